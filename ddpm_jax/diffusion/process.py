"""The forward process q and its posterior (Ho et al. 2020, eq. 2, 4, 6, 7)."""

from typing import NamedTuple

import jax.numpy as jnp


class Normal(NamedTuple):
    """A diagonal Gaussian: mean [B,H,W,C], log_variance broadcastable to it."""

    mean: jnp.ndarray
    log_variance: jnp.ndarray


def extract(table, t):
    """table [T] at t int32 [B] -> [B,1,1,1]."""
    return table[t][:, None, None, None]


def q_mean_variance(schedule, x_start, t):
    """q(x_t | x_0), eq. 4. x_start [B,H,W,C] in [-1,1], t int32 [B] (0 = one step) -> Normal."""
    return Normal(
        extract(schedule.sqrt_alphas_cumprod, t) * x_start,
        extract(schedule.log_one_minus_alphas_cumprod, t),
    )


def q_sample(schedule, x_start, t, noise):
    """x_t ~ q(x_t | x_0), eq. 4. x_start, noise [B,H,W,C]; t int32 [B], 0 = one step.
    -> [B,H,W,C]"""
    return (
        extract(schedule.sqrt_alphas_cumprod, t) * x_start
        + extract(schedule.sqrt_one_minus_alphas_cumprod, t) * noise
    )


def q_posterior(schedule, x_start, x_t, t):
    """q(x_{t-1} | x_t, x_0), eq. 6-7. -> Normal(mean [B,H,W,C], log_variance [B,1,1,1])"""
    return Normal(
        extract(schedule.posterior_mean_coef1, t) * x_start
        + extract(schedule.posterior_mean_coef2, t) * x_t,
        extract(schedule.posterior_log_variance, t),
    )
