"""Folders and archives of images: the split and the class of each file.

1. Names: what begins with a dot, and what operating systems leave (LITTER), is left out, at any
   depth; so is what has none of images.SUFFIXES.
2. A lone folder with nothing beside it is entered.
3. Splits: folders named as in SPLIT_NAMES, in any case, also with an ending (`test_set`,
   `val2017`). With train and another split, what lies beside them is left out. One split folder
   beside other images, two folders of one split, no train, and split folders inside other folders
   are ambiguous: `--split_folders` or `--nosplit_folders`.
4. Classes: in a split, either images, without classes, or a folder for each class. Folders numbered
   as shards are no classes if the numbers of their images run on from one to the next. Images
   beside class folders, and other numbered folders, are ambiguous: `--classes=folders` or `none`.

What is left out is counted and named; what is ambiguous is a UserError with the flag that settles
it. docs/images.md shows examples.
"""

import bz2
import functools
import gzip
import lzma
import mmap
import os
import pathlib
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddpm_jax.data import images
from ddpm_jax.errors import UserError

SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "testing"),
               "validation": ("validation", "valid", "val", "dev", "development")}
LITTER = ("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir",
          "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found")
UNREAD = (".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".tga", ".svg",
          ".psd", ".exr", ".hdr", ".dng", ".raw", ".cr2", ".nef", ".arw", ".ico", ".webm", ".mp4")
_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
_SPLIT_ENDING = re.compile(r"[ _-]?(set|data|images|imgs|split|\d{4})$")
_SHARD = re.compile(r"(?:shard|part|chunk|batch)[ _-]?\d+", re.IGNORECASE)
_NUMBER = re.compile(r"\d{3,}")


class Item(NamedTuple):
    """One file below the root."""

    name: str  # relative to the root, with slashes
    where: str  # its name in errors
    read: Callable  # () -> bytes; UserError if it cannot be read


class Tree(NamedTuple):
    """The images of a folder."""

    splits: dict  # {name: (items, labels int32 [N], or None without classes)}
    class_names: tuple
    left_out: tuple  # lines that count and name what is in no split


def image_tree(root, *, split_folders=None, classes=None) -> Tree:
    """The images below a folder, or in a .zip or .tar archive, in order of path.

    split_folders: True, False, or None to decide by rule 3. classes: 'folders', 'none', or None to
    decide by rule 4. Raises UserError for no images, ambiguous folders, and classes of another
    split that the train split lacks.
    """
    left_out, rows = {}, []
    for item in sorted(all_items(pathlib.Path(root)), key=lambda item: item.name.split("/")):
        if reason := why_left_out(item.name):
            left_out.setdefault(reason, []).append(item)
        else:
            rows.append((tuple(item.name.split("/")), item))
    if not rows:
        raise UserError("; ".join([f"{root}: no images in it ({', '.join(images.SUFFIXES)})",
                                   *_lines(left_out)]))
    where, rows = _enter(str(root), rows, lambda top, rows: split_of(top) or (
        classes and any(len(parts) == 2 for parts, _ in rows)))
    folders, beside = _splits(where, rows, split_folders)
    left_out["images beside the split folders"] = [item for _, item in beside]
    splits, names = {}, ()
    for split, (where, rows) in folders.items():
        where, rows = _enter(where, rows, lambda top, _, names=names: classes or top in names)
        groups, beside = CLASSES[classes](where, _by_folder(rows))
        left_out.setdefault("images beside class folders", []).extend(item for _, item in beside)
        found = tuple(name for name in groups if name)
        names = names if splits else found
        if bool(found) != bool(names) or set(found) - set(names):
            raise UserError(f"{where}: its classes ({', '.join(found) or 'none'}) are not those of "
                            f"the train split ({', '.join(names) or 'none'}); --classes=none takes "
                            "all images without labels")
        items = [item for group in groups.values() for _, item in group]
        labels = [np.full(len(group), names.index(name), np.int32)
                  for name, group in groups.items() if names]
        splits[split] = (items, np.concatenate(labels) if names else None)
    return Tree(splits, names, tuple(_lines(left_out)))


def tree_lines(tree) -> list:
    """Lines: images and classes of each split, and what is left out."""
    lines = []
    for split, (items, labels) in tree.splits.items():
        line = f"{split}: {len(items):,} images"
        if labels is not None:
            counts = np.bincount(labels, minlength=len(tree.class_names))
            line += f", {len(counts)} classes: " + ", ".join(
                f"{name} {count:,}" for name, count in zip(tree.class_names, counts, strict=True))
        lines.append(line)
    return lines + list(tree.left_out)


@functools.cache
def split_of(folder) -> str | None:
    """The split that a folder's name means, or None."""
    name = folder.lower()
    return _SPLIT_OF.get(name) or _SPLIT_OF.get(_SPLIT_ENDING.sub("", name))


# ---- files ----


def why_left_out(name) -> str:
    """Why a file is left out, or ''."""
    if any(part.startswith(".") or part.lower() in LITTER for part in name.split("/")):
        return "hidden or system files"
    suffix = os.path.splitext(name)[1].lower()
    if suffix in UNREAD:
        return f"{suffix} files (not read: convert them)"
    return "" if suffix in images.SUFFIXES else "other files"


def _lines(left_out) -> list:
    lines = []
    for reason, items in left_out.items():
        if items:
            first = ", ".join(item.name for item in items[:3]) + (", ..." if items[3:] else "")
            lines.append(f"left out: {len(items):,} {reason}: {first}")
    return lines


def all_items(root):
    """All files (Item) below a folder or in an archive, in any order."""
    if root.is_dir():
        return _folder_items(root, "", (os.path.realpath(root),))
    if not root.exists():
        raise UserError(f"{root}: no such folder")
    try:
        return list((_zip_items if zipfile.is_zipfile(root) else _tar_items)(root))
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
            NotImplementedError, ValueError) as error:
        raise UserError(f"{root}: damaged, or no folder, .zip or .tar archive ({error})"
                        ) from error


def _folder_items(folder, prefix, above):
    """Files of a folder and its subfolders; links are followed, but not back to a folder above."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
    for entry in entries:
        name = prefix + entry.name
        if entry.is_dir():
            if (real := os.path.realpath(entry.path)) not in above:
                yield from _folder_items(entry.path, f"{name}/", (*above, real))
            continue
        yield Item(name if entry.is_file() else f"{name} (no file: a broken link?)", entry.path,
                   functools.partial(images.read_file, entry.path))


def _zip_items(path):
    archive = zipfile.ZipFile(path)  # closes itself; may be read from any thread

    def read(member, where):
        try:
            return images.retry(functools.partial(archive.read, member), where)
        except (EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise images.DamagedError(f"{where}: cannot be unpacked ({error})") from error

    for member in archive.infolist():
        name = member.filename.replace("\\", "/")
        if not name.endswith("/"):
            where = f"{path}, {name}"
            yield Item(name, where, functools.partial(read, member, where))


def _tar_items(path):
    """Members by offset, so that any thread reads any of them: a compressed archive is unpacked to
    one temporary file first."""
    with open(path, "rb") as file, tempfile.TemporaryFile() as unpacked:
        magic = file.read(6)
        for start, opener in COMPRESSIONS.items():
            if magic.startswith(start):
                with opener(path) as stream:
                    shutil.copyfileobj(stream, unpacked, 1 << 20)
                unpacked.flush()
                file = unpacked
        file.seek(0)
        places = {}
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile():
                    places[name] = slice(member.offset_data, member.offset_data + member.size)
                elif member.islnk():
                    places[name] = places.get(member.linkname.removeprefix("./"), slice(0))
                elif not member.isdir():
                    places[f"{name} (no file: a link?)"] = slice(0)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name, place in places.items():
        yield Item(name, f"{path}, {name}", functools.partial(content.__getitem__, place))


COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


# ---- splits and classes; a row is (parts of the path below the folder in question, Item) ----


def _by_folder(rows) -> dict:
    """{first folder, or '' for images that are in none: rows}"""
    groups = {}
    for parts, item in rows:
        groups.setdefault(parts[0] if len(parts) > 1 else "", []).append((parts, item))
    return groups


def _below(rows) -> list:
    return [(parts[1:], item) for parts, item in rows]


def _enter(where, rows, stop):
    """Rule 2 -> (where, rows): down to images, several folders, or one where stop(name, rows)."""
    while len(groups := _by_folder(rows)) == 1 and (
            top := next(iter(groups))) and not stop(top, rows):
        where, rows = f"{where}/{top}", _below(rows)
    return where, rows


def _named(groups) -> str:
    return ", ".join(f"{name}/ ({len(rows):,})" if name else f"{len(rows):,} images"
                     for name, rows in list(groups.items())[:6]) + ", ..." * (len(groups) > 6)


def _splits(where, rows, split_folders):
    """Rule 3 -> ({split: (where, rows below its folder)}, rows beside the split folders)."""
    groups = _by_folder(rows)
    folders = {name: split_of(name) for name in groups if split_of(name)}
    if split_folders is False:
        return {"train": (where, rows)}, []
    if not folders:
        _refuse_inner_splits(where, rows)
        return {"train": (where, rows)}, []
    twice = [name for name, split in folders.items() if list(folders.values()).count(split) > 1]
    if twice:
        raise UserError(f"{where}: {_named({n: groups[n] for n in twice})} are the same split; "
                        "merge or rename them, or pass --nosplit_folders: no splits")
    others = {name: group for name, group in groups.items() if name not in folders}
    beside = [row for group in others.values() for row in group]
    has_train = "train" in folders.values()
    if not has_train and not others:
        raise UserError(f"{where}: {_named(groups)} but no train/; rename one, or pass "
                        "--nosplit_folders: no splits")
    if split_folders is None and others and not (has_train and len(folders) > 1):
        rest = "left out" if has_train else "the train split"
        raise UserError(
            f"{where}: is {_named({n: groups[n] for n in folders})} a split or a class? Beside it: "
            f"{_named(others)}; pass --split_folders: a split, and the rest is {rest}, or "
            "--nosplit_folders: no splits")
    splits = {split: (f"{where}/{name}", _below(groups[name])) for name, split in folders.items()}
    if not has_train:
        splits["train"], beside = (where, beside), []
    for folder, below in splits.values():
        if split_folders is None:
            _refuse_inner_splits(folder, below)
    return {split: splits[split] for split in SPLIT_NAMES if split in splits}, beside


def _refuse_inner_splits(where, rows):
    """Split folders below other folders, where they would be taken for parts of a class."""
    tops = _by_folder(rows)
    if len(tops) > 1 and all(map(split_of, tops)):
        raise UserError(f"{where}: {_named(tops)}: split folders inside a split; move them up, or "
                        "pass --nosplit_folders: no splits")
    for parts, item in rows:
        if any(map(split_of, parts[1:-1])):
            raise UserError(f"{item.where}: a split folder inside another folder; move the split "
                            f"folders up to {where}, or pass --nosplit_folders: no splits")


def _no_classes(where, groups):
    return {"": [row for rows in groups.values() for row in rows]}, []


def _class_folders(where, groups):
    beside = groups.pop("", [])
    if not groups:
        raise UserError(f"{where}: --classes=folders, but no folders with images in it")
    return {_utf8(where, name): rows for name, rows in groups.items()}, beside


def _utf8(where, name) -> str:
    """A folder's name, whatever encoding the locale has; UserError if it is not UTF-8."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: the folder {name!r} has a name that is not UTF-8; rename it"
                        ) from None


def _by_rule(where, groups):
    """Rule 4."""
    if list(groups) == [""] or all(map(_SHARD.fullmatch, groups)):
        return _no_classes(where, groups)
    if "" in groups:
        raise UserError(f"{where}: holds both images and folders of images: {_named(groups)}; pass "
                        "--classes=none: all images, without labels, or --classes=folders: the "
                        "images beside the folders are left out")
    if len({len(name) for name in groups}) == 1 and all(map(_NUMBER.fullmatch, groups)):
        if _numbers_run_on(groups):
            return _no_classes(where, groups)
        raise UserError(f"{where}: are the numbered folders {_named(groups)} classes? pass "
                        "--classes=folders if they are, --classes=none if not")
    return _class_folders(where, groups)


def _numbers_run_on(groups) -> bool:
    """Whether the last number in the images' names grows from folder to folder (FFHQ, EDM)."""
    last = -1
    for rows in groups.values():
        numbers = [re.findall(r"\d+", pathlib.PurePosixPath(parts[-1]).stem) for parts, _ in rows]
        if not all(numbers) or min(values := [int(found[-1]) for found in numbers]) <= last:
            return False
        last = max(values)
    return True


CLASSES = {None: _by_rule, "folders": _class_folders, "none": _no_classes}
