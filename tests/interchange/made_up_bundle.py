"""Writes checkpoint bundles without TensorFlow: only as much as large tests need."""

import pathlib
import struct

import numpy as np

from ddpm_jax.formats.tfrecord import masked_crc32c


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out) + bytes([n])


def field(number, value):
    """One protocol buffer field: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(pairs):
    body = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
    body += struct.pack("<II", 0, 1)
    return body + b"\0" + struct.pack("<I", masked_crc32c(body + b"\0"))


def write_noise(prefix, shapes):
    """A bundle of float32 noise, {name: shape}: every array starts with the same numbers."""
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    noise = np.random.default_rng(0).standard_normal(largest, dtype=np.float32) / 30
    checksums, entries, offset = {}, {b"": field(1, 1)}, 0
    with open(f"{prefix}.data-00000-of-00001", "wb") as file:
        for name in sorted(shapes):
            values = noise[: int(np.prod(shapes[name]))]
            size = values.nbytes
            if size not in checksums:
                checksums[size] = masked_crc32c(values)
            shape = b"".join(field(2, field(1, n)) for n in shapes[name])
            entries[name.encode()] = (
                field(1, 1) + field(2, shape) + field(4, offset) + field(5, size)
                + varint(6 << 3 | 5) + struct.pack("<I", checksums[size]))
            file.write(values.data)
            offset += size
    data = block(sorted(entries.items()))
    meta = block([])
    index = block([(b"~", varint(0) + varint(len(data) - 5))])
    footer = b"".join(map(varint, (len(data), len(meta) - 5, len(data) + len(meta),
                                   len(index) - 5)))
    pathlib.Path(f"{prefix}.index").write_bytes(
        data + meta + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))
