"""Every solver converges at its order on a problem whose solution is known: the exact denoiser of a
Gaussian mixture, in float64, against an integrator at 1e-13."""

import functools

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ddpm_jax.diffusion import solvers
from ddpm_jax.diffusion.sampling import SAMPLERS

WEIGHTS, MEANS, SPREADS = np.array([0.3, 0.5, 0.2]), np.array([-0.9, 0.1, 0.8]), np.array(
    [0.15, 0.2, 0.1])
LOW, HIGH = -4.5, 2.5  # lambda of the first and the last node
X_T = np.linspace(-2, 2, 17)
DETERMINISTIC = [name for name, row in SAMPLERS.items()
                 if isinstance(row.make, functools.partial)]


def at(lam):
    return solvers.Levels(1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam)), lam)


def denoise(x, alpha, sigma):
    """E[x_0 | x] of the mixture."""
    variance = alpha**2 * SPREADS**2 + sigma**2
    off = x[:, None] - alpha * MEANS
    log_weight = np.log(WEIGHTS) - 0.5 * np.log(variance) - 0.5 * off**2 / variance
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    return (weight * (MEANS + alpha * SPREADS**2 / variance * off)).sum(1)


@functools.cache
def solution():
    def slope(lam, x):
        alpha, sigma = (v[0] for v in at(np.array([lam]))[:2])
        eps = (x - alpha * denoise(x, alpha, sigma)) / sigma
        return sigma**2 * x - sigma * eps

    return solve_ivp(slope, (LOW, HIGH), X_T, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]


def last_node(row, lam, **keywords):
    """The state at the last of the nodes ``lam`` (rising), before the step to the clean image."""
    plan = functools.partial(row.make.keywords["plan"], **{
        k: v for k, v in row.make.keywords.items() if k not in ("plan", "output", "span")})
    visited = at(row.visits(lam[::-1])[::-1])
    table = plan(visited, **keywords)[::-1]
    x, carry = X_T, [np.zeros_like(X_T)] * (table.shape[1] - 1)
    for i in range(len(table) - 1):
        x_start = denoise(x, visited.alpha[i], visited.sigma[i])
        eps = (x - visited.alpha[i] * x_start) / visited.sigma[i]
        terms = (x, {"x_start": x_start, "eps": eps}[row.make.keywords["output"]], *carry)
        x, *carry = (sum(w * term for w, term in zip(line, terms, strict=True))
                     for line in table[i])
    return x


def visits_of_reals(nodes):
    """F-PNDM's evaluations where a node need not be a timestep."""
    return solvers.pndm_visits(2 * np.arange(len(nodes))).astype(float) / 2


def error(name, count, **keywords):
    row, lam = SAMPLERS[name], np.linspace(LOW, HIGH, count + 1)
    if row.visits is solvers.pndm_visits:
        where = visits_of_reals(lam)
        row = row._replace(visits=lambda nodes: np.interp(where, np.arange(len(nodes)), nodes))
    return np.abs(last_node(row, lam, **keywords) - solution()).max()


ORDERS = {"dpm_solver_2": 2, "dpm_solver_3": 3, "dpmpp_2s": 2, "dpmpp_2m": 2, "dpmpp_3m": 3,
          "dpmpp_3m_diffusers": 2, "unipc_2": 3, "unipc_3": 4, "heun": 2, "plms": 2, "pndm": 2}


def test_every_solver_has_its_order_here():
    assert sorted(ORDERS) == sorted(DETERMINISTIC)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_at_the_solver_s_order(name):
    errors = [error(name, n) for n in (192, 384, 768)]
    slopes = -np.diff(np.log2(errors))
    assert abs(slopes[-1] - ORDERS[name]) < 0.15, (errors, slopes)
    assert errors[0] < 1e-3


def test_the_factor_2_is_what_the_third_order_needs():
    slope = np.log2(error("dpmpp_3m", 384) / error("dpmpp_3m", 768))
    without = np.log2(error("dpmpp_3m_diffusers", 384) / error("dpmpp_3m_diffusers", 768))
    assert slope > 2.9 and without < 2.2


def test_a_lower_order_at_the_end_caps_the_order():
    errors = [error("dpmpp_3m", n, lower_order_final=True) for n in (192, 384, 768)]
    assert -np.diff(np.log2(errors))[-1] < 2.5


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_constant_prediction_is_followed_exactly(name):
    """Where x_start does not depend on x, every solver is on the exact path at every node."""
    row = SAMPLERS[name]
    lam = np.linspace(LOW, HIGH, 25)
    if row.visits is solvers.pndm_visits:
        where = visits_of_reals(lam)
        row = row._replace(visits=lambda nodes: np.interp(where, np.arange(len(nodes)), nodes))
    visited = at(row.visits(lam[::-1])[::-1])
    plan = functools.partial(row.make.keywords["plan"], **{
        k: v for k, v in row.make.keywords.items() if k not in ("plan", "output", "span")})
    table, clean, noise = plan(visited)[::-1], 0.3, 1.7
    x, carry = visited.alpha[0] * clean + visited.sigma[0] * noise, [0.0] * (
        plan(visited).shape[1] - 1)
    for line in table:
        output = {"x_start": clean, "eps": noise}[row.make.keywords["output"]]
        x, *carry = line @ np.array([x, output, *carry])
    np.testing.assert_allclose(x, clean, atol=1e-12)


def test_visits():
    np.testing.assert_array_equal(solvers.heun_visits([0, 5, 9]), [0, 0, 5, 5, 9])
    np.testing.assert_array_equal(
        solvers.pndm_visits([0, 2, 6, 10, 20]),
        [0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 15, 15, 20])
    for bad in ([0, 1, 2], [0, 2, 3, 6]):
        with pytest.raises(ValueError, match="four nodes"):
            solvers.pndm_visits(bad)
    for evaluations in range(13, 60):
        assert len(solvers.pndm_visits(2 * np.arange(solvers.without_start(evaluations)))) == \
            evaluations
    for evaluations in range(1, 30, 2):
        assert len(solvers.heun_visits(np.arange(solvers.half(evaluations)))) == evaluations
