"""Training objectives: L_simple (eq. 14) and its weightings, the terms of the variational bound
(eq. 5), and the sum of both, L_hybrid (Nichol & Dhariwal 2021)."""

import functools
import math

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.prediction import p_mean_variance, snr
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


def _weights(weigh):
    """A row of WEIGHTS from the weight of the square error of x_0 as a function of the SNR."""
    @functools.wraps(weigh)  # its signature shows the keywords
    def weights(schedule, t, predict, **keywords):
        # A target of no factor carries no x_0: its error gets no weight.
        factor = predict.factor(schedule, t)
        weight = weigh(snr(schedule, t), **keywords) / jnp.where(factor > 0, factor, 1.0)
        return jnp.where(factor > 0, weight, 0.0).reshape(-1)

    return weights


# Weights [B] of the square error of the target. Each is written once, in units of x_0, and divided
# by the parameterization's factor, so that a weighting means the same for every prediction.
WEIGHTS = {
    "target": lambda schedule, t, predict: jnp.ones(t.shape),   # plain error of the target
    "l_simple": _weights(lambda snr: snr),                      # = target for eps
    "constant": _weights(lambda snr: jnp.ones_like(snr)),       # = target for x_start
    "snr_plus_one": _weights(lambda snr: snr + 1.0),            # = target for v
    # Salimans & Ho 2022, sec. 4
    "truncated_snr": _weights(lambda snr: jnp.maximum(snr, 1.0)),
    # Hang et al. 2023, eq. 6
    "min_snr": _weights(lambda snr, gamma=5.0: jnp.minimum(snr, gamma)),
    # Choi et al. 2022, eq. 8
    "p2": _weights(lambda snr, k=1.0, gamma=1.0: snr / (k + snr) ** gamma),
}


def mse_loss(denoise_fn, schedule, x_start, t, noise, *, predict, variance, weights=None):
    """L_simple, eq. 14. denoise_fn: (x_t [B,H,W,C], timestep int32 [B]) -> [B,H,W,C].

    x_start, noise [B,H,W,C]; t int32 [B]; weights: None, or (schedule, t, predict) -> [B] as the
    rows of WEIGHTS. -> mean square per example [B]
    """
    x_t = q_sample(schedule, x_start, t, noise)
    output, _ = variance.split(denoise_fn(x_t, schedule.timesteps[t]))
    error = mean_flat(jnp.square(predict.target(schedule, x_start, x_t, t, noise) - output))
    return error if weights is None else weights(schedule, t, predict) * error


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


def hybrid_loss(denoise_fn, schedule, x_start, t, noise, *, predict, variance, weights=None,
                vlb_weight=0.001):
    """L_simple + vlb_weight L_vlb (Nichol & Dhariwal 2021, eq. 16), for a learned variance.

    L_vlb is a sum over t, so with t uniform its term counts T times. It does not train the mean:
    the gradient stops there (improved-diffusion, gaussian_diffusion.py:721). Arguments as
    ``mse_loss``; weights act on the first part alone. -> [B]
    """
    output = denoise_fn(q_sample(schedule, x_start, t, noise), schedule.timesteps[t])
    mean, extra = variance.split(output)
    frozen = jnp.concatenate([jax.lax.stop_gradient(mean), extra], axis=-1)
    args = (schedule, x_start, t, noise)
    simple = mse_loss(lambda *_: output, *args, predict=predict, variance=variance, weights=weights)
    vlb = vlb_loss(lambda *_: frozen, *args, predict=predict, variance=variance)
    return simple + vlb_weight * schedule.betas.shape[0] * vlb


def whole_vlb_loss(denoise_fn, schedule, x_start, t, noise, *, predict, variance):
    """T times ``vlb_loss``: its mean over uniform t is L_vlb but for the prior, in bits/dim (Nichol
    & Dhariwal 2021, sec. 3.3). Arguments as ``mse_loss``. -> [B]"""
    return schedule.betas.shape[0] * vlb_loss(
        denoise_fn, schedule, x_start, t, noise, predict=predict, variance=variance)


LOSSES = {"mse": mse_loss, "kl": vlb_loss, "hybrid": hybrid_loss, "vlb": whole_vlb_loss}
IMPORTANCE_SAMPLED = {"vlb"}  # losses for which training draws t by training/importance.py
