"""Step by step beside diffusers' schedulers, where these are right.

Not compared: their third-order DPM-Solver++ is of second order (ours is the row
``dpmpp_3m_diffusers``); Heun and F-PNDM place their evaluations on other timesteps.
"""

import numpy as np
import pytest

from ddpm_jax.diffusion import nodes, sampling, solvers
from ddpm_jax.diffusion.schedule import linear

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")]
T, STEPS = 1000, 12
BETAS = linear(T)
BAR = np.cumprod(1 - BETAS)
X_T = np.random.default_rng(0).standard_normal((2, 1, 4, 4))
MULTISTEP = dict(num_train_timesteps=T, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                 prediction_type="epsilon", final_sigmas_type="zero")


def eps_of(x, t):
    return 0.9 * np.tanh(x) + 0.02 * np.cos(t / 90.0)


def ours(name, visited):
    """The states after every evaluation, in float64."""
    row = sampling.SAMPLERS[name]
    plan = {k: v for k, v in row.make.keywords.items() if k not in ("plan", "output", "span")}
    table = row.make.keywords["plan"](solvers.levels(BAR[visited]), **plan)
    x, states = X_T, []
    carry = [np.zeros_like(X_T)] * (table.shape[1] - 1)
    for k in range(len(visited) - 1, -1, -1):
        alpha, sigma = np.sqrt(BAR[visited[k]]), np.sqrt(1 - BAR[visited[k]])
        eps = eps_of(x, visited[k])
        output = {"eps": eps, "x_start": (x - sigma * eps) / alpha}[row.make.keywords["output"]]
        terms = (x, output, *carry)
        x, *carry = (sum(w * term for w, term in zip(line, terms, strict=True))
                     for line in table[k])
        states.append(x)
    return states


def theirs(scheduler):
    """The states after every evaluation at the timesteps that the scheduler holds."""
    import torch
    x, states = torch.tensor(X_T), []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tensor(eps_of(x.numpy(), float(t))), t, x).prev_sample
        states.append(x.numpy())
    return states


@pytest.mark.parametrize("name, order", [("dpmpp_2m", 2), ("dpmpp_3m_diffusers", 3)])
@pytest.mark.parametrize("spacing", ["logsnr", "even"])
def test_every_step_equals_diffusers(name, order, spacing):
    diffusers = pytest.importorskip("diffusers")
    visited = nodes.place(spacing, BAR, STEPS)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **MULTISTEP, algorithm_type="dpmsolver++", solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(timesteps=[int(t) for t in visited[::-1]])
    pairs = zip(ours(name, visited), theirs(scheduler), strict=True)
    for i, (a, b) in enumerate(pairs):
        # they keep lambda in float32
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=f"evaluation {i}")


def test_unipc_2_equals_diffusers_up_to_the_last_node():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        **MULTISTEP, solver_order=2, solver_type="bh2", predict_x0=True, lower_order_final=False,
        disable_corrector=[])
    scheduler.set_timesteps(STEPS)
    a, b = ours("unipc_2", scheduler.timesteps.numpy()[::-1]), theirs(scheduler)
    for i in range(STEPS - 1):
        np.testing.assert_allclose(a[i], b[i], rtol=2e-4, atol=2e-4, err_msg=f"evaluation {i}")


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_equals_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    import jax.numpy as jnp
    import torch

    from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
    from ddpm_jax.diffusion.schedule import make_schedule, respace
    visited = nodes.place("leading", BAR, 10)
    schedule = make_schedule(respace(BETAS, visited), visited)
    scheduler = diffusers.DDIMScheduler(T, beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
                                        clip_sample=False, timestep_spacing="leading",
                                        set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    noise = np.random.default_rng(1).standard_normal(X_T.shape)
    sampler = sampling.SAMPLERS["ddim"].make(BAR[visited], eta=eta)
    for k in (9, 4, 1):
        eps = eps_of(X_T, visited[k])
        want = scheduler.step(torch.tensor(eps), int(visited[k]), torch.tensor(X_T), eta=eta,
                              variance_noise=torch.tensor(noise)).prev_sample.numpy()
        prediction = p_mean_variance(
            schedule, jnp.asarray(eps, jnp.float32), jnp.asarray(X_T, jnp.float32),
            jnp.full(2, k), predict=PARAMETERIZATIONS["eps"], variance=VARIANCES["fixed_small"],
            clip_denoised=False)
        got, _ = sampler.step(schedule, prediction, jnp.asarray(X_T, jnp.float32), k,
                              jnp.asarray(noise, jnp.float32), ())
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
