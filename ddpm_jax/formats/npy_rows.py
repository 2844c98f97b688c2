"""Arrays of .npy and .npz files on disk, their rows read when they are needed."""

import contextlib
import math
import os
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import UserError

COPY_BYTES = 1 << 24
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0}


class Rows(NamedTuple):
    """An array on disk. read(start, count) -> rows start ... start+count-1, from any thread."""
    shape: tuple
    dtype: np.dtype
    read: Callable


def _header(file) -> tuple:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the .npy format")
    return _HEADERS[version](file)


def _rows(file, start, end) -> Rows:
    """The array whose .npy form lies in ``file`` from byte ``start`` to byte ``end``."""
    file.seek(start)
    shape, fortran, dtype = _header(file)
    if dtype.hasobject:
        raise UserError("holds Python objects, not an array of numbers")
    if fortran and len(shape) > 1:
        raise UserError("is stored in Fortran order; save it with np.ascontiguousarray")
    first, size = file.tell(), dtype.itemsize * math.prod(shape[1:])
    if not shape or min(shape) < 0 or first + size * shape[0] > end:
        raise UserError(f"is cut short or damaged: {end - first:,} bytes for an array of shape "
                        f"{shape}")

    descriptor = os.dup(file.fileno())      # outlives the file object, and ends with read()

    def read(at, count):
        data = os.pread(descriptor, count * size, first + at * size)
        return np.frombuffer(data, dtype).reshape(count, *shape[1:])

    weakref.finalize(read, os.close, descriptor)

    return Rows(tuple(shape), dtype, read)


@contextlib.contextmanager
def _problems(what):
    """Whatever a damaged file raises, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # numpy parses a header as Python, which raises many types
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"is not a readable {what} ({reason})") from error


def open_npy(file) -> Rows:
    """The array of a .npy file. file: binary, on disk. Raises UserError."""
    with _problems(".npy of numbers"):
        return _rows(file, 0, file.seek(0, os.SEEK_END))


def open_npz(file, choose: Callable) -> Rows:
    """One array of an .npz file, its checksum verified; a compressed one is unpacked to a temporary
    file. file: binary, on disk; choose([names]) -> the name. Raises UserError."""
    with _problems(".npz of plain arrays"):
        with zipfile.ZipFile(file) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            info = archive.getinfo(f"{choose(names)}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                with tempfile.TemporaryFile() as unpacked:
                    with archive.open(info) as member:
                        shutil.copyfileobj(member, unpacked, COPY_BYTES)
                    unpacked.flush()
                    return open_npy(unpacked)
            with archive.open(info) as member:
                while member.read(COPY_BYTES):      # verifies the checksum
                    pass
        file.seek(info.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        start = info.header_offset + 30 + name + extra
        return _rows(file, start, start + info.file_size)
