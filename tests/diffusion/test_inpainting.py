import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import inpainting as I
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.sampling import ancestral_step
from ddpm_jax.diffusion.schedule import linear, make_schedule

STEPS = 60
SCHEDULE = make_schedule(linear(STEPS, 1e-3, 0.2))
COVARIANCE = np.array([[0.20, 0.16], [0.16, 0.25]])


def test_the_number_of_network_calls_is_the_paper_s():
    levels = I.repaint_levels(250, 10, 10)
    assert levels[0] == 250 and levels[-1] == 0
    assert (np.abs(np.diff(levels)) == 1).all()
    assert (len(levels) - 1, int((np.diff(levels) < 0).sum())) == (4570, 2410)
    levels = I.repaint_levels(50, 5, 5)
    assert (np.diff(levels) < 0).sum() == 230
    np.testing.assert_array_equal(I.repaint_levels(5, 2, 1), [5, 4, 3, 2, 1, 0])
    np.testing.assert_array_equal(I.repaint_levels(4, 1, 2), [4, 3, 2, 3, 2, 1, 2, 1, 0, 1, 0])
    for bad in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            I.repaint_levels(10, *bad)


def denoise_step(x, t, noise):
    """The exact denoiser of a Gaussian of two pixels."""
    alpha = SCHEDULE.sqrt_alphas_cumprod[t]
    sigma = SCHEDULE.sqrt_one_minus_alphas_cumprod[t]
    gain = alpha * COVARIANCE @ jnp.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
    x_start = jnp.einsum("ij,bxj->bxi", gain, x[..., 0])[..., None]
    prediction = p_mean_variance(
        SCHEDULE, x_start, x, jnp.full(x.shape[0], t), predict=PARAMETERIZATIONS["x_start"],
        variance=VARIANCES["fixed_small"], clip_denoised=False)
    return ancestral_step(SCHEDULE, prediction, x, t, noise)[0]


def fill(value, count, **jumps):
    known = jnp.full((count, 1, 2, 1), value)
    mask = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    key = jax.random.key(0)

    def noise_fn(i):
        return jax.random.normal(jax.random.fold_in(key, i), known.shape)

    run = jax.jit(lambda: I.inpaint_loop(SCHEDULE, denoise_step, noise_fn, noise_fn(10**6), known,
                                         mask, I.repaint_levels(STEPS, **jumps)))
    return known, np.asarray(run())


def test_known_pixels_are_kept_bit_for_bit_and_the_rest_nears_the_conditional():
    """The mean of the other pixel is the Gaussian's conditional in the limit of many short jumps;
    plain replacement does not see the known pixel well enough."""
    mean = COVARIANCE[0, 1] / COVARIANCE[0, 0] * 0.7
    off = []
    for jump_length, resamplings in ((1, 1), (5, 12), (1, 100)):
        known, x = fill(0.7, 2000, jump_length=jump_length, resamplings=resamplings)
        np.testing.assert_array_equal(x[:, 0, 0], known[:, 0, 0])
        off.append(abs(x[:, 0, 1, 0].mean() - mean))
    assert off[0] > 0.2 and off[1] < 0.1 and off[2] < 0.03, off


def test_going_up_one_level_is_q():
    """Up from level n and q_sample to n + 1 have the same mean and variance."""
    x_0 = jnp.full((20000, 1, 1, 1), 0.5)
    first, second = (jax.random.normal(jax.random.key(k), x_0.shape) for k in (1, 2))
    up = I.noise_up(SCHEDULE, q_sample(SCHEDULE, x_0, jnp.full(20000, 9), first), 10, second)
    direct = q_sample(SCHEDULE, x_0, jnp.full(20000, 10), first)
    assert float(abs(up.mean() - direct.mean())) < 0.02
    assert float(abs(up.std() - direct.std())) < 0.01


def test_the_known_part_lies_at_the_level_just_reached():
    x = jnp.zeros((1, 2, 2, 1))
    known = jnp.full_like(x, 0.3)
    noise = jnp.ones_like(x)
    mask = jnp.ones((1, 2, 2, 1))
    for level in (1, 7, STEPS):
        want = (SCHEDULE.sqrt_alphas_cumprod[level - 1] * 0.3
                + SCHEDULE.sqrt_one_minus_alphas_cumprod[level - 1])
        np.testing.assert_allclose(
            I.replace_known(SCHEDULE, x, level, known, mask, noise), want, rtol=1e-6)
    np.testing.assert_array_equal(I.replace_known(SCHEDULE, x, 0, known, mask, noise), known)
