import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import inpainting as I
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
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
    for bad, message in (((0, 2), "at least 1"), ((2, 0), "at least 1"), ((10, 2), "below the 10")):
        with pytest.raises(ValueError, match=message):
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

    visits = I.repaint_visits(SCHEDULE, **jumps)

    def noise_fn(i):
        return jax.random.normal(jax.random.fold_in(key, i), known.shape)

    def visit(i, x):
        at = I.Visits(*(jnp.asarray(table)[i] for table in visits))
        noises = [noise_fn(3 * i + k) for k in range(3)]
        return I.inpaint_step(SCHEDULE, denoise_step, x, at, known, mask, noises)

    run = jax.jit(lambda: jax.lax.fori_loop(0, len(visits.t), visit, noise_fn(10**6)))
    return known, np.asarray(run())


@pytest.mark.slow
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


def test_between_two_network_calls_the_noise_is_that_of_q():
    """x at the level reached, scaled and noised, has the mean and variance of q at the next."""
    kept = np.concatenate([[1.0], np.cumprod(1 - np.asarray(SCHEDULE.betas, np.float64))])
    visits = I.repaint_visits(SCHEDULE, 7, 3)
    levels = I.repaint_levels(STEPS, 7, 3)
    np.testing.assert_array_equal(visits.t, levels[1:][np.diff(levels) < 0])
    reached = np.concatenate([[STEPS], visits.t[:-1]])
    np.testing.assert_allclose(visits.scale**2 * kept[reached], kept[visits.t + 1], rtol=1e-6)
    np.testing.assert_allclose(visits.scale**2 * (1 - kept[reached]) + visits.sigma**2,
                               1 - kept[visits.t + 1], rtol=1e-5)
    jumps = reached != visits.t + 1
    assert jumps.sum() == 2 * 8 and (visits.sigma[~jumps] == 0).all()


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
