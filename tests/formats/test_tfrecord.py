"""TFRecord files, made by hand and by TensorFlow."""

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats import tfrecord
from ddpm_jax.formats.tfrecord import masked_crc32c

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


@pytest.mark.parametrize("data, crc", [  # RFC 3720 B.4, and the customary check string
    (b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E),
])
def test_mask_of_published_checksums(data, crc):
    rotated = (masked_crc32c(data) - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == crc
    assert masked_crc32c(np.frombuffer(data, np.uint8)) == masked_crc32c(data)
