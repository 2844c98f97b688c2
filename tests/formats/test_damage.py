"""Damaged files of every format: a UserError or arrays, never another exception."""

import gzip
import io
import pathlib
import pickle
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from made_up_files import idx as idx_bytes
from made_up_files import message, varint, write_lmdb, write_tfrecord

from ddpm_jax.data import datasets, images, prepare, prepare_tfds
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.inception import weights
from ddpm_jax.formats import (
    archives,
    idx,
    lsun_lmdb,
    npy_rows,
    tf_checkpoint,
    tfrecord,
    torch_pickle,
)
from ddpm_jax.formats import (
    safetensors as our_safetensors,
)
from ddpm_jax.storage import files, remote

RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal((3, 4)).astype(np.float32)
LONGS = np.arange(5)
IMAGES = RNG.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
GOLDEN = pathlib.Path(__file__).parent / "golden"


def pickled():
    """A state dict of FLOATS and LONGS as torch.save pickles it (protocol 2, by hand)."""
    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def integers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    def tensor(key, kind, array):
        storage = (b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
                   + b"J" + struct.pack("<i", array.size) + b"tQ")
        strides = [s // array.itemsize for s in array.strides]
        return (text(key) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J\0\0\0\0"
                + integers(array.shape) + integers(strides)
                + b"\x89ccollections\nOrderedDict\n)RtR")

    return (b"\x80\x02}(" + tensor("0", "FloatStorage", FLOATS)
            + tensor("1", "LongStorage", LONGS) + b"u.")


def write_torch_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled())
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", FLOATS.tobytes())
        archive.writestr("x/data/1", LONGS.tobytes())


def write_torch_stream(path):
    head = b"".join(pickle.dumps(x, 2) for x in (
        0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    storages = b"".join(struct.pack("<q", a.size) + a.tobytes() for a in (FLOATS, LONGS))
    path.write_bytes(head + pickled() + pickle.dumps(["0", "1"], 2) + storages)


def write_tar(path):
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name in "ab":
            member = tarfile.TarInfo(name)
            member.size = 700
            archive.addfile(member, io.BytesIO(RNG.bytes(700)))


def write_graph(path):
    proto = b"\x08\x01" + message(2, message(2, b"\x08" + varint(3)) + message(
        2, b"\x08" + varint(4))) + message(4, FLOATS.tobytes())
    value = message(5, message(1, b"value") + message(2, message(8, proto)))
    path.write_bytes(message(1, message(1, b"x/y") + message(2, b"Const") + value))


def write_bundle(path):
    for file in GOLDEN.glob("tiny.*"):
        shutil.copy(file, path.parent)


def write_npz(path):
    with open(path, "wb") as file:
        np.savez(file, floats=FLOATS, longs=LONGS)


def read_rows(path):
    with open(path, "rb") as file:
        rows = (npy_rows.open_npy(file) if path.suffix == ".npy"
                else npy_rows.open_npz(file, lambda names: "floats"))
        return rows.read(0, rows.shape[0])


def all_of(lazies):
    return {name: lazy.read() for name, lazy in lazies.items()}


def read_records(path):
    with open(path, "rb") as file:
        return [tfrecord.stylegan_image(tfrecord.tfrecord_read(file, "x", *place), "x")
                for place in tfrecord.tfrecord_offsets(path)]


def write_store(path):
    prepare.write_store(path.parents[1], "folder", {
        "train": (len(IMAGES), range(len(IMAGES)), [0, 1], IMAGES.__getitem__)}, (4, 4, 3),
        class_names=("a", "b"))


def read_store(path):
    source = datasets.open_source("folder", str(path.parents[1]), "train")
    return [source.read(i) for i in range(len(source))], source.labels


def write_tfds(path):
    """Fashion-MNIST of two images, in FOLDER/fashion_mnist/VERSION."""
    raw = path.parent / "raw"
    raw.mkdir()
    for stem in ("train", "t10k"):
        for kind, array in (("images-idx3", np.zeros((2, 28, 28), np.uint8)),
                            ("labels-idx1", np.arange(2, dtype=np.uint8))):
            (raw / f"{stem}-{kind}-ubyte").write_bytes(idx_bytes(array))
    prepare_tfds.idx_digits("fashion_mnist", path.parent, [str(raw)])


def read_tfds(path):
    source = datasets.open_source("fashion_mnist", str(path.parents[2]), "train")
    return [source.read(i) for i in range(len(source))], source.labels


# name: (file that is damaged, write(path), read(path), whether a checksum covers all of it)
FORMATS = {
    "safetensors": ("x.safetensors",
                    lambda p: safetensors.numpy.save_file({"f": FLOATS, "l": LONGS}, p),
                    lambda p: all_of(our_safetensors.open_safetensors(p)[0]), False),
    "torch zip": ("x.pth", write_torch_zip, lambda p: all_of(torch_pickle.open_torch(p)), True),
    "torch stream": ("x.pth", write_torch_stream,
                     lambda p: all_of(torch_pickle.open_torch(p)), False),
    "bundle's index": ("tiny.index", write_bundle,
                       lambda p: all_of(tf_checkpoint.open_bundle(p.with_suffix(""))), True),
    "bundle's data": ("tiny.data-00000-of-00001", write_bundle,
                      lambda p: all_of(tf_checkpoint.open_bundle(p.with_suffix(""))), True),
    "graph": ("x.pb", write_graph, lambda p: weights.read_state(p.read_bytes(), p), False),
    "tfrecord": ("x.tfrecords", lambda p: write_tfrecord(p, IMAGES), read_records, False),
    "idx": ("x", lambda p: p.write_bytes(idx_bytes(IMAGES)), idx.read_idx, False),
    "idx.gz": ("x.gz", lambda p: p.write_bytes(gzip.compress(idx_bytes(IMAGES))), idx.read_idx,
               True),
    "tar": ("x.tar", write_tar, lambda p: [(n, f.read()) for n, f in archives.tar_members(p)],
            False),
    "tgz": ("x.tgz", write_tar, lambda p: [(n, f.read()) for n, f in archives.tar_members(p)],
            True),
    "lmdb": ("data.mdb", lambda p: write_lmdb(p.parent, {f"{i:03}": bytes(500 * i)
                                                         for i in range(20)}),
             lambda p: list(lsun_lmdb.lmdb_items(p.parent)[1]), False),
    "store's info": ("folder/info.json", write_store, read_store, False),
    "store's images": ("folder/train_images.npy", write_store, read_store, False),
    "store's labels": ("folder/train_labels.npy", write_store, read_store, False),
    "TFDS's info": ("dataset_info.json", write_tfds, read_tfds, False),
    "TFDS's features": ("features.json", write_tfds, read_tfds, False),
    "array record": ("fashion_mnist-train.array_record-00000-of-00001", write_tfds, read_tfds,
                     False),
    "array at an address": ("x.npy", lambda p: np.save(p, IMAGES),
                            lambda p: remote.RemoteArray(f"file://{p}", 0).whole(), False),
    "rows of npz": ("x.npz", write_npz, read_rows, True),
    "rows of npy": ("x.npy", lambda p: np.save(p, IMAGES), read_rows, False),
    "npz": ("x.npz", write_npz, files.read_npz, False),
    "json": ("x.json", lambda p: files.write_json(p, {"a": [1, 2.5, "x"]}), files.read_json, False),
}


def damage(data, rng):
    """One of six kinds of damage."""
    data, at = bytearray(data), int(rng.integers(len(data)))
    match rng.integers(6):
        case 0 | 1:
            data[at] ^= int(rng.integers(1, 256))
        case 2:
            for place in rng.integers(len(data), size=5):
                data[place] = rng.integers(256)
        case 3:
            del data[at:]
        case 4:
            data += rng.bytes(30)
        case 5:
            data[at:at + 20] = bytes(20)
    return bytes(data)


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_one_line_or_changes_nothing_that_has_a_checksum(tmp_path, monkeypatch, name):
    monkeypatch.setattr(images, "RETRY_WAITS", ())  # it is not for a moment
    file, write, read, covered = FORMATS[name]
    path = tmp_path / file
    write(path)
    [path] = tmp_path.rglob(path.name)  # TFDS's lie in the folder of a version
    whole, refused = path.read_bytes(), 0
    try:
        expected = read(path)
    except UserError as error:  # a graph of one constant is not Inception's
        expected, covered = str(error), False
    for seed in range(200):
        path.write_bytes(damage(whole, np.random.default_rng([seed, len(whole)])))
        try:
            found = read(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), str(error)
        else:
            assert not covered or str(found) == str(expected), seed
    assert refused > 20


@pytest.mark.parametrize("name", ["safetensors", "torch zip", "torch stream", "bundle's data"])
@pytest.mark.parametrize("part", [0, 0.1, 0.3])
def test_a_file_that_is_cut_after_it_was_opened(tmp_path, name, part):
    file, write, _, _ = FORMATS[name]
    path = tmp_path / file
    write(path)
    opened = {"safetensors": lambda: our_safetensors.open_safetensors(path)[0],
              "bundle's data": lambda: tf_checkpoint.open_bundle(path.with_suffix(""))}.get(
                  name, lambda: torch_pickle.open_torch(path))()
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    with pytest.raises(UserError, match=path.name.split("-")[0]):
        all_of(opened)
    path.unlink()
    with pytest.raises(UserError, match=path.name.split("-")[0]):
        all_of(opened)
