"""An array that is still in its file: known by shape and type, read only when needed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Lazy(NamedTuple):
    """``read()`` -> numpy array of ``shape`` and ``dtype``, fresh from the file on every call.

    A reader returns {name: Lazy}, so that converting a model holds one array of the file at a time
    beside what it has converted. ``read`` raises UserError where the file is damaged there.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def load(value) -> np.ndarray:
    """The numpy array of a Lazy, or of anything that numpy can see as an array."""
    return value.read() if isinstance(value, Lazy) else np.asarray(value)
