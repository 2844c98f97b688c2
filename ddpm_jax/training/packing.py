"""Parameters as a few arrays: the kernels of each shape stacked, and all biases and scales end to
end.

The optimizer and the average then are a few large operations instead of hundreds of small ones, and
one cast makes the kernels ready to compute with. Only the train program (programs.py) packs:
checkpoints, sampling and evaluation see the named tree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# How the OHWI kernels of 3x3 convolutions lie in a stack. XLA wants them as HWIO on a TPU and
# would copy every one of them, and its gradient, at every step.
ORDERS = {"tpu": (1, 2, 3, 0)}
AS_THEY_ARE = (0, 1, 2, 3)


def order_on(platform):
    return ORDERS.get(platform, AS_THEY_ARE)


class Packed(NamedTuple):
    """kernels: {'OxHxWxI': [n, ...]}, the leaves of two axes and more, those of one shape stacked;
    vectors [m]: the rest."""

    kernels: dict[str, jax.Array]
    vectors: jax.Array


def _groups(leaves) -> tuple[dict[str, list[int]], list[int]]:
    """Which leaves lie in each array of a Packed, in the tree's order."""
    kernels: dict[str, list[int]] = {}
    vectors = []
    for i, x in enumerate(leaves):
        group = kernels.setdefault("x".join(map(str, x.shape)), []) if x.ndim > 1 else vectors
        group.append(i)
    return kernels, vectors


def _permuted(x, order):
    return x.transpose(order) if x.ndim == len(order) else x


def pack(tree, order=AS_THEY_ARE) -> Packed:
    """Packed from a tree of arrays of one dtype; order: that of the axes of 4-D leaves in it."""
    leaves = jax.tree.leaves(tree)
    kernels, vectors = _groups(leaves)
    return Packed(
        {shape: jnp.stack([_permuted(leaves[i], order) for i in group])
         for shape, group in kernels.items()},
        jnp.concatenate([leaves[i] for i in vectors]))


def unpack(packed: Packed, like, order=AS_THEY_ARE):
    """The tree that ``pack`` took; like: its shapes (arrays or ShapeDtypeStructs)."""
    leaves, structure = jax.tree.flatten(like)
    kernels, vectors = _groups(leaves)
    out = list(leaves)
    back = tuple(np.argsort(order))
    for shape, group in kernels.items():
        stack = packed.kernels[shape]
        for i, piece in zip(group, lax.split(stack, [1] * len(group)), strict=True):
            out[i] = _permuted(piece[0], back)
    pieces = lax.split(packed.vectors, [leaves[i].size for i in vectors])
    for i, piece in zip(vectors, pieces, strict=True):
        out[i] = piece
    return structure.unflatten(out)


def kernels_as(packed: Packed, dtype) -> Packed:
    """The same with kernels in the type they are used in."""
    return packed._replace(kernels=jax.tree.map(lambda x: x.astype(dtype), packed.kernels))


def pack_state(state, like, order=AS_THEY_ARE):
    """``state`` (any tree) with each part shaped like the tree ``like`` packed: weights, their
    average, moments."""
    structure = jax.tree.structure(like)
    return jax.tree.map(
        lambda part: pack(part, order) if jax.tree.structure(part) == structure else part,
        state, is_leaf=lambda part: jax.tree.structure(part) == structure)


def unpack_state(state, like, order=AS_THEY_ARE):
    """The inverse of ``pack_state``, in new arrays: jit would hand on what stays as it is."""
    state = jax.tree.map(
        lambda part: unpack(part, like, order) if isinstance(part, Packed) else part,
        state, is_leaf=lambda part: isinstance(part, Packed))
    return jax.tree.map(jnp.copy, state)
