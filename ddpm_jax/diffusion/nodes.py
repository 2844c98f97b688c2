"""Which timesteps a shorter chain visits.

A row takes (alphas_cumprod float64 [T], num_steps) and gives int [S] rising within 0 ... T-1, with
S = num_steps unless its docstring names another; ValueError where that cannot be had.
"""

import numpy as np

from ddpm_jax.diffusion.schedule import evenly_spaced


def even(alphas_cumprod, num_steps):
    """Evenly spread, 0 and T-1 included (improved-diffusion, "N")."""
    return evenly_spaced(len(alphas_cumprod), num_steps)


def quad(alphas_cumprod, num_steps):
    """Squares of evenly spread roots up to 0.8 T, as DDIM's CIFAR-10 results (ermongroup/ddim,
    runners/diffusion.py:346). T-1 is not visited. Steps that fall on one timestep are one step,
    which leaves 49 of 50 at T = 1000."""
    _at_least(2, num_steps, "quad")
    roots = np.linspace(0, np.sqrt(0.8 * len(alphas_cumprod)), num_steps)
    return np.unique((roots**2).astype(np.int64))


def logsnr(alphas_cumprod, num_steps):
    """Evenly spread in lambda = log(alpha / sigma), 0 and T-1 included (DPM-Solver, app. D), at the
    nearest distinct timesteps."""
    total = len(alphas_cumprod)
    if num_steps == 1:
        return np.array([total - 1])
    if alphas_cumprod[-1] == 0:
        raise ValueError("nodes=logsnr: the last timestep has no signal; take even or trailing, "
                         "with ancestral or ddim")
    lam = 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))
    wanted = np.linspace(lam[-1], lam[0], num_steps)
    near = np.round(np.interp(wanted, lam[::-1], np.arange(total)[::-1])).astype(np.int64)[::-1]
    offset = np.arange(num_steps)
    rising = np.maximum.accumulate(near - offset) + offset
    return np.minimum(rising, total - num_steps + offset)


def leading(alphas_cumprod, num_steps):
    """Multiples of T // num_steps from 0 (ermongroup/ddim, "uniform"). T-1 is not visited."""
    return np.arange(num_steps) * (len(alphas_cumprod) // num_steps)


def trailing(alphas_cumprod, num_steps):
    """Every T / num_steps-th timestep down from T-1 (Lin et al. 2023, table 2)."""
    total = len(alphas_cumprod)
    return np.round(np.arange(total, 0, -total / num_steps)[:num_steps]).astype(np.int64)[::-1] - 1


def _at_least(fewest, num_steps, name):
    if num_steps < fewest:
        raise ValueError(f"nodes={name} needs at least {fewest} steps, got {num_steps}")


NODES = {"even": even, "quad": quad, "logsnr": logsnr, "leading": leading, "trailing": trailing}


def lowest_start(total):
    """The lowest of T timesteps from which images of pure noise are decoded: that of ``quad``."""
    return -(-4 * total // 5) - 1


def is_named(nodes) -> bool:
    """Whether ``nodes`` is a row of NODES; else it lists timesteps, or is nothing that is known."""
    return isinstance(nodes, str) and nodes in NODES


def _listed(nodes, total):
    texts = nodes.split(",") if isinstance(nodes, str) else list(nodes)
    try:
        listed = sorted(map(int, texts))
        whole = isinstance(nodes, str) or listed == sorted(texts)
    except (TypeError, ValueError):  # of int: no number
        whole = False
    if not whole:
        raise ValueError(f"nodes={nodes!r} is not known; known: {', '.join(NODES)}, or timesteps, "
                         "such as 0,20,99")
    if not listed or listed[0] < 0 or listed[-1] >= total or len({*listed}) < len(listed):
        raise ValueError(f"nodes={','.join(map(str, texts))} are not distinct timesteps of "
                         f"0 ... {total - 1}")
    return np.array(listed)


def place(nodes, alphas_cumprod, num_steps):
    """int [S] rising: a row of NODES at ``num_steps``, or the timesteps of a list as they are.

    nodes: a name, or timesteps in any order, also as text ("0,20,99"). Raises ValueError where a
    name is not known, num_steps is not in 1 ... T, or listed timesteps are no whole numbers, repeat
    or leave 0 ... T-1.
    """
    total = len(alphas_cumprod)
    if not is_named(nodes):
        return _listed(nodes, total)
    if not 1 <= num_steps <= total:
        raise ValueError(f"{num_steps} sampling steps are not in 1 ... {total}")
    return NODES[nodes](np.asarray(alphas_cumprod, np.float64), num_steps)
