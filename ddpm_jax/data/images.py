"""Image files to arrays: one rule for decoding, cropping and resizing, used for every dataset and
for images to be evaluated. docs/images.md states the rule for each kind of file.

PIL is imported where it is used: runs on prepared data need none.
"""

import errno
import io
import logging
import os
import pathlib
import time

import numpy as np

from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
GREY_MODES = ("1", "L", "LA")
# Of 16-bit colour Pillow keeps one byte of two: the name that keeps the upper, and the lower.
_SWAPPED = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
MAX_PIXELS = 1 << 29  # 1.6 GB as RGB
RETRY_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts to read
_GIVE_A_SIZE = ("give an image size (centre crop and resize): --image_size, or "
                "config.data.image_size")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_FIRST_IS_WHOLE = ("MPO",)  # a JPEG whose further frames are previews and depth maps


class DamagedError(UserError):
    """Bytes that were read, but do not decode to an image."""


def retry(read, where):
    """read(), tried again after each of RETRY_WAITS if it raises OSError (a stale NFS handle, a
    file that is being replaced); UserError naming `where` after the last."""
    for wait in RETRY_WAITS:
        try:
            return read()
        except OSError as error:
            log.warning("cannot read %s (%s); next attempt in %s s", where, error, wait)
        time.sleep(wait)
    try:
        return read()
    except OSError as error:
        remedy = ("raise the limit with ulimit -n" if error.errno in (errno.EMFILE, errno.ENFILE)
                  else "check the file and its disk, then start again")
        raise UserError(f"cannot read {where}: {error.strerror or error}, {len(RETRY_WAITS) + 1} "
                        f"attempts in {sum(RETRY_WAITS):.0f} s; {remedy}") from error


def read_file(path) -> bytes:
    """The file's bytes, by `retry`."""
    return retry(pathlib.Path(path).read_bytes, path)


def _bytes(file, where) -> bytes:
    if isinstance(file, bytes):
        return file
    if isinstance(file, (str, os.PathLike)):
        return read_file(file)
    return file.read()


def _bits(image, data) -> int:
    """Bits a channel of an opened image; Pillow cuts 16-bit RGB to 8 and reports mode RGB."""
    if data.startswith(b"\x89PNG"):
        return data[24]  # IHDR: width and height (4 bytes each), then the bit depth
    depths = getattr(image, "tag_v2", {}).get(258, 8)  # TIFF's BitsPerSample
    return max(depths) if isinstance(depths, tuple) else depths


def _to_8_bits(opened, data, where):
    """A PNG of 16 bits a channel as one of 8, by the PNG specification's rule for depths: 65535
    becomes 255, other values in proportion, rounded. UserError for other deep images."""
    from PIL import Image
    raw = {tile[3] for tile in opened.tile}
    if opened.format != "PNG" or "transparency" in opened.info or not raw <= {"I;16B", *_SWAPPED}:
        raise UserError(f"{where}: more than 8 bits a channel (mode {opened.mode}); convert it to "
                        "8")
    values = np.asarray(opened).astype(np.uint32)
    if raw <= {*_SWAPPED}:  # Pillow has cut colour to the upper bytes
        with Image.open(io.BytesIO(data)) as lower:
            lower.tile = [(*tile[:3], _SWAPPED[tile[3]]) for tile in lower.tile]
            values = values << 8 | np.asarray(lower)
    image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    image.info = opened.info  # with the orientation
    return image


def _loaded(data, where):
    """The bytes as a PIL image of mode L or RGB, turned as its EXIF orientation requires."""
    from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
    Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS instead: Pillow's limit looks like damage
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{where}: {width}x{height} are more than {MAX_PIXELS:,} pixels; "
                                "make it smaller first")
            if opened.format not in _FIRST_IS_WHOLE and getattr(opened, "n_frames", 1) > 1:
                raise UserError(f"{where}: {opened.n_frames} frames (animation or pages); extract "
                                "the one that is meant")
            deep = opened.mode in DEEP_MODES or _bits(opened, data) > 8
            image = _to_8_bits(opened, data, where) if deep else opened
            image.load()
            image = ImageOps.exif_transpose(image)
        grey = image.mode in GREY_MODES
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:
                raise UserError(f"{where}: has transparent pixels; flatten it onto a background "
                                "first")
        return image.convert("L" if grey else "RGB")
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        reason = f"no {', '.join(_FORMATS)}" if data else "an empty file"
        raise DamagedError(f"{where}: not a readable image: {reason}; replace or remove it"
                           ) from error
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DamagedError(f"{where}: not a readable image, damaged or cut short ({error}); "
                           "replace or remove it") from error


def decode(file, where, *, image_size=None, channels=None) -> np.ndarray:
    """Read one image -> uint8 [H, W, C].

    file: path, binary stream or bytes; where: its name in errors. image_size: centre crop to the
    short side, then PIL's antialiased Lanczos (as StyleGAN's dataset_tool made the LSUN files of
    the paper); an image of that size, and None, are left unchanged. channels: 1, 3 or None (as the
    file); grey becomes RGB for 3. Raises DamagedError for what does not decode, UserError for a
    path that cannot be read (after `retry`), colour if channels is 1, transparent pixels, more
    than 8 bits a channel (but for a PNG's 16), several frames, and more than MAX_PIXELS.
    """
    image = _loaded(_bytes(file, where), where)
    if channels == 1 and image.mode != "L":
        raise UserError(f"{where}: a colour image where grey ones are expected; "
                        "convert it, or ask for 3 channels")
    if channels == 3:
        image = image.convert("RGB")
    if image_size is not None and image.size != (image_size, image_size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        from PIL import Image
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def first_shape(items, *, image_size=None, channels=None) -> tuple:
    """(H, W, C) of the first of a folder's images that decodes, required of all others.

    items: folders.Item. UserError if it is not square, DamagedError if none decodes.
    """
    for item in items:
        try:
            shape = decode(item.read(), item.where, image_size=image_size, channels=channels).shape
        except DamagedError as error:
            damage = error
            continue
        if shape[0] != shape[1]:
            raise UserError(f"{item.where} is {shape[1]}x{shape[0]}, not square; {_GIVE_A_SIZE}")
        return shape
    raise damage


def decode_as(item, shape, *, image_size=None) -> np.ndarray:
    """`decode` to exactly `shape`; UserError naming the file if it has another size."""
    image = decode(item.read(), item.where, image_size=image_size, channels=shape[2])
    if image.shape != shape:
        raise UserError(f"{item.where} is {image.shape[1]}x{image.shape[0]}, the first image is "
                        f"{shape[1]}x{shape[0]}; {_GIVE_A_SIZE}")
    return image
