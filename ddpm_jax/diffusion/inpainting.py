"""Filling in unknown pixels with an unconditional model (RePaint, Lugmayr et al. 2022).

After every step the known part is replaced by the image noised to the level just reached. With
resampling the chain goes back up ``jump_length`` levels and down again, so that the two parts can
agree. Level n is x after n noise steps: 0 is the image, level n is index t = n - 1 of the schedule.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.process import q_sample


class Visits(NamedTuple):
    """The network calls in order. t int32 [N]: each goes from level t + 1 to t. scale, sigma
    float32 [N]: before it x becomes scale x + sigma noise, which is q from the level reached before
    to t + 1 (1 and 0 where that is the same level)."""

    t: np.ndarray
    scale: np.ndarray
    sigma: np.ndarray


def repaint_levels(num_steps, jump_length=10, resamplings=10):
    """Levels in the order they are visited, int [transitions + 1], from num_steps down to 0.

    From every level j that is a multiple of jump_length and below num_steps - jump_length the chain
    goes back up to j + jump_length, ``resamplings`` - 1 times (RePaint, Alg. 1; andreas128/RePaint,
    scheduler.py:150). resamplings=1: plain replacement. Raises ValueError on numbers below 1, and
    where resampling is requested of a chain that is too short for one jump.
    """
    if jump_length < 1 or resamplings < 1:
        raise ValueError(f"jump_length={jump_length} and resamplings={resamplings} must be at "
                         "least 1")
    if resamplings > 1 and jump_length >= num_steps:
        raise ValueError(f"jump_length={jump_length} must be below the {num_steps} steps of the "
                         "chain, or resamplings 1")
    left = dict.fromkeys(range(0, num_steps - jump_length, jump_length), resamplings - 1)
    levels = [num_steps]
    while levels[-1] > 0:
        levels.append(levels[-1] - 1)
        if left.get(levels[-1], 0):
            left[levels[-1]] -= 1
            levels.extend(range(levels[-1] + 1, levels[-1] + jump_length + 1))
    return np.array(levels, np.int32)


def repaint_visits(schedule, jump_length=10, resamplings=10) -> Visits:
    """The network calls of ``repaint_levels`` on a schedule; the steps of q between two of them are
    one (eq. 4 between two levels). Raises ValueError as ``repaint_levels``."""
    betas = np.asarray(schedule.betas, np.float64)
    levels = repaint_levels(len(betas), jump_length, resamplings)
    starts = levels[:-1][np.diff(levels) < 0]
    reached = np.concatenate([starts[:1], starts[:-1] - 1])
    kept = np.array([np.prod(1.0 - betas[low:high])
                     for low, high in zip(reached, starts, strict=True)])
    return Visits(starts - 1, np.sqrt(kept).astype(np.float32),
                  np.sqrt(1.0 - kept).astype(np.float32))


def replace_known(schedule, x, level, known, mask, noise):
    """x [B,H,W,C] at ``level`` with the pixels where mask is 1 taken from ``known``, noised to that
    level; at level 0 from ``known`` itself, bit for bit.

    known in [-1,1], mask (1: known, 0: to fill in) and noise broadcast to x; level scalar int32.
    """
    t = jnp.full(x.shape[0], jnp.maximum(level - 1, 0), jnp.int32)
    noised = jnp.where(level > 0, q_sample(schedule, known, t, noise), known)
    return jnp.where(mask > 0, noised, x)


def inpaint_step(schedule, denoise_step, x, visit, known, mask, noises):
    """x [B,H,W,C] at the level reached before -> x at level visit.t.

    denoise_step(x, t, noise): a sampler's step without memory, from level t + 1 to t. visit: one
    entry of Visits, scalars. noises: three of [B,H,W,C], drawn anew for each visit and not for each
    level, since a level is visited more than once.
    """
    up, down, replacement = noises
    x = denoise_step(visit.scale * x + visit.sigma * up, visit.t, down)
    return replace_known(schedule, x, visit.t, known, mask, replacement)
