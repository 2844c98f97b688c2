"""Make the form of a dataset that training reads, once, from the network or from given files.

cifar10, fashion_mnist and celeb_a_hq become TFDS's own format (array_record, without TensorFlow),
so `tfds.data_source` reads them too; folder and lsun_* become one array of pixels a split. A
dataset appears complete in its folder or not at all, and an existing one is never touched.
"""

import contextlib
import io
import json
import logging
import os
import pathlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from ddpm_jax import run_log
from ddpm_jax.data import images
from ddpm_jax.errors import UserError
from ddpm_jax.folders import new_folder
from ddpm_jax.formats import tfrecord

INFO = "info.json"
_CHUNK = 512


def as_file(data):
    """Bytes, or an open binary file, as a binary file."""
    return io.BytesIO(data) if isinstance(data, bytes) else data


def refuse_existing(folder, name):
    """UserError if `folder/name` is there: nothing is overwritten."""
    if (folder / name).exists():
        raise UserError(f"{folder / name} is there already; remove it first, or give another --dir")


def _appearing(folder, name):
    """A temporary folder that becomes `folder/name` when the block ends well, else vanishes."""
    refuse_existing(folder, name)
    return new_folder(folder / name, "give another --dir")


def write_store(folder, name, splits, shape, *, class_names=(), about=""):
    """Write `folder/name`: info.json and, per split, SPLIT_images.npy uint8 [N, H, W, C], labels.

    splits: {name: (count, iterable of items, labels or None, decode)}; decode(item) -> uint8
    `shape`, runs in threads, and raises UserError for what it cannot read.
    """
    need = sum(count for count, *_ in splits.values()) * int(np.prod(shape))
    with _appearing(folder, name) as temp, ThreadPoolExecutor(os.cpu_count()) as pool:
        if (free := shutil.disk_usage(temp).free) < need:
            raise UserError(f"{folder}: {name} needs {need / 1e9:.1f} GB there, "
                            f"{free / 1e9:.1f} GB are free; give another --dir")
        for split, (count, items, labels, decode) in splits.items():
            bar = run_log.progress(count, name=f"{name} {split}")
            items, done = iter(items), 0
            with open(temp / f"{split}_images.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, {
                    "descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
                while chunk := list(islice(items, _CHUNK)):
                    for image in pool.map(decode, chunk):
                        file.write(image.tobytes())
                    done += len(chunk)
                    bar.update(done)
            bar.close()
            if done != count:
                raise UserError(f"{name} {split}: {done} images where {count} were announced")
            if class_names:
                np.save(temp / f"{split}_labels.npy", np.asarray(labels, np.int32))
        (temp / INFO).write_text(json.dumps({
            "format": 1, "about": about, "image_shape": list(shape),
            "splits": {split: count for split, (count, *_) in splits.items()},
            "class_names": list(class_names)}, indent=1) + "\n")


def _one(sources, what):
    if len(sources) != 1:
        raise UserError(f"--from: give {what}" + (f", not {len(sources)}" if sources else ""))
    path = pathlib.Path(sources[0]).expanduser()
    if not path.exists():
        raise UserError(f"--from={path}: no such file or folder")
    return path


def folder(name, data_dir, sources, *, image_size=None, channels=None):
    """A folder of images (see images.image_tree) -> arrays."""
    root = _one(sources, "one folder of images")
    tree = images.image_tree(root)
    shape = images.first_shape(tree.splits["train"][0][0], image_size=image_size,
                               channels=channels)

    def decode(path):
        return images.decode_as(path, shape, image_size=image_size)

    splits = {split: (len(paths), paths, labels, decode)
              for split, (paths, labels) in tree.splits.items()}
    resized = f", centre crop and Lanczos to {image_size}" if image_size else ""
    write_store(data_dir, name, splits, shape, class_names=tree.class_names,
                about=f"images of {root.resolve().name}{resized}")


def lsun(name, data_dir, sources, *, image_size=None, channels=None):
    """LSUN's LMDB folders (train, and *_val_lmdb) or one TFRecord of StyleGAN's -> arrays.

    LMDB: centre crop to the short side, Lanczos to image_size (256). TFRecord: as it is, of that
    size already (the paper's files, resolution 2**8: NAME-r08.tfrecords).
    """
    size = image_size or 256
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
            count, items = tfrecord.lmdb_items(path)
            splits[split] = (count, items, None, decode)
        elif path.suffix == ".zip":
            raise UserError(f"--from={path}: unpack it first, and give the folder")
        else:
            offsets = tfrecord.tfrecord_offsets(path)
            splits[split] = (len(offsets), _tfrecord_items(path, offsets), None, exact)
    write_store(data_dir, name, splits, shape, about=f"LSUN, {size}x{size}, from "
                + ", ".join(pathlib.Path(s).name for s in sources))


def _tfrecord_items(path, offsets):
    with open(path, "rb") as file:
        for i, (offset, length) in enumerate(offsets):
            where = f"{path}, record {i}"
            yield where, tfrecord.tfrecord_read(file, where, offset, length)


def _build(name, data_dir, generate, parent, *, config=None):
    """Write `data_dir/name` in TFDS's format by `parent` (a TFDS builder) with our reader.

    generate(builder, download) -> {split: iterable of (key, example)}; its images are PIL images or
    encoded files, for which TFDS needs no TensorFlow (numpy arrays it would encode by it).
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

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its ten retries are not the user's news
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with _appearing(data_dir, name) as temp:
        inside = temp / "tfds"
        builder = Builder(data_dir=inside, config=config, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it would name the temporary folder
            builder.download_and_prepare(
                download_dir=temp / "downloads",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        shutil.rmtree(temp / "downloads", ignore_errors=True)
        for child in (inside / name).iterdir():
            os.replace(child, temp / child.name)
        shutil.rmtree(inside)


def cifar10(name, data_dir, sources, *, image_size=None, channels=None):
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
                                     for n, f in tfrecord.tar_members(source)}
        needed = [*info.train_files, *info.test_files, *info.label_files]
        if missing := [n for n in needed if n not in members]:
            raise UserError(f"{source}: {missing[0]} is not in it; is it cifar-10-binary.tar.gz?")
        names = members[info.label_files[0]].read().decode().split()
        builder.info.features["label"].names = names

        def examples(prefix, files):
            index = 0
            for file in files:
                pixels, labels = tfrecord.cifar_batch(members[file].read(), f"{source}, {file}")
                for image, label in zip(pixels, labels, strict=True):
                    yield index, {"id": f"{prefix}_{index:05d}", "label": int(label),
                                  "image": Image.fromarray(image)}
                    index += 1

        return {"train": examples("train", info.train_files),
                "test": examples("test", info.test_files)}

    _build(name, data_dir, generate, tfds.builder_cls("cifar10"))


def fashion_mnist(name, data_dir, sources, *, image_size=None, channels=None):
    """Fashion-MNIST's four idx files, e.g. those of Debian's dataset-fashion-mnist package."""
    import tensorflow_datasets as tfds
    from PIL import Image
    parent = tfds.builder_cls("fashion_mnist")
    given = _one(sources, "the folder of the four idx .gz files") if sources else None

    def load(stem, download):
        if given is None:
            return tfrecord.read_idx(download(f"{parent.URL}{stem}.gz"))
        found = [p for p in (given / f"{stem}.gz", given / stem) if p.exists()]
        if not found:
            raise UserError(f"--from={given}: {stem}.gz is not in it")
        return tfrecord.read_idx(found[0])

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


def celeb_a_hq(name, data_dir, sources, *, image_size=None, channels=None):
    """CelebA-HQ at 256x256 from the data256x256.tar that TFDS's builder names, 30,000 images."""
    import tensorflow_datasets as tfds
    path = _one(sources, "data256x256.tar (how to make it: github.com/tkarras/"
                "progressive_growing_of_gans); a folder of images goes with --name=folder")

    def generate(builder, download):
        def examples():
            for member, file in tfrecord.tar_members(path):
                image = images.decode(file, f"{path}, {member}", channels=3)
                if image.shape != (256, 256, 3):
                    raise UserError(f"{path}, {member}: {image.shape}, not (256, 256, 3)")
                file.seek(0)
                yield member, {"image": file, "image/filename": member}
        return {"train": examples()}

    _build(name, data_dir, generate, tfds.builder_cls("celeb_a_hq"), config="256")


