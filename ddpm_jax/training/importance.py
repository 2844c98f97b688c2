"""Timesteps drawn by their share of the bound, so that its estimate is less noisy (Nichol &
Dhariwal 2021, sec. 3.3; improved-diffusion, resample.py:124).

Pure functions of the history of losses, which is part of the training state: a run that is resumed
draws what it would have drawn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

KEPT = 10        # losses of each timestep
UNIFORM = 0.001  # of the probability is shared evenly, so that no timestep is forgotten


class History(NamedTuple):
    """The newest KEPT losses of each timestep. losses float32 [T,KEPT], written round and round;
    count int32 [T]: losses recorded, from 2 KEPT on less a multiple of KEPT."""

    losses: jax.Array
    count: jax.Array


def start(num_timesteps) -> History:
    """The history before the first update."""
    return History(jnp.zeros((num_timesteps, KEPT)), jnp.zeros(num_timesteps, jnp.int32))


def probabilities(history):
    """float32 [T], in proportion to the root of the mean square loss; all equal until every
    timestep has KEPT losses."""
    root = jnp.sqrt(jnp.square(history.losses).mean(axis=1))
    even = 1.0 / len(root)
    share = root / jnp.maximum(root.sum(), jnp.finfo(root.dtype).tiny)
    return jnp.where((history.count >= KEPT).all(), (1.0 - UNIFORM) * share + UNIFORM * even, even)


def timestep(cumulative, uniform):
    """t int32 [] of a ``uniform`` number in [0, 1). cumulative: sums of the probabilities, [T]."""
    t = (cumulative <= uniform * cumulative[-1]).sum()
    return jnp.minimum(t, len(cumulative) - 1).astype(jnp.int32)


def record(history, t, losses) -> History:
    """The history after a batch: t int32 [B], losses float32 [B], in the order of the examples."""
    order = jnp.argsort(t, stable=True)
    t, losses = t[order], losses[order]
    place, first = jnp.arange(len(t)), jnp.searchsorted(t, t)
    following = jnp.searchsorted(t, t, side="right") - place
    slot = (history.count[t] + place - first) % KEPT
    row = jnp.where(following <= KEPT, t, len(history.count))  # of more than KEPT the last ones
    count = history.count.at[t].add(1)
    return History(history.losses.at[row, slot].set(losses, mode="drop"),
                   jnp.where(count < 2 * KEPT, count, KEPT + count % KEPT))
