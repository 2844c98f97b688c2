"""The table of datasets, and `open_source`, which opens one split of any of them.

sklearn and tensorflow_datasets are imported where they are used: slow, and needed by few rows.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import logging
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ddpm_jax.data import folders, images, prepare, prepare_tfds
from ddpm_jax.errors import UserError
from ddpm_jax.formats import tfrecord
from ddpm_jax.storage import files, remote

log = logging.getLogger(__name__)

_FINGERPRINT_IMAGES = 256
_KEPT_BYTES = 1 << 30  # smaller arrays of a bucket are fetched once and kept in memory


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split, random access from any thread: shape (H, W, C), source[i] uint8 [H, W, C]."""

    name: str
    split: str
    size: int
    shape: tuple
    read: Callable  # i -> uint8 [H, W, C]
    where: str  # the folder, gs:// address or package that holds it
    read_labels: Callable | None = None  # () -> int32 [size]
    class_names: tuple = ()
    splits: tuple = ()  # the names that open_source accepts for this dataset
    left_out: tuple = ()  # lines that name what the source holds and no split has
    read_all: Callable | None = None  # () -> uint8 [size, H, W, C], if faster than one by one

    def __len__(self):
        return self.size

    def __getitem__(self, i) -> np.ndarray:
        if not 0 <= i < self.size:
            raise IndexError(f"image {i} of {self.size} ({self.name}, {self.split})")
        return self.read(int(i))

    @functools.cached_property
    def labels(self):
        """int32 [size], or None where the dataset has none."""
        return None if self.read_labels is None else np.asarray(self.read_labels(), np.int32)

    def array(self) -> np.ndarray:
        """All images in memory: uint8 [size, H, W, C]."""
        if self.read_all is not None:
            return self.read_all()
        return read_rows(self.read, range(self.size))

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the content, wherever it lies: a hash of the count, the shape and the
        pixels of up to 256 evenly spaced images."""
        digest = hashlib.sha256(f"{self.size} {tuple(self.shape)}".encode())
        rows = np.linspace(0, self.size - 1, min(self.size, _FINGERPRINT_IMAGES)).astype(int)
        digest.update(read_rows(self.read, rows).tobytes())
        return digest.hexdigest()[:16]


def read_rows(read, indices) -> np.ndarray:
    """read(i) of each index, stacked: uint8 [n, H, W, C]. 16 threads, because a read may be a
    request to a bucket or the decoding of a file."""
    with ThreadPoolExecutor(16) as pool:
        return np.stack(list(pool.map(read, map(int, indices))))


def data_folder(data_dir):
    """`data_dir`, else $DDPM_DATA_DIR, else ~/.cache/ddpm_jax/data: a Path, or gs:// as text."""
    data_dir = data_dir or os.environ.get("DDPM_DATA_DIR") or "~/.cache/ddpm_jax/data"
    return str(data_dir) if files.is_remote(data_dir) else pathlib.Path(
        os.path.expanduser(data_dir))  # which lets ~ stand where a user has no home


def _pick(splits, split, name):
    """splits[split]; UserError listing the names if there is none."""
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _digits():
    """-> (images with values of 0 ... 16 [N,8,8], classes [N]), from scikit-learn's file where that
    is in its place: importing scikit-learn takes a second."""
    folder = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    file = pathlib.Path(folder, "datasets", "data", "digits.csv.gz")
    if file.exists():
        table = np.loadtxt(file, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def _open_digits(name, folder, split, image_size, channels) -> Source:
    images, classes = _digits()
    pixels = np.round(images * (255 / 16)).astype(np.uint8)[..., None]
    # Stratified: every fifth image of each class, in the package's order, is a test image.
    rank = np.zeros(len(pixels), int)
    for c in range(10):
        members = np.flatnonzero(classes == c)
        rank[members] = np.arange(len(members))
    held_out = rank % 5 == 4
    splits = {"train": ~held_out, "test": held_out}
    rows = _pick(splits, split, name)
    array = pixels[rows]
    return Source(name, split, len(array), array.shape[1:], array.__getitem__, "scikit-learn",
                  lambda: classes[rows], tuple("0123456789"), tuple(splits),
                  read_all=lambda: array)


def _not_prepared(name, folder):
    return UserError(f"{name} is not prepared in {folder}; run: ddpm data prepare --name={name} "
                     f"--dir={folder}{DATASETS[name].prepare_hint}")


@contextlib.contextmanager
def _damage(where):
    """Whatever numpy, TFDS and array_record raise of damaged files, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{where}: damaged ({reason}); remove it and prepare it again") from error


def _open_tfds(name, folder, split, image_size, channels, *, tfds_name, version) -> Source:
    given = folder
    if files.is_remote(folder):
        folder = remote.stage(folder, tfds_name)
    found = folder and sorted((folder / tfds_name).glob(version + "/dataset_info.json"))
    if not found:
        raise _not_prepared(name, given)
    import tensorflow_datasets as tfds
    where = str(found[-1].parent)
    with _damage(where):
        builder = tfds.builder_from_directory(where)
        info, features = builder.info, builder.info.features
        shape = features["image"].shape
    if info.file_format.value not in _RECORDS:
        raise UserError(f"{where} holds {info.file_format.value} files, which are not read; known: "
                        f"{', '.join(_RECORDS)}")
    _pick(info.splits, split, name)
    with _damage(where):
        size, fetch = _RECORDS[info.file_format.value](builder, split, where)

    def decode(i, data):
        record = f"{where}, record {i} of {split}"
        image = images.decode(data, record, channels=shape[2])
        if image.shape != shape:
            raise UserError(f"{record} is {image.shape}, not {shape}; prepare it again")
        return image

    def read_all():
        out = np.empty((size, *shape), np.uint8)
        for start in range(0, size, 1000):  # far faster than one by one, with threads or without
            rows = list(range(start, min(start + 1000, size)))
            out[start:start + 1000] = list(map(decode, rows, fetch(rows, "image")))
        return out

    labelled = "label" in features
    return Source(name, split, size, shape, lambda i: decode(i, *fetch([i], "image")), where,
                  (lambda: fetch(list(range(size)), "label")) if labelled else None,
                  tuple(features["label"].names) if labelled else (), tuple(info.splits),
                  read_all=read_all)


def _array_records(builder, split, where):
    """-> (number of records, fetch(rows, key) -> list)"""
    import tensorflow_datasets as tfds

    def open_records():
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    records = open_records()

    def fetch(rows, key):
        def read():
            nonlocal records
            try:
                return [record[key] for record in records.__getitems__(rows)]
            except Exception as error:  # array_record raises its own, for the disk and for damage
                with contextlib.suppress(Exception):
                    records = open_records()  # a stale handle stays stale
                raise OSError(f"a record of {split} in {rows[0]}..{rows[-1]} ({error}; prepare it "
                              "again if it is damaged)") from error

        return images.retry(read, where)

    return len(records), fetch


def _tf_records(builder, split, where):
    """The same for TFDS's older format, without TensorFlow."""
    records = [(path, *place) for path in builder.info.splits[split].filepaths
               for place in tfrecord.tfrecord_offsets(path)]

    def one(row, key):
        path, offset, length = records[row]
        record = f"{path}, record {row} of {split}"

        def read():
            with open(path, "rb") as file:
                return tfrecord.tfrecord_read(file, record, offset, length)

        example = tfrecord.parse_example(images.retry(read, record), record)
        if len(example.get(key, ())) != 1:
            raise UserError(f"{record} has no {key}; prepare it again")
        return example[key][0]

    return len(records), lambda rows, key: [one(row, key) for row in rows]


_RECORDS = {"array_record": _array_records, "tfrecord": _tf_records}


class _FileArray:
    """A .npy file: array[i] reads one row, whole() all. Unlike a memory map it raises for a disk
    that fails, so that reading can be tried again."""

    def __init__(self, path):
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape, self.dtype, self._path, self._start = (
            mapped.shape, mapped.dtype, path, mapped.offset)

    def __getitem__(self, i):
        size = int(np.prod(self.shape[1:]))

        def read():
            with open(self._path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, self._start + i * size)

        if len(row := images.retry(read, self._path)) != size:
            raise UserError(f"{self._path}: cut short at image {i}; remove it and prepare it again")
        return np.frombuffer(row, np.uint8).reshape(self.shape[1:])

    def whole(self):
        return images.retry(lambda: np.load(self._path, allow_pickle=False), self._path)


def _open_store(name, folder, split, image_size=None, channels=None) -> Source:
    """Arrays that prepare.write_store made, read in place, image by image; small ones on gs:// are
    fetched whole at the first read."""
    root, in_bucket = files.join(folder, name), files.is_remote(folder)
    info_file = files.join(root, prepare.INFO)
    if not (prepare.INFO in remote.listing(root) if in_bucket else os.path.exists(info_file)):
        raise _not_prepared(name, folder)

    def read(path):
        return remote.read_bytes(path) if in_bucket else pathlib.Path(path).read_bytes()

    images_file = files.join(root, f"{split}_images.npy")
    with _damage(root):
        info = json.loads(read(info_file))
        count = _pick(info["splits"], split, name)
        pixels = (remote.RemoteArray(images_file, _KEPT_BYTES) if in_bucket
                  else _FileArray(images_file))
        labels = info["class_names"] and np.load(
            io.BytesIO(read(files.join(root, f"{split}_labels.npy"))), allow_pickle=False)
        expected = (count, *info["image_shape"])
    if pixels.shape != expected or pixels.dtype != np.uint8:
        raise UserError(f"{images_file}: {pixels.shape} does not fit {prepare.INFO}; remove {root} "
                        "and prepare it again")
    return Source(name, split, count, pixels.shape[1:], pixels.__getitem__, root,
                  (lambda: labels) if info["class_names"] else None, tuple(info["class_names"]),
                  tuple(info["splits"]), tuple(info.get("left_out", ())), pixels.whole)


def _open_folder(name, folder, split, image_size, channels) -> Source:
    """The prepared arrays if `folder` has them, else the image files in it, decoded at each read
    (`folder` may then be a .zip or .tar archive)."""
    if files.is_remote(folder) or (folder / name / prepare.INFO).exists():
        return _open_store(name, folder, split)
    try:
        tree = folders.image_tree(folder)
    except UserError as error:
        raise UserError(f"{error}; prepare a folder of images with: ddpm data prepare "
                        f"--name={name} --dir={folder} --from=FOLDER_OF_IMAGES") from None
    items, labels = _pick(tree.splits, split, name)
    for line in tree.left_out:
        log.warning("%s: %s", folder, line)
    shape = images.first_shape(tree.splits["train"][0], image_size=image_size, channels=channels)
    return Source(name, split, len(items), shape,
                  lambda i: images.decode_as(items[i], shape, image_size=image_size), str(folder),
                  None if labels is None else lambda: labels, tree.class_names,
                  tuple(tree.splits), tree.left_out)


def _padded(source, size) -> Source:
    """`source` centred on black squares of `size` (28 -> 32 for a U-Net of four levels)."""
    before = (size - source.shape[0]) // 2
    after = size - source.shape[0] - before
    edge = ((before, after), (before, after), (0, 0))
    return dataclasses.replace(source, shape=(size, size, source.shape[2]),
                               read=lambda i: np.pad(source.read(i), edge),
                               read_all=lambda: np.pad(source.array(), ((0, 0), *edge)))


class Dataset(NamedTuple):
    """A row of DATASETS. prepare is None for what a package contains."""

    about: str
    open: Callable  # (name, folder, split, image_size, channels) -> Source
    prepare: Callable | None = None  # see ddpm_jax.data.prepare
    prepare_hint: str = ""  # flags that `ddpm data prepare` needs besides name and dir
    pad: bool = False  # a larger image_size adds a black border
    flags: tuple = ("from",)  # that `prepare` reads, besides name, dir, image_size and channels


def _tfds(about, tfds_name, version, *row, **options):
    return Dataset(about, functools.partial(_open_tfds, tfds_name=tfds_name, version=version),
                   *row, **options)


def _lsun(category):
    return Dataset(f"LSUN {category}, 256x256 RGB: centre crop to the short side, Lanczos",
                   _open_store, prepare.lsun, " --from=LMDB_FOLDER_OR_TFRECORDS",
                   flags=("from", "max_unreadable"))


DATASETS = {
    "digits": Dataset("scikit-learn's 1,797 handwritten digits, 8x8 grey; 80/20 split",
                      _open_digits, pad=True),
    "cifar10": _tfds("CIFAR-10 (TFDS cifar10:3.*), 32x32 RGB", "cifar10", "3.*",
                     prepare_tfds.cifar10),
    "mnist": _tfds("MNIST (TFDS), 28x28 grey; image_size 32 pads with black", "mnist", "3.*",
                   prepare_tfds.idx_digits, pad=True),
    "fashion_mnist": _tfds("Fashion-MNIST (TFDS), 28x28 grey; image_size 32 pads with black",
                           "fashion_mnist", "3.*", prepare_tfds.idx_digits, pad=True),
    "celeb_a_hq": _tfds("CelebA-HQ (TFDS celeb_a_hq/256), 256x256 RGB, train only",
                        "celeb_a_hq/256", "2.*", prepare_tfds.celeb_a_hq,
                        " --from=data256x256.tar"),
    "lsun_church": _lsun("church_outdoor"),
    "lsun_bedroom": _lsun("bedroom"),
    "lsun_cat": _lsun("cat"),
    "folder": Dataset("any folder, .zip or .tar of images, flat or in class folders",
                      _open_folder, prepare.folder, " --from=FOLDER_OF_IMAGES",
                      flags=("from", "max_unreadable", "split_folders", "classes", "list")),
}


def open_source(name, data_dir, split, *, image_size=None, channels=None) -> Source:
    """Open one split of a dataset.

    data_dir: see `data_folder`; on gs:// arrays are read in place, TFDS's files staged once a host
    (remote.stage). image_size, channels: None takes what the data has; another size pads (rows with
    pad), crops and resizes (folder of image files), or is an error. Raises UserError for an unknown
    name or split, data that is damaged or not prepared (with the command that prepares it), and
    another number of channels.
    """
    if name not in DATASETS:
        raise UserError(f"data.name {name!r} is unknown; known: {', '.join(DATASETS)}")
    row = DATASETS[name]
    source = row.open(name, data_folder(data_dir), split, image_size, channels)
    size, found = source.shape[0], source.shape[2]
    if channels not in (None, found):
        raise UserError(f"{name} has {found} channel(s), not {channels} ({source.where})")
    if image_size in (None, size):
        return source
    if not row.pad or image_size < size:
        raise UserError(f"{name} is {size}x{size} in {source.where}, not {image_size}; change "
                        "data.image_size, or prepare it anew")
    return _padded(source, image_size)
