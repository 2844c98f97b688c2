import io
import os
import struct
import threading
import time
import warnings
import zlib

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


def png(bits, colour_type, rows, **chunks):
    """A PNG written here, for Pillow writes no 16-bit colour. rows: bytes of each row; chunks: of
    other kinds."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))
    head = struct.pack(">IIBBBBB", 4, len(rows), bits, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
            + b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
            + chunk(b"IEND", b""))


def deep_png(colour_type, values, **chunks):
    return png(16, colour_type, [row.astype(">u2").tobytes() for row in values], **chunks)


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (2, 3), (6, 4)])
def test_sixteen_bit_pngs_become_the_nearest_of_8_bits(colour_type, channels):
    values = RNG.integers(0, 65536, (6, 4, channels))
    values[0, :, 0] = 0, 128, 129, 65535  # 128 / 257 is just below a half
    if channels == 4:
        values[..., 3] = 65535
    expected = np.floor(values[..., :3] * 255 / 65535 + 0.5)
    np.testing.assert_array_equal(images.decode(deep_png(colour_type, values), "x"), expected)
    turned = images.decode(deep_png(colour_type, values, eXIf=(  # orientation 3: by 180 degrees
        b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, 3, 0, 0))), "x")
    np.testing.assert_array_equal(turned, expected[::-1, ::-1])


def test_sixteen_bit_pngs_with_transparency_are_refused():
    values = np.full((4, 4, 4), 40000)
    with pytest.raises(UserError, match="x: has transparent pixels"):
        images.decode(deep_png(6, values), "x")
    for deep in (deep_png(4, values[..., :2]), deep_png(0, values[..., :1], tRNS=b"\x9c\x40"),
                 deep_png(2, values[..., :3], tRNS=b"\x9c\x40" * 3)):
        with pytest.raises(UserError, match="deep.png: more than 8 bits a channel") as caught:
            images.decode(deep, "deep.png")
        assert not isinstance(caught.value, images.DamagedError)


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_eight_bit_pngs_of_every_kind_are_read(colour_type, channels):
    flat = png(8, colour_type, [np.full(4 * channels, 255, np.uint8).tobytes()] * 4)
    assert images.decode(flat, "flat.png").shape == (4, 4, 1 if channels < 3 else 3)


def test_other_deep_files_are_refused(tmp_path):
    for array in (np.full((4, 4), 40000, np.uint16), np.full((4, 4), 0.5, np.float32),
                  np.full((4, 4), 7, np.int32)):
        with pytest.raises(UserError, match="more than 8 bits"):
            images.decode(encoded(array, "TIFF"), "x")
    # TIFF of 16-bit RGB, uncompressed: Pillow reports mode RGB for it too.
    tags = [(256, 4, 1, 2), (257, 4, 1, 1), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 128), (277, 3, 1, 3), (278, 4, 1, 1), (279, 4, 1, 12)]
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(
        struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    data += struct.pack("<3H", 16, 16, 16) + np.full(6, 40000, "<u2").tobytes()
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == "RGB"
    with pytest.raises(UserError, match="more than 8 bits"):
        images.decode(data, "x.tif")


def test_cmyk_and_palettes_become_rgb():
    ink = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 255, 255, 0], [255, 255, 255, 255]]],
                                   np.uint8), "CMYK")
    data = io.BytesIO()
    ink.save(data, "TIFF")
    expected = [[[255, 255, 255], [255, 0, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(images.decode(data.getvalue(), "x"), expected)
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 255, 255, 255, 0, 0, 0, 0, 0])
    palette.putdata([0, 1, 2])
    for transparent, refused in ((None, False), (7, False), (1, True)):
        data = io.BytesIO()
        palette.save(data, "PNG", **({} if transparent is None else {"transparency": transparent}))
        if refused:
            with pytest.raises(UserError, match="x: has transparent pixels"):
                images.decode(data.getvalue(), "x")
        else:
            np.testing.assert_array_equal(images.decode(data.getvalue(), "x"), expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_and_pages_are_refused(kind):
    frames = [Image.fromarray(pixels(6, 6, 3)) for _ in range(3)]
    data = io.BytesIO()
    frames[0].save(data, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="x: 3 frames"):
        images.decode(data.getvalue(), "x")


def test_the_first_picture_of_a_phones_mpo_is_taken():
    first, preview = (Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (200, 10))
    data = io.BytesIO()
    first.save(data, "MPO", save_all=True, append_images=[preview])
    assert images.decode(data.getvalue(), "x.jpg").mean() > 190


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_bmp_gif_and_tiff_are_read(kind):
    grey = np.repeat(pixels(5, 5)[:, :, None], 3, 2) // 64 * 64
    np.testing.assert_array_equal(images.decode(encoded(grey, kind), "x"), grey)


def test_one_bit_becomes_black_and_white():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    data = io.BytesIO()
    bits.save(data, "PNG")
    assert images.decode(data.getvalue(), "x")[..., 0].tolist() == [[0, 255], [255, 0]]


def test_a_large_picture_is_no_damage(monkeypatch):
    large = io.BytesIO()
    Image.new("1", (15000, 12500)).save(large, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 27)  # Pillow's own refuses twice this
    with warnings.catch_warnings(action="error"):
        assert images.decode(large.getvalue(), "x", image_size=8).shape == (8, 8, 1)
    monkeypatch.setattr(images, "MAX_PIXELS", 15000 * 12500 - 1)
    with pytest.raises(UserError, match="x: 15000x12500 are more than 187,499,999 pixels"):
        images.decode(large.getvalue(), "x")


def test_a_long_text_in_a_png_is_no_damage():
    from PIL.PngImagePlugin import PngInfo
    note = PngInfo()
    note.add_text("comment", "x" * (2 << 20), zip=True)
    assert images.decode(encoded(pixels(4, 4, 3), pnginfo=note), "x").shape == (4, 4, 3)


def test_damage_and_rules_are_told_apart():
    with pytest.raises(images.DamagedError):
        images.decode(b"", "x")
    with pytest.raises(images.DamagedError):  # cut short
        images.decode(png(16, 2, [b"12345678"]), "x")


def test_a_file_that_is_away_for_a_moment_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RETRY_WAITS", (0.05, 0.1, 0.2, 0.4, 0.8))
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels(4, 4, 3)).getvalue())
    away = path.rename(tmp_path / "away.png")
    thread = threading.Timer(0.3, away.rename, (path,))
    thread.start()
    assert images.decode(path, path).shape == (4, 4, 3)
    thread.join()


def test_a_file_that_stays_away_is_named_with_waits_that_grow(tmp_path, monkeypatch):
    assert list(images.RETRY_WAITS) == sorted(images.RETRY_WAITS) and len(images.RETRY_WAITS) > 2
    monkeypatch.setattr(images, "RETRY_WAITS", (0.02, 0.04))
    before = time.monotonic()
    with pytest.raises(UserError, match="gone.png: No such file or directory, 3 attempts") as error:
        images.decode(tmp_path / "gone.png", tmp_path / "gone.png")
    assert time.monotonic() - before > 0.06
    assert not isinstance(error.value, images.DamagedError)


def test_too_many_open_files_is_named(tmp_path, monkeypatch):
    import resource
    monkeypatch.setattr(images, "RETRY_WAITS", (0.01,))
    (tmp_path / "a.png").write_bytes(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.dup(0)
    os.close(used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
    try:
        with pytest.raises(UserError, match="a.png: Too many open files.*ulimit -n"):
            images.decode(tmp_path / "a.png", "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_other_formats_and_empty_files_are_named_so():
    with pytest.raises(images.DamagedError, match="x: not a readable image: an empty file"):
        images.decode(b"", "x")
    for data in (b"\0\0\0\x18ftypheic" + bytes(40), encoded(pixels(8, 8, 3), "PPM").getvalue(),
                 b"<svg/>"):
        with pytest.raises(images.DamagedError, match="x.png: not a readable image: no PNG, JPEG"):
            images.decode(data, "x.png")
