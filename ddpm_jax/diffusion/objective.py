"""Training objectives: L_simple (eq. 14) and the terms of the variational bound (eq. 5)."""

import math

import jax.numpy as jnp

from ddpm_jax.diffusion.prediction import p_mean_variance
from ddpm_jax.diffusion.process import q_posterior, q_sample


def mean_flat(x):
    """Mean over all axes but the first. [B, ...] -> [B]"""
    return x.reshape(x.shape[0], -1).mean(axis=1)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N1 || N2) of diagonal Gaussians, elementwise, in nats (utils.py:97)."""
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + jnp.exp(log_variance1 - log_variance2)
        + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    )


def approx_standard_normal_cdf(x):
    """The tanh approximation of the Gaussian CDF that the official decoder uses (utils.py:112)."""
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x, mean, log_variance, cdf=approx_standard_normal_cdf
):
    """Log-likelihood in nats of 8-bit pixels x (on the grid k/127.5 - 1) under the decoder, eq. 13.

    The Gaussian's mass over each pixel's bin of width 2/255; the outermost bins reach to infinity
    (|x| > 0.999, utils.py:117). x, mean [B,H,W,C]; -> [B,H,W,C].
    """
    centered = x - mean
    inverse_scale = jnp.exp(-0.5 * log_variance)
    upper = cdf(inverse_scale * (centered + 1.0 / 255.0))
    lower = cdf(inverse_scale * (centered - 1.0 / 255.0))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def vlb_term(schedule, prediction, x_start, x_t, t):
    """One term of the bound, eq. 5: KL for t > 0, decoder's negative log-likelihood at t = 0.

    prediction: Prediction at (x_t, t). -> bits/dim [B]
    """
    posterior = q_posterior(schedule, x_start, x_t, t)
    kl = normal_kl(*posterior, prediction.mean, prediction.log_variance)
    decoder_nll = -discretized_gaussian_log_likelihood(
        x_start, prediction.mean, prediction.log_variance
    )
    bits = jnp.log(2.0)
    return jnp.where(t == 0, mean_flat(decoder_nll) / bits, mean_flat(kl) / bits)


def mse_loss(denoise_fn, schedule, x_start, t, noise, *, predict, variance):
    """L_simple, eq. 14. denoise_fn: (x_t [B,H,W,C], timestep int32 [B]) -> [B,H,W,C].

    x_start, noise [B,H,W,C]; t int32 [B]. -> mean square per example [B]
    """
    x_t = q_sample(schedule, x_start, t, noise)
    output, _ = variance.split(denoise_fn(x_t, schedule.timesteps[t]))
    return mean_flat(jnp.square(predict.target(schedule, x_start, x_t, t, noise) - output))


def noised_prediction(denoise_fn, schedule, x_start, t, noise, *, predict, variance,
                      clip_denoised):
    """-> (x_t drawn with ``noise``, the Prediction there). Arguments as ``mse_loss``."""
    x_t = q_sample(schedule, x_start, t, noise)
    return x_t, p_mean_variance(
        schedule, denoise_fn(x_t, schedule.timesteps[t]), x_t, t, predict=predict,
        variance=variance, clip_denoised=clip_denoised)


def vlb_loss(denoise_fn, schedule, x_start, t, noise, *, predict, variance):
    """One term of L_vlb, eq. 5, x_0 unclipped, not multiplied by T (diffusion_utils_2.py:288).

    Arguments as ``mse_loss``. -> bits/dim [B]
    """
    x_t, prediction = noised_prediction(denoise_fn, schedule, x_start, t, noise, predict=predict,
                                        variance=variance, clip_denoised=False)
    return vlb_term(schedule, prediction, x_start, x_t, t)


LOSSES = {"mse": mse_loss, "kl": vlb_loss}
