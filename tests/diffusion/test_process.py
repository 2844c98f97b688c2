import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.process import q_mean_variance, q_posterior, q_sample
from ddpm_jax.diffusion.schedule import linear, make_schedule

SCHEDULE = make_schedule(linear(1000))


def rand(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_one_jump_equals_many_single_steps():
    """eq. 2 applied t+1 times to a Gaussian's mean and variance gives eq. 4."""
    betas = linear(1000)
    mean, variance = 1.0, 0.0
    for beta in betas[:301]:
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    q = q_mean_variance(SCHEDULE, jnp.ones((1, 1, 1, 1)), jnp.array([300]))
    np.testing.assert_allclose(q.mean.item(), mean, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(q.log_variance).item(), variance, rtol=1e-5)


def test_q_sample_is_mean_plus_deviation_times_noise():
    x, noise, t = rand(0, 3, 4, 4, 2), rand(1, 3, 4, 4, 2), jnp.array([0, 500, 999])
    q = q_mean_variance(SCHEDULE, x, t)
    np.testing.assert_allclose(
        q_sample(SCHEDULE, x, t, noise), q.mean + jnp.exp(0.5 * q.log_variance) * noise, atol=2e-6)


def test_posterior_is_bayes_rule():
    """q(x_{t-1}|x_t,x_0) ~ q(x_t|x_{t-1}) q(x_{t-1}|x_0), multiplied on a grid, for one pixel."""
    t, x_0, x_t = 40, 0.3, -0.2
    betas = linear(1000)
    bar = np.cumprod(1 - betas)
    grid = np.linspace(-2, 2, 200_001)
    log = (-((x_t - np.sqrt(1 - betas[t]) * grid) ** 2) / (2 * betas[t])
           - (grid - np.sqrt(bar[t - 1]) * x_0) ** 2 / (2 * (1 - bar[t - 1])))
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    shape = (1, 1, 1, 1)
    q = q_posterior(SCHEDULE, jnp.full(shape, x_0), jnp.full(shape, x_t), jnp.array([t]))
    np.testing.assert_allclose(q.mean.item(), mean, rtol=1e-5)
    np.testing.assert_allclose(np.exp(q.log_variance.item()), variance, rtol=1e-4)
