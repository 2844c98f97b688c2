"""The table of datasets, and one way to open any of them: `open_source`."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ddpm_jax.data import images, prepare
from ddpm_jax.errors import UserError
from ddpm_jax.storage import remote

_FINGERPRINT_IMAGES = 256
_KEPT_BYTES = 1 << 30  # smaller arrays of a bucket are fetched once and kept in memory


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Images by number, from any thread. shape is (H, W, C); source[i] is uint8 [H, W, C]."""

    name: str
    split: str
    size: int
    shape: tuple
    read: Callable  # i -> uint8 [H, W, C]
    where: str  # the folder or package that holds it
    read_labels: Callable | None = None  # () -> int32 [size]
    class_names: tuple = ()
    splits: tuple = ()  # names of all splits
    read_all: Callable | None = None  # () -> uint8 [size, H, W, C], where quicker than one by one

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
        """All images, in memory: uint8 [size, H, W, C]."""
        if self.read_all is not None:
            return self.read_all()
        out = np.empty((self.size, *self.shape), np.uint8)

        def fill(i):
            out[i] = self.read(i)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(fill, range(self.size)):
                pass
        return out

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits: shape, count and the pixels of up to 256 evenly spaced images."""
        digest = hashlib.sha256(f"{self.size} {tuple(self.shape)}".encode())
        rows = np.linspace(0, self.size - 1, min(self.size, _FINGERPRINT_IMAGES)).astype(int)
        digest.update(read_rows(self.read, rows).tobytes())
        return digest.hexdigest()[:16]


def read_rows(read, indices) -> np.ndarray:
    """read(i) of all indices, stacked: uint8 [n, H, W, C]. By threads: from a bucket each is a
    request, from a folder of pictures each is decoded."""
    with ThreadPoolExecutor(16) as pool:
        return np.stack(list(pool.map(read, map(int, indices))))


def default_data_dir() -> pathlib.Path:
    """$DDPM_DATA_DIR, else ~/.cache/ddpm_jax/data."""
    return pathlib.Path(os.environ.get("DDPM_DATA_DIR") or "~/.cache/ddpm_jax/data").expanduser()


def data_folder(data_dir):
    """`data_dir` as a path, gs:// and the like as text; '' or None means the default."""
    data_dir = data_dir or os.environ.get("DDPM_DATA_DIR")
    if data_dir and remote.is_remote(data_dir):
        return str(data_dir)
    return pathlib.Path(data_dir).expanduser() if data_dir else default_data_dir()


def _pick(splits, split, name):
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _in_memory(name, split, array, labels, *, where, class_names, splits) -> Source:
    return Source(name, split, len(array), array.shape[1:], array.__getitem__, where,
                  lambda: labels, class_names, splits, read_all=lambda: array)


def _open_digits(name, folder, split, image_size, channels) -> Source:
    from sklearn.datasets import load_digits
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    # Stratified and fixed: of each class, in the package's order, every fifth is held out.
    rank = np.zeros(len(pixels), int)
    for c in range(10):
        members = np.flatnonzero(digits.target == c)
        rank[members] = np.arange(len(members))
    held_out = rank % 5 == 4
    rows = _pick({"train": ~held_out, "test": held_out}, split, name)
    return _in_memory(name, split, pixels[rows], digits.target[rows], where="scikit-learn",
                      class_names=tuple("0123456789"), splits=("train", "test"))


def _not_prepared(name, folder, extra=""):
    return UserError(f"{name} is not prepared in {folder}; run: ddpm data prepare --name={name} "
                     f"--dir={folder}{extra}")


def _open_tfds(name, folder, split, image_size, channels, *, tfds_name, version) -> Source:
    given = folder
    if remote.is_remote(folder):
        folder = remote.stage(folder, tfds_name)
    found = folder and sorted((folder / tfds_name).glob(version + "/dataset_info.json"))
    if not found:
        raise _not_prepared(name, given, DATASETS[name].prepare_hint)
    import tensorflow_datasets as tfds
    builder = tfds.builder_from_directory(found[-1].parent)
    if "tfrecord" in str(builder.info.file_format).lower():
        raise UserError(f"{found[-1].parent} holds TFRecord files; convert once with: tfds "
                        f"convert_format --dataset_dir={found[-1].parent} "
                        "--out_file_format=array_record --overwrite")
    _pick(builder.info.splits, split, name)
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    shape = builder.info.features["image"].shape

    def read_many(rows):
        try:
            return [record["image"] for record in records.__getitems__(rows)]
        except Exception as error:  # array_record raises its own on damaged chunks
            raise UserError(f"{found[-1].parent}: a record of {split} in {rows[0]}..{rows[-1]} "
                            f"cannot be read ({error}); prepare it again") from error

    def decode(i, data):
        where = f"{found[-1].parent}, record {i} of {split}"
        image = images.decode(prepare.as_file(data), where, channels=shape[2])
        if image.shape != shape:
            raise UserError(f"{where} is {image.shape}, not {shape}; prepare it again")
        return image

    def read_all():
        out = np.empty((len(records), *shape), np.uint8)
        for start in range(0, len(out), 1000):  # far quicker than one at a time, threads or not
            rows = list(range(start, min(start + 1000, len(out))))
            out[start:start + 1000] = list(map(decode, rows, read_many(rows)))
        return out

    features = builder.info.features
    label = features["label"] if "label" in features else None
    return Source(name, split, len(records), shape, lambda i: decode(i, *read_many([i])),
                  str(found[-1].parent),
                  label and (lambda: [r["label"] for r in records.__getitems__(
                      list(range(len(records))))]),
                  tuple(label.names) if label else (), tuple(builder.info.splits), read_all)


def _open_store(name, folder, split, image_size, channels) -> Source:
    """What prepare.write_store made: memory-mapped pixels, so a read costs one image."""
    if remote.is_remote(folder):
        return _open_remote_store(name, folder, split)
    root = folder / name
    try:
        info = json.loads((root / prepare.INFO).read_text())
        _pick(info["splits"], split, name)
        shape = (info["splits"][split], *info["image_shape"])
        pixels = np.load(root / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(root / f"{split}_labels.npy") if info["class_names"] else None
    except (OSError, EOFError, KeyError, ValueError) as error:
        if not (root / prepare.INFO).exists():
            raise _not_prepared(name, folder, DATASETS[name].prepare_hint) from None
        raise UserError(f"{root}: damaged ({error}); remove it and prepare it again") from error
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise UserError(f"{root / f'{split}_images.npy'}: {pixels.shape} does not fit "
                        f"{prepare.INFO}; remove {root} and prepare it again")
    return Source(name, split, len(pixels), pixels.shape[1:], lambda i: np.array(pixels[i]),
                  str(root), None if labels is None else lambda: labels,
                  tuple(info["class_names"]), tuple(info["splits"]),
                  read_all=lambda: np.array(pixels))


def _open_remote_store(name, url, split) -> Source:
    """The same on gs://, in place: small ones whole, at the first read, else image by image."""
    root = remote.join(url, name)
    if prepare.INFO not in remote.listing(root):
        raise _not_prepared(name, url, DATASETS[name].prepare_hint)
    try:
        info = json.loads(remote.read_bytes(remote.join(root, prepare.INFO)))
        _pick(info["splits"], split, name)
        pixels = remote.RemoteArray(remote.join(root, f"{split}_images.npy"), _KEPT_BYTES)
        fits = pixels.shape == (info["splits"][split], *info["image_shape"])
        labels = None
        if info["class_names"]:
            labels = np.load(io.BytesIO(remote.read_bytes(
                remote.join(root, f"{split}_labels.npy"))), allow_pickle=False)
    except (EOFError, KeyError, ValueError) as error:
        raise UserError(f"{root}: damaged ({error}); remove it and prepare it again") from error
    if not fits:
        raise UserError(f"{root}/{split}_images.npy: {pixels.shape} does not fit {prepare.INFO}; "
                        f"remove {root} and prepare it again")
    return Source(name, split, len(pixels), pixels.shape[1:], lambda i: pixels[i], root,
                  None if labels is None else lambda: labels, tuple(info["class_names"]),
                  tuple(info["splits"]), read_all=pixels.whole)


def _open_folder(name, folder, split, image_size, channels) -> Source:
    """The prepared form if `folder` has it, else the images in `folder`, decoded at each read."""
    if remote.is_remote(folder):
        return _open_remote_store(name, folder, split)
    if (folder / name / prepare.INFO).exists():
        return _open_store(name, folder, split, image_size, channels)
    try:
        tree = images.image_tree(folder)
    except UserError as error:
        raise UserError(f"{error}; prepare a folder of images with: ddpm data prepare "
                        f"--name={name} --dir={folder} --from=FOLDER_OF_IMAGES") from None
    paths, labels = _pick(tree.splits, split, name)
    shape = images.first_shape(tree.splits["train"][0][0], image_size=image_size,
                               channels=channels)
    return Source(name, split, len(paths), shape,
                  lambda i: images.decode_as(paths[i], shape, image_size=image_size), str(folder),
                  None if labels is None else lambda: labels, tree.class_names,
                  tuple(tree.splits))


def _padded(source, size) -> Source:
    """`source` in the middle of black squares of `size` (28 -> 32 for a U-Net of four levels)."""
    before = (size - source.shape[0]) // 2
    after = size - source.shape[0] - before
    edge = ((before, after), (before, after), (0, 0))
    return dataclasses.replace(source, shape=(size, size, source.shape[2]),
                               read=lambda i: np.pad(source.read(i), edge),
                               read_all=lambda: np.pad(source.array(), ((0, 0), *edge)))


class Dataset(NamedTuple):
    """One row: `open(name, folder, split, image_size, channels)`; prepare is None if embedded."""

    about: str
    open: Callable
    prepare: Callable | None = None
    prepare_hint: str = ""  # flags that `ddpm data prepare` needs besides name and dir
    pad: bool = False  # a larger image_size adds a black border


def _lsun(category):
    return Dataset(f"LSUN {category}, 256x256 RGB: centre crop to the short side, Lanczos",
                   _open_store, prepare.lsun, " --from=LMDB_FOLDER_OR_TFRECORDS")


DATASETS = {
    "digits": Dataset("scikit-learn's 1,797 handwritten digits, 8x8 grey; 80/20 split",
                      _open_digits, pad=True),
    "cifar10": Dataset("CIFAR-10 (TFDS cifar10:3.*), 32x32 RGB",
                       functools.partial(_open_tfds, tfds_name="cifar10", version="3.*"),
                       prepare.cifar10),
    "fashion_mnist": Dataset("Fashion-MNIST (TFDS), 28x28 grey; image_size 32 pads with black",
                             functools.partial(_open_tfds, tfds_name="fashion_mnist",
                                               version="3.*"),
                             prepare.fashion_mnist, pad=True),
    "celeb_a_hq": Dataset("CelebA-HQ (TFDS celeb_a_hq/256), 256x256 RGB, train only",
                          functools.partial(_open_tfds, tfds_name="celeb_a_hq/256",
                                            version="2.*"),
                          prepare.celeb_a_hq, " --from=data256x256.tar"),
    "lsun_church": _lsun("church_outdoor"),
    "lsun_bedroom": _lsun("bedroom"),
    "lsun_cat": _lsun("cat"),
    "folder": Dataset("any folder of PNG, JPEG or WebP images, flat or in class folders",
                      _open_folder, prepare.folder, " --from=FOLDER_OF_IMAGES"),
}


def open_source(name, data_dir, split, *, image_size=None, channels=None) -> Source:
    """Open one split of a dataset.

    data_dir: '' or None means `default_data_dir()`; on gs:// arrays are read in place, TFDS's files
    staged once a host (remote.stage). image_size, channels: None takes what the data
    has; another size pads (digits, fashion_mnist), crops and resizes (folder read in place), or is
    an error. Raises UserError for an unknown name or split, data that is not prepared (with the
    command that prepares it) or damaged, and channels that differ.
    """
    if name not in DATASETS:
        raise UserError(f"data.name {name!r} is unknown; known: {', '.join(DATASETS)}")
    row = DATASETS[name]
    source = row.open(name, data_folder(data_dir), split, image_size, channels)
    if channels not in (None, source.shape[2]):
        raise UserError(f"{name} has {source.shape[2]} channel(s), not {channels} "
                        f"({source.where})")
    if image_size not in (None, source.shape[0]):
        if not row.pad or image_size < source.shape[0]:
            raise UserError(f"{name} is {source.shape[0]}x{source.shape[0]} in {source.where}, "
                            f"not {image_size}; change data.image_size, or prepare it anew")
        source = _padded(source, image_size)
    return source
