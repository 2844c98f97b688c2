"""Noise schedules: beta laws and the tables that follow from them (Ho et al. 2020, sec. 2 and 4).

Every table is computed in float64 on the host and rounded to float32 once, at the very end: the
recursion in float32 is off by 1.6e-4 in ``1 - alphas_cumprod[0]``.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Schedule(NamedTuple):
    """Tables over t = 0 ... T-1, each float32 [T] (``timesteps`` int32 [T]).

    ``timesteps[t]`` is the timestep passed to the network at step t; it differs from t on a
    respaced chain.
    """

    betas: jnp.ndarray
    alphas_cumprod: jnp.ndarray
    alphas_cumprod_prev: jnp.ndarray
    sqrt_alphas_cumprod: jnp.ndarray
    sqrt_one_minus_alphas_cumprod: jnp.ndarray
    log_one_minus_alphas_cumprod: jnp.ndarray
    sqrt_recip_alphas_cumprod: jnp.ndarray
    sqrt_recipm1_alphas_cumprod: jnp.ndarray
    posterior_variance: jnp.ndarray
    posterior_log_variance: jnp.ndarray
    fixed_large_log_variance: jnp.ndarray
    posterior_mean_coef1: jnp.ndarray
    posterior_mean_coef2: jnp.ndarray
    timesteps: jnp.ndarray


def linear(num_timesteps, beta_start=1e-4, beta_end=0.02):
    """Betas float64 [T], linear in t: the paper's choice (sec. 4)."""
    return np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)


def quad(num_timesteps, beta_start=1e-4, beta_end=0.02):
    """Betas float64 [T] whose square roots are linear in t (diffusion_utils_2.py:23)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2


def const(num_timesteps, beta_end=0.02):
    """Betas float64 [T], all equal."""
    return np.full(num_timesteps, beta_end, dtype=np.float64)


def jsd(num_timesteps):
    """Betas float64 [T]: 1/T, 1/(T-1), ..., 1 (diffusion_utils_2.py:33, after Sohl-Dickstein)."""
    return 1.0 / np.linspace(num_timesteps, 1, num_timesteps, dtype=np.float64)


def _warmup(num_timesteps, beta_start, beta_end, fraction):
    betas = const(num_timesteps, beta_end)
    ramp = int(num_timesteps * fraction)
    betas[:ramp] = linear(ramp, beta_start, beta_end)
    return betas


def warmup10(num_timesteps, beta_start=1e-4, beta_end=0.02):
    """Betas float64 [T]: linear over the first tenth, constant after (diffusion_utils_2.py:27)."""
    return _warmup(num_timesteps, beta_start, beta_end, 0.1)


def warmup50(num_timesteps, beta_start=1e-4, beta_end=0.02):
    """Betas float64 [T]: linear over the first half, constant after (diffusion_utils_2.py:29)."""
    return _warmup(num_timesteps, beta_start, beta_end, 0.5)


def cosine(num_timesteps, offset=0.008, max_beta=0.999):
    """Betas float64 [T] of a squared-cosine alphas_cumprod (Nichol & Dhariwal 2021, eq. 17)."""
    u = np.linspace(0, 1, num_timesteps + 1, dtype=np.float64)
    f = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], max_beta)


def listed(num_timesteps, betas=()):
    """The betas [T] given, as float64. Raises ValueError where there are not T of them."""
    if len(betas) != num_timesteps:
        raise ValueError(f"{len(betas)} betas are listed for {num_timesteps} timesteps")
    return np.array(betas, dtype=np.float64)


BETAS = {
    "linear": linear,
    "quad": quad,
    "const": const,
    "jsd": jsd,
    "warmup10": warmup10,
    "warmup50": warmup50,
    "cosine": cosine,
    "listed": listed,
}


def _first_is_next(variance, posterior_variance):
    first = posterior_variance[min(1, len(posterior_variance) - 1)]
    return np.log(np.maximum(np.append(first, variance[1:]), 1e-20))


def _floor(variance, posterior_variance):
    return np.log(np.maximum(variance, 1e-20))


# What stands for log-variance at t = 0, where the posterior's variance is 0: the CIFAR-10 code
# takes the posterior's at t = 1 (diffusion_utils_2.py:57,141), the 256x256 code a floor
# (diffusion_utils.py:82). It matters to the decoder's likelihood only: no noise is drawn at t = 0.
FIRST_LOG_VARIANCE = {"next": _first_is_next, "floor": _floor}


def tables64(betas, first_log_variance="next"):
    """All tables from betas [T] in (0, 1], as a dict of float64 [T] named as in ``Schedule``.

    Raises ValueError where a beta is outside (0, 1] or the array is not one-dimensional.
    """
    betas = np.asarray(betas, dtype=np.float64)
    if betas.ndim != 1 or betas.size == 0 or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError("betas must be a non-empty vector of numbers in (0, 1]")
    log_variance = FIRST_LOG_VARIANCE[first_log_variance]
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas)
    previous = np.append(1.0, cumprod[:-1])
    posterior_variance = betas * (1.0 - previous) / (1.0 - cumprod)
    with np.errstate(divide="ignore"):  # jsd ends in beta = 1: nothing of x_0 is left
        return dict(
            betas=betas,
            alphas_cumprod=cumprod,
            alphas_cumprod_prev=previous,
            sqrt_alphas_cumprod=np.sqrt(cumprod),
            sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - cumprod),
            log_one_minus_alphas_cumprod=np.log(1.0 - cumprod),
            sqrt_recip_alphas_cumprod=np.sqrt(1.0 / cumprod),
            sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / cumprod - 1.0),
            posterior_variance=posterior_variance,
            posterior_log_variance=log_variance(posterior_variance, posterior_variance),
            fixed_large_log_variance=log_variance(betas, posterior_variance),
            posterior_mean_coef1=betas * np.sqrt(previous) / (1.0 - cumprod),
            posterior_mean_coef2=(1.0 - previous) * np.sqrt(alphas) / (1.0 - cumprod),
        )


def make_schedule(betas, timesteps=None, *, first_log_variance="next"):
    """Schedule from betas float64 [T]; ``timesteps`` int [T] is passed to the network.

    ``first_log_variance`` is a row of FIRST_LOG_VARIANCE. Raises ValueError as ``tables64``.
    """
    tables = tables64(betas, first_log_variance)
    if timesteps is None:
        timesteps = np.arange(len(tables["betas"]))
    if len(timesteps) != len(tables["betas"]):
        raise ValueError(f"{len(timesteps)} timesteps for {len(tables['betas'])} betas")
    # A jsd chain divides by alphas_cumprod[-1] = 0: keep the tables finite in float32.
    largest = float(np.finfo(np.float32).max) ** 0.5
    return Schedule(
        **{k: jnp.asarray(np.minimum(v, largest), jnp.float32) for k, v in tables.items()},
        timesteps=jnp.asarray(timesteps, jnp.int32),
    )


def respace(betas, timesteps):
    """Betas float64 [S] of the chain that visits only ``timesteps`` [S] (strictly rising, < T).

    A stride is another Schedule, not another sampler: pass the result and ``timesteps`` to
    ``make_schedule``. Keeps alphas_cumprod at every visited step (Nichol & Dhariwal 2021, sec. 4).
    Raises ValueError where ``timesteps`` is not strictly rising within 0 ... T-1.
    """
    timesteps = np.asarray(timesteps)
    betas = np.asarray(betas, dtype=np.float64)
    if timesteps.size == 0 or timesteps[0] < 0 or timesteps[-1] >= len(betas) or (
        np.diff(timesteps) <= 0
    ).any():
        raise ValueError(f"timesteps must rise strictly within 0 ... {len(betas) - 1}")
    if timesteps.size == len(betas):
        return betas
    visited = np.cumprod(1.0 - betas)[timesteps]
    return 1.0 - visited / np.append(1.0, visited[:-1])


def zero_terminal_snr(betas):
    """Betas float64 [T] whose last step leaves no signal: sqrt(alphas_cumprod) shifted and scaled,
    its first value kept (Lin et al. 2023, Alg. 1). The last beta is 1.

    eps is not defined there: for predict v or x_start only.
    """
    root = np.sqrt(np.cumprod(1.0 - np.asarray(betas, np.float64)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return 1.0 - root**2 / np.append(1.0, root[:-1] ** 2)


def evenly_spaced(num_timesteps, num_steps):
    """int [S]: ``num_steps`` of 0 ... T-1, evenly spread, first and last included.

    Raises ValueError unless 1 <= num_steps <= num_timesteps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"{num_steps} sampling steps asked of a chain of {num_timesteps}")
    if num_steps == 1:
        return np.array([num_timesteps - 1])
    return np.round(np.linspace(0, num_timesteps - 1, num_steps)).astype(np.int64)
