"""Does a converted model compute what its source computes? Every import ends with this verdict.

eps at four timesteps on a fixed input, by this project (at matmul precision ``highest``) and by
diffusers on PyTorch's CPU. Without diffusers and PyTorch nothing is claimed; they are optional and
imported inside ``diffusers_peer``.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import load
from ddpm_jax.interchange import parameter_names
from ddpm_jax.interchange.diffusers.fields import unet_config
from ddpm_jax.interchange.diffusers.read import WEIGHTS, Model
from ddpm_jax.models.unet import UNet

TOLERANCE = 1e-4  # of the largest |eps|, float32
PASS, FAIL, NOT_COMPARED = "PASS", "FAIL", "not compared"


class Verdict(NamedTuple):
    """result: PASS, FAIL or NOT_COMPARED; max_abs: largest difference of eps; scale: largest |eps|
    of the peer; peer: the program compared with, or the reason why there was none."""

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


def not_compared(why) -> Verdict:
    return Verdict(NOT_COMPARED, None, None, (), why)


def fixed_input(shape, num_timesteps):
    """(x [1,H,W,C] standard normal, four timesteps from 0 to T-1), the same in every version."""
    # RandomState's stream is frozen (numpy NEP 19), Generator's is not.
    x = np.random.RandomState(2006_11239 % 2**32).standard_normal((1, *shape)).astype(np.float32)
    return x, tuple(int(t) for t in np.round(np.linspace(0, num_timesteps - 1, 4)))


def diffusers_peer(config: Mapping, state_dict: Mapping | None = None, folder=None):
    """(function (x [1,H,W,C], t) -> eps, name) of diffusers' UNet2DModel; None where it or PyTorch
    is not installed.

    config: its JSON. folder: diffusers reads the .safetensors there (nothing of ours in between);
    else state_dict, {current key: array}, is loaded.
    """
    try:
        import torch  # isort: skip (before diffusers, which looks for it once a process)

        import diffusers
    except ImportError:
        return None
    if folder is not None:
        net = diffusers.UNet2DModel.from_pretrained(folder, local_files_only=True,
                                                    use_safetensors=True,
                                                    torch_dtype=torch.float32)
    else:
        net = diffusers.UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
        net.load_state_dict({k: torch.from_numpy(np.array(v, np.float32, order="C"))
                             for k, v in state_dict.items()}, assign=True)
    net.eval()

    def eps(x, t):
        labels = _labels(net.config.num_class_embeds, x, t)
        with torch.no_grad():
            channels_first = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
            return net(channels_first, t, None if labels is None else torch.from_numpy(labels)
                       ).sample.numpy().transpose(0, 2, 3, 1)

    return eps, f"diffusers {diffusers.__version__} (PyTorch {torch.__version__})"


def peer_of_params(model: UNet, params):
    """``diffusers_peer`` with our params. Raises UserError for a model that diffusers lacks."""
    return diffusers_peer(unet_config(model), parameter_names.state_dict_from_params(params, model))


def peer_of_file(found: Model):
    """``diffusers_peer`` of a file: diffusers reads it where that is safe, else it is given the
    file's arrays, since a .bin is a pickle whose loader may run code, depending on the versions
    installed. Raises UserError for weights without config.json."""
    if found.config is None:
        raise UserError("no config.json beside the weights for diffusers to build the model from")
    if os.path.basename(found.weights) == f"{WEIGHTS}.safetensors":
        return diffusers_peer(found.config, folder=found.folder)
    state = parameter_names.current_names(found.state_dict)
    return diffusers_peer(found.config, {k: load(v) for k, v in state.items()})


def _labels(num_labels, x, t):
    """A label for each image of x that differs between timesteps; None without labels."""
    return np.full(len(x), t % num_labels, np.int32) if num_labels else None


def network_eps(model: UNet, params):
    """(x, t) -> eps of our network in float32, products at precision ``highest``."""
    model = model.clone(dtype=jnp.float32)

    @jax.jit
    def apply(params, x, t, labels):
        return model.apply({"params": params}, x, t, labels=labels)

    on_device = jax.device_put(params, jax.devices()[0])

    def eps(x, t):
        with jax.default_matmul_precision("highest"):
            return np.asarray(apply(on_device, x, jnp.full(len(x), t, jnp.int32),
                                    _labels(model.num_labels, x, t)))

    return eps


def verdict(ours: Callable, peer, shape, num_timesteps) -> Verdict:
    """Compare ours(x [1,H,W,C] float32, t int) -> eps with ``peer``: (function, name), or None."""
    if peer is None:
        return not_compared("diffusers and PyTorch are not installed")
    x, timesteps = fixed_input(shape, num_timesteps)
    function, name = peer
    error = scale = 0.0
    for t in timesteps:
        theirs = np.asarray(function(x, t), np.float64)
        error = max(error, _largest(np.asarray(ours(x, t), np.float64) - theirs))
        scale = max(scale, _largest(theirs))
    close = np.isfinite(error) and np.isfinite(scale) and error <= TOLERANCE * scale
    return Verdict(PASS if close else FAIL, error, scale, timesteps, name)


def _largest(x) -> float:
    """max |x|, infinite where anything is not a number (max() would drop a NaN)."""
    return float(np.abs(x).max()) if np.isfinite(x).all() else float("inf")


def check(model: UNet, params, num_timesteps, found: Model | None = None) -> Verdict:
    """The verdict on ``params``, converted from a diffusers file (found) or from elsewhere.

    Raises UserError if it is FAIL.
    """
    try:
        peer = peer_of_file(found) if found else peer_of_params(model, params)
    except UserError as error:  # a model that diffusers cannot express
        return not_compared(str(error))
    shape = (model.image_size, model.image_size, model.in_channels)
    result = verdict(network_eps(model, params), peer, shape, num_timesteps)
    if result.result == FAIL:
        raise UserError(f"{result}; nothing was written")
    return result
