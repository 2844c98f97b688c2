"""The reverse process: one step of each sampler (Ho et al. 2020, Alg. 2).

Callables: ``predict_fn(x_t, t [B]) -> Prediction`` and ``noise_fn(t) -> [B,H,W,C]``; t counts steps
of the schedule at hand. The loop over t is the caller's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from ddpm_jax.diffusion.process import q_sample


class Sampler(NamedTuple):
    """step(schedule, prediction, x_t, t, noise, memory) -> (x_{t-1} [B,H,W,C], memory), t scalar
    int32. start(x_T) -> memory: what a step keeps for the next one, a tree of [B,...] arrays."""

    step: Callable
    start: Callable[[Any], Any] = lambda x_T: ()


def ancestral_step(schedule, prediction, x_t, t, noise, memory=()):
    """Alg. 2 line 4: no noise at t = 0."""
    scale = jnp.where(t > 0, jnp.exp(0.5 * prediction.log_variance), 0.0)
    return prediction.mean + scale * noise, memory


def ddim_step(schedule, prediction, x_t, t, noise, memory=()):
    """Without noise (Song et al. 2020, eq. 12 with sigma = 0)."""
    previous = schedule.alphas_cumprod_prev[t]
    return (jnp.sqrt(previous) * prediction.x_start
            + jnp.sqrt(1.0 - previous) * prediction.eps), memory


SAMPLERS = {"ancestral": Sampler(ancestral_step), "ddim": Sampler(ddim_step)}


def reverse_step(sampler, schedule, predict_fn, noise_fn, x_t, t, memory):
    """-> (x_{t-1} [B,H,W,C], memory, x_0 predicted at t [B,H,W,C])"""
    prediction = predict_fn(x_t, jnp.full(x_t.shape[0], t, jnp.int32))
    previous, memory = sampler.step(schedule, prediction, x_t, t, noise_fn(t), memory)
    return previous, memory, prediction.x_start


def interpolate(schedule, x_start1, x_start2, t, weights, noise1, noise2):
    """Latents between two images at step t (Fig. 8): mixtures of the noised images, not of x_0.

    x_start1, x_start2, noise1, noise2 [H,W,C]; t int; weights [B] of the second image in [0, 1].
    -> x_t [B,H,W,C], to be decoded by t+1 reverse steps (diffusion_utils.py:281)
    """
    both = q_sample(
        schedule,
        jnp.stack([x_start1, x_start2]),
        jnp.full(2, t, jnp.int32),
        jnp.stack([noise1, noise2]),
    )
    w = weights[:, None, None, None]
    return (1.0 - w) * both[:1] + w * both[1:]
