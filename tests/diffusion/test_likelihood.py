import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import likelihood as L
from ddpm_jax.diffusion.objective import vlb_loss
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES
from ddpm_jax.diffusion.schedule import linear, make_schedule

ROW = dict(predict=PARAMETERIZATIONS["eps"], variance=VARIANCES["fixed_large"])
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.integers(0, 256, (3, 4, 4, 1)) / 127.5 - 1, jnp.float32)


def noise_fn(t):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), t), X.shape)


def test_prior_of_the_papers_schedule():
    """L_T is about 1e-5 bits/dim (sec. 4); for white images exactly the KL of their mean."""
    schedule = make_schedule(linear(1000))
    bar = np.cumprod(1 - linear(1000))[-1]
    got = L.prior_bpd(schedule, jnp.ones((1, 4, 4, 3)))
    want = 0.5 * (bar + (1 - bar) - 1 - np.log(1 - bar)) / np.log(2)
    np.testing.assert_allclose(got, want, rtol=5e-2)  # float32 near 1: the number is 3e-5
    assert 1e-6 < float(L.prior_bpd(schedule, X)[0]) < 1e-4


def test_terms_are_those_of_the_loss():
    schedule = make_schedule(linear(20, 1e-3, 0.3))
    denoise_fn = lambda x, t: 0.3 * x  # noqa: E731
    for t in (0, 7, 19):
        ts = jnp.full(3, t)
        got, mse, eps_mse = L.bpd_terms(denoise_fn, schedule, X, ts, noise_fn(t),
                                        clip_denoised=False, **ROW)
        want = vlb_loss(denoise_fn, schedule, X, ts, noise_fn(t), **ROW)
        np.testing.assert_allclose(got, want, rtol=1e-4)
        assert got.shape == mse.shape == eps_mse.shape == (3,)


def test_perfect_noise_prediction_has_no_error():
    schedule = make_schedule(linear(20, 1e-3, 0.3))
    noise = noise_fn(0)
    _, mse, eps_mse = L.bpd_terms(
        lambda x, t: noise, schedule, X, jnp.full(3, 5), noise, clip_denoised=False, **ROW)
    np.testing.assert_allclose(mse, 0, atol=1e-8)
    np.testing.assert_allclose(eps_mse, 0, atol=1e-8)


def test_gaussian_data_with_the_exact_denoiser():
    """Pixels N(0, s^2), the exact E[eps | x_t]: every KL term and error has a closed form."""
    s2, total = 0.25, 30
    betas = linear(total, 1e-3, 0.3)
    schedule, bar = make_schedule(betas), np.cumprod(1 - betas)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 32, 32, 3)) * s2**0.5, jnp.float32)

    def denoise_fn(x_t, t):
        a = schedule.alphas_cumprod[t][:, None, None, None]
        return jnp.sqrt(1 - a) * x_t / (a * s2 + 1 - a)

    for t in (1, 10, 29):
        noise = jax.random.normal(jax.random.key(t), x.shape)
        got, mse, eps_mse = L.bpd_terms(
            denoise_fn, schedule, x, jnp.full(8, t), noise, clip_denoised=False, **ROW)
        left = s2 * (1 - bar[t]) / (bar[t] * s2 + 1 - bar[t])  # Var[x_0 | x_t]
        np.testing.assert_allclose(mse.mean(), left, rtol=2e-2)
        np.testing.assert_allclose(eps_mse.mean(), left * bar[t] / (1 - bar[t]), rtol=2e-2)
        coef = betas[t] * np.sqrt(bar[t - 1]) / (1 - bar[t])
        q, p = betas[t] * (1 - bar[t - 1]) / (1 - bar[t]), betas[t]
        kl = 0.5 * (np.log(p / q) - 1 + (q + coef**2 * left) / p)
        np.testing.assert_allclose(got.mean(), kl / np.log(2), rtol=2e-2)
