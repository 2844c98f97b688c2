"""The reverse process: a table of samplers, and one step of each (Ho et al. 2020, Alg. 2).

A sampler visits steps t = N-1 ... 0 of a schedule with one network call each, and keeps what it
needs of earlier calls in its memory. Callables: ``predict_fn(x_t, t [B]) -> Prediction`` and
``noise_fn(t) -> [B,H,W,C]``; t counts steps of the schedule at hand. The loop over t is the
caller's.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import solvers
from ddpm_jax.diffusion.nodes import is_named, lowest_start, place
from ddpm_jax.diffusion.process import q_sample


class Sampler(NamedTuple):
    """step(schedule, prediction, x_t, t, noise, memory) -> (x of the next step [B,H,W,C], memory),
    t scalar int32. start(x_T) -> memory: what a step keeps for the next one, a tree of [B,...]
    arrays."""

    step: Callable
    start: Callable[[Any], Any] = lambda x_T: ()


def ancestral_step(schedule, prediction, x_t, t, noise, memory=()):
    """Alg. 2 line 4: no noise at t = 0."""
    scale = jnp.where(t > 0, jnp.exp(0.5 * prediction.log_variance), 0.0)
    return prediction.mean + scale * noise, memory


def ddim_step(schedule, prediction, x_t, t, noise, memory=(), *, eta=0.0):
    """Song et al. 2020, eq. 12 and 16. eta 0: without noise; 1: ancestral sampling with variance
    fixed_small."""
    previous = schedule.alphas_cumprod_prev[t]
    if not eta:
        return (jnp.sqrt(previous) * prediction.x_start
                + jnp.sqrt(1.0 - previous) * prediction.eps), memory
    variance = jnp.where(t > 0, eta**2 * schedule.posterior_variance[t], 0.0)
    rest = jnp.sqrt(jnp.maximum(1.0 - previous - variance, 0.0))
    return (jnp.sqrt(previous) * prediction.x_start + rest * prediction.eps
            + jnp.sqrt(variance) * noise), memory


def solver_step(table, output, schedule, prediction, x_t, t, noise, memory):
    """One evaluation of a solver: row t of ``table`` [N, 1 + slots, 2 + slots] applied to x_t, the
    prediction's field ``output`` and the slots of memory."""
    row = jnp.asarray(table, x_t.dtype)[t]
    terms = (x_t, getattr(prediction, output), *memory)
    following, *slots = (
        sum(row[i, j] * term for j, term in enumerate(terms)) for i in range(row.shape[0]))
    return following, tuple(slots)


class Method(NamedTuple):
    """A row of SAMPLERS. make(alphas_cumprod float64 [N], **keywords) -> Sampler on that chain; it
    raises ValueError where the chain is too short or a keyword impossible.

    keywords: those that a config may set; nodes: the row of ``nodes.NODES`` that serves it; clips:
    whether x_start may be clipped; visits(nodes int [S]) -> timesteps int [N] of its network calls,
    rising; num_nodes(N) -> S."""

    make: Callable
    keywords: frozenset = frozenset()
    nodes: str = "even"
    clips: bool = True
    visits: Callable = np.asarray
    num_nodes: Callable = int


def _ancestral(alphas_cumprod):
    return Sampler(ancestral_step)


def _ddim(alphas_cumprod, *, eta=0.0):
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is not in [0, 1]")
    return Sampler(functools.partial(ddim_step, eta=eta))


def _solve(alphas_cumprod, *, plan, output, span, **keywords):
    at = solvers.levels(alphas_cumprod)
    if not np.isfinite(at.lam).all():
        raise ValueError("the last timestep has no signal, by which solvers divide; take ancestral "
                         "or ddim, or a list of nodes without it")
    if len(at.lam) <= span:
        raise ValueError(f"{len(at.lam)} evaluations are too few: it needs {span + 1} or more; "
                         "take more, or ddim")
    table = plan(at, **keywords)
    return Sampler(functools.partial(solver_step, table, output),
                   lambda x_T: (jnp.zeros_like(x_T),) * (table.shape[1] - 1))


def _solver(plan, output, span, *, keywords=(), **fixed):
    """The row of a solver. output: the field of Prediction that it mixes, of which only x_start can
    be clipped; span: intervals between nodes that its largest step reaches over."""
    return Method(functools.partial(_solve, plan=plan, output=output, span=span, **fixed),
                  frozenset(keywords), nodes="logsnr", clips=output == "x_start")


_multistep = functools.partial(_solver, keywords=("lower_order_final",))


SAMPLERS = {
    "ancestral": Method(_ancestral),
    "ddim": Method(_ddim, frozenset({"eta"})),
    "dpm_solver_2": _solver(solvers.dpm_solver_singlestep, "eps", 2, order=2),
    "dpm_solver_3": _solver(solvers.dpm_solver_singlestep, "eps", 3, order=3),
    "dpmpp_2s": _solver(solvers.dpmpp_singlestep, "x_start", 2),
    "dpmpp_2m": _multistep(solvers.dpmpp_multistep, "x_start", 2, order=2),
    "dpmpp_3m": _multistep(solvers.dpmpp_multistep, "x_start", 3, order=3),
    "dpmpp_3m_diffusers": _multistep(
        solvers.dpmpp_multistep, "x_start", 3, order=3, third_factor=1.0),
    "unipc_2": _multistep(solvers.unipc, "x_start", 2, order=2),
    "unipc_3": _multistep(solvers.unipc, "x_start", 3, order=3),
    "heun": _solver(solvers.heun, "eps", 1)._replace(
        visits=solvers.heun_visits, num_nodes=solvers.half),
    "plms": _multistep(solvers.plms, "eps", 4),
    "pndm": _solver(solvers.pndm, "eps", 12)._replace(
        nodes="even", visits=solvers.pndm_visits, num_nodes=solvers.without_start),
}


def plan_chain(method, alphas_cumprod, nodes, steps, *, below=None, **keywords):
    """-> (timesteps int [N] of a chain's network calls, rising; its Sampler).

    method: a Method; alphas_cumprod float64 [T]; nodes: a row of ``nodes.NODES`` of ``steps`` calls
    in 1 ... T, or listed timesteps; below: as a chain from pure noise, but only its timesteps under
    this one; keywords: the method's. Raises ValueError where they do not fit each other; where
    another number of steps would, the message names the nearest.
    """
    plan = functools.partial(_plan_chain, method, alphas_cumprod, nodes, below=below, **keywords)
    try:
        return plan(steps)
    except ValueError as error:
        others = range(1, len(alphas_cumprod) + 1) if is_named(nodes) else ()
        near = sorted(others, key=lambda other: abs(other - steps))
        works = next((other for other in near if _fits(plan, other)), None)
        if works is None:
            raise
        raise ValueError(f"{error} (steps={works} works)") from None


def _fits(plan, steps) -> bool:
    try:
        plan(steps)
    except ValueError:
        return False
    return True


def _plan_chain(method, alphas_cumprod, nodes, steps, *, below, **keywords):
    nodes = place(nodes, alphas_cumprod, method.num_nodes(steps))
    total, first = len(alphas_cumprod), nodes[-1]
    if below is None and alphas_cumprod[-1] == 0 and first != total - 1:
        raise ValueError(f"the last timestep has no signal, so the first one visited must be "
                         f"{total - 1}, not {first}; take nodes even or trailing")
    if below is None and first < lowest_start(total):
        raise ValueError(f"it starts from pure noise, which images at timestep {first} of "
                         f"{total} are not; begin at {lowest_start(total)} or later")
    visits = method.visits(nodes if below is None else nodes[nodes < below])
    if not len(visits):
        raise ValueError(f"no timestep under {below} is visited")
    return visits, method.make(alphas_cumprod[visits], **keywords)


def reverse_step(sampler, schedule, predict_fn, noise_fn, x_t, t, memory):
    """-> (x_{t-1} [B,H,W,C], memory, x_0 predicted at t [B,H,W,C])"""
    prediction = predict_fn(x_t, jnp.full(x_t.shape[0], t, jnp.int32))
    previous, memory = sampler.step(schedule, prediction, x_t, t, noise_fn(t), memory)
    return previous, memory, prediction.x_start


def interpolate(schedule, x_start1, x_start2, t, weights, noise1, noise2):
    """Latents between two images at step t (Fig. 8): mixtures of the noised images, not of x_0.

    x_start1, x_start2, noise1, noise2 [H,W,C]; t int; weights [B] of the second image in [0, 1].
    -> x_t [B,H,W,C], to be decoded by t+1 reverse steps (diffusion_utils.py:281)
    """
    both = q_sample(
        schedule,
        jnp.stack([x_start1, x_start2]),
        jnp.full(2, t, jnp.int32),
        jnp.stack([noise1, noise2]),
    )
    w = weights[:, None, None, None]
    return (1.0 - w) * both[:1] + w * both[1:]
