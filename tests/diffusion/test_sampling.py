import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import sampling as S
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedule import (
    Schedule,
    evenly_spaced,
    linear,
    make_schedule,
    respace,
    tables64,
)

BETAS = linear(50, 1e-4, 0.3)
SCHEDULE = make_schedule(BETAS)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(-1, 1, (3, 4, 4, 1)), jnp.float32)
X_T = jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)


def noise_fn(t):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), t), X.shape)


def predict_fn(denoise_fn, schedule=SCHEDULE, predict="x_start"):
    def predict_fn(x_t, t):
        return p_mean_variance(
            schedule, denoise_fn(x_t, schedule.timesteps[t]), x_t, t,
            predict=PARAMETERIZATIONS[predict], variance=VARIANCES["fixed_large"],
            clip_denoised=True)

    return predict_fn


def chain(steps, betas=BETAS):
    visited = evenly_spaced(len(betas), steps)
    respaced = respace(betas, visited)
    return respaced, make_schedule(respaced, visited)


def sample(predict_fn, name, x_t, steps, schedule=SCHEDULE, betas=BETAS, **keywords):
    """x_0 after the reverse steps steps-1 ... 0 from x_t."""
    sampler = S.SAMPLERS[name].make(np.cumprod(1 - betas)[:steps], **keywords)

    def body(carry, t):
        x, memory, _ = S.reverse_step(sampler, schedule, predict_fn, noise_fn, carry[0], t,
                                      carry[1])
        return (x, memory), None

    return jax.lax.scan(body, (x_t, sampler.start(x_t)), jnp.arange(steps - 1, -1, -1))[0][0]


@pytest.mark.parametrize("name", S.SAMPLERS)
@pytest.mark.parametrize("steps", [50, 7, 1])
def test_a_perfect_denoiser_gets_its_image_back(name, steps):
    betas, schedule = chain(steps)
    if steps <= {"pndm": 12, "ancestral": 0, "ddim": 0}.get(name, 1):
        with pytest.raises(ValueError, match="evaluations are too few"):
            S.SAMPLERS[name].make(np.cumprod(1 - betas))
        return
    x_0 = sample(predict_fn(lambda x, t: X, schedule), name, X_T, steps, schedule, betas)
    np.testing.assert_allclose(x_0, X, atol=1e-5)


def eps_of(x, t):
    """A denoiser that is wrong in a smooth way."""
    return 0.9 * jnp.tanh(x) + 0.02 * jnp.cos(t / 9.0)[:, None, None, None]


def test_ddim_with_eta_1_is_ancestral_sampling_with_fixed_small():
    """Exactly, so in float64 to its rounding."""
    visited = evenly_spaced(50, 12)
    betas = respace(BETAS, visited)
    with jax.enable_x64(True):
        schedule = Schedule(**{k: jnp.asarray(v) for k, v in tables64(betas).items()},
                            timesteps=jnp.asarray(visited))

        def predict(x_t, t):
            return p_mean_variance(
                schedule, eps_of(x_t, schedule.timesteps[t]), x_t, t,
                predict=PARAMETERIZATIONS["eps"], variance=VARIANCES["fixed_small"],
                clip_denoised=True)

        def draw(name, **keywords):
            return np.asarray(sample(predict, name, X_T.astype(jnp.float64), 12, schedule, betas,
                                     **keywords))

        np.testing.assert_allclose(draw("ddim", eta=1.0), draw("ancestral"), atol=1e-12)
        assert np.abs(draw("ddim", eta=0.5) - draw("ddim")).max() > 1e-2
    with pytest.raises(ValueError, match="eta=1.5"):
        S.SAMPLERS["ddim"].make(np.cumprod(1 - BETAS), eta=1.5)


@pytest.mark.parametrize("name", ["dpm_solver_2", "dpmpp_2m", "unipc_2", "plms"])
def test_a_solver_in_float32_follows_its_plan_in_float64(name):
    """The loop under jit against the plan's rows applied with numpy."""
    betas, schedule = chain(20)
    predict = predict_fn(eps_of, schedule, "eps")
    sampler = S.SAMPLERS[name].make(np.cumprod(1 - betas))
    table, output = sampler.step.args
    x, memory = np.asarray(X_T, np.float64), [np.zeros(X.shape)] * (table.shape[1] - 1)
    for t in range(19, -1, -1):
        prediction = predict(jnp.asarray(x, jnp.float32), jnp.full(3, t))
        terms = (x, np.asarray(getattr(prediction, output), np.float64), *memory)
        x, *memory = (sum(w * term for w, term in zip(line, terms, strict=True))
                      for line in table[t])
    np.testing.assert_allclose(sample(predict, name, X_T, 20, schedule, betas), x, atol=1e-4)


def test_without_history_a_multistep_solver_takes_ddim_s_step():
    betas, schedule = chain(10)
    prediction = predict_fn(eps_of, schedule, "eps")(X_T, jnp.full(3, 9))
    results = []
    for name in ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc_2", "plms"):
        sampler = S.SAMPLERS[name].make(np.cumprod(1 - betas))
        results.append(
            sampler.step(schedule, prediction, X_T, 9, noise_fn(9), sampler.start(X_T))[0])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-5)


def test_the_loop_equals_algorithm_2_written_out():
    denoise_fn = lambda x, t: jnp.tanh(x) * 0.5 + 0.01 * t[:, None, None, None]  # noqa: E731
    x = np.asarray(X_T, np.float64)
    betas = BETAS
    bar = np.cumprod(1 - betas)
    for t in range(49, -1, -1):
        eps = np.tanh(x) * 0.5 + 0.01 * t
        x_0 = np.clip((x - np.sqrt(1 - bar[t]) * eps) / np.sqrt(bar[t]), -1, 1)
        before = bar[t - 1] if t else 1.0
        mean = (betas[t] * np.sqrt(before) * x_0
                + (1 - before) * np.sqrt(1 - betas[t]) * x) / (1 - bar[t])
        x = mean + (np.sqrt(betas[t]) * np.asarray(noise_fn(t), np.float64) if t else 0)
    got = sample(predict_fn(denoise_fn, predict="eps"), "ancestral", X_T, 50)
    np.testing.assert_allclose(got, x, atol=1e-4)


def test_a_sampler_remembers_earlier_steps(monkeypatch):
    """Memory goes from step to step: here the sum of all predictions of x_0."""
    def step(schedule, prediction, x_t, t, noise, memory):
        x, _ = S.ancestral_step(schedule, prediction, x_t, t, noise)
        return jnp.where(t > 0, x, memory + prediction.x_start), memory + prediction.x_start

    monkeypatch.setitem(S.SAMPLERS, "sum",
                        S.Method(lambda alphas_cumprod: S.Sampler(step, jnp.zeros_like)))
    np.testing.assert_allclose(
        sample(predict_fn(lambda x, t: X), "sum", X_T, 50), 50 * X, rtol=1e-5)


def test_respaced_and_full_chains_agree_for_a_gaussian():
    """With the exact denoiser of N(0, 1) data, both chains leave N(0, 1) alone (DDIM: exactly)."""
    def denoise(schedule):
        return lambda x, t: jnp.sqrt(
            1 - SCHEDULE.alphas_cumprod[t])[:, None, None, None] * x

    for steps in (50, 10):
        betas, schedule = chain(steps)

        def no_clip(x_t, t, schedule=schedule):
            return p_mean_variance(
                schedule, denoise(schedule)(x_t, schedule.timesteps[t]), x_t, t,
                predict=PARAMETERIZATIONS["eps"], variance=VARIANCES["fixed_large"],
                clip_denoised=False)

        x_0 = sample(no_clip, "ddim", X_T, steps, schedule, betas)
        # the DDIM map scales by a product of cosines of angle steps: 1 in the limit
        ratio = np.asarray(x_0 / X_T)
        assert np.ptp(ratio) < 1e-3 and 0.7 < ratio.mean() <= 1.001, (steps, ratio.mean())


def test_interpolation_mixes_noised_images():
    a, b, n1, n2 = X[0], X[1], X_T[0], X_T[1]
    weights = jnp.array([0.0, 0.25, 1.0])
    got = S.interpolate(SCHEDULE, a, b, 20, weights, n1, n2)
    ends = q_sample(SCHEDULE, jnp.stack([a, b]), jnp.full(2, 20), jnp.stack([n1, n2]))
    np.testing.assert_allclose(got[0], ends[0], atol=1e-6)
    np.testing.assert_allclose(got[2], ends[1], atol=1e-6)
    np.testing.assert_allclose(got[1], 0.75 * ends[0] + 0.25 * ends[1], atol=1e-6)


def test_shared_latents_start_in_the_middle():
    """Decoding from x_t needs t+1 steps only; the perfect denoiser still gets its image."""
    x_t = q_sample(SCHEDULE, X, jnp.full(3, 20), X_T)
    x_0 = sample(predict_fn(lambda x, t: X), "ancestral", x_t, 21)
    np.testing.assert_allclose(x_0, X, atol=1e-6)
