"""Given images: PNG folders as people have them, and arrays of .npz and .npy files."""

import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import image_files


def pictures(n=3, size=5, channels=3):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def write_folder(path, images, names=None):
    for i, image in enumerate(images):
        file = path / (names[i] if names else f"{i:03d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.squeeze(image)).save(file)
    return path


def all_of(found):
    return np.stack([found.read(i) for i in range(found.size)])


def test_folder_npz_and_npy_hold_the_same_images(tmp_path):
    folder = write_folder(tmp_path / "png", pictures())
    (folder / "readme.txt").write_text("not an image")
    np.savez(tmp_path / "x.npz", pictures())
    np.savez_compressed(tmp_path / "y.npz", samples=pictures())
    np.save(tmp_path / "x.npy", pictures())
    found = [image_files.open_images(tmp_path / name) for name in ("png", "x.npz", "y.npz",
                                                                   "x.npy")]
    for images in found:
        assert images.size == 3 and images.shape == (5, 5, 3)
        np.testing.assert_array_equal(all_of(images), pictures())
    assert found[0].identity == image_files.open_images(folder).identity
    assert found[1].identity == found[2].identity == found[3].identity != found[0].identity
    assert "readme.txt" in found[0].notes[0]


def test_sorted_by_name(tmp_path):
    folder = write_folder(tmp_path / "png", pictures(), ["b.png", "c.PNG", "a.png"])
    np.testing.assert_array_equal(image_files.open_images(folder).read(0), pictures()[2])


# ---- arrays ----


@pytest.mark.parametrize("arrays, message", [
    ({"images": np.zeros((1, 2, 2, 3), np.uint8), "labels": np.zeros(1)},
     r"no arr_0 \(it has images, labels\)"),
    ({"arr_0": np.zeros((1, 2, 2, 3), np.float32)}, "float32; expected uint8"),
    ({"arr_0": np.zeros((1, 3, 2, 4), np.uint8)}, "shape"),
    ({"arr_0": np.zeros((9, 4, 4), np.uint8)}, "shape"),
    ({"arr_0": np.zeros((1, 4, 4, 4), np.uint8)}, "shape"),
    ({"arr_0": np.zeros((0, 2, 2, 3), np.uint8)}, "no image"),
    ({"arr_0": np.asfortranarray(pictures())}, "Fortran"),
    ({"arr_0": np.array([{}, {}])}, "x.npz holds Python objects")])
def test_other_arrays_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        image_files.open_images(tmp_path / "x.npz")


def test_channels_first_are_read_as_such(tmp_path):
    np.save(tmp_path / "x.npy", pictures().transpose(0, 3, 1, 2))
    found = image_files.open_images(tmp_path / "x.npy")
    np.testing.assert_array_equal(all_of(found), pictures())
    assert found.shape == (5, 5, 3) and "[N,C,H,W]" in found.notes[0]


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 1), (0, 255)])
def test_the_advice_for_floats_gives_the_grey_levels_back(low, high, tmp_path):
    levels = pictures(8)
    levels[0, 0, 0] = 0, 255, 128      # the whole range is there
    x = (levels / 255 * (high - low) + low).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(UserError, match="float32; expected uint8") as error:
        image_files.open_images(tmp_path / "x.npy")
    formula = str(error.value).partition(": save ")[2].partition(" if that")[0]
    np.testing.assert_array_equal(eval(formula, {"np": np, "x": x}), levels)


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: b"hello", lambda data: b"",
    lambda data: data.replace(bytes(pictures()[1, 2].tobytes()), bytes(15)),
    lambda data: data.replace(b"PK\x03\x04\x14", b"PK\x03\x04\xff").replace(
        b"PK\x01\x02", b"PK\x01\xff")])
def test_damaged_arrays_are_one_line(damage, tmp_path):
    file = io.BytesIO()
    np.savez(file, pictures())
    (tmp_path / "x.npz").write_bytes(damage(file.getvalue()))
    with pytest.raises(UserError, match="x.npz is not a readable"):
        image_files.open_images(tmp_path / "x.npz")
    np.save(tmp_path / "y.npy", pictures())
    content = (tmp_path / "y.npy").read_bytes()
    (tmp_path / "y.npy").write_bytes(content[:-1])
    with pytest.raises(UserError, match="y.npy is cut short"):
        image_files.open_images(tmp_path / "y.npy")


def test_a_dict_in_npy_is_refused_and_not_run(tmp_path):
    np.save(tmp_path / "x.npy", {"images": pictures()}, allow_pickle=True)
    with pytest.raises(UserError, match="x.npy holds Python objects"):
        image_files.open_images(tmp_path / "x.npy")


@pytest.mark.parametrize("compression", [
    zipfile.ZIP_STORED, pytest.param(zipfile.ZIP_DEFLATED, marks=pytest.mark.slow)])
def test_a_large_npz_is_never_whole_in_memory(compression, tmp_path):
    """Half a GiB of zeros; what is allocated stays below a tenth of it."""
    import tracemalloc
    n, shape = 2731, (256, 256, 3)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {
        "descr": "|u1", "fortran_order": False, "shape": (n, *shape)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive, archive.open(
            "arr_0.npy", "w", force_zip64=True) as file:
        file.write(header.getvalue())
        for i in range(n):
            file.write(bytes([i % 251]) * (256 * 256 * 3))
    tracemalloc.start()
    try:
        found = image_files.open_images(tmp_path / "x.npz")
        assert [found.read(i)[0, 0, 0] for i in (0, 250, 251, n - 1)] == [
            0, 250, 0, (n - 1) % 251]
        assert tracemalloc.get_traced_memory()[1] < 54e6
    finally:
        tracemalloc.stop()
    assert found.size == n and found.shape == shape


# ---- folders ----


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        image_files.open_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no .png"):
        image_files.open_images(tmp_path / "empty")
    (tmp_path / "empty" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no .png.* it has a.jpg"):
        image_files.open_images(tmp_path / "empty")
    folder = write_folder(tmp_path / "mixed", [*pictures(2), pictures(1, size=7)[0]])
    with pytest.raises(UserError, match="002.png is 7x7, 000.png is 5x5: all images must have one"):
        image_files.open_images(folder)
    (folder / "000.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="000.png is not a readable image"):
        image_files.open_images(folder)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.pt", "a.png", "a"])
def test_other_files_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="expected a folder of PNG files, an .npz or a .npy"):
        image_files.open_images(tmp_path / name)


def test_the_samplers_own_folder(tmp_path):
    folder = write_folder(tmp_path / "out", pictures(2, 20), ["grid.png", "progressive.png"])
    write_folder(folder / "png", pictures())
    np.testing.assert_array_equal(all_of(image_files.open_images(folder)), pictures())
    (folder / "request.json").write_text("{}")
    (folder / "shards").mkdir()
    with pytest.raises(UserError, match="half of the samples .* run the same command again"):
        image_files.open_images(folder)
    np.savez(folder / "samples.npz", pictures(7))
    found = image_files.open_images(folder)
    assert found.size == 7 and "samples.npz" in found.notes[0]


def test_images_beside_the_pictures_of_a_sampler(tmp_path):
    folder = write_folder(tmp_path / "out", [pictures(1, 20)[0], *pictures()],
                          ["grid.png", "a.png", "b.png", "c.png"])
    found = image_files.open_images(folder)
    assert found.size == 3 and "grid.png" in found.notes[0]


def test_what_systems_leave_in_folders_is_no_image(tmp_path):
    folder = write_folder(tmp_path / "png", pictures())
    for name in ("._000.png", ".hidden/x.png", "__MACOSX/000.png", "@eaDir/000.png",
                 ".ipynb_checkpoints/000.png", "Thumbs.db", ".DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"litter")
    found = image_files.open_images(folder)
    np.testing.assert_array_equal(all_of(found), pictures())
    assert found.notes[0].count(",") >= 2 and "3 files" in found.notes[0]


def test_names_that_are_not_utf_8(tmp_path):
    folder = write_folder(tmp_path / "png", pictures())
    os.rename(folder / "001.png", os.fsencode(folder) + b"/001\xff.png")
    np.testing.assert_array_equal(all_of(image_files.open_images(folder)), pictures())


def test_nested_folders_are_read_and_mixtures_refused(tmp_path):
    folder = write_folder(tmp_path / "png", pictures(), ["a/1.png", "a/deep/0.png", "b/0.png"])
    np.testing.assert_array_equal(all_of(image_files.open_images(folder)), pictures())
    write_folder(folder, pictures(1))
    with pytest.raises(UserError, match=r"images \(000.png\) and folders of images \(a/1.png\)"):
        image_files.open_images(folder)


def test_grey_among_colour_is_repeated_and_grey_alone_stays(tmp_path):
    grey = pictures(2, channels=1)
    alone = image_files.open_images(write_folder(tmp_path / "grey", grey))
    np.testing.assert_array_equal(all_of(alone), grey)
    both = image_files.open_images(write_folder(
        tmp_path / "both", [grey[0], pictures(1)[0], grey[1]]))
    assert both.shape == (5, 5, 3) and "2 of 3 images are grey" in both.notes[0]
    np.testing.assert_array_equal(both.read(0), grey[0].repeat(3, axis=2))
    np.testing.assert_array_equal(both.read(1), pictures(1)[0])


def png16(colour):
    """A PNG of 16 bits a channel, 2 x 2, all 40000."""
    import struct
    import zlib

    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    channels = 3 if colour else 1
    row = b"\0" + struct.pack(">H", 40000) * 2 * channels
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2 if colour else 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 2))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("colour", [True, False])
def test_16_bits_a_channel_are_refused(colour, tmp_path):
    (tmp_path / "a.png").write_bytes(png16(colour))
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2, 2)      # it is a good file
    with pytest.raises(UserError, match="a.png: 16 bits a channel; convert it to 8"):
        image_files.open_images(tmp_path)


def test_transparent_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4, 4), 100, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: has transparent pixels"):
        image_files.open_images(tmp_path).read(0)
