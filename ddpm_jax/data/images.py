"""Image files to arrays: one rule for decoding, cropping and resizing, used for every dataset.

PIL is imported where it is used: runs on prepared data need none.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
GREY_MODES = ("1", "L", "LA")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
SPLIT_FOLDERS = {"train": "train", "test": "test", "validation": "validation",
                 "valid": "validation", "val": "validation"}


def decode(file, where, *, image_size=None, channels=None) -> np.ndarray:
    """Read one image -> uint8 [H, W, C].

    file: path or binary stream; where: its name in errors. image_size: centre crop to the short
    side, then PIL's antialiased Lanczos (as StyleGAN's dataset_tool made the LSUN files of the
    paper); an image of that size, and None, are left unchanged. channels: 1, 3 or None (as the
    file); grey becomes RGB for 3. Raises UserError for colour if channels is 1, transparency, more
    than 8 bits a channel, and files that cannot be decoded.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(file) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # decoders raise anything on damaged bytes
        raise UserError(f"{where}: not a readable image, damaged or cut short ({error}); "
                        "replace or remove it") from error
    if image.mode in DEEP_MODES:
        raise UserError(f"{where}: more than 8 bits a channel (mode {image.mode}); convert it")
    found = 1 if image.mode in GREY_MODES else 3
    if channels == 1 and found == 3:
        raise UserError(f"{where}: a colour image where grey ones are expected; "
                        "convert it, or ask for 3 channels")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise UserError(f"{where}: has transparent pixels; flatten it onto a background first")
    image = image.convert("L" if (channels or found) == 1 else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def first_shape(path, *, image_size=None, channels=None) -> tuple:
    """(H, W, C) of a folder's first image, required of all others; UserError if not square."""
    shape = decode(path, path, image_size=image_size, channels=channels).shape
    if shape[0] != shape[1]:
        raise UserError(f"{path} is {shape[1]}x{shape[0]}, not square; give an image size "
                        "(centre crop and resize): --image_size, or config.data.image_size")
    return shape


def decode_as(path, shape, *, image_size=None) -> np.ndarray:
    """`decode` to exactly `shape`; UserError naming the file if it has another size."""
    image = decode(path, path, image_size=image_size, channels=shape[2])
    if image.shape != shape:
        raise UserError(f"{path} is {image.shape[1]}x{image.shape[0]}, the first image is "
                        f"{shape[1]}x{shape[0]}; give an image size (centre crop and resize): "
                        "--image_size, or config.data.image_size")
    return image


def _images_in(folder, pattern="*") -> list:
    return sorted(p for p in folder.glob(pattern) if p.suffix.lower() in SUFFIXES
                  and not p.name.startswith(".") and p.is_file())


def _class_folders(folder) -> dict:
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {sub.name: _images_in(sub, "**/*") for sub in subfolders}
    return {name: paths for name, paths in found.items() if paths}


class Tree(NamedTuple):
    """The images of a folder."""

    splits: dict  # {name: (paths, labels int32 [N], or None without classes)}
    class_names: tuple


def image_tree(root) -> Tree:
    """The images below `root`, in order of path.

    root holds split folders (train, and test or val), each as follows, or is itself the train
    split: images (flat, no labels), or one folder of images per class (sorted by name).
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    folders = {split: root / name for name, split in SPLIT_FOLDERS.items()
               if (root / name).is_dir()}
    if "train" not in folders:
        folders = {"train": root}
    splits, class_names = {}, ()
    for split, folder in folders.items():
        flat, classes = _images_in(folder), _class_folders(folder)
        if not flat and not classes:
            raise UserError(f"{folder}: no images in it ({', '.join(SUFFIXES)})")
        if flat and classes:
            raise UserError(f"{folder}: holds both images ({flat[0].name}) and folders of images "
                            f"({next(iter(classes))}); keep one of the two")
        if split == "train":
            class_names = tuple(classes)
        if bool(classes) != bool(class_names) or set(classes) - set(class_names):
            raise UserError(f"{folder}: its classes ({', '.join(classes) or 'none'}) are not "
                            f"those of the train split ({', '.join(class_names) or 'none'})")
        paths = flat or [p for c in classes for p in classes[c]]
        labels = None if flat else np.array(
            [class_names.index(c) for c in classes for _ in classes[c]], np.int32)
        splits[split] = (paths, labels)
    return Tree(splits, class_names)
