"""Writers of the file formats that are read here, independent of the code under test."""

import struct
import types

import pytest
from PIL import Image


def crc32c(data):
    """Bit by bit, from the definition (reflected polynomial 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(data):
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def stylegan_example(image):
    """What StyleGAN's dataset_tool writes for uint8 [H, W, C]."""
    chw = image.transpose(2, 0, 1)
    shape = message(3, message(1, b"".join(map(varint, chw.shape))))
    data = message(1, message(1, chw.tobytes()))
    entries = [message(1, message(1, k) + message(2, v))
               for k, v in ((b"shape", shape), (b"data", data))]
    return message(1, b"".join(entries))


def write_tfrecord(path, images):
    path.write_bytes(b"".join(framed(stylegan_example(i)) for i in images))
    return path


def write_examples(path, records):
    """tf.Examples of {"image": bytes, "label": int}."""
    def feature(name, value):
        kind = message(1, message(1, value)) if isinstance(value, bytes) else message(
            3, message(1, varint(value)))
        return message(1, message(1, name.encode()) + message(2, kind))
    path.write_bytes(b"".join(framed(message(1, b"".join(
        feature(k, v) for k, v in record.items()))) for record in records))


def write_lmdb(path, items):
    import lmdb
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key.encode(), value)
    return path


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def make():
    """The writers above."""
    return types.SimpleNamespace(crc32c=crc32c, save=save, idx=idx, lmdb=write_lmdb,
                                 tfrecord=write_tfrecord, examples=write_examples)
