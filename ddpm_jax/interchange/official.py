"""Reads checkpoints of the paper's own code (hojonathanho/diffusion, commit 1e0dceb, TensorFlow 1).

One checkpoint holds the raw weights, their moving averages, Adam's two slots and the step
(tpu_utils.py:88,150-171; utils.py:150-177). Reading needs no TensorFlow.
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy, load
from ddpm_jax.formats.tf_checkpoint import find_prefix, open_bundle
from ddpm_jax.interchange import parameter_names

_QUIET = ("beta1_power", "beta2_power", parameter_names.GLOBAL_STEP)  # follow from the step


class Checkpoint(NamedTuple):
    """Parts are {official name of the plain variable: Lazy}, empty where the file has none.

    ``step`` is the number of updates done; ``notes`` are lines for the user.
    """

    prefix: str
    step: int
    params: Mapping[str, Lazy]
    ema_params: Mapping[str, Lazy]
    mu: Mapping[str, Lazy]
    nu: Mapping[str, Lazy]
    notes: list[str]


def _step(variables, prefix, notes):
    if parameter_names.GLOBAL_STEP in variables:
        return int(load(variables[parameter_names.GLOBAL_STEP]))
    match = re.search(r"-(\d+)$", os.path.basename(prefix))
    step = int(match.group(1)) if match else 0
    notes.append(f"no global_step in the checkpoint: step {step} taken from its "
                 + ("name" if match else "absence"))
    return step


def open_official(path) -> Checkpoint:
    """The checkpoint named by a prefix, an .index file or a folder; arrays stay in the file.

    Raises UserError for files that are missing, damaged or hold no variable of the U-Net.
    """
    prefix = find_prefix(path)
    variables = open_bundle(prefix)
    parts = parameter_names.split_checkpoint(variables)
    notes: list[str] = []
    step = _step(variables, prefix, notes)
    ignored = sorted(set(parts.pop("other")) - set(_QUIET))
    if ignored:
        notes.append(f"ignored, not the model's: {', '.join(ignored)}")
    if not parts["params"] and not parts["ema_params"]:
        raise UserError(f"{prefix}: no variable named {parameter_names.SCOPE}/...: not a "
                        "checkpoint of hojonathanho/diffusion (it holds "
                        f"{', '.join(sorted(variables)[:3])} ...)")
    if not parts["params"]:
        notes.append("no raw weights in the checkpoint: the EMA weights are used as both")
        parts["params"] = parts["ema_params"]
    if not parts["ema_params"]:
        notes.append("no EMA weights in the checkpoint: the raw weights are used as both "
                     "(sample quality suffers: FID 12.1 instead of 3.2 for the released CIFAR-10)")
        parts["ema_params"] = parts["params"]
    if not parts["mu"] or not parts["nu"]:
        notes.append("no Adam slots in the checkpoint: training would continue with fresh moments")
        parts["mu"] = parts["nu"] = {}
    return Checkpoint(prefix, step, **parts, notes=notes)
