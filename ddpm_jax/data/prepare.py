"""Convert a dataset, once, from the network or from given files, to the form that training reads.

cifar10, fashion_mnist and celeb_a_hq become TFDS's own format (array_record, without TensorFlow),
so `tfds.data_source` reads them too; folder and lsun_* become one array of pixels a split. A
dataset appears complete in its folder or not at all, and an existing one is never changed.

tensorflow_datasets and PIL are imported where they are used: slow, and needed by few functions.
"""

import contextlib
import io
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from ddpm_jax.data import images
from ddpm_jax.errors import UserError
from ddpm_jax.formats import archives, idx, lsun_lmdb, tfrecord
from ddpm_jax.storage import files, remote

INFO = "info.json"
_TFDS_INFO = "dataset_info.json"
_CHUNK = 512


class Options(NamedTuple):
    """What a preparation may be given besides its sources; rows that need none ignore them."""

    image_size: int | None = None
    channels: int | None = None
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
        _refuse_existing(folder, name)
        return row.prepare(name, folder, sources, options)
    target = files.join(folder, name)
    if {INFO, _TFDS_INFO} & {path.split("/")[-1] for path in remote.listing(target)}:
        raise UserError(f"{target} exists already; remove it first, or give another --dir")
    with tempfile.TemporaryDirectory(prefix="ddpm_prepare_") as here:
        row.prepare(name, pathlib.Path(here), sources, options)
        remote.upload(pathlib.Path(here) / name, target, last={INFO, _TFDS_INFO})


def as_file(data):
    """Bytes, or an open binary file, as a binary file."""
    return io.BytesIO(data) if isinstance(data, bytes) else data


def _refuse_existing(folder, name):
    if (folder / name).exists():
        raise UserError(f"{folder / name} exists already; remove it first, or give another --dir")


def _new_dataset(folder, name):
    """A temporary folder that becomes `folder/name` if the block succeeds, and vanishes if not."""
    _refuse_existing(folder, name)
    return files.new_folder(folder / name, "give another --dir")


def write_store(folder, name, splits, shape, *, class_names=(), about="",
                progress=DEFAULTS.progress):
    """Write `folder/name`: info.json and, per split, SPLIT_images.npy uint8 [N, H, W, C], labels.

    splits: {name: (count, iterable of items, labels or None, decode)}; decode(item) -> uint8
    `shape`, runs in threads, and raises UserError for what it cannot read.
    """
    need = sum(count for count, *_ in splits.values()) * int(np.prod(shape))
    with _new_dataset(folder, name) as temp, ThreadPoolExecutor(os.cpu_count()) as pool:
        if (free := shutil.disk_usage(temp).free) < need:
            raise UserError(f"{folder}: {name} needs {need / 1e9:.1f} GB there, "
                            f"{free / 1e9:.1f} GB are free; give another --dir")
        for split, (count, items, labels, decode) in splits.items():
            update, close = progress(count, name=f"{name} {split}")
            items, done = iter(items), 0
            with open(temp / f"{split}_images.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, {
                    "descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
                while chunk := list(islice(items, _CHUNK)):
                    for image in pool.map(decode, chunk):
                        file.write(image.tobytes())
                    done += len(chunk)
                    update(done)
            close()
            if done != count:
                raise UserError(f"{name} {split}: {done} images where {count} were expected")
            if class_names:
                np.save(temp / f"{split}_labels.npy", np.asarray(labels, np.int32))
        (temp / INFO).write_text(json.dumps({
            "format": 1, "about": about, "image_shape": list(shape),
            "splits": {split: count for split, (count, *_) in splits.items()},
            "class_names": list(class_names)}, indent=1) + "\n")


def _one(sources, what):
    """The only source, as a Path that exists; UserError asking for `what` else."""
    if len(sources) != 1:
        raise UserError(f"--from: give {what}" + (f", not {len(sources)}" if sources else ""))
    path = pathlib.Path(sources[0]).expanduser()
    if not path.exists():
        raise UserError(f"--from={path}: no such file or folder")
    return path


def folder(name, data_dir, sources, options=DEFAULTS):
    """A folder of images (see images.image_tree) -> arrays."""
    root = _one(sources, "one folder of images")
    size = options.image_size
    tree = images.image_tree(root)
    shape = images.first_shape(tree.splits["train"][0][0], image_size=size,
                               channels=options.channels)

    def decode(path):
        return images.decode_as(path, shape, image_size=size)

    splits = {split: (len(paths), paths, labels, decode)
              for split, (paths, labels) in tree.splits.items()}
    resized = f", centre crop and Lanczos to {size}" if size else ""
    write_store(data_dir, name, splits, shape, class_names=tree.class_names,
                about=f"images of {root.resolve().name}{resized}", progress=options.progress)


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
        return images.decode(io.BytesIO(data), where, image_size=size, channels=3)

    def exact(item):
        where, data = item
        image = tfrecord.stylegan_image(data, where)
        if image.shape != shape:
            raise UserError(f"{where}: {image.shape} where {shape} is expected; use the file of "
                            f"resolution {size}, or --image_size")
        return image

    splits = {}
    for path in (_one([s], "") for s in sources):
        split = "validation" if "_val" in path.name else "train"
        if split in splits:
            raise UserError(f"--from={path}: a second source of the {split} split")
        if path.is_dir():
            count, items = lsun_lmdb.lmdb_items(path)
            splits[split] = (count, items, None, decode)
        elif path.suffix == ".zip":
            raise UserError(f"--from={path}: unpack it first, and give the folder")
        else:
            offsets = tfrecord.tfrecord_offsets(path)
            splits[split] = (len(offsets), _tfrecord_items(path, offsets), None, exact)
    write_store(data_dir, name, splits, shape, about=f"LSUN, {size}x{size}, from "
                + ", ".join(pathlib.Path(s).name for s in sources), progress=options.progress)


def _tfrecord_items(path, offsets):
    with open(path, "rb") as file:
        for i, (offset, length) in enumerate(offsets):
            where = f"{path}, record {i}"
            yield where, tfrecord.tfrecord_read(file, where, offset, length)


def _build(name, data_dir, generate, parent, *, config=None):
    """Write `data_dir/name` in TFDS's format: `parent` (a TFDS builder) with another reader.

    generate(builder, download) -> {split: iterable of (key, example)}. Its images are PIL images or
    encoded files, because TFDS encodes numpy arrays with TensorFlow.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered
    with registered.skip_registration():

        class Builder(parent):
            name = parent.name
            url_infos = parent.url_infos
            pkg_dir_path = parent._get_pkg_dir_path()

            def _split_generators(self, dl_manager):
                def download(url):
                    try:
                        return dl_manager.download(url)
                    except Exception as error:  # requests', urllib's, TFDS's own
                        reason = " ".join(str(error).split())[:120] or type(error).__name__
                        raise UserError(f"cannot download {url} ({reason}); fetch it elsewhere "
                                        "and give it with --from=") from error
                return generate(self, download)

            def _generate_examples(self):
                raise NotImplementedError

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # hide its ten retries
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with _new_dataset(data_dir, name) as temp:
        inside = temp / "tfds"
        builder = Builder(data_dir=inside, config=config, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # its message names the temporary folder
            builder.download_and_prepare(
                download_dir=temp / "downloads",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        shutil.rmtree(temp / "downloads", ignore_errors=True)
        for child in (inside / name).iterdir():
            os.replace(child, temp / child.name)
        shutil.rmtree(inside)


def cifar10(name, data_dir, sources, options=DEFAULTS):
    """The binary CIFAR-10: cifar-10-binary.tar.gz, or a folder with it or its unpacked files."""
    import tensorflow_datasets as tfds
    from PIL import Image
    given = _one(sources, "cifar-10-binary.tar.gz") if sources else None

    def generate(builder, download):
        info = builder._cifar_info
        source = pathlib.Path(given or download(info.url))
        if source.is_dir() and (source / "cifar-10-binary.tar.gz").exists():
            source = source / "cifar-10-binary.tar.gz"
        members = {p.name: io.BytesIO(p.read_bytes()) for p in source.rglob("*") if p.is_file()} \
            if source.is_dir() else {pathlib.PurePath(n).name: f
                                     for n, f in archives.tar_members(source)}
        needed = [*info.train_files, *info.test_files, *info.label_files]
        if missing := [n for n in needed if n not in members]:
            raise UserError(f"{source}: {missing[0]} is not in it; give cifar-10-binary.tar.gz")
        names = members[info.label_files[0]].read().decode().split()
        builder.info.features["label"].names = names

        def examples(prefix, batches):
            index = 0
            for file in batches:
                pixels, labels = archives.cifar_batch(members[file].read(), f"{source}, {file}")
                for image, label in zip(pixels, labels, strict=True):
                    yield index, {"id": f"{prefix}_{index:05d}", "label": int(label),
                                  "image": Image.fromarray(image)}
                    index += 1

        return {"train": examples("train", info.train_files),
                "test": examples("test", info.test_files)}

    _build(name, data_dir, generate, tfds.builder_cls("cifar10"))


def fashion_mnist(name, data_dir, sources, options=DEFAULTS):
    """Fashion-MNIST's four idx files, e.g. those of Debian's dataset-fashion-mnist package."""
    import tensorflow_datasets as tfds
    from PIL import Image
    parent = tfds.builder_cls("fashion_mnist")
    given = _one(sources, "the folder of the four idx .gz files") if sources else None

    def load(stem, download):
        if given is None:
            return idx.read_idx(download(f"{parent.URL}{stem}.gz"))
        found = [p for p in (given / f"{stem}.gz", given / stem) if p.exists()]
        if not found:
            raise UserError(f"--from={given}: {stem}.gz is not in it")
        return idx.read_idx(found[0])

    def generate(builder, download):
        splits = {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            pixels = load(f"{stem}-images-idx3-ubyte", download)
            labels = load(f"{stem}-labels-idx1-ubyte", download)
            if pixels.shape[1:] != (28, 28) or labels.shape != pixels.shape[:1]:
                raise UserError(f"{stem}-images-idx3-ubyte: {pixels.shape} images for "
                                f"{labels.shape} labels; not Fashion-MNIST")
            splits[split] = ((i, {"image": Image.fromarray(p), "label": int(y)})
                             for i, (p, y) in enumerate(zip(pixels, labels, strict=True)))
        return splits

    _build(name, data_dir, generate, parent)


def celeb_a_hq(name, data_dir, sources, options=DEFAULTS):
    """CelebA-HQ at 256x256 from the data256x256.tar that TFDS's builder names, 30,000 images."""
    import tensorflow_datasets as tfds
    path = _one(sources, "data256x256.tar (how to make it: github.com/tkarras/"
                "progressive_growing_of_gans); a folder of images goes with --name=folder")

    def generate(builder, download):
        def examples():
            for member, file in archives.tar_members(path):
                image = images.decode(file, f"{path}, {member}", channels=3)
                if image.shape != (256, 256, 3):
                    raise UserError(f"{path}, {member}: {image.shape}, not (256, 256, 3)")
                file.seek(0)
                yield member, {"image": file, "image/filename": member}
        return {"train": examples()}

    _build(name, data_dir, generate, tfds.builder_cls("celeb_a_hq"), config="256")


