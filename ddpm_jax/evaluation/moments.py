"""Mean and covariance of features: shifted sums, merged exactly, gathered bit for bit."""

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


def add(moments: Moments, features, mask=None) -> Moments:
    """moments with features [B,D] added; mask [B] bool leaves the padding of a last batch out."""
    features = np.asarray(features)
    if mask is not None:
        features = features[np.asarray(mask, bool)]
    n, total, outer = moments.n, moments.total.copy(), moments.outer.copy()
    for start in range(0, len(features), BLOCK):
        x = features[start:start + BLOCK].astype(np.float64) - moments.shift
        n, total, outer = n + len(x), total + x.sum(0), outer + x.T @ x
    return Moments(n, moments.shift, total, outer)


def merge(a: Moments, b: Moments) -> Moments:
    """Both together. Sums of the same shift are added; else b is moved to a's shift first."""
    gap = b.shift - a.shift
    total, outer = b.total, b.outer
    if gap.any():
        cross = np.outer(total, gap)
        outer = outer + cross + cross.T + b.n * np.outer(gap, gap)
        total = total + b.n * gap
    return Moments(a.n + b.n, a.shift, a.total + total, a.outer + outer)


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


def gather(array) -> np.ndarray:
    """The array of every process, [processes, ...], exact for any dtype.

    JAX without x64 would round float64 to float32 on the way: the bits travel as uint8.
    """
    import jax
    array = np.ascontiguousarray(array)
    if jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils
    raw = np.frombuffer(array.tobytes(), np.uint8)
    return np.asarray(multihost_utils.process_allgather(raw)).view(array.dtype).reshape(
        (jax.process_count(), *array.shape))


def gather_moments(moments: Moments) -> Moments:
    """The moments over all processes, the same on each; all must use the same shift."""
    n, total, outer = (gather(np.asarray(x)) for x in (moments.n, moments.total, moments.outer))
    return Moments(int(n.sum()), moments.shift, total.sum(0), outer.sum(0))


# --- the same on the device, for N too large to keep the features -----------------------------

def device_empty(dim: int) -> tuple:
    """(n [], total [D], outer [D,D]) float32 zeros."""
    import jax.numpy as jnp
    return jnp.zeros(()), jnp.zeros(dim), jnp.zeros((dim, dim))


def device_add(sums: tuple, features, mask, shift) -> tuple:
    """sums with features [B,D] where mask [B] holds; shifted, or float32 loses what matters."""
    import jax
    import jax.numpy as jnp
    n, total, outer = sums
    x = jnp.where(mask[:, None], features - shift[None, :], 0)
    squares = jnp.dot(x.T, x, precision=jax.lax.Precision.HIGHEST)
    return n + mask.sum(), total + x.sum(0), outer + squares


def from_device(sums: tuple, shift) -> Moments:
    n, total, outer = (np.asarray(x, np.float64) for x in sums)
    return Moments(int(n), np.asarray(shift, np.float64), total, outer)
