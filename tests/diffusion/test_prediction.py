import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.prediction import (
    PARAMETERIZATIONS,
    VARIANCES,
    dynamic_threshold,
    p_mean_variance,
)
from ddpm_jax.diffusion.process import q_posterior, q_sample
from ddpm_jax.diffusion.schedule import linear, make_schedule

SCHEDULE = make_schedule(linear(1000))
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(-1, 1, (4, 4, 4, 3)), jnp.float32)
NOISE = jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)
T = jnp.array([0, 1, 300, 700])
X_T = q_sample(SCHEDULE, X, T, NOISE)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_target_read_back_is_x_start(name):
    row = PARAMETERIZATIONS[name]
    target = row.target(SCHEDULE, X, X_T, T, NOISE)
    # x_prev divides by posterior_mean_coef1, small at large t: digits are lost there
    np.testing.assert_allclose(row.x_start(SCHEDULE, target, X_T, T), X, atol=3e-3)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("clip", [True, False])
def test_a_perfect_output_gives_the_posterior_mean_and_the_noise(name, clip):
    target = PARAMETERIZATIONS[name].target(SCHEDULE, X, X_T, T, NOISE)
    p = p_mean_variance(SCHEDULE, target, X_T, T, predict=PARAMETERIZATIONS[name],
                        variance=VARIANCES["fixed_large"], clip_denoised=clip)
    np.testing.assert_allclose(p.mean, q_posterior(SCHEDULE, X, X_T, T).mean, atol=1e-4)
    np.testing.assert_allclose(p.eps[1:], NOISE[1:], atol=1e-2)


def test_a_dynamic_threshold_is_each_images_own():
    """And none where the image is within [-1, 1] but for fewer than that share of its pixels."""
    wide = X * jnp.array([0.5, 1.0, 2.0, 8.0])[:, None, None, None]
    got = dynamic_threshold(wide, 0.9)
    np.testing.assert_array_equal(got[:2], wide[:2])
    for image, x in zip(np.asarray(wide[2:]), np.asarray(got[2:]), strict=True):
        bound = np.quantile(np.abs(image), 0.9)
        np.testing.assert_allclose(x, np.clip(image, -bound, bound) / bound, rtol=1e-5)
    p = p_mean_variance(SCHEDULE, wide, X_T, T, predict=PARAMETERIZATIONS["x_start"], threshold=0.9,
                        variance=VARIANCES["fixed_large"], clip_denoised=True)
    np.testing.assert_array_equal(p.x_start, got)


def test_clipping_acts_before_the_mean_but_leaves_x_prev_alone():
    wild = 5.0 * jnp.ones_like(X)
    t = jnp.full(4, 500)
    for name in ("eps", "x_start"):
        p = p_mean_variance(SCHEDULE, wild, X_T, t, predict=PARAMETERIZATIONS[name],
                            variance=VARIANCES["fixed_small"], clip_denoised=True)
        assert float(jnp.abs(p.x_start).max()) <= 1.0
        np.testing.assert_allclose(
            p.mean, q_posterior(SCHEDULE, p.x_start, X_T, t).mean, atol=1e-6)
    p = p_mean_variance(SCHEDULE, wild, X_T, t, predict=PARAMETERIZATIONS["x_prev"],
                        variance=VARIANCES["fixed_small"], clip_denoised=True)
    np.testing.assert_array_equal(p.mean, wild)


def test_variances():
    output = jnp.concatenate([NOISE, X], axis=3)
    kwargs = dict(predict=PARAMETERIZATIONS["eps"], clip_denoised=False)
    learned = p_mean_variance(SCHEDULE, output, X_T, T, variance=VARIANCES["learned"], **kwargs)
    np.testing.assert_array_equal(learned.log_variance, X)
    np.testing.assert_allclose(learned.x_start, X, atol=1e-4)
    large = p_mean_variance(SCHEDULE, NOISE, X_T, T, variance=VARIANCES["fixed_large"], **kwargs)
    small = p_mean_variance(SCHEDULE, NOISE, X_T, T, variance=VARIANCES["fixed_small"], **kwargs)
    np.testing.assert_allclose(
        jnp.exp(large.log_variance[1:, 0, 0, 0]), linear(1000)[np.array(T[1:])], rtol=1e-5)
    assert (large.log_variance[2:] > small.log_variance[2:]).all()


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_factor_turns_an_error_of_x_0_into_one_of_the_target(name):
    row, off = PARAMETERIZATIONS[name], 0.1
    t = jnp.array([1, 50, 300, 700])
    x_t = q_sample(SCHEDULE, X, t, NOISE)
    # at a fixed x_t another x_0 means another noise
    noise = (x_t - SCHEDULE.sqrt_alphas_cumprod[t][:, None, None, None] * (X + off)
             ) / SCHEDULE.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]
    change = row.target(SCHEDULE, X + off, x_t, t, noise) - row.target(SCHEDULE, X, x_t, t, NOISE)
    np.testing.assert_allclose(np.square(change), off**2 * np.broadcast_to(
        row.factor(SCHEDULE, t), X.shape), rtol=2e-2)


def test_learned_range_lies_between_the_posterior_and_beta():
    betas = linear(1000)
    bar = np.cumprod(1 - betas)
    posterior = betas[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    posterior = np.append(posterior[0], posterior)  # that at t = 1 stands for t = 0
    for level, want in ((-1.0, np.log(posterior)), (1.0, np.log(betas)),
                        (0.0, np.log(posterior * betas) / 2)):
        for first in ("next", "floor"):
            got = VARIANCES["learned_range"].log_variance(
                make_schedule(betas, first_log_variance=first), jnp.full(X.shape, level), T)
            np.testing.assert_allclose(got[:, 0, 0, 0], want[np.array(T)], rtol=1e-5)
