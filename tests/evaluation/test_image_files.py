"""Given images: PNG folders and ADM's npz."""

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import image_files


def pictures(n=3, size=5):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def write_folder(path, images, names=None):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / (names[i] if names else f"{i:03d}.png"))
    return path


def test_folder_and_npz_hold_the_same_images(tmp_path):
    folder = write_folder(tmp_path / "png", pictures())
    (folder / "readme.txt").write_text("not an image")
    np.savez(tmp_path / "x.npz", pictures())
    a, b = image_files.open_images(folder), image_files.open_images(tmp_path / "x.npz")
    assert a.size == b.size == 3 and a.shape == b.shape == (5, 5, 3)
    for i in range(3):
        np.testing.assert_array_equal(a.read(i), b.read(i))
    assert a.identity == image_files.open_images(folder).identity


def test_sorted_by_name(tmp_path):
    folder = write_folder(tmp_path / "png", pictures(), ["b.png", "c.PNG", "a.png"])
    np.testing.assert_array_equal(image_files.open_images(folder).read(0), pictures()[2])


@pytest.mark.parametrize("arrays, message", [
    ({"images": np.zeros((1, 2, 2, 3), np.uint8)}, "no arr_0"),
    ({"arr_0": np.zeros((1, 2, 2, 3), np.float32)}, "float32; expected uint8"),
    ({"arr_0": np.zeros((1, 3, 2, 2), np.uint8)}, "shape"),
    ({"arr_0": np.zeros((0, 2, 2, 3), np.uint8)}, "no image")])
def test_other_arrays_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        image_files.open_images(tmp_path / "x.npz")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        image_files.open_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no .png"):
        image_files.open_images(tmp_path / "empty")
    folder = write_folder(tmp_path / "mixed", [*pictures(2), pictures(1, size=7)[0]])
    with pytest.raises(UserError, match="002.png is .7, 7, 3."):
        image_files.open_images(folder).read(2)
    (folder / "000.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="000.png is not a readable image"):
        image_files.open_images(folder)
