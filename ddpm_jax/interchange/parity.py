"""Does a converted model compute what its source computes? The verdict of every import.

eps at four timesteps on a fixed input, by this project (handed in as a function, at matmul
precision ``highest``) and by diffusers on PyTorch's CPU, or against values that a peer once
computed from the very same weights and that ship with the project (parity_golden.json, keyed by
the weights' hash). With neither, nothing is claimed.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ddpm_jax.interchange import parameter_names

TOLERANCE = 1e-4  # of the largest |eps|, float32
POINTS = 64  # of each golden eps
GOLDEN = pathlib.Path(__file__).with_name("parity_golden.json")

PASS, FAIL, NOT_COMPARED = "PASS", "FAIL", "not compared"


class Verdict(NamedTuple):
    """result: PASS, FAIL or NOT_COMPARED; max_abs: largest difference of eps; scale: largest |eps|
    of the peer; peer: who it was compared with, or why with nobody."""

    result: str
    max_abs: float | None
    scale: float | None
    timesteps: tuple[int, ...]
    peer: str

    def __str__(self):
        if self.result == NOT_COMPARED:
            return f"parity: {self.result} ({self.peer})"
        return (f"parity: {self.result}: eps at t = {', '.join(map(str, self.timesteps))} differs "
                f"from {self.peer} by at most {self.max_abs:.2e} of {self.scale:.2e} (allowed: "
                f"{TOLERANCE:.0e} of the largest)")


def fixed_input(shape, num_timesteps):
    """(x [1,H,W,C] standard normal, four timesteps from 0 to T-1), the same for everybody."""
    # RandomState's stream is frozen (numpy NEP 19), Generator's is not.
    x = np.random.RandomState(2006_11239 % 2**32).standard_normal((1, *shape)).astype(np.float32)
    return x, tuple(int(t) for t in np.round(np.linspace(0, num_timesteps - 1, 4)))


def fingerprint(params, config) -> str:
    """sha256 of all weights in the table's order: one model, one hash, whatever file it was in."""
    digest = hashlib.sha256()
    for entry in parameter_names.entries(config):
        leaf = params
        for part in entry.path:
            leaf = leaf[part]
        digest.update("/".join(entry.path).encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).data)
    return digest.hexdigest()


def diffusers_peer(unet_config: Mapping, state_dict: Mapping | None = None, folder=None):
    """(function (x [1,H,W,C], t) -> eps, name) of diffusers' UNet2DModel; None where it or PyTorch
    is not installed.

    folder: let diffusers read its .safetensors there (nothing of ours in between); else state_dict,
    {current key: array}, is loaded.
    """
    try:
        import diffusers
        import torch
    except ImportError:
        return None
    if folder is not None:
        net = diffusers.UNet2DModel.from_pretrained(folder, local_files_only=True,
                                                    use_safetensors=True,
                                                    torch_dtype=torch.float32)
    else:
        keywords = {k: v for k, v in unet_config.items() if not k.startswith("_")}
        net = diffusers.UNet2DModel(**keywords)
        net.load_state_dict({k: torch.from_numpy(np.array(v, np.float32, order="C"))
                             for k, v in state_dict.items()}, assign=True)
    net.eval()

    def eps(x, t):
        with torch.no_grad():
            channels_first = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
            return net(channels_first, t).sample.numpy().transpose(0, 2, 3, 1)

    return eps, f"diffusers {diffusers.__version__} (PyTorch {torch.__version__})"


def points(eps) -> np.ndarray:
    """The POINTS values of one eps that a golden record keeps, evenly spread."""
    flat = np.asarray(eps).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(POINTS, flat.size)).astype(int)]


def golden_peer(params, config, path=GOLDEN):
    """(function (x, t) -> POINTS values of eps, name) for weights whose hash is known, or None."""
    known = json.loads(pathlib.Path(path).read_text())
    record = known.get(fingerprint(params, config)) if known else None
    if record is None:
        return None
    return (lambda x, t: np.float32(record["eps"][str(t)])), f"{record['peer']} (stored values)"


def verdict(ours: Callable, peer, shape, num_timesteps) -> Verdict:
    """Compare ours(x [1,H,W,C] float32, t int) -> eps with ``peer``: (function, name), or None.

    A golden peer's function returns POINTS values instead of a whole eps.
    """
    x, timesteps = fixed_input(shape, num_timesteps)
    if peer is None:
        return Verdict(NOT_COMPARED, None, None, timesteps,
                       "diffusers and PyTorch are not installed, and no values of a peer are "
                       "stored for these weights")
    function, name = peer
    error = scale = 0.0
    for t in timesteps:
        theirs = np.asarray(function(x, t), np.float64)
        mine = np.asarray(ours(x, t), np.float64)
        if mine.shape != theirs.shape:
            mine = points(mine)
        error = max(error, _largest(mine - theirs))
        scale = max(scale, _largest(theirs))
    close = np.isfinite(error) and np.isfinite(scale) and error <= TOLERANCE * scale
    return Verdict(PASS if close else FAIL, error, scale, timesteps, name)


def _largest(x) -> float:
    """max |x|, infinite where anything is not a number (max() would drop a NaN)."""
    return float(np.abs(x).max()) if np.isfinite(x).all() else float("inf")
