"""Reads and writes .safetensors files with the library (version 0.8: its numpy reader is lazy and
knows bfloat16)."""

import json
import os
import struct

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy
from ddpm_jax.storage.files import whole_file

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.float32,
           "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
           "BOOL": np.bool_}


def _opened(path):
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a safetensors file, damaged or cut short ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def open_safetensors(path) -> tuple[dict[str, Lazy], dict[str, str]]:
    """({name: Lazy array}, metadata) of a .safetensors file; bfloat16 reads as float32.

    Raises UserError for a missing, damaged or foreign file.
    """
    path = os.fspath(path)

    def lazy(name, piece):
        kind = piece.get_dtype()
        if kind not in _DTYPES:
            raise UserError(f"{path}: {name} has type {kind}, which is not supported")

        def read():
            with _opened(path) as file:
                return file.get_tensor(name).astype(_DTYPES[kind], copy=False)

        return Lazy(tuple(piece.get_shape()), np.dtype(_DTYPES[kind]), read)

    with _opened(path) as file:
        arrays = {name: lazy(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        return arrays, file.metadata() or {}


def save_safetensors(arrays, path, metadata=None) -> None:
    """Writes {name: array} (any axis order; copied tensor by tensor) to ``path``, atomically.

    Equal arrays and metadata give equal bytes. Raises UserError where it cannot be written.
    """
    # The library writes an array's buffer as it lies: a permuted view has to be made contiguous.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with whole_file(path) as file:
        try:
            save_file(contiguous, file.name, {k: str(v) for k, v in (metadata or {}).items()})
        except SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}") from error
        _settle(file)


def _settle(file):
    """Makes what the library left under the file's name reproducible, and as readable as others.

    It orders metadata at random, and it renames a private file of its own over the given one.
    """
    with open(file.name, "r+b") as written:
        length, = struct.unpack("<Q", written.read(8))
        header = json.loads(written.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        written.seek(8)
        written.write(text.ljust(length))
        os.fchmod(written.fileno(), os.fstat(file.fileno()).st_mode)
