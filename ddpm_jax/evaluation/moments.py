"""Mean and covariance of features, from sums about a shift near their mean."""

from typing import NamedTuple

import numpy as np

BLOCK = 1024


class Moments(NamedTuple):
    """float64 sums over n features x [D], y = x - shift: total = sum(y), outer = sum(y y')."""
    n: int
    shift: np.ndarray
    total: np.ndarray
    outer: np.ndarray


def empty(dim: int, shift=None) -> Moments:
    """No features yet. shift [D]: near their mean (a reference's), against cancellation."""
    shift = np.zeros(dim) if shift is None else np.asarray(shift, np.float64)
    return Moments(0, shift, np.zeros(dim), np.zeros((dim, dim)))


def add(moments: Moments, features) -> Moments:
    """moments with features [B,D] added."""
    features = np.asarray(features)
    n, total, outer = moments.n, moments.total.copy(), moments.outer.copy()
    for start in range(0, len(features), BLOCK):
        x = features[start:start + BLOCK].astype(np.float64) - moments.shift
        n, total, outer = n + len(x), total + x.sum(0), outer + x.T @ x
    return Moments(n, moments.shift, total, outer)


def of(features, shift=None) -> Moments:
    """Moments of features [N,D]; the shift defaults to the mean of the first block."""
    features = np.asarray(features)
    if shift is None and len(features):
        shift = features[:BLOCK].astype(np.float64).mean(0)
    return add(empty(features.shape[1], shift), features)


def finish(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """(mean [D], covariance [D,D] divided by n - 1). ValueError for n < 2."""
    if moments.n < 2:
        raise ValueError(f"a covariance needs 2 features or more, got {moments.n}")
    mean = moments.total / moments.n
    cov = (moments.outer - moments.n * np.outer(mean, mean)) / (moments.n - 1)
    return moments.shift + mean, (cov + cov.T) / 2


def mean_and_cov(features) -> tuple[np.ndarray, np.ndarray]:
    return finish(of(features))
