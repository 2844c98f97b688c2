"""Grids of images, and PNG files read back by Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.storage import pictures


def test_tile():
    images = np.ones((5, 40, 33, 3), np.uint8) * np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1)
    grid = pictures.tile(images)
    assert grid.shape == (2 * 42 - 2, 3 * 35 - 2, 3) and grid.dtype == np.uint8
    assert [grid[0, c * 35, 0] for c in range(3)] == [1, 2, 3]
    assert [grid[42 + 39, c * 35 + 32, 2] for c in range(2)] == [4, 5]
    assert (grid[40:42] == 128).all() and (grid[42:, 70:] == 128).all()
    assert pictures.tile(images[:, :8, :8, :1]).shape == (2 * 66 - 2, 3 * 66 - 2, 1)  # enlarged
    assert pictures.tile(images, columns=5).shape == (40, 5 * 35 - 2, 3)
    lined = pictures.tile(images, 5, scale=1, gap=1, grey=255)
    assert lined.shape == (40, 5 * 34 - 1, 3) and (lined[:, 33] == 255).all()
    small = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pictures.tile(small, scale=3)[::3, ::3], small[0])
    for bad in (images.astype(float), images[0], images[:0]):
        with pytest.raises(ValueError, match="tile needs uint8"):
            pictures.tile(bad)


@pytest.mark.parametrize("channels", [1, 3])
def test_png(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (5, 4, channels), dtype=np.uint8)
    pictures.write_png(tmp_path / "a.png", array)
    read = np.asarray(Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())))
    np.testing.assert_array_equal(read.reshape(array.shape), array)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape, columns", [((6, 8, 8, 1), 3), ((4, 40, 40, 3), 2)])
def test_untile_is_the_inverse_of_tile(shape, columns):
    images = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    picture = pictures.tile(images, columns)
    found = pictures.untile(pictures.decode_png(pictures.encode_png(picture)), shape[1:])
    assert found.shape[:2] == (shape[0] // columns, columns)
    np.testing.assert_array_equal(found.reshape(shape), images)
    assert pictures.untile(picture[1:], shape[1:]) is None
