"""Convert a dataset, once, from the network or from given files, to the form that training reads.

folder and lsun_* become one array of pixels a split; for the others see prepare_tfds.py. A dataset
appears complete in its folder or not at all, and an existing one is never changed.
"""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from ddpm_jax.data import folders, images
from ddpm_jax.errors import UserError
from ddpm_jax.formats import lsun_lmdb, tfrecord
from ddpm_jax.storage import files, remote

INFO = "info.json"
_TFDS_INFO = "dataset_info.json"
MAX_UNREADABLE = 0.01  # of LSUN's records: two of cat's are empty
_LMDB_FILES = ("data.mdb", "lock.mdb")
_CHUNK = 512


class Options(NamedTuple):
    """What a preparation may be given besides its sources; rows that need none ignore them."""

    image_size: int | None = None
    channels: int | None = None
    split_folders: bool | None = None  # see folders.image_tree
    classes: str | None = None
    max_unreadable: float | None = None  # share of damaged images left out, see write_store
    progress: Callable = lambda total, name: (lambda done: None, lambda: None)  # -> update, close


DEFAULTS = Options()


def prepare(row, name, folder, sources, options=DEFAULTS):
    """Make `folder/name` by the row of DATASETS; on gs:// made here first, then uploaded.

    folder: see datasets.data_folder. sources: files or folders to read; [] downloads, where a row
    can. Raises UserError: nothing to prepare, sources that are missing, damaged or of another kind,
    no space, and a dataset that exists (before anything is read).
    """
    if row.prepare is None:
        raise UserError(f"{name} needs no preparation: it is {row.about}")
    if not files.is_remote(folder):
        refuse_existing(folder, name)
        return row.prepare(name, folder, sources, options)
    target = files.join(folder, name)
    if {INFO, _TFDS_INFO} & {path.split("/")[-1] for path in remote.listing(target)}:
        raise UserError(f"{target} exists already; remove it first, or give another --dir")
    with files.staging_folder(pathlib.Path(tempfile.gettempdir(), f"ddpm_prepare_{name}")) as here:
        row.prepare(name, here, sources, options)
        remote.upload(here / name, target, last={INFO, _TFDS_INFO})


def refuse_existing(folder, name):
    if (folder / name).exists():
        raise UserError(f"{folder / name} exists already; remove it first, or give another --dir")


def new_dataset(folder, name):
    """A temporary folder that becomes `folder/name` if the block succeeds, and vanishes if not."""
    refuse_existing(folder, name)
    return files.new_folder(folder / name, "give another --dir")


def write_store(folder, name, splits, shape, *, class_names=(), about="", left_out=(),
                max_unreadable=0.0, progress=DEFAULTS.progress):
    """Write `folder/name`: info.json and, per split, SPLIT_images.npy uint8 [N, H, W, C], labels.

    splits: {name: (count, iterable of items, labels or None, decode)}; decode(item) -> uint8
    `shape`, runs in threads, and raises UserError for what it cannot read. Of each split a share
    of max_unreadable items may raise images.DamagedError: they are left out, and N is smaller.
    left_out: lines for info.json, to which these are added.
    """
    need = sum(count for count, *_ in splits.values()) * int(np.prod(shape))
    with new_dataset(folder, name) as temp, ThreadPoolExecutor(os.cpu_count()) as pool:
        if (free := shutil.disk_usage(temp).free) < need:
            raise UserError(f"{folder}: {name} needs {need / 1e9:.1f} GB there, "
                            f"{free / 1e9:.1f} GB are free; give another --dir")
        counts, left_out = {}, list(left_out)
        for split, (count, items, labels, decode) in splits.items():
            update, close = progress(count, name=f"{name} {split}")
            kept, errors = _write_images(temp / f"{split}_images.npy", (count, *shape), _decoded(
                pool, iter(items), decode, update), max_unreadable)
            close()
            counts[split] = len(kept)
            if errors:
                left_out.append(f"{split}: {len(errors):,} of {count:,} could not be read and are "
                                f"left out: {'; '.join(map(str, errors[:3]))}"
                                + ("; ..." if errors[3:] else ""))
            if class_names:
                np.save(temp / f"{split}_labels.npy", np.asarray(labels, np.int32)[kept])
        (temp / INFO).write_text(json.dumps({
            "format": 1, "about": about, "image_shape": list(shape), "splits": counts,
            "class_names": list(class_names), "left_out": left_out}, indent=1) + "\n")


def _decoded(pool, items, decode, update):
    """decode(item) of each, in order; DamagedError is returned, all else is raised."""
    def attempt(item):
        try:
            return decode(item)
        except images.DamagedError as error:
            return error

    done = 0
    while chunk := list(islice(items, _CHUNK)):
        yield from pool.map(attempt, chunk)
        done += len(chunk)
        update(done)


def _write_images(path, shape, decoded, max_unreadable):
    """-> (positions of the images that were written, errors of the others). shape: (N, H, W, C)."""
    kept, errors, count = [], [], shape[0]
    with open(path, "wb") as file:
        def write_header(rows):  # of one length for any number of rows: numpy leaves room
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {
                "descr": "|u1", "fortran_order": False, "shape": (rows, *shape[1:])})

        write_header(count)
        for i, image in enumerate(decoded):
            if not isinstance(image, UserError):
                kept.append(i)
                file.write(image.tobytes())
                continue
            errors.append(image)
            if len(errors) > max_unreadable * count:
                raise image if not max_unreadable else UserError(
                    f"{len(errors):,} of {count:,} cannot be read, more than --max_unreadable="
                    f"{max_unreadable}; the last: {image}")
        if errors:
            write_header(len(kept))
    if len(kept) + len(errors) != count:
        raise UserError(f"{path.name}: {len(kept) + len(errors)} images where {count} were "
                        "expected")
    return kept, errors


def one_source(sources, what):
    """The only source, as a Path that exists; UserError asking for `what` else."""
    if len(sources) != 1:
        raise UserError(f"--from: give {what}" + (f", not {len(sources)}" if sources else ""))
    path = pathlib.Path(sources[0]).expanduser()
    if not path.exists():
        raise UserError(f"--from={path}: no such file or folder")
    return path


def folder_tree(sources, options) -> folders.Tree:
    """The images of the only source, a folder or an archive (see folders.image_tree)."""
    root = one_source(sources, "one folder of images, or a .zip or .tar of one")
    return folders.image_tree(root, split_folders=options.split_folders, classes=options.classes)


def folder(name, data_dir, sources, options=DEFAULTS):
    """A folder or archive of images -> arrays."""
    size = options.image_size
    tree = folder_tree(sources, options)
    shape = images.first_shape(tree.splits["train"][0], image_size=size,
                               channels=options.channels)

    def decode(item):
        return images.decode_as(item, shape, image_size=size)

    splits = {split: (len(items), items, labels, decode)
              for split, (items, labels) in tree.splits.items()}
    resized = f", centre crop and Lanczos to {size}" if size else ""
    write_store(data_dir, name, splits, shape, class_names=tree.class_names,
                about=f"images of {pathlib.Path(sources[0]).resolve().name}{resized}",
                left_out=tree.left_out, max_unreadable=options.max_unreadable or 0.0,
                progress=options.progress)


def lsun(name, data_dir, sources, options=DEFAULTS):
    """LSUN's LMDB folders (train, and *_val_lmdb) or one of StyleGAN's TFRecord files -> arrays.

    LMDB: centre crop to the short side, Lanczos to image_size (256). TFRecord: unchanged, its
    images must have that size (the paper's files have resolution 2**8: NAME-r08.tfrecords).
    """
    size = options.image_size or 256
    shape = (size, size, 3)
    if not sources:
        raise UserError("--from: give the unpacked LMDB folder(s), or a StyleGAN .tfrecords file")

    def decode(item):
        where, data = item
        return images.decode(data, where, image_size=size, channels=3)

    def exact(item):
        where, data = item
        if isinstance(data, UserError):
            raise images.DamagedError(str(data)) from data
        image = tfrecord.stylegan_image(data, where)
        if image.shape != shape:
            raise UserError(f"{where}: {image.shape} where {shape} is expected; use the file of "
                            f"resolution {size}, or --image_size")
        return image

    splits = {}
    for path in map(_lsun_source, sources):
        split = "validation" if "_val" in path.name else "train"
        if split in splits:
            raise UserError(f"--from={path}: a second source of the {split} split")
        if path.is_dir():
            count, items = lsun_lmdb.lmdb_items(path)
            splits[split] = (count, items, None, decode)
        else:
            offsets = tfrecord.tfrecord_offsets(path)
            splits[split] = (len(offsets), _tfrecord_items(path, offsets), None, exact)
    share = MAX_UNREADABLE if options.max_unreadable is None else options.max_unreadable
    write_store(data_dir, name, splits, shape, about=f"LSUN, {size}x{size}, from "
                + ", ".join(pathlib.Path(s).name for s in sources), max_unreadable=share,
                progress=options.progress)


def _lsun_source(source):
    """An LMDB folder (also given by a file in it, or by the folder above it), or a file."""
    path = one_source([source], "")
    if path.name in _LMDB_FILES:
        return path.absolute().parent
    if path.suffix == ".zip":
        raise UserError(f"--from={path}: unpack it first, and give the folder")
    inside = sorted(path.glob("*/data.mdb"))
    if path.is_file() or (path / "data.mdb").exists() or len(inside) != 1:
        return path
    return inside[0].parent


def _tfrecord_items(path, offsets):
    """(where, data, or the UserError of a record that is damaged)"""
    with open(path, "rb") as file:
        for i, (offset, length) in enumerate(offsets):
            where = f"{path}, record {i}"
            try:
                data = tfrecord.tfrecord_read(file, where, offset, length)
            except UserError as error:
                data = error
            yield where, data
