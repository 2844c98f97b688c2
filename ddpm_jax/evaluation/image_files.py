"""Given images: a folder of PNG or the .npz of ADM's evaluator."""

import hashlib
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.storage import files


class Images(NamedTuple):
    """read(i) -> uint8 [H,W,C]; shape (H,W,C); identity: sha256 of what was given."""
    size: int
    shape: tuple
    read: Callable
    identity: str


def _of_array(array, path):
    if array.dtype != np.uint8:
        raise UserError(f"{path}: arr_0 is {array.dtype}; expected uint8 [N,H,W,3], 0 ... 255")
    if array.ndim != 4 or array.shape[3] not in (1, 3) or array.shape[1] != array.shape[2]:
        raise UserError(f"{path}: arr_0 has shape {array.shape}; expected [N,H,W,3], square")
    if not len(array):
        raise UserError(f"{path}: no image in it")
    return Images(len(array), array.shape[1:], array.__getitem__,
                  hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())


def _decode(content, path):
    from PIL import Image
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode not in ("RGB", "L"):
                image = image.convert("RGB")
            array = np.asarray(image)
    except Exception as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    return array[:, :, None] if array.ndim == 2 else array


def _of_folder(path):
    names = [n for n in files.listing(path) if n.lower().endswith(".png")]
    if not names:
        raise UserError(f"{path} holds no .png (looked for: PNG files, or one .npz with arr_0)")
    digest = hashlib.sha256()
    shape = _decode(files.read_bytes(files.join(path, names[0])), names[0]).shape

    def read(i):
        array = _decode(files.read_bytes(files.join(path, names[i])), names[i])
        if array.shape != shape:
            raise UserError(f"{path}/{names[i]} is {array.shape}, {names[0]} is {shape}: all "
                            "images must have one size")
        return array

    for name in names:
        digest.update(name.encode())
        digest.update(hashlib.sha256(files.read_bytes(files.join(path, name))).digest())
    return Images(len(names), shape, read, digest.hexdigest())


def open_images(path) -> Images:
    """Images of a folder of PNG (by sorted name) or of an .npz with arr_0 uint8 [N,H,W,C].

    UserError: nothing there, another dtype or shape, sizes that differ.
    """
    if str(path).endswith(".npz"):
        arrays = files.read_npz(path)
        if "arr_0" not in arrays:
            raise UserError(f"{path} has no arr_0 (it has {', '.join(arrays) or 'nothing'})")
        return _of_array(arrays["arr_0"], path)
    if not files.exists(path):
        raise UserError(f"--samples={path}: no such folder or file")
    return _of_folder(path)
