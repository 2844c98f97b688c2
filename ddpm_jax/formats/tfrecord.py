"""Readers that need no TensorFlow: TFRecord files of tf.Example, LSUN's LMDB, idx, CIFAR's binary.

Everything damaged raises UserError naming the file and the record.
"""

import gzip
import io
import pathlib
import struct
import tarfile
import zlib

import numpy as np

from ddpm_jax.errors import UserError


def _masked_crc(data) -> int:
    """TFRecord's checksum: CRC-32C, rotated right by 15 bits, plus a constant."""
    import google_crc32c
    crc = google_crc32c.value(bytes(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecord_offsets(path) -> list[tuple[int, int]]:
    """(offset, length) of each record's data, from one pass over the checked length fields.

    A record is uint64 length, uint32 checksum of it, data, uint32 checksum of the data.
    """
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
            if _masked_crc(head[:8]) != crc:
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
    if _masked_crc(data) != int.from_bytes(file.read(4), "little"):
        raise UserError(f"{where}: wrong checksum of the data; copy the file again")
    return data


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def _fields(data):
    """The fields of a protocol buffer: yields (number, int or bytes)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        else:
            size, at = {1: lambda at: (8, at), 5: lambda at: (4, at),
                        2: lambda at: _varint(data, at)}[kind](at)
            value, at = data[at:at + size], at + size
            if at > len(data):
                raise ValueError("a field is longer than its message")
        yield tag >> 3, value


def _packed_ints(data):
    at, values = 0, []
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def parse_example(data, where) -> dict:
    """A tf.Example -> {name: list of bytes or of int}; float features are left out.

    Example.features (1) is a map (1) from key (1) to Feature (2): bytes_list (1) or int64_list (3).
    """
    example = {}
    try:
        for _, features in _fields(data):
            for _, entry in _fields(features):
                pair = dict(_fields(entry))
                for kind, values in _fields(pair[2]):
                    items = [v for _, v in _fields(values)]
                    if kind == 1:
                        example[pair[1].decode()] = items
                    elif kind == 3:
                        example[pair[1].decode()] = [i for v in items for i in (
                            [v] if isinstance(v, int) else _packed_ints(v))]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a tf.Example ({error!r})") from error
    return example


def stylegan_image(data, where) -> np.ndarray:
    """A record of StyleGAN's dataset_tool ('shape' [C, H, W], 'data' uint8) -> uint8 [H, W, C]."""
    example = parse_example(data, where)
    try:
        shape, (pixels,) = example["shape"], example["data"]
        return np.frombuffer(pixels, np.uint8).reshape(shape).transpose(1, 2, 0)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: not an image of StyleGAN's dataset_tool ({error!r})") from error


def lmdb_items(path):
    """LSUN's LMDB folder -> (count, iterator of (where, encoded image bytes) in order of key)."""
    import lmdb
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
        count = env.stat()["entries"]
        need = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    except lmdb.Error as error:
        raise UserError(f"{path}: not a readable LMDB folder ({error})") from error
    if (pathlib.Path(path) / "data.mdb").stat().st_size < need:  # reading on would be a SIGBUS
        raise UserError(f"{path}: data.mdb is cut short; unpack the archive again")

    def items():
        try:
            with env, env.begin(buffers=False) as transaction:
                for key, value in transaction.cursor():
                    yield f"{path}, key {key.decode(errors='replace')}", value
        except lmdb.Error as error:
            raise UserError(f"{path}: damaged ({error}); unpack the archive again") from error

    return count, items()


def read_idx(path) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped (as Fashion-MNIST is published) or not."""
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        zero, kind, rank = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{rank}I", data[4:4 + 4 * rank])
        if (zero, kind) != (0, 8):
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: missing, damaged or not an idx file ({error})") from error


def tar_members(path):
    """The regular files of a tar archive, in its order: yields (name, binary stream)."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, io.BytesIO(archive.extractfile(member).read())
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path}: missing, damaged or not a tar archive ({error})") from error


def cifar_batch(data, where):
    """One file of the binary CIFAR-10 -> (uint8 [n, 32, 32, 3], labels uint8 [n])."""
    rows = np.frombuffer(data, np.uint8)
    if not len(rows) or len(rows) % 3073 or rows[::3073].max() > 9:
        raise UserError(f"{where}: not a batch of the binary CIFAR-10 (n x 3073 bytes)")
    rows = rows.reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
