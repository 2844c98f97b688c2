"""The variational bound of whole images in bits/dim, term by term (Ho et al. 2020, eq. 5)."""

from typing import NamedTuple

import jax.numpy as jnp

from ddpm_jax.diffusion.objective import mean_flat, noised_prediction, normal_kl, vlb_term
from ddpm_jax.diffusion.process import q_mean_variance


class Bound(NamedTuple):
    """total, prior: bits/dim [B]. terms: bits/dim [B,T], index t; t = 0 is the decoder
    (distortion), the rest the rate. mse: mean square error of the predicted x_0, [-1,1] scale,
    [B,T]. eps_mse: that of the predicted noise [B,T]."""

    total: jnp.ndarray
    terms: jnp.ndarray
    prior: jnp.ndarray
    mse: jnp.ndarray
    eps_mse: jnp.ndarray


def prior_bpd(schedule, x_start):
    """KL(q(x_T | x_0) || N(0, I)), the L_T of eq. 5. x_start [B,H,W,C] -> bits/dim [B]"""
    t = jnp.full(x_start.shape[0], schedule.betas.shape[0] - 1, jnp.int32)
    q = q_mean_variance(schedule, x_start, t)
    return mean_flat(normal_kl(q.mean, q.log_variance, 0.0, 0.0)) / jnp.log(2.0)


def bpd_terms(denoise_fn, schedule, x_start, t, noise, *, predict, variance, clip_denoised=True):
    """The bound's term at t int32 [B], from x_t drawn with ``noise`` (diffusion_utils_2.py:313).

    -> (bits/dim [B], mean square error of x_0 [B], of eps [B])
    """
    x_t, prediction = noised_prediction(
        denoise_fn, schedule, x_start, t, noise, predict=predict, variance=variance,
        clip_denoised=clip_denoised)
    return (
        vlb_term(schedule, prediction, x_start, x_t, t),
        mean_flat(jnp.square(prediction.x_start - x_start)),
        mean_flat(jnp.square(prediction.eps - noise)),
    )
