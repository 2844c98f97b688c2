"""Another run, of whose weights a new run starts (``ddpm train --init_from``)."""

import contextlib
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import checkpoints
from ddpm_jax.config import flatten, from_json
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import Experiment, Training, build_model, first_history, new_state
from ddpm_jax.storage import files
from ddpm_jax.training.steps import TrainState

_FREE = {"model.dropout", "model.dtype", "model.remat"}  # change no weight's shape
_SHAPES = {"data.image_size", "data.channels", "diffusion.variance"}


class InitFrom(NamedTuple):
    """Another run, of whose weights and average at ``step`` (None: the newest) a new one starts;
    optimizer: of its moments too."""

    workdir: str
    step: int | None = None
    optimizer: bool = False


def find(init_from: InitFrom) -> tuple[dict, int]:
    """The stored config and the step of the run to start from. Raises UserError without one."""
    folder = files.resolve(init_from.workdir)
    stored = checkpoints.read_config(folder)
    if stored is None:
        raise UserError(f"--init_from={folder}: no run here (no config.json)")
    with contextlib.closing(checkpoints.Checkpoints(folder, read_only=True)) as store:
        return stored, store.find(init_from.step)


def find_fitting(training: Training, source: InitFrom) -> tuple[Experiment, int]:
    """The other run's model and the step. Raises UserError where its network has other weights than
    that of ``training``, or as ``find``."""
    exp = training.experiment
    stored, step = find(source)
    other = build_model(from_json(stored), exp.runner.mesh.devices.flat)
    if jax.tree.map(lambda x: x.shape, other.abstract_params) != jax.tree.map(
            lambda x: x.shape, exp.abstract_params):
        raise UserError(f"--init_from={source.workdir}: its network has other weights: "
                        f"{_differences(other.config, exp.config)}; take the values of that run")
    return other, step


def _differences(old, new) -> str:
    """The fields on which a network's weights depend, as 'field: old -> new'."""
    there = flatten(old.to_dict())
    here = {field: value for field, value in flatten(new.to_dict()).items() if field in _SHAPES
            or field.startswith("model.") and field not in _FREE}
    return ", ".join(f"{field}: {there[field]} -> {value}" for field, value in here.items()
                     if there[field] != value)


def first_state(training: Training, source: InitFrom) -> tuple[int, TrainState]:
    """The step and the state that a run from ``source`` starts with. Raises UserError as
    ``find_fitting``."""
    exp = training.experiment
    other, step = find_fitting(training, source)
    folder = files.resolve(source.workdir)
    with contextlib.closing(checkpoints.Checkpoints(folder, read_only=True)) as store:
        if source.optimizer:
            history = jax.eval_shape(lambda: first_history(other.config.diffusion))
            state = store.restore(step, training.abstract_state._replace(history=history),
                                  exp.runner)
            return step, state._replace(history=new_state(training).history)
        params, ema_params = (store.restore_weights(step, like, ema=ema, runner=exp.runner)[0]
                              for ema, like in ((False, training.abstract_state.params),
                                                (True, training.abstract_state.ema_params)))
    state = new_state(training)
    count = exp.runner.put("replicated", np.int32(step))
    return step, state._replace(step=count, params=params, ema_params=ema_params)
