"""Reads a PyTorch state dict (.bin, .pt, .pth) with numpy and without running anything in it.

A PyTorch file is a pickle, and a pickle may call any function. This unpickler knows three names
(an ordered dict and the two functions that rebuild a tensor from a piece of a storage) and stands
in for them itself; any other name is refused. Both containers are read: the zip archive (PyTorch
1.6 and later) and the older stream of pickles with the storages behind it.
"""

import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy, bfloat16_to_float32, map_bytes

_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "bf16",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1",
    "ByteStorage": "u1", "BoolStorage": "?",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORED = 0  # zipfile.ZIP_STORED


class _Storage:
    """A run of ``count`` items of one type; ``where()`` -> (file, offset of its first byte)."""

    __slots__ = ("kind", "count", "where")

    def __init__(self, kind, count, where):
        self.kind, self.count, self.where = kind, count, where

    @property
    def stored(self):
        return np.dtype("<u2" if self.kind == "bf16" else self.kind)


def _tensor(storage, offset, shape, stride):
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or not all(
        isinstance(n, int) and n >= 0 for n in numbers
    ):
        raise UserError("a tensor without a proper storage, shape and stride")
    empty = 0 in shape
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if not empty and last >= storage.count:
        raise UserError(f"a tensor reaches item {last} of a storage of {storage.count}")

    def read():
        path, start = storage.where()
        item = storage.stored.itemsize
        flat = map_bytes(path, start + offset * item, storage.stored,
                         0 if empty else last - offset + 1)
        strided = np.lib.stride_tricks.as_strided(flat, shape, [s * item for s in stride],
                                                  writeable=False)
        array = np.array(strided, order="C")
        return bfloat16_to_float32(array) if storage.kind == "bf16" else array

    dtype = np.dtype(np.float32) if storage.kind == "bf16" else storage.stored
    return Lazy(shape, dtype, read)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storage_of):
        super().__init__(file, encoding="utf-8")
        self._storage_of = storage_of

    def find_class(self, module, name):
        # Fresh functions for each name: what a pickle may do to one is gone with this file.
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _tensor(storage, offset, shape,
                                                                      stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise UserError(f"it asks for {module}.{name}: only plain tensors are read from a pickle "
                        "(use a .safetensors file instead)")

    def persistent_load(self, saved):
        if not (isinstance(saved, tuple) and len(saved) >= 5 and saved[0] == "storage"
                and isinstance(saved[1], str) and isinstance(saved[4], int)):
            raise UserError("a storage of an unknown form")
        return self._storage_of(saved[1], str(saved[2]), saved[4])


def _from_zip(path):
    with zipfile.ZipFile(path) as archive:
        members = {}
        for info in archive.infolist():
            members[info.filename.partition("/")[2]] = info
        if "data.pkl" not in members:
            raise UserError("a zip archive without data.pkl: not a PyTorch state dict")
        order = members.get("byteorder")
        if order is not None and archive.read(order) != b"little":
            raise UserError("written on a big-endian machine, which is not supported")

        def storage_of(kind, key, count):
            info = members.get(f"data/{key}")
            storage = _Storage(kind, count, None)
            if info is None or info.compress_type != _STORED:
                raise UserError(f"storage {key} is missing or compressed")
            if info.file_size < count * storage.stored.itemsize:
                raise UserError(f"truncated: storage {key} has {info.file_size} bytes")

            def where():
                with open(path, "rb") as file:
                    file.seek(info.header_offset + 26)
                    name, extra = struct.unpack("<HH", file.read(4))
                return path, info.header_offset + 30 + name + extra

            storage.where = where
            return storage

        return _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), storage_of).load()


def _from_stream(path):
    found = {}

    def storage_of(kind, key, count):
        return found.setdefault(key, _Storage(kind, count, None))

    with open(path, "rb") as file:
        head = [_Unpickler(file, storage_of).load() for _ in range(3)]
        if head[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL] or not isinstance(head[2], dict):
            raise UserError("not a PyTorch file")
        if head[2].get("little_endian") is not True:
            raise UserError("written on a big-endian machine, which is not supported")
        loaded = _Unpickler(file, storage_of).load()
        keys = _Unpickler(file, storage_of).load()
        size = os.path.getsize(path)
        for key in keys:
            if key not in found:
                raise UserError(f"storage {key} belongs to no tensor")
            storage = found[key]
            (count,) = struct.unpack("<q", file.read(8))
            start = file.tell()
            end = start + count * storage.stored.itemsize
            if count != storage.count or end > size:
                raise UserError(f"truncated: storage {key} ends at byte {end}, the file at {size}")
            storage.where = lambda start=start: (path, start)
            file.seek(end)
    if any(storage.where is None for storage in found.values()):
        raise UserError("a tensor's storage is not in the file")
    return loaded


def open_torch(path) -> dict[str, Lazy]:
    """{key: Lazy array} of a PyTorch file that holds a state dict; bfloat16 reads as float32.

    Nothing in the file is run and PyTorch is not imported. Raises UserError, naming the file, for
    anything but a mapping of names to plain tensors.
    """
    path = os.fspath(path)
    try:
        loaded = (_from_zip if zipfile.is_zipfile(path) else _from_stream)(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: not a readable PyTorch file ({error})") from error
    if not isinstance(loaded, dict) or not loaded or not all(
        isinstance(k, str) and isinstance(v, Lazy) for k, v in loaded.items()
    ):
        raise UserError(f"{path}: not a state dict, a mapping of names to tensors")
    return dict(loaded)
