"""What the network predicts and how to read it: eps, x_0, x_{t-1} or v; fixed or learned variance.

The rows of Table 2 (Ho et al. 2020, sec. 3.2), ``PARAMETERIZATIONS`` x ``VARIANCES``, and two that
came later: v (Salimans & Ho 2022) and learned_range (Nichol & Dhariwal 2021).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ddpm_jax.diffusion.process import extract, q_posterior


class Parameterization(NamedTuple):
    """target(schedule, x_start, x_t, t, noise): what to regress on, [B,H,W,C].
    x_start(schedule, output, x_t, t): x_0 read back from the network's output, [B,H,W,C].
    factor(schedule, t): the square error of the target that an x_0 off by 1 makes, [B,1,1,1].
    mean: None where the reverse mean is the posterior's at that x_0; else
    mean(schedule, output, x_t, t)."""

    target: Callable
    x_start: Callable
    factor: Callable
    mean: Callable | None = None


class Prediction(NamedTuple):
    """Everything that a sampler's step may want: x_start, eps, mean [B,H,W,C], log_variance."""

    x_start: jnp.ndarray
    eps: jnp.ndarray
    mean: jnp.ndarray
    log_variance: jnp.ndarray


def _start_from_eps(schedule, eps, x_t, t):
    return (
        extract(schedule.sqrt_recip_alphas_cumprod, t) * x_t
        - extract(schedule.sqrt_recipm1_alphas_cumprod, t) * eps
    )


def eps_from_start(schedule, x_start, x_t, t):
    """The noise that q_sample would have used to reach x_t from x_start. -> [B,H,W,C]"""
    return (
        extract(schedule.sqrt_recip_alphas_cumprod, t) * x_t - x_start
    ) / extract(schedule.sqrt_recipm1_alphas_cumprod, t)


def _start_from_previous(schedule, previous, x_t, t):
    coef1 = extract(schedule.posterior_mean_coef1, t)
    return previous / coef1 - extract(schedule.posterior_mean_coef2, t) / coef1 * x_t


def snr(schedule, t):
    """Signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod) at t int32 [B] -> [B,1,1,1]."""
    return jnp.square(extract(schedule.sqrt_alphas_cumprod, t)
                      / extract(schedule.sqrt_one_minus_alphas_cumprod, t))


def _v(schedule, x_start, x_t, t, noise):
    return (extract(schedule.sqrt_alphas_cumprod, t) * noise
            - extract(schedule.sqrt_one_minus_alphas_cumprod, t) * x_start)


def _start_from_v(schedule, v, x_t, t):
    return (extract(schedule.sqrt_alphas_cumprod, t) * x_t
            - extract(schedule.sqrt_one_minus_alphas_cumprod, t) * v)


PARAMETERIZATIONS = {
    # eq. 11-12, the paper's choice
    "eps": Parameterization(
        target=lambda schedule, x_start, x_t, t, noise: noise, x_start=_start_from_eps, factor=snr
    ),
    "x_start": Parameterization(
        target=lambda schedule, x_start, x_t, t, noise: x_start,
        x_start=lambda schedule, output, x_t, t: output,
        factor=lambda schedule, t: jnp.ones((t.shape[0], 1, 1, 1)),
    ),
    # the posterior mean of eq. 8; its raw output stays the mean (diffusion_utils_2.py:152)
    "x_prev": Parameterization(
        target=lambda schedule, x_start, x_t, t, noise: q_posterior(
            schedule, x_start, x_t, t
        ).mean,
        x_start=_start_from_previous,
        factor=lambda schedule, t: jnp.square(extract(schedule.posterior_mean_coef1, t)),
        mean=lambda schedule, output, x_t, t: output,
    ),
    # Salimans & Ho 2022, app. D: the one target that is defined at zero signal and at zero noise
    "v": Parameterization(
        target=_v, x_start=_start_from_v, factor=lambda schedule, t: snr(schedule, t) + 1.0),
}


def _split(output):
    return jnp.split(output, 2, axis=-1)


class Variance(NamedTuple):
    """split(output [B,H,W,C or 2C]) -> (what ``Parameterization`` reads, extra or None).
    log_variance(schedule, extra, t) -> [B,1,1,1] or [B,H,W,C]. channels: output / input."""

    split: Callable
    log_variance: Callable
    channels: int = 1


def _between_bounds(schedule, extra, t):
    last = schedule.betas.shape[0] - 1
    low = extract(schedule.posterior_variance, jnp.minimum(jnp.maximum(t, 1), last))
    low, high = jnp.log(jnp.maximum(low, 1e-20)), jnp.log(extract(schedule.betas, t))
    fraction = (extra + 1.0) / 2.0
    return fraction * high + (1.0 - fraction) * low


VARIANCES = {
    # sigma^2 = beta (sec. 3.2): optimal for x_0 ~ N(0, I); CIFAR-10 runs
    "fixed_large": Variance(
        lambda output: (output, None),
        lambda schedule, extra, t: extract(schedule.fixed_large_log_variance, t),
    ),
    # sigma^2 = posterior variance (sec. 3.2): optimal for a single x_0; 256x256 runs
    "fixed_small": Variance(
        lambda output: (output, None),
        lambda schedule, extra, t: extract(schedule.posterior_log_variance, t),
    ),
    # a second half of the channels is the log-variance itself (Table 2, diffusion_utils_2.py:134)
    "learned": Variance(_split, lambda schedule, extra, t: extra, channels=2),
    # the second half interpolates log-variances between the posterior's and beta, -1 to 1 (Nichol &
    # Dhariwal 2021, eq. 15; the posterior's at t = 1 stands for that at t = 0)
    "learned_range": Variance(_split, _between_bounds, channels=2),
}


def dynamic_threshold(x_start, share):
    """x_start [B,H,W,C] clipped to its image's quantile ``share`` of |x_start| where that is above
    1, then divided by it (Saharia et al. 2022, sec. 2.3)."""
    bound = jnp.quantile(jnp.abs(x_start).reshape(x_start.shape[0], -1), share, axis=1)
    bound = jnp.maximum(bound, 1.0)[:, None, None, None]
    return jnp.clip(x_start, -bound, bound) / bound


def p_mean_variance(schedule, output, x_t, t, *, predict, variance, clip_denoised, threshold=None):
    """p(x_{t-1} | x_t) from the network's output [B,H,W,C or 2C] at x_t [B,H,W,C], t int32 [B].

    predict: Parameterization; variance: Variance. ``clip_denoised`` clips x_0 to [-1, 1] before
    the posterior mean is taken (sampling and evaluation; diffusion_utils_2.py:156); threshold: that
    of ``dynamic_threshold``, which then takes its place. -> Prediction
    """
    output, extra = variance.split(output)
    x_start = predict.x_start(schedule, output, x_t, t)
    if threshold is not None:
        x_start = dynamic_threshold(x_start, threshold)
    elif clip_denoised:
        x_start = jnp.clip(x_start, -1.0, 1.0)
    if predict.mean is None:
        mean = q_posterior(schedule, x_start, x_t, t).mean
    else:
        mean = predict.mean(schedule, output, x_t, t)
    return Prediction(
        x_start=x_start,
        eps=eps_from_start(schedule, x_start, x_t, t),
        mean=mean,
        log_variance=variance.log_variance(schedule, extra, t),
    )
