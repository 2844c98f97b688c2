"""Grids of images and PNG files.

Inside functions: PIL, which is slow to import.
"""

import io
import math

import numpy as np

from ddpm_jax.storage import files


def enlarge(images, scale: int) -> np.ndarray:
    """Each pixel of [..., H, W, C] becomes scale x scale pixels."""
    return np.asarray(images).repeat(scale, axis=-3).repeat(scale, axis=-2)


def _own_scale(height) -> int:
    return -(-64 // height) if height < 32 else 1


def tile(images, columns=None, *, scale=None, gap=2, grey=128) -> np.ndarray:
    """One picture of a grid, row by row: uint8 [N, H, W, C] -> uint8 [height, width, C].

    columns: default ceil(sqrt(N)). scale: whole-number enlargement; the default brings images below
    32 pixels (8x8 digits) to at least 64. gap: pixels of the level ``grey`` between images; missing
    images have it too. Raises ValueError for other dtypes and shapes.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"tile needs uint8 [N, H, W, C], got {images.dtype} {images.shape}")
    images = enlarge(images, scale or _own_scale(images.shape[1]))
    n, h, w, c = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    grid = np.full((rows * columns, h + gap, w + gap, c), grey, np.uint8)
    grid[:n, :h, :w] = images
    grid = grid.reshape(rows, columns, h + gap, w + gap, c).swapaxes(1, 2)
    return grid.reshape(rows * (h + gap), columns * (w + gap), c)[:-gap, :-gap]


def untile(picture, image_shape, *, gap=2) -> np.ndarray | None:
    """The images of a whole grid that ``tile`` made at its own scale: uint8 [height,width,C] ->
    [rows,columns,H,W,C]; None where the picture is no such grid."""
    h, w, c = image_shape
    scale = _own_scale(h)
    (rows, below), (columns, beside) = (
        divmod(n + gap, scale * m + gap) for n, m in zip(picture.shape, (h, w), strict=False))
    if below or beside or picture.shape[2] != c:
        return None
    grid = np.pad(picture, ((0, gap), (0, gap), (0, 0)))
    grid = grid.reshape(rows, scale * h + gap, columns, scale * w + gap, c).swapaxes(1, 2)
    return grid[:, :, :scale * h:scale, :scale * w:scale]


def encode_png(picture) -> bytes:
    """uint8 [H, W, C], C 1 or 3, as the bytes of a PNG file."""
    from PIL import Image
    picture = np.asarray(picture, np.uint8)
    data = io.BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(data, "PNG")
    return data.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """The bytes of a PNG file as uint8 [H, W, C]."""
    from PIL import Image
    picture = np.asarray(Image.open(io.BytesIO(data)))
    return picture[:, :, None] if picture.ndim == 2 else picture


def write_png(path, picture) -> None:
    """Write uint8 [H, W, C], C 1 or 3; the file appears complete or not at all."""
    files.write_bytes(path, encode_png(picture))
