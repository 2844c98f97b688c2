"""Filling in unknown pixels with an unconditional model (RePaint, Lugmayr et al. 2022).

After every step the known part is replaced by the image noised to the level just reached. With
resampling the chain goes back up ``jump_length`` levels and down again, so that the two parts can
agree. Level n is x after n noise steps: 0 is the image, level n is index t = n - 1 of the schedule.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.process import q_sample


def repaint_levels(num_steps, jump_length=10, resamplings=10):
    """Levels in the order they are visited, int [transitions + 1], from num_steps down to 0.

    From every level j that is a multiple of jump_length and below num_steps - jump_length the chain
    goes back up to j + jump_length, ``resamplings`` - 1 times (RePaint, Alg. 1; andreas128/RePaint,
    scheduler.py:150). resamplings=1: plain replacement. Raises ValueError on numbers below 1.
    """
    if jump_length < 1 or resamplings < 1:
        raise ValueError(f"jump_length={jump_length} and resamplings={resamplings} must be at "
                         "least 1")
    left = dict.fromkeys(range(0, num_steps - jump_length, jump_length), resamplings - 1)
    levels = [num_steps]
    while levels[-1] > 0:
        levels.append(levels[-1] - 1)
        if left.get(levels[-1], 0):
            left[levels[-1]] -= 1
            levels.extend(range(levels[-1] + 1, levels[-1] + jump_length + 1))
    return np.array(levels, np.int32)


def replace_known(schedule, x, level, known, mask, noise):
    """x [B,H,W,C] at ``level`` with the pixels where mask is 1 taken from ``known``, noised to that
    level; at level 0 from ``known`` itself, bit for bit.

    known in [-1,1], mask (1: known, 0: to fill in) and noise broadcast to x; level scalar int32.
    """
    t = jnp.full(x.shape[0], jnp.maximum(level - 1, 0), jnp.int32)
    noised = jnp.where(level > 0, q_sample(schedule, known, t, noise), known)
    return jnp.where(mask > 0, noised, x)


def noise_up(schedule, x, level, noise):
    """x at ``level`` -> x at level + 1, one step of q (eq. 2). -> [B,H,W,C]"""
    beta = schedule.betas[level]
    return jnp.sqrt(1.0 - beta) * x + jnp.sqrt(beta) * noise


def inpaint_step(schedule, denoise_step, x, start, end, known, mask, noise, known_noise):
    """One transition between the neighbouring levels ``start`` and ``end`` (scalars int32).

    denoise_step(x, t, noise): a sampler's step without carry, from level t + 1 to t. -> [B,H,W,C]
    """
    def down(x):
        x = denoise_step(x, start - 1, noise)
        return replace_known(schedule, x, end, known, mask, known_noise)

    return jax.lax.cond(end < start, down, lambda x: noise_up(schedule, x, start, noise), x)


def inpaint_loop(schedule, denoise_step, noise_fn, x_T, known, mask, levels):
    """x_0 [B,H,W,C] from x_T along ``levels`` (``repaint_levels``), as one scan.

    noise_fn(i) -> [B,H,W,C], i = 0, 1, ...: two draws a transition. Noise is indexed by transition
    and not by level, since a level is visited more than once.
    """
    def body(x, visit):
        i, start, end = visit
        return inpaint_step(schedule, denoise_step, x, start, end, known, mask,
                            noise_fn(2 * i), noise_fn(2 * i + 1)), None

    levels = jnp.asarray(levels)
    visits = (jnp.arange(len(levels) - 1), levels[:-1], levels[1:])
    return jax.lax.scan(body, x_T, visits)[0]
