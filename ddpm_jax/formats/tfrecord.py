"""TFRecord files of tf.Example, read without TensorFlow.

A record is uint64 length, uint32 checksum of it, data, uint32 checksum of the data. Everything
damaged raises UserError naming the file and the record.
"""

import pathlib
import struct

import google_crc32c
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.formats import protobuf


def masked_crc32c(data) -> int:
    """Checksum of TFRecord and LevelDB: CRC-32C, rotated right by 15 bits, plus a constant.

    data: bytes or an array (tensorflow/core/lib/hash/crc32c.h).
    """
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecord_offsets(path) -> list[tuple[int, int]]:
    """(offset, length) of each record's data, from one pass over the checked length fields."""
    offsets, size = [], pathlib.Path(path).stat().st_size
    with open(path, "rb") as file:
        position = 0
        while position < size:
            file.seek(position)
            head = file.read(12)
            where = f"{path}, record {len(offsets)}"
            if len(head) < 12:
                raise UserError(f"{where}: cut short; copy the file again")
            length, crc = struct.unpack("<QI", head)
            if masked_crc32c(head[:8]) != crc:
                raise UserError(f"{where}: wrong checksum of the length; not a TFRecord file, or "
                                "damaged: copy it again")
            if position + 16 + length > size:
                raise UserError(f"{where}: cut short; copy the file again")
            offsets.append((position + 12, length))
            position += 16 + length
    return offsets


def tfrecord_read(file, where, offset, length) -> bytes:
    """The data of one record of an open file, its checksum verified."""
    file.seek(offset)
    data = file.read(length)
    if masked_crc32c(data) != int.from_bytes(file.read(4), "little"):
        raise UserError(f"{where}: wrong checksum of the data; copy the file again")
    return data


def parse_example(data, where) -> dict:
    """A tf.Example -> {name: list of bytes or of int}; float features are left out.

    Example.features (1) is a map (1) from key (1) to Feature (2): bytes_list (1) or int64_list (3).
    """
    example = {}
    try:
        for _, features in protobuf.fields(data):
            for _, entry in protobuf.fields(features):
                pair = dict(protobuf.fields(entry))
                for kind, values in protobuf.fields(pair[2]):
                    items = [value for _, value in protobuf.fields(values)]
                    if kind == 1:
                        example[protobuf.text(pair[1])] = [
                            bytes(protobuf.content(item)) for item in items]
                    elif kind == 3:
                        example[protobuf.text(pair[1])] = [
                            number for item in items for number in protobuf.signed_items(item)]
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: not a tf.Example ({error!r})") from error
    return example


def stylegan_image(data, where) -> np.ndarray:
    """A record of StyleGAN's dataset_tool ('shape' [C, H, W], 'data' uint8) -> uint8 [H, W, C]."""
    example = parse_example(data, where)
    try:
        shape, (pixels,) = example["shape"], example["data"]
        return np.frombuffer(pixels, np.uint8).reshape(shape).transpose(1, 2, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not an image of StyleGAN's dataset_tool ({error!r})") from error
