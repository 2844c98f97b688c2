"""An array that is still in its file: known by shape and type, read only when asked for."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Lazy(NamedTuple):
    """``read()`` -> numpy array of ``shape`` and ``dtype``, fresh from the file on every call.

    A reader returns {name: Lazy}, so that converting a model holds one array of the file at a time
    beside what it has converted.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def load(value) -> np.ndarray:
    """The numpy array of a Lazy, or of anything that numpy can see as an array."""
    return value.read() if isinstance(value, Lazy) else np.asarray(value)


def bfloat16_to_float32(bits) -> np.ndarray:
    """float32 from the uint16 bit patterns of bfloat16 (exact: the upper half of a float32)."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def map_bytes(path, offset: int, dtype, count: int) -> np.ndarray:
    """``count`` items of ``dtype`` at ``offset`` of a file, mapped read-only, not read."""
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
