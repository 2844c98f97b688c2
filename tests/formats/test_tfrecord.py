import gzip
import io
import tarfile

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats import tfrecord

RNG = np.random.default_rng(1)


def read_all(path):
    with open(path, "rb") as file:
        return [tfrecord.stylegan_image(tfrecord.tfrecord_read(file, f"record {i}", *place), "x")
                for i, place in enumerate(tfrecord.tfrecord_offsets(path))]


def test_stylegan_tfrecord(tmp_path, make):
    assert make.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    images = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_all(make.tfrecord(tmp_path / "a.tfrecords", images)),
                                  images)


@pytest.mark.parametrize("at, message", [
    (0, "record 0: wrong checksum of the length"), (40, "record 0: wrong checksum of the data"),
    (-3, "record 1: wrong checksum of the data")])
def test_a_flipped_bit_is_found(tmp_path, at, message, make):
    path = make.tfrecord(tmp_path / "a", RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_all(path)


@pytest.mark.parametrize("cut", [1, 230, 240])
def test_a_cut_tfrecord(tmp_path, cut, make):
    path = make.tfrecord(tmp_path / "a", RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="a, record 1: cut short"):
        tfrecord.tfrecord_offsets(path)


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x0a\x03\x0a\x01\x07", b"\x0b"])
def test_not_an_example(data):
    with pytest.raises(UserError, match="f, record 3: not"):
        tfrecord.stylegan_image(data, "f, record 3")


@pytest.mark.peer
def test_against_tensorflow(tmp_path):
    tf = pytest.importorskip("tensorflow")
    path = str(tmp_path / "tf.tfrecords")
    images = RNG.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    with tf.io.TFRecordWriter(path) as writer:
        for image in images.transpose(0, 3, 1, 2):
            writer.write(tf.train.Example(features=tf.train.Features(feature={
                "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=image.shape)),
                "data": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
                "other": tf.train.Feature(float_list=tf.train.FloatList(value=[1.0, 2.0])),
            })).SerializeToString())
    np.testing.assert_array_equal(read_all(path), images)


def test_lmdb(tmp_path, make):
    path = make.lmdb(tmp_path / "b_lmdb", {"k2": b"two", "k1": b"one"})
    count, items = tfrecord.lmdb_items(path)
    assert count == 2 and [v for _, v in items] == [b"one", b"two"]
    with pytest.raises(UserError, match="not a readable LMDB"):
        tfrecord.lmdb_items(tmp_path)


def test_a_cut_lmdb_is_an_error_not_a_signal(tmp_path, make):
    path = make.lmdb(tmp_path / "c", {f"{i:03}": bytes(5000) for i in range(50)})
    data = (path / "data.mdb").read_bytes()
    (path / "data.mdb").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="cut short"):
        tfrecord.lmdb_items(path)


def test_idx(tmp_path, make):
    array = RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    (tmp_path / "a.gz").write_bytes(gzip.compress(make.idx(array)))
    (tmp_path / "a").write_bytes(make.idx(array))
    np.testing.assert_array_equal(tfrecord.read_idx(tmp_path / "a.gz"), array)
    np.testing.assert_array_equal(tfrecord.read_idx(tmp_path / "a"), array)
    (tmp_path / "b.gz").write_bytes((tmp_path / "a.gz").read_bytes()[:-12])
    (tmp_path / "c").write_bytes(make.idx(array)[:-1])
    for bad in ("b.gz", "c", "missing"):
        with pytest.raises(UserError, match=f"{bad}: missing, damaged"):
            tfrecord.read_idx(tmp_path / bad)


def test_cifar_batch():
    images = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    rows = [bytes([label]) + image.transpose(2, 0, 1).tobytes()
            for label, image in zip((9, 0, 4), images, strict=True)]
    pixels, labels = tfrecord.cifar_batch(b"".join(rows), "x")
    np.testing.assert_array_equal(pixels, images)
    assert labels.tolist() == [9, 0, 4]
    for bad in (b"", rows[0][:-1], b"\x0a" + rows[0][1:]):
        with pytest.raises(UserError, match="x: not a batch"):
            tfrecord.cifar_batch(bad, "x")


def test_tar_members(tmp_path):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("d/f")
        member.size = 20_000
        archive.addfile(member, io.BytesIO(RNG.bytes(20_000)))
    assert [(n, len(f.read())) for n, f in tfrecord.tar_members(path)] == [("d/f", 20_000)]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="a.tar.gz: missing, damaged"):
        list(tfrecord.tar_members(path))
