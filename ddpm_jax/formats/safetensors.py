"""Reads and writes .safetensors files (8-byte header length, JSON header, raw data).

Read here rather than with the library because numpy has no bfloat16, and because an array should
stay in its file until it is asked for; written with the library.
"""

import json
import os
import struct

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy, bfloat16_to_float32, map_bytes

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
           "I8": "i1", "U8": "u1", "BOOL": "?"}
_MAX_HEADER = 100_000_000  # the library's own limit


def _header(path):
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
        if length > _MAX_HEADER or 8 + length > size:
            raise UserError(f"{path}: not a safetensors file, or cut short in its header")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path}: not a safetensors file: the header is no JSON") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file: the header is no JSON object")
    return header, 8 + length, size


def _lazy(path, name, facts, base, size):
    try:
        kind, shape = facts["dtype"], tuple(int(n) for n in facts["shape"])
        start, end = (int(n) for n in facts["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged: no shape, type and place for {name}") from error
    stored = np.dtype("<u2" if kind == "BF16" else _DTYPES.get(kind, "V1"))
    if kind != "BF16" and kind not in _DTYPES:
        raise UserError(f"{path}: {name} has type {kind}, which is not supported")
    count = int(np.prod(shape, dtype=np.int64))
    if min((*shape, start)) < 0 or end - start != count * stored.itemsize:
        raise UserError(f"{path}: damaged: {name} of shape {shape} is not {end - start} bytes")
    if base + end > size:
        raise UserError(f"{path}: truncated: {name} ends at byte {base + end}, the file at {size}")

    def read():
        array = np.array(map_bytes(path, base + start, stored, count)).reshape(shape)
        return bfloat16_to_float32(array) if kind == "BF16" else array

    return Lazy(shape, np.dtype(np.float32) if kind == "BF16" else stored, read)


def open_safetensors(path) -> tuple[dict[str, Lazy], dict[str, str]]:
    """({name: Lazy array}, metadata) of a .safetensors file; bfloat16 reads as float32.

    Raises UserError for a missing, truncated or foreign file.
    """
    path = os.fspath(path)
    try:
        header, base, size = _header(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    metadata = header.pop("__metadata__", {})
    return {n: _lazy(path, n, facts, base, size) for n, facts in header.items()}, dict(metadata)


def save_safetensors(arrays, path, metadata=None) -> None:
    """Writes {name: array} (any axis order; copied tensor by tensor) to ``path``, atomically."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = os.fspath(path)
    temporary = f"{path}.partial"
    # The library writes an array's buffer as it lies: a permuted view has to be made contiguous.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        save_file(contiguous, temporary, metadata={k: str(v) for k, v in (metadata or {}).items()})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
