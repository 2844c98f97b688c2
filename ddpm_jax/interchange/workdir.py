"""Writes an imported model as a run's folder, as ddpm_jax.checkpoints lays it out."""

import functools
import operator

import jax
import numpy as np

from ddpm_jax import checkpoints
from ddpm_jax.config import to_json
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import Experiment, build_training
from ddpm_jax.storage import files
from ddpm_jax.training.steps import TrainState

IMPORT_FACTS = "import.json"


def training_state(exp: Experiment, step: int, params, ema_params, moments=None) -> TrainState:
    """The state after ``step`` updates; moments: Adam's {"mu": tree, "nu": tree}, zeros where
    absent. Every counter of the optimizer is ``step``."""
    def fill(path, shape):
        keys = [getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))
                for key in path]
        if keys[-1] == "count":
            return np.asarray(step, shape.dtype)
        for name, tree in (moments or {}).items():
            if name in keys:
                return functools.reduce(operator.getitem, keys[keys.index(name) + 1:], tree)
        return np.zeros(shape.shape, shape.dtype)

    like = build_training(exp).abstract_state
    return TrainState(step=np.asarray(step, np.int32), params=params, ema_params=ema_params,
                      opt_state=jax.tree_util.tree_map_with_path(fill, like.opt_state),
                      history=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like.history))


def write_run(workdir, exp: Experiment, state: TrainState, facts: dict) -> None:
    """Make ``workdir`` a run of ``exp`` with ``state`` as its one checkpoint; it appears whole or
    not at all.

    state: trees of arrays (Orbax copies numpy's before it writes, JAX's on the CPU it does not);
    facts: the source of the weights, kept as import.json. Raises UserError where the folder exists
    with something in it.
    """
    config = to_json(exp.config)
    with files.new_folder(workdir) as folder:
        # Not in the background, which would copy a large model while nothing else is computed.
        store = checkpoints.Checkpoints(folder, background=False)
        try:
            store.save(int(state.step), state, config)
            store.wait()
        finally:
            store.close()
        files.write_json(folder / IMPORT_FACTS, facts)
        files.write_json(folder / "config.json", config)  # last: readers know a run by it


def check_free(workdir) -> None:
    """Raise UserError now where ``write_run`` would later."""
    folder = files.resolve(workdir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--workdir={folder} exists and is not an empty folder: take another, or "
                        "remove it")


def read_facts(workdir) -> dict:
    """The facts that ``write_run`` kept; {} for a run that was trained here."""
    path = files.resolve(workdir) / IMPORT_FACTS
    return files.read_json(path) if files.exists(path) else {}
