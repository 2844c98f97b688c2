"""Reads .npy files of numbers, and those that hold a dict of arrays, without running anything.

``np.save`` of a dict writes a pickle of an array of one object; see restricted_pickle.
"""

import contextlib
import io
import re
import zipfile

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.formats import restricted_pickle

_ADVICE = "only dicts of arrays are read from a pickle (save an .npz instead)"


def _array(dtype, data, shape, order="C"):
    """dtype: what ``_names`` made of numpy's; UserError where it is not that of numbers."""
    code, byte_order = dtype.value
    if not re.fullmatch(r"[biufc][0-9]{1,2}", code):
        raise UserError(f"refused: an array of type {code[:20]!r}")
    return np.frombuffer(data, np.dtype(code).newbyteorder(byte_order)).reshape(shape, order=order)


def _names():
    """New stand-ins for what pickles of arrays call, by the modules of numpy 1 and 2."""
    class Dtype:
        def __init__(self, code, *_):
            self.value = str(code), "="

        def __setstate__(self, state):
            self.value = self.value[0], state[1] if state[1] in ("<", ">") else "="

    class Array:
        def __setstate__(self, state):
            _, shape, dtype, fortran, data = state
            self.value = data[0] if isinstance(data, list) and len(data) == 1 else _array(
                dtype, data, shape, "F" if fortran else "C")

    names = {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): Dtype}
    for numpy in ("numpy._core", "numpy.core"):
        names |= {(f"{numpy}.multiarray", "_reconstruct"): lambda *_: Array(),
                  (f"{numpy}.multiarray", "scalar"): lambda *of: _array(*of, shape=())[()]}
    return names | {  # as protocol 2 writes bytes
        ("_codecs", "encode"): lambda text, encoding: str(text).encode("latin1"),
        ("__builtin__", "bytes"): lambda: b""}


def _plain(value):
    value = getattr(value, "value", value)  # of an Array
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return value


def _dict(file) -> dict:
    value = _plain(restricted_pickle.load(file, _names(), _ADVICE))
    if not isinstance(value, dict):
        raise UserError(f"it holds a {type(value).__name__}, not a dict of arrays")
    return value


@contextlib.contextmanager
def _problems(path, kind):
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path}: not a readable {kind} ({error})") from error


def read_npy(content: bytes, path) -> np.ndarray | dict:
    """The array in the bytes of a .npy file, or the dict {name: array, number or text} in it.

    Raises UserError, naming ``path``, for a damaged file, code, or other objects.
    """
    file = io.BytesIO(content)
    with _problems(path, ".npy file"):
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        _, _, dtype = read_header(file)
        if dtype.hasobject:
            return _dict(file)
        return np.load(io.BytesIO(content), allow_pickle=False)


def read_pickle(content: bytes, path) -> dict:
    """The dict of arrays in a pickle, or in a PyTorch zip of numpy's arrays; raises as above."""
    file = io.BytesIO(content)
    with _problems(path, "pickle of a dict"):
        if content.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                file = io.BytesIO(archive.read(name))
        return _dict(file)
