"""Given images: a folder of PNG files, or an array in an .npz or .npy file."""

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from etils import epath

from ddpm_jax.data import folders, images
from ddpm_jax.errors import UserError
from ddpm_jax.formats import npy_rows
from ddpm_jax.storage import files

PICTURES = ("grid.png", "progressive.png")      # of `ddpm sample`, beside its images
HASHED_BYTES = 1 << 24
THREADS = 16


class Images(NamedTuple):
    """read(i) -> uint8 [H,W,C]; shape (H,W,C); identity: sha256 of what was given; notes: lines
    about what was left out or converted."""
    size: int
    shape: tuple
    read: Callable
    identity: str
    notes: tuple = ()


def open_images(path) -> Images:
    """Images of a folder of PNG (by sorted path), of an .npz with arr_0 or one array, or of a .npy;
    arrays uint8 [N,H,W,C] or [N,C,H,W], read when they are needed.

    Raises UserError for nothing there, other types and shapes, more than 8 bits a channel, sizes
    that differ.
    """
    place = epath.Path(path)
    if not place.exists():
        raise UserError(f"--samples={path}: no such folder or file")
    if place.is_dir():
        return _of_folder(place)
    if not str(path).endswith((".npz", ".npy")):
        raise UserError(f"--samples={path}: expected a folder of PNG files, an .npz or a .npy (an "
                        "archive has to be unpacked first)")
    return _of_array_file(place)


# ---- arrays ----


def _chosen(names) -> str:
    if "arr_0" in names or len(names) == 1:
        return "arr_0" if "arr_0" in names else names[0]
    raise UserError(f"has no arr_0 (it has {', '.join(names) or 'nothing'})")


def _of_array_file(path) -> Images:
    try:
        with files.on_disk(path) as file:
            return _of_rows(npy_rows.open_npy(file) if path.suffix == ".npy"
                            else npy_rows.open_npz(file, _chosen))
    except UserError as error:
        raise UserError(f"{path} {error}") from error


def _of_rows(rows) -> Images:
    if rows.dtype != np.uint8:
        raise UserError(f"holds {rows.dtype}; expected uint8, 0 ... 255{_conversion(rows)}")
    if len(rows.shape) != 4 or not rows.shape[0]:
        raise UserError(f"has no image in it: shape {rows.shape}" if 0 in rows.shape[:1] else
                        f"has shape {rows.shape}; expected [N,H,W,C] with C 1 or 3")
    n, *shape = rows.shape
    channels_last = shape[2] in (1, 3) and shape[0] == shape[1]
    channels_first = shape[0] in (1, 3) and shape[1] == shape[2]
    if not (channels_last or channels_first):
        raise UserError(f"has shape {rows.shape}; expected [N,H,W,C] or [N,C,H,W], C 1 or 3, "
                        "square")
    notes = () if channels_last else (f"the array's shape {rows.shape} is read as [N,C,H,W]",)
    order = (0, 1, 2) if channels_last else (1, 2, 0)
    digest, block = hashlib.sha256(), max(1, HASHED_BYTES // int(np.prod(shape)))
    for start in range(0, n, block):
        digest.update(rows.read(start, min(block, n - start)))
    return Images(n, tuple(shape[i] for i in order),
                  lambda i: rows.read(int(i), 1)[0].transpose(order), digest.hexdigest(), notes)


def _conversion(rows) -> str:
    """How such an array becomes uint8, from the range of its first images."""
    if rows.dtype.kind not in "fiu" or not rows.shape or not rows.shape[0]:
        return ""
    first = rows.read(0, min(8, rows.shape[0]))
    low, high = float(first.min()), float(first.max())
    if rows.dtype.kind != "f" or high > 1:
        formula = "np.clip(np.rint(x), 0, 255)"
    else:
        formula = f"np.clip(np.rint({'(x + 1) * 127.5' if low < 0 else 'x * 255'}), 0, 255)"
    return (f". Its first images go from {low:g} to {high:g}: save {formula}.astype(np.uint8) if "
            "that is their scale")


# ---- folders ----


def _is_hidden(name) -> bool:
    return name.startswith(".") or name.lower() in folders.LITTER


def _walk(folder, prefix="") -> list[str]:
    """Relative paths of all files below a folder, sorted."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            found += [] if _is_hidden(entry.name) else _walk(entry, f"{name}/")
        else:
            found.append(name)
    return found


def _image_names(folder) -> tuple[list[str], list[str]]:
    """-> (paths of the images, paths left out). Images lie in the folder or in folders below it."""
    every = _walk(folder)
    pngs = [n for n in every if n.lower().endswith(".png") and not _is_hidden(n.split("/")[-1])]
    names = [n for n in pngs if n not in PICTURES] or pngs
    if not names:
        there = f"; it has {', '.join(every[:3])}" if every else ""
        raise UserError(f"{folder} holds no .png (looked for: PNG files, or one .npz with arr_0)"
                        f"{there}")
    here = [n for n in names if "/" not in n]
    below = [n for n in names if "/" in n]
    if here and below:
        raise UserError(f"{folder} holds images ({here[0]}) and folders of images ({below[0]}); "
                        "name the folder that is meant, or move one of the two away")
    return names, [n for n in every if n not in set(names)]


def _of_folder(folder) -> Images:
    drawn = folder / "samples.npz"
    if drawn.exists():
        found = _of_array_file(drawn)
        return found._replace(notes=(f"reading {drawn}", *found.notes))
    if (folder / "request.json").exists() and (folder / "shards").exists():
        raise UserError(f"{folder} holds half of the samples of a `ddpm sample`; run the same "
                        "command again first")
    names, left_out = _image_names(folder)

    def scan(name):
        content = files.read_bytes(folder / name)
        grey, size = _png_header(content, folder / name)
        return hashlib.sha256(content).digest(), grey, size

    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        scanned = list(pool.map(scan, names))
    for name, (content_digest, _, size) in zip(names, scanned, strict=True):
        if size != scanned[0][2]:
            raise UserError(f"{folder}/{name} is {size[0]}x{size[1]}, {names[0]} is "
                            "{}x{}: all images must have one size".format(*scanned[0][2]))
        digest.update(os.fsencode(name))
        digest.update(content_digest)
    greys = sum(grey for _, grey, _ in scanned)
    channels = 1 if greys == len(names) else 3
    notes = []
    if left_out:
        notes.append(f"{folder}: {len(left_out)} files are no images to evaluate: "
                     f"{', '.join(left_out[:5])}{', ...' if len(left_out) > 5 else ''}")
    if 0 < greys < len(names):
        notes.append(f"{folder}: {greys} of {len(names)} images are grey; their channel is "
                     "repeated")
    width, height = scanned[0][2]

    def read(i):
        path = folder / names[i]
        return images.decode(io.BytesIO(files.read_bytes(path)), path, channels=channels)

    return Images(len(names), (height, width, channels), read, digest.hexdigest(), tuple(notes))


def _png_header(content, path) -> tuple[bool, tuple]:
    """(is it grey, (width, height)) without decoding."""
    from PIL import Image
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode, size = image.mode, image.size
    except Exception as error:  # decoders raise anything on damaged bytes
        raise UserError(f"{path} is not a readable image: {error}") from error
    if content.startswith(b"\x89PNG") and content[24] > 8:      # IHDR's bit depth
        raise UserError(f"{path}: {content[24]} bits a channel; convert it to 8 (16-bit values are "
                        "256 times as large, not cut off)")
    return mode in images.GREY_MODES, size
