import io

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import images
from ddpm_jax.errors import UserError

RNG = np.random.default_rng(0)


def encoded(array, kind="PNG", mode=None, **options):
    data = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(data, kind, **options)
    return io.BytesIO(data.getvalue())


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_come_back_exactly(kind, options):
    colour = pixels(9, 7, 3)
    np.testing.assert_array_equal(images.decode(encoded(colour, kind, **options), "x"), colour)


def test_channels():
    grey, colour = pixels(5, 5), pixels(5, 5, 3)
    assert images.decode(encoded(grey), "x").shape == (5, 5, 1)
    as_rgb = images.decode(encoded(grey), "x", channels=3)
    np.testing.assert_array_equal(as_rgb, np.repeat(grey[:, :, None], 3, 2))
    assert images.decode(encoded(colour, mode="P"), "x").shape == (5, 5, 3)
    with pytest.raises(UserError, match=r"cat.png: a colour image where grey"):
        images.decode(encoded(colour), "cat.png", channels=1)
    opaque = np.concatenate([colour, np.full((5, 5, 1), 255, np.uint8)], 2)
    np.testing.assert_array_equal(images.decode(encoded(opaque), "x"), colour)
    opaque[2, 2, 3] = 0
    with pytest.raises(UserError, match="x: has transparent"):
        images.decode(encoded(opaque), "x")
    with pytest.raises(UserError, match="8 bits"):
        images.decode(encoded(np.full((4, 4), 60000, np.uint16)), "x")


def test_centre_crop_then_lanczos():
    wide = pixels(16, 29, 3)
    out = images.decode(encoded(wide), "x", image_size=8)
    square = Image.fromarray(wide[:, 6:22])  # (29 - 16) // 2 = 6
    np.testing.assert_array_equal(out, np.asarray(square.resize((8, 8), Image.LANCZOS)))
    exact = pixels(8, 8, 3)
    np.testing.assert_array_equal(images.decode(encoded(exact), "x", image_size=8), exact)


def test_a_photo_is_turned_as_its_exif_says():
    tall = Image.fromarray(pixels(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    tall.save(data, "PNG", exif=exif)
    turned = images.decode(io.BytesIO(data.getvalue()), "x")
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(tall), -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path, kind, part):
    data = encoded(pixels(40, 40, 3), kind).getvalue()
    path = tmp_path / "broken.img"
    path.write_bytes(data[:int(len(data) * part)])
    with pytest.raises(UserError, match="broken.img: not a readable image"):
        images.decode(path, path)


def test_tree_of_splits_and_classes(tmp_path, make):
    for name in ("train/dog/b.png", "train/dog/a.PNG", "train/cat/deep/c.png", "val/cat/d.png"):
        make.save(tmp_path / name, pixels(4, 4, 3))
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    (tmp_path / "train/empty").mkdir()
    tree = images.image_tree(tmp_path)
    assert tree.class_names == ("cat", "dog") and list(tree.splits) == ["train", "validation"]
    paths, labels = tree.splits["train"]
    assert [p.name for p in paths] == ["c.png", "a.PNG", "b.png"] and labels.tolist() == [0, 1, 1]
    assert tree.splits["validation"][1].tolist() == [0]


def test_flat_tree(tmp_path, make):
    make.save(tmp_path / "b.png", pixels(4, 4, 3))
    make.save(tmp_path / "a.png", pixels(4, 4, 3))
    paths, labels = images.image_tree(tmp_path).splits["train"]
    assert [p.name for p in paths] == ["a.png", "b.png"] and labels is None


def test_bad_trees(tmp_path, make):
    with pytest.raises(UserError, match="no such folder"):
        images.image_tree(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images in it"):
        images.image_tree(tmp_path)
    make.save(tmp_path / "train/cat/a.png", pixels(4, 4, 3))
    make.save(tmp_path / "test/bird/a.png", pixels(4, 4, 3))
    with pytest.raises(UserError, match=r"test: its classes \(bird\) are not"):
        images.image_tree(tmp_path)
    make.save(tmp_path / "train/a.png", pixels(4, 4, 3))
    with pytest.raises(UserError, match="holds both images"):
        images.image_tree(tmp_path)
