"""Which images stand for a split where an evaluation takes fewer than all.

Not the first ones: folders and some data sets are sorted by class. The order is fixed, so that all
processes and all evaluations take the same images.
"""

import numpy as np

from ddpm_jax.data.feed import shuffled_index

SEED = 0
ORDER = f"shuffled, seed {SEED}"     # in a result: records without it took the first images


def permutation(size: int) -> np.ndarray:
    """int32 [size]: a fixed order of 0 ... size-1."""
    return shuffled_index(SEED, np.arange(size), size)


def subset(size: int, num: int | None = None) -> np.ndarray:
    """int [min(num, size)]: all of 0 ... size-1 in order (num None too), or the first ``num`` of
    ``permutation``."""
    return np.arange(size) if num is None or num >= size else permutation(size)[:num]
