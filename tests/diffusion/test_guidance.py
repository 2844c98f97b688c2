"""Classifier-free guidance on functions whose predictions are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.guidance import guided
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
from ddpm_jax.diffusion.schedule import linear, make_schedule

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)), jnp.float32)
T = jnp.array([1, 5, 9])
LABELS = jnp.array([2, 0, 1])
NONE = 3


def network(x_t, t, labels):
    """eps, and a second half for a learned variance, that depend on everything."""
    c = jnp.float32(1) + jnp.stack([jnp.sin(labels + 2.0 * t)] * 4, -1).reshape(-1, 2, 2, 1)
    return jnp.concatenate([x_t * c, x_t - c], axis=-1)


def eps_of(scale, variance="learned_range"):
    rows = VARIANCES[variance]
    fn = network if rows.channels == 2 else lambda *a, **k: network(*a, **k)[..., :1]
    return guided(fn, scale, NONE, rows)(X, T, labels=LABELS)


def test_the_scale_is_1_for_the_label_0_for_none_and_w_plus_1_in_the_paper():
    with_label, without = (network(X, T, labels) for labels in (LABELS, jnp.full(3, NONE)))
    np.testing.assert_allclose(eps_of(1.0), with_label, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(eps_of(0.0)[..., :1], without[..., :1], rtol=1e-6)
    w = 1.5  # Ho & Salimans 2021, eq. 6
    np.testing.assert_allclose(
        eps_of(1 + w)[..., :1], ((1 + w) * with_label - w * without)[..., :1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(eps_of(1 + w)[..., 1:], with_label[..., 1:])  # the variance's
    np.testing.assert_array_equal(eps_of(1 + w, "fixed_large"), eps_of(1 + w)[..., :1])


@pytest.mark.parametrize("predict", list(PARAMETERIZATIONS))
def test_guiding_the_target_is_guiding_x_start(predict):
    schedule, s = make_schedule(linear(10, 1e-3, 0.2)), 2.5

    def start(output):
        return p_mean_variance(
            schedule, output, X, T, predict=PARAMETERIZATIONS[predict],
            variance=VARIANCES["fixed_small"], clip_denoised=False).x_start

    with_label, without = (start(network(X, T, labels)[..., :1])
                           for labels in (LABELS, jnp.full(3, NONE)))
    np.testing.assert_allclose(start(eps_of(s, "fixed_small")),
                               without + s * (with_label - without), rtol=2e-4, atol=2e-4)
