"""Reads a PyTorch state dict (.bin, .pt, .pth) with numpy and without running anything in it.

A PyTorch file is a pickle, of which three names are known (an ordered dict and the two functions
that rebuild a tensor from a piece of a storage); see restricted_pickle. Both containers are read:
the zip archive (PyTorch 1.6 and later) and the older stream of pickles with the storages behind it.
"""

import collections
import contextlib
import io
import math
import os
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.formats import restricted_pickle
from ddpm_jax.formats.lazy import Lazy

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_STORAGES = {
    "DoubleStorage": np.dtype("<f8"), "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"), "BFloat16Storage": _BFLOAT16, "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"), "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"), "BoolStorage": np.dtype("?"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class _Storage:
    """A run of ``count`` items of one type; ``read()`` -> their bytes, as many at least."""

    __slots__ = ("dtype", "count", "read")

    def __init__(self, dtype, count, read=None):
        self.dtype, self.count, self.read = dtype, count, read

    @property
    def size(self):
        return self.count * self.dtype.itemsize


def _tensor(storage, offset, shape, stride):
    shape, stride = tuple(shape), tuple(stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or not all(
        isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)
    ):
        raise UserError("a tensor without a proper storage, shape and stride")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and max(last + 1, math.prod(shape)) > storage.count:
        raise UserError(f"a tensor of shape {shape} reaches item {last}, outside its storage of "
                        f"{storage.count}")
    dtype = np.dtype(np.float32) if storage.dtype == _BFLOAT16 else storage.dtype

    def read():
        if 0 in shape:
            return np.zeros(shape, dtype)
        flat = np.frombuffer(storage.read(), storage.dtype, storage.count)
        strided = np.lib.stride_tricks.as_strided(
            flat[offset:], shape, [s * flat.itemsize for s in stride], writeable=False)
        return strided.astype(dtype, order="C")

    return Lazy(shape, dtype, read)


def _load(file, storage_of):
    """The pickle at the file's position; storage_of(type, key, count) -> _Storage."""
    def persistent_load(saved):
        if not (isinstance(saved, tuple) and len(saved) >= 5 and saved[0] == "storage"
                and saved[1] in _STORAGES and isinstance(saved[4], int) and saved[4] >= 0):
            raise UserError("a storage of an unknown form")
        return storage_of(_STORAGES[saved[1]], str(saved[2]), saved[4])

    return restricted_pickle.load(file, {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"):
            lambda storage, offset, shape, stride, *_: _tensor(storage, offset, shape, stride),
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        **{("torch", name): name for name in _STORAGES},
    }, "only plain tensors are read from a pickle (use a .safetensors file instead)",
        persistent_load)


@contextlib.contextmanager
def _problems(path):
    """Whatever a damaged file raises, as one line that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a broken pickle or archive raises nearly anything
        raise UserError(f"{path}: not a readable PyTorch file, or damaged "
                        f"({str(error) or type(error).__name__})") from error


def _from_zip(path, opened):
    with opened() as file, zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise UserError("a compressed zip archive: not a PyTorch state dict")
        if "data.pkl" not in members:
            raise UserError("a zip archive without data.pkl: not a PyTorch state dict")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise UserError("written on a big-endian machine, which is not supported")
        end = file.seek(0, os.SEEK_END)

        def storage_of(dtype, key, count):
            info, storage = members.get(f"data/{key}"), _Storage(dtype, count)
            if info is None:
                raise UserError(f"storage {key} is missing")
            if info.file_size < storage.size or info.header_offset + info.file_size > end:
                raise UserError(f"truncated: storage {key} has {info.file_size} bytes")
            storage.read = lambda: _read_member(path, opened, info)
            return storage

        return _load(io.BytesIO(archive.read(members["data.pkl"])), storage_of)


def _read_member(path, opened, info):
    """The bytes of one stored member of a zip, its checksum verified, without the directory."""
    with _problems(path), opened() as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, os.SEEK_CUR)
        data = file.read(info.file_size)
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise UserError(f"damaged: {info.filename} fails its checksum")
        return data


def _from_stream(path, opened):
    found = {}

    def storage_of(dtype, key, count):
        storage = found.setdefault(key, _Storage(dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise UserError(f"storage {key} has two types or sizes")
        return storage

    def read(start, size):
        with _problems(path), opened() as file:
            file.seek(start)
            data = file.read(size)
            if len(data) != size:
                raise UserError(f"truncated: {len(data)} bytes of {size} at byte {start}")
            return data

    with opened() as file:
        head = [_load(file, storage_of) for _ in range(3)]
        if head[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL] or not isinstance(head[2], dict):
            raise UserError("not a PyTorch file")
        loaded = _load(file, storage_of)
        if head[2].get("little_endian") is not True:
            raise UserError("written on a big-endian machine, which is not supported")
        keys = _load(file, storage_of)
        at = file.tell()
        end = file.seek(0, os.SEEK_END)
        for key in keys:
            if key not in found:
                raise UserError(f"storage {key} belongs to no tensor")
            storage = found[key]
            if read(at, 8) != struct.pack("<q", storage.count) or at + 8 + storage.size > end:
                raise UserError(f"truncated: storage {key} of {storage.count} items is not whole")
            storage.read = lambda start=at + 8, size=storage.size: read(start, size)
            at += 8 + storage.size
    if any(storage.read is None for storage in found.values()):
        raise UserError("a tensor's storage is not in the file")
    return loaded


def open_torch(path, content: bytes | None = None) -> dict[str, Lazy]:
    """{key: Lazy array} of a PyTorch file that holds a state dict; bfloat16 reads as float32.

    content: the file's bytes, where they are at hand (of a bucket, say); ``path`` then only names
    it. Nothing in the file is run and PyTorch is not imported. Checksums, which the zip form has,
    are verified when an array is read. Raises UserError, naming the file, for anything but a
    mapping of names to plain tensors.
    """
    path = os.fspath(path)

    def opened():
        return open(path, "rb") if content is None else io.BytesIO(content)

    with _problems(path):
        with opened() as file:
            read = _from_zip if file.read(2) == b"PK" else _from_stream
        loaded = read(path, opened)
        if not isinstance(loaded, dict) or not loaded or not all(
            isinstance(k, str) and isinstance(v, Lazy) for k, v in loaded.items()
        ):
            raise UserError("not a state dict, a mapping of names to tensors")
        return dict(loaded)
