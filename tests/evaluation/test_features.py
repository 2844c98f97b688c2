"""Closed forms with an exact denoiser, and the same numbers on any layout."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import programs
from ddpm_jax.evaluation import collect, extract, features, measures, small_cnn
from ddpm_jax.evaluation.options import Options

SPREAD = 0.25


class ExactDenoiser:
    """E[eps | x_t] for pixels that are N(0, SPREAD^2), independent."""

    dtype = jnp.float32
    num_classes, no_label = 0, None

    def __init__(self, schedule):
        self.schedule = schedule

    def apply(self, variables, x_t, t, *condition):
        del variables, condition
        a = jnp.asarray(self.schedule.alphas_cumprod)[t][:, None, None, None]
        x_start = SPREAD ** 2 * jnp.sqrt(a) / (SPREAD ** 2 * a + 1 - a) * x_t
        return (x_t - jnp.sqrt(a) * x_start) / jnp.sqrt(1 - a)


@pytest.fixture(scope="module")
def gaussian_bound(tiny):
    """(measured, betas) of the bound of 768 Gaussian pictures, 12 x 12."""
    model, session = tiny(8, **{"diffusion.num_timesteps": 30, "diffusion.schedule.beta_end": 0.3,
                        "diffusion.variance": "fixed_small"})
    exp = model.exp._replace(model=ExactDenoiser(model.exp.schedule), image_shape=(12, 12, 1))
    pixels = np.random.default_rng(0).standard_normal((768, 12, 12, 1)) * SPREAD
    images = np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    model = model._replace(exp=exp, params={})
    sums = collect.collect(features.of_bound(session, model, images, 3, 256), num=768, batch=256)
    return measures.likelihood(sums), np.asarray(exp.betas, np.float64)


def closed_form(betas):
    """Posterior variance and error of x_0 given x_t, [T] each, in float64 from the equations."""
    a_bar = np.cumprod(1 - betas)
    a_prev = np.concatenate([[1.0], a_bar[:-1]])
    mse = SPREAD ** 2 * (1 - a_bar) / (SPREAD ** 2 * a_bar + 1 - a_bar)
    return a_bar, a_prev, mse, betas * (1 - a_prev) / (1 - a_bar)


def test_rmse_and_eps_loss_are_the_closed_form(gaussian_bound):
    measured, betas = gaussian_bound
    a_bar, _, mse, _ = closed_form(betas)
    np.testing.assert_allclose(measured["mse"][1:], mse[1:], rtol=0.02)
    assert measured["rmse"] == pytest.approx(127.5 * np.sqrt(mse[0]), rel=0.01)
    eps = np.array_split(a_bar / (1 - a_bar) * mse, measures.BUCKETS)
    np.testing.assert_allclose(measured["eps_loss"], [b.mean() for b in eps], rtol=0.01)


def test_rate_is_the_closed_form(gaussian_bound):
    measured, betas = gaussian_bound
    a_bar, a_prev, mse, variance = closed_form(betas)
    # Both Gaussians have the same variance: the KL is the gap of their means (eq. 8).
    coefficient = betas * np.sqrt(a_prev) / (1 - a_bar)
    terms = coefficient[1:] ** 2 * mse[1:] / (2 * variance[1:] * np.log(2))
    np.testing.assert_allclose(measured["terms"][1:], terms, rtol=0.02)
    assert measured["rate"] == pytest.approx(terms.sum(), rel=0.01)


def test_prior_and_total_are_the_closed_form(gaussian_bound):
    measured, betas = gaussian_bound
    a_bar = closed_form(betas)[0][-1]
    # E KL(N(sqrt(a) x, 1-a) || N(0, 1)) over x ~ N(0, SPREAD^2)
    prior = 0.5 * (a_bar * SPREAD ** 2 + (1 - a_bar) - 1 - np.log(1 - a_bar)) / np.log(2)
    assert measured["prior"] == pytest.approx(prior, rel=0.02)
    parts = measured["rate"] + measured["distortion"] + measured["prior"]
    assert measured["bpd"] == pytest.approx(parts, rel=1e-5)


def test_distortion_is_the_integral_over_pixels_and_noise(gaussian_bound):
    from math import erf
    measured, betas = gaussian_bound
    a_bar, _, _, variance = closed_form(betas)
    a, sigma = a_bar[0], np.sqrt(variance[1])     # log variance at t = 0 is the one at t = 1
    rng = np.random.default_rng(1)
    x = np.clip(np.rint((rng.standard_normal(20_000) * SPREAD + 1) * 127.5), 0, 255) / 127.5 - 1
    x_t = np.sqrt(a) * x + np.sqrt(1 - a) * rng.standard_normal(20_000)
    mean = np.clip(SPREAD ** 2 * np.sqrt(a) / (SPREAD ** 2 * a + 1 - a) * x_t, -1, 1)
    phi = np.vectorize(lambda z: 0.5 * (1 + erf(z / np.sqrt(2))))
    high = np.where(x > 0.999, 1.0, phi((x + 1 / 255 - mean) / sigma))
    low = np.where(x < -0.999, 0.0, phi((x - 1 / 255 - mean) / sigma))
    expected = -np.mean(np.log2(np.maximum(high - low, 1e-12)))
    assert measured["distortion"] == pytest.approx(expected, rel=0.02)


def test_rate_distortion_ends_where_the_totals_are(gaussian_bound):
    measured, _ = gaussian_bound
    rate, rmse = measures.rate_distortion(measured["terms"], measured["prior"], measured["mse"])
    assert rate[-1] == pytest.approx(measured["rate"] + measured["prior"])
    assert rmse[-1] == pytest.approx(measured["rmse"])
    assert rate[0] == measured["prior"] and np.all(np.diff(rate) >= 0)
    assert rmse[0] == pytest.approx(127.5 * np.sqrt(measured["mse"][-1]))


# --- the same on any layout ---

def measure(tiny, devices, runner="shard_map"):
    """bits/dim of given images, features of given images, features of samples."""
    model, session = tiny(devices, **{"parallel.runner": runner})
    images = np.random.default_rng(1).integers(0, 256, (21, 8, 8, 1), dtype=np.uint8)
    bound = measures.likelihood(collect.collect(
        features.of_bound(session, model, images, 0, 8), num=21, batch=8))
    extractor = extract.make({"random": small_cnn.random_params(1), "channels": {}})
    given = collect.collect(features.of_images(session, images.__getitem__, 8)(extractor),
                            num=21, batch=8)
    sampled = features.of_samples(session, model, Options(seed=5), 10, images_kept=4)
    drawn = collect.collect(sampled(extractor, "none"), num=21, batch=10)
    return bound, given, drawn


@pytest.fixture(scope="module")
def on_one_device(tiny):
    return measure(tiny, 1)


@pytest.mark.slow
@pytest.mark.parametrize("devices, runner", [
    (8, "shard_map"), (4, "jit"), (8, "pmap")])
def test_numbers_do_not_depend_on_the_devices(tiny, on_one_device, devices, runner):
    bound, given, drawn = measure(tiny, devices, runner)
    for name in ("bpd", "rate", "rmse", "prior"):
        assert bound[name] == pytest.approx(on_one_device[0][name], rel=1e-6), name
    for name, a in given.items():
        np.testing.assert_allclose(a, on_one_device[1][name], rtol=1e-5, atol=1e-6)
    for name in ("random", "channels"):
        np.testing.assert_allclose(drawn[name], on_one_device[2][name], rtol=1e-3, atol=1e-3)
    real = on_one_device[1]["random"]
    distances = [small_cnn.distance(d["random"], real) for d in (drawn, on_one_device[2])]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)


def test_images_are_those_of_the_sampler_whatever_the_batch(tiny):
    model, session = tiny(8)
    exp, params, _ = model
    chain = programs.sampling_chain(exp)
    expected = np.asarray(programs.sample_program(exp, chain)(
        params, np.uint32(5), exp.runner.put("batch", np.arange(24, dtype=np.int32))))
    extractor = extract.make({"images": {}, "channels": {}})
    sampled = features.of_samples(session, model, Options(seed=5), 11, images_kept=13)
    found = collect.collect(sampled(extractor, "round"), num=20, batch=11)
    np.testing.assert_array_equal(found["images"], expected[:13])       # only what is wanted
    assert len(found["channels"]) == 20
    np.testing.assert_allclose(found["channels"][:, 0], expected[:20].mean((1, 2, 3)), rtol=1e-5)
