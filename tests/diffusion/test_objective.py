import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import objective as O
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
from ddpm_jax.diffusion.process import q_posterior, q_sample
from ddpm_jax.diffusion.schedule import linear, make_schedule

SCHEDULE = make_schedule(linear(1000))
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.integers(0, 256, (4, 4, 4, 3)) / 127.5 - 1, jnp.float32)
NOISE = jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)
T = jnp.array([0, 1, 300, 700])


def test_normal_kl_equals_the_integral():
    m1, v1, m2, v2 = 0.3, 0.5, -0.2, 1.7
    x = np.linspace(-12, 12, 400_001)
    p = np.exp(-((x - m1) ** 2) / 2 / v1) / np.sqrt(2 * np.pi * v1)
    log_q = -((x - m2) ** 2) / 2 / v2 - 0.5 * np.log(2 * np.pi * v2)
    integral = np.trapezoid(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - log_q), 0), x)
    got = O.normal_kl(m1, jnp.log(v1), m2, jnp.log(v2))
    np.testing.assert_allclose(got, integral, rtol=1e-5)


def test_decoder_mass_sums_to_one_over_the_256_levels():
    levels = jnp.arange(256).reshape(256, 1, 1, 1) / 127.5 - 1
    for mean, log_variance in [(0.1, -6.0), (-1.0, -9.8), (0.997, -2.0)]:
        log = O.discretized_gaussian_log_likelihood(levels, mean, log_variance)
        np.testing.assert_allclose(jnp.exp(log).sum(), 1.0, atol=1e-5)


def test_decoder_against_the_exact_gaussian():
    """The tanh approximation is the official one; with erf in its place the mass is exact."""
    exact = lambda z: 0.5 * (1 + jax.lax.erf(z / math.sqrt(2)))  # noqa: E731
    x, mean, log_variance = jnp.full((1, 1, 1, 1), 51 / 127.5 - 1), -0.59, -8.0
    s = math.exp(log_variance / 2)
    want = 0.5 * (math.erf((51 / 127.5 - 1 + 1 / 255 - mean) / s / math.sqrt(2))
                  - math.erf((51 / 127.5 - 1 - 1 / 255 - mean) / s / math.sqrt(2)))
    got = O.discretized_gaussian_log_likelihood(x, mean, log_variance, cdf=exact)
    np.testing.assert_allclose(jnp.exp(got).item(), want, rtol=1e-4)
    approx = O.discretized_gaussian_log_likelihood(x, mean, log_variance)
    assert 0 < abs(approx.item() - got.item()) < 1e-2
    z = 0.7
    assert O.approx_standard_normal_cdf(z) == pytest.approx(
        0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))), rel=1e-6)


def test_mse_of_the_true_noise_is_zero_and_of_zero_its_square():
    row = dict(predict=PARAMETERIZATIONS["eps"], variance=VARIANCES["fixed_large"])
    perfect = O.mse_loss(lambda x, t: NOISE, SCHEDULE, X, T, NOISE, **row)
    np.testing.assert_array_equal(perfect, 0.0)
    zero = O.mse_loss(lambda x, t: 0 * x, SCHEDULE, X, T, NOISE, **row)
    np.testing.assert_allclose(zero, (np.asarray(NOISE) ** 2).reshape(4, -1).mean(1), rtol=1e-6)


def test_the_network_receives_the_schedule_s_timesteps():
    told = []
    schedule = make_schedule(linear(5), [0, 10, 20, 30, 40])

    def denoise_fn(x, t):
        told.append(np.asarray(t))
        return jnp.concatenate([x, x], axis=3)

    row = dict(predict=PARAMETERIZATIONS["eps"], variance=VARIANCES["learned_range"])
    for loss in O.LOSSES.values():
        loss(denoise_fn, schedule, X, jnp.array([0, 1, 4, 2]), NOISE, **row)
    np.testing.assert_array_equal(told, [[0, 10, 40, 20]] * len(O.LOSSES))


@pytest.mark.parametrize("predict", PARAMETERIZATIONS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_vlb_term_by_hand(predict, variance):
    output = jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)
    row = dict(predict=PARAMETERIZATIONS[predict], variance=VARIANCES[variance])
    got = O.vlb_loss(lambda x, t: output, SCHEDULE, X, T, NOISE, **row)
    x_t = q_sample(SCHEDULE, X, T, NOISE)
    p = p_mean_variance(SCHEDULE, output, x_t, T, clip_denoised=False, **row)
    q = q_posterior(SCHEDULE, X, x_t, T)
    for b in range(4):
        m1, m2 = np.asarray(q.mean[b], float), np.asarray(p.mean[b], float)
        l1, l2 = float(q.log_variance[b, 0, 0, 0]), float(p.log_variance[b, 0, 0, 0])
        if b:
            nats = 0.5 * (l2 - l1 - 1 + np.exp(l1 - l2) + (m1 - m2) ** 2 * np.exp(-l2)).mean()
        else:
            nats = -float(O.discretized_gaussian_log_likelihood(X[:1], p.mean[:1], l2).mean())
        np.testing.assert_allclose(got[b], nats / math.log(2), rtol=2e-4)


def test_learned_variance_is_trained_by_the_bound():
    """The KL is least where the learned log-variance equals the posterior's."""
    x_t = q_sample(SCHEDULE, X, T, NOISE)
    target = PARAMETERIZATIONS["x_prev"].target(SCHEDULE, X, x_t, T, NOISE)
    true = q_posterior(SCHEDULE, X, x_t, T).log_variance * jnp.ones_like(X)

    def loss(shift):
        output = jnp.concatenate([target, true + shift], axis=3)
        return O.vlb_loss(lambda x, t: output, SCHEDULE, X, T, NOISE,
                          predict=PARAMETERIZATIONS["x_prev"], variance=VARIANCES["learned"])[1:]

    np.testing.assert_allclose(loss(0.0), 0.0, atol=1e-5)
    assert (loss(0.3) > 0).all() and (loss(-0.3) > 0).all()


@pytest.mark.parametrize("name", sorted(set(O.WEIGHTS) - {"target"}))
def test_a_weighting_means_the_same_for_every_prediction(name):
    """One error of x_0, expressed in each target's units, costs the same."""
    t = jnp.array([3, 50, 300, 700])
    x_t = q_sample(SCHEDULE, X, t, NOISE)
    wrong = X + jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)
    noise = (x_t - SCHEDULE.sqrt_alphas_cumprod[t][:, None, None, None] * wrong
             ) / SCHEDULE.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]
    costs = [O.mse_loss(lambda x, s, row=row: row.target(SCHEDULE, wrong, x_t, t, noise),
                        SCHEDULE, X, t, NOISE, predict=row, variance=VARIANCES["fixed_large"],
                        weights=O.WEIGHTS[name]) for row in PARAMETERIZATIONS.values()]
    for other in costs[1:]:
        np.testing.assert_allclose(other, costs[0], rtol=3e-2)


@pytest.mark.parametrize("name, predict", [
    ("l_simple", "eps"), ("constant", "x_start"), ("snr_plus_one", "v")])
def test_some_weightings_are_the_plain_error_of_a_target(name, predict):
    weights = O.WEIGHTS[name](SCHEDULE, T, PARAMETERIZATIONS[predict])
    np.testing.assert_allclose(weights, O.WEIGHTS["target"](SCHEDULE, T, None), rtol=1e-5)


def test_published_weights_of_eps():
    """min-SNR and P2 as their papers write them for eps: min(1, gamma / SNR), 1 / (k + SNR)^g."""
    snr = np.asarray(SCHEDULE.alphas_cumprod, float)[np.array(T)]
    snr = snr / (1 - snr)
    eps = PARAMETERIZATIONS["eps"]
    np.testing.assert_allclose(O.WEIGHTS["min_snr"](SCHEDULE, T, eps), np.minimum(1, 5 / snr),
                               rtol=1e-3)
    np.testing.assert_allclose(O.WEIGHTS["p2"](SCHEDULE, T, eps, gamma=0.5), (1 + snr) ** -0.5,
                               rtol=1e-3)


def test_the_hybrid_s_bound_trains_the_variance_alone():
    """Gradients against finite differences, on both halves of the output."""
    output = jnp.asarray(RNG.standard_normal((*X.shape[:3], 6)), jnp.float32)
    row = dict(predict=PARAMETERIZATIONS["eps"], variance=VARIANCES["learned_range"])

    def hybrid(output):
        return O.hybrid_loss(lambda x, t: output, SCHEDULE, X, T, NOISE, **row)

    def vlb(output):
        return O.vlb_loss(lambda x, t: output, SCHEDULE, X, T, NOISE, **row)

    def mse(output):
        return O.mse_loss(lambda x, t: output, SCHEDULE, X, T, NOISE, **row)

    np.testing.assert_allclose(hybrid(output), mse(output) + 0.001 * 1000 * vlb(output), rtol=1e-5)
    grads = jax.grad(lambda o: hybrid(o).sum())(output)
    mean, variance = grads[..., :3], grads[..., 3:]
    np.testing.assert_allclose(mean, jax.grad(lambda o: mse(o).sum())(output)[..., :3], rtol=1e-5)
    step = 1e-2
    for b, y, x, c in [(0, 1, 2, 3), (1, 0, 0, 4), (3, 3, 1, 5)]:
        nudge = jnp.zeros_like(output).at[b, y, x, c].set(step)
        slope = (vlb(output + nudge) - vlb(output - nudge))[b] / (2 * step)
        np.testing.assert_allclose(variance[b, y, x, c - 3], slope, rtol=0.05, atol=1e-5)
