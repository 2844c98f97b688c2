"""Parameters as a few vectors: the kernels of each size end to end, and all biases and scales.

The optimizer and the average then are a few large operations instead of hundreds of small ones, and
one cast makes the kernels ready to compute with. Checkpoints hold the named tree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Packed(NamedTuple):
    """kernels: {'SIZE': [n*SIZE]}, the leaves of two axes and more, those of one size end to end;
    vectors [m]: the rest."""

    kernels: dict[str, jax.Array]
    vectors: jax.Array


def _groups(leaves) -> tuple[dict[str, list[int]], list[int]]:
    """Which leaves lie in each vector of a Packed, in the tree's order."""
    kernels: dict[str, list[int]] = {}
    vectors = []
    for i, x in enumerate(leaves):
        (kernels.setdefault(str(x.size), []) if x.ndim > 1 else vectors).append(i)
    return kernels, vectors


def pack(tree) -> Packed:
    """Packed from a tree of arrays of one dtype."""
    leaves = jax.tree.leaves(tree)
    kernels, vectors = _groups(leaves)

    def join(group):
        return jnp.concatenate([leaves[i].reshape(-1) for i in group])

    return Packed({size: join(group) for size, group in kernels.items()}, join(vectors))


def unpack(packed: Packed, like):
    """The tree that ``pack`` took; like: its shapes (arrays or ShapeDtypeStructs)."""
    leaves, structure = jax.tree.flatten(like)
    kernels, vectors = _groups(leaves)
    out = list(leaves)

    def cut(vector, group):
        for i, piece in zip(group, lax.split(vector, [leaves[i].size for i in group]), strict=True):
            out[i] = piece.reshape(leaves[i].shape)

    for size, group in kernels.items():
        cut(packed.kernels[size], group)
    cut(packed.vectors, vectors)
    return structure.unflatten(out)


def kernels_as(params, dtype):
    """Params, packed or a tree, with kernels in the type they are used in."""
    if isinstance(params, Packed):
        return params._replace(kernels=jax.tree.map(lambda x: x.astype(dtype), params.kernels))
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)


def pack_state(state, like):
    """``state`` (any tree) with each part shaped like the tree ``like`` packed: weights, their
    average, moments."""
    structure = jax.tree.structure(like)
    return jax.tree.map(
        lambda part: pack(part) if jax.tree.structure(part) == structure else part,
        state, is_leaf=lambda part: jax.tree.structure(part) == structure)


def unpack_state(state, like):
    """The inverse of ``pack_state``, in new arrays: jit would hand on what stays as it is."""
    state = jax.tree.map(
        lambda part: unpack(part, like) if isinstance(part, Packed) else part,
        state, is_leaf=lambda part: isinstance(part, Packed))
    return jax.tree.map(jnp.copy, state)
