"""Deterministic solvers of the probability-flow ODE, as tables of coefficients.

At every evaluation a solver mixes three things linearly: the state x, the network's output there
(x_start or eps) and what it kept of earlier evaluations. A solver is therefore a *plan*: one small
matrix an evaluation, computed in float64 on the host before anything is compiled. All solvers share
one step (``sampling.linear_step``), one network call an evaluation, and no branch.

alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod), lambda = log(alpha / sigma). From
node p to node q with less noise, h = lambda_q - lambda_p > 0. Below the last node lies the clean
image (alpha 1, sigma 0); the step to it is of first order in every solver, since lambda is infinite
there. Sources: DPM-Solver (Lu et al. 2022a), DPM-Solver++ (Lu et al. 2022b), UniPC (Zhao et al.
2023), PNDM (Liu et al. 2022), EDM (Karras et al. 2022).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy import expm1


class Levels(NamedTuple):
    """alpha, sigma, lam float64 [N] of the evaluations in the order of sampling, noisiest first."""

    alpha: np.ndarray
    sigma: np.ndarray
    lam: np.ndarray


def levels(alphas_cumprod) -> Levels:
    """Levels from alphas_cumprod float64 [N] of a chain, least noise first."""
    kept = np.asarray(alphas_cumprod, np.float64)[::-1]
    alpha, sigma = np.sqrt(kept), np.sqrt(1.0 - kept)
    with np.errstate(divide="ignore"):
        return Levels(alpha, sigma, np.log(alpha) - np.log(sigma))


class Plan:
    """Rows written evaluation by evaluation. ``table()`` -> float64 [N, 1 + slots, 2 + slots]:
    row 0 makes the next state, row 1 + i slot i, each from (x, output, slot 0, slot 1, ...)."""

    def __init__(self, count: int, slots: int):
        self.size = 2 + slots
        self._table = np.zeros((count, 1 + slots, self.size))

    def basis(self):
        """Unit vectors: x, output, then one for each slot."""
        return list(np.eye(self.size))

    def write(self, i: int, following, *slots):
        """Evaluation i: the next state and every slot, as combinations of ``basis()``."""
        self._table[i] = np.stack([following, *slots])

    def table(self):
        """The plan in the chain's order, where the noisiest evaluation is the last row."""
        return self._table[::-1]


def _clean(at, i, x, *, x_start=None, eps=None):
    """The first-order step from evaluation i to the clean image."""
    return x_start if eps is None else (x - at.sigma[i] * eps) / at.alpha[i]


def _data_step(at, p, q, x, x_start):
    """First order in x_start from p to q (DPM-Solver++ eq. 9; DDIM)."""
    h = at.lam[q] - at.lam[p]
    return at.sigma[q] / at.sigma[p] * x - at.alpha[q] * expm1(-h) * x_start


def _noise_step(at, p, q, x, eps):
    """First order in eps from p to q (DPM-Solver eq. 3.7; DDIM)."""
    h = at.lam[q] - at.lam[p]
    return at.alpha[q] / at.alpha[p] * x - at.sigma[q] * expm1(h) * eps


def _orders(count, order, lower_order_final):
    """Order of the step after each of ``count`` evaluations: the history bounds it at the start."""
    for i in range(count - 1):
        yield min(order, i + 1, count - 1 - i if lower_order_final else order)


# ---- multistep: one evaluation a step ----


def dpmpp_multistep(at: Levels, *, order, third_factor=2.0, lower_order_final=False):
    """DPM-Solver++ (2M, 3M). Slots: x_start of the last order - 1 evaluations.

    The second difference of order 3 carries a factor 2, without which the solver is of second order
    (three public code bases leave it out; third_factor=1 reproduces them).
    """
    count = len(at.lam)
    plan = Plan(count, order - 1)
    x, now, *past = plan.basis()
    for i, of in enumerate(_orders(count, order, lower_order_final)):
        h = at.lam[i + 1] - at.lam[i]
        following = _data_step(at, i, i + 1, x, now)
        if of > 1:
            r0 = (at.lam[i] - at.lam[i - 1]) / h
            first = (now - past[0]) / r0
        if of == 2:
            following = following - at.alpha[i + 1] * expm1(-h) * first / 2
        if of == 3:
            r1 = (at.lam[i - 1] - at.lam[i - 2]) / h
            before = (past[0] - past[1]) / r1
            second = third_factor * (first - before) / (r0 + r1)
            first = first + r0 / (r0 + r1) * (first - before)
            following = (following + at.alpha[i + 1] * (expm1(-h) / h + 1) * first
                         - at.alpha[i + 1] * ((expm1(-h) + h) / h**2 - 0.5) * second)
        plan.write(i, following, *[now, *past][:order - 1])
    plan.write(count - 1, _clean(at, count - 1, x, x_start=now), *past)
    return plan.table()


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
                    (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(at: Levels, *, lower_order_final=False):
    """PLMS: DDIM steps with Adams-Bashforth means of the last four eps (PNDM, eq. 12).

    Slots: the last three eps. The order is 2 whatever the length of the history.
    """
    count = len(at.lam)
    plan = Plan(count, 3)
    x, now, *past = plan.basis()
    for i, of in enumerate(_orders(count, 4, lower_order_final)):
        eps = sum(w * e for w, e in zip(_ADAMS_BASHFORTH[of - 1], (now, *past), strict=False))
        plan.write(i, _noise_step(at, i, i + 1, x, eps), now, *past[:2])
    plan.write(count - 1, _clean(at, count - 1, x, eps=now), *past)
    return plan.table()


def _unipc_weights(ratios, hh, scale):
    """Solves the order conditions of UniPC for the nodes at ``ratios`` (UniPC, eq. 5)."""
    size = len(ratios)
    phi, factorial, right = expm1(hh) / hh - 1, 1, []
    for i in range(1, size + 1):
        right.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    return np.linalg.solve(np.vander(ratios, size, increasing=True).T, np.array(right))


def unipc(at: Levels, *, order, lower_order_final=False):
    """UniPC with B(h) = exp(h) - 1 ("bh2"): a predictor of ``order``, and a corrector that uses the
    next evaluation without a further one; order + 1 in all.

    Slots: the corrected state of the last node, and x_start of the last ``order`` evaluations.
    """
    count = len(at.lam)
    plan = Plan(count, 1 + order)
    x, now, base, *past = plan.basis()

    def move(p, of, state, at_p, older, new=None):
        """From p to p + 1 with x_start at_p there, older ones before, and new at p + 1."""
        h = at.lam[p + 1] - at.lam[p]
        scale = expm1(-h)
        ratios = [(at.lam[p - 1 - k] - at.lam[p]) / h for k in range(of - 1)]
        slopes = [(d - at_p) / r for d, r in zip(older, ratios, strict=False)]
        if new is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, new - at_p]
        # With one unknown the published solver takes 1/2, the limit of small h.
        weights = [0.5] if len(ratios) == 1 else _unipc_weights(np.array(ratios), -h, scale)
        mean = sum((w * s for w, s in zip(weights, slopes, strict=True)), np.zeros(plan.size))
        return (at.sigma[p + 1] / at.sigma[p] * state
                - at.alpha[p + 1] * scale * (at_p + mean))

    orders = list(_orders(count, order, lower_order_final))
    for i in range(count):
        corrected = x if i == 0 else move(i - 1, orders[i - 1], base, past[0], past[1:], now)
        following = (_clean(at, i, x, x_start=now) if i == count - 1
                     else move(i, orders[i], corrected, now, past))
        plan.write(i, following, corrected, *[now, *past][:order])
    return plan.table()


# ---- singlestep: the evaluations of a step lie on nodes of their own ----


def _groups(count, order):
    """(first evaluation, order) of each step over ``count`` evaluations, the last one left out; a
    remainder is one step of lower order at the end."""
    return [(i, min(order, count - 1 - i)) for i in range(0, count - 1, order)]


def dpm_solver_singlestep(at: Levels, *, order):
    """DPM-Solver-2 and -3 in eps; intermediate points are nodes of the chain, with the ratios that
    their lambda have (DPM-Solver, Alg. 1 and 2). Slots: x and eps at the step's start, next eps."""
    count = len(at.lam)
    plan = Plan(count, 3)
    x, now, base, eps0, eps1 = plan.basis()
    for i, of in _groups(count, order):
        plan.write(i, _noise_step(at, i, i + 1, x, now), x, now, now)
        if of == 1:
            continue
        q = i + of
        h = at.lam[q] - at.lam[i]
        r1, r2 = ((at.lam[i + k] - at.lam[i]) / h for k in (1, of - 1))
        if of == 2:
            mean = eps0 + (now - eps0) / (2 * r1)
            plan.write(i + 1, _noise_step(at, i, q, base, mean), base, eps0, now)
            continue
        between = (_noise_step(at, i, i + 2, base, eps0) - at.sigma[i + 2] * r2 / r1
                   * (expm1(r2 * h) / (r2 * h) - 1) * (now - eps0))
        plan.write(i + 1, between, base, eps0, now)
        final = (_noise_step(at, i, q, base, eps0)
                 - at.sigma[q] / r2 * (expm1(h) / h - 1) * (now - eps0))
        plan.write(i + 2, final, base, eps0, now)
    plan.write(count - 1, _clean(at, count - 1, x, eps=now), base, eps0, eps1)
    return plan.table()


def dpmpp_singlestep(at: Levels):
    """DPM-Solver++ 2S in x_start (Alg. 1). Slots: x and x_start at the step's start."""
    count = len(at.lam)
    plan = Plan(count, 2)
    x, now, base, start = plan.basis()
    for i, of in _groups(count, 2):
        plan.write(i, _data_step(at, i, i + 1, x, now), x, now)
        if of == 2:
            r = (at.lam[i + 1] - at.lam[i]) / (at.lam[i + 2] - at.lam[i])
            mean = (1 - 1 / (2 * r)) * start + now / (2 * r)
            plan.write(i + 1, _data_step(at, i, i + 2, base, mean), base, start)
    plan.write(count - 1, _clean(at, count - 1, x, x_start=now), base, start)
    return plan.table()


# ---- chains in which a node is evaluated more than once ----


def heun(at: Levels):
    """Heun's method in (x / alpha, sigma / alpha), as EDM's sampler (Alg. 1), on ``heun_visits``.

    Slots: x and eps at the step's start.
    """
    count = len(at.lam)
    plan = Plan(count, 2)
    x, now, base, start = plan.basis()
    for i in range(0, count - 1, 2):
        plan.write(i, _noise_step(at, i, i + 1, x, now), x, now)
        plan.write(i + 1, _noise_step(at, i, i + 1, base, (start + now) / 2), base, start)
    plan.write(count - 1, _clean(at, count - 1, x, eps=now), base, start)
    return plan.table()


def heun_visits(nodes):
    """Every node twice, as the end of a step and as the start of the next, but the first and the
    step into the clean image: int [2 S - 1] from int [S], rising."""
    return np.repeat(nodes, 2)[:-1]


def pndm(at: Levels):
    """F-PNDM: three pseudo Runge-Kutta steps of four evaluations, then PLMS (PNDM, Alg. 2), on
    ``pndm_visits``. Slots: x at the step's start, the sum of the step's eps, the last three eps.
    """
    count = len(at.lam)
    plan = Plan(count, 5)
    x, now, base, total, *past = plan.basis()
    for i in range(0, 12, 4):
        half, end = i + 1, i + 3
        plan.write(i, _noise_step(at, i, half, x, now), x, now / 6, now, *past[:2])
        plan.write(i + 1, _noise_step(at, i, half, base, now), base, total + now / 3, *past)
        plan.write(i + 2, _noise_step(at, i, end, base, now), base, total + now / 3, *past)
        plan.write(i + 3, _noise_step(at, i, end, base, total + now / 6), base, total, *past)
    for i in range(12, count - 1):
        eps = sum(w * e for w, e in zip(_ADAMS_BASHFORTH[3], (now, *past), strict=True))
        plan.write(i, _noise_step(at, i, i + 1, x, eps), base, total, now, *past[:2])
    plan.write(count - 1, _clean(at, count - 1, x, eps=now), base, total, *past)
    return plan.table()


def pndm_visits(nodes):
    """int [S + 9]: the three noisiest intervals of ``nodes`` int [S] visited as start, middle,
    middle, end. Raises ValueError where there are fewer than 4 nodes, or no timestep between two.
    """
    nodes = np.asarray(nodes)
    if len(nodes) < 4 or (np.diff(nodes[-4:]) < 2).any():
        raise ValueError("its Runge-Kutta start needs four nodes that are two timesteps "
                         "apart; plms has none")
    start = []
    for low, high in zip(nodes[-4:-1], nodes[-3:], strict=True):
        middle = (low + high) // 2
        start += [low, middle, middle, high]
    return np.concatenate([nodes[:-4], [nodes[-4]], start])


def half(evaluations):
    """Nodes of a chain in which all but the last are evaluated twice."""
    return (evaluations + 1) // 2


def without_start(evaluations):
    """Nodes of a chain with F-PNDM's start, which takes nine evaluations more than it has nodes."""
    return max(evaluations - 9, math.ceil(evaluations / 4))
