"""Writes an imported model as a run's folder, as ddpm_jax.checkpoints lays it out."""

import contextlib
import json
import pathlib

import numpy as np

from ddpm_jax import checkpoints
from ddpm_jax.errors import UserError
from ddpm_jax.folders import new_folder
from ddpm_jax.training.steps import TrainState

IMPORT_FACTS = "import.json"


def write_run(workdir, *, step, params, ema_params, opt_state, config: dict, facts: dict) -> None:
    """Make ``workdir`` a run with one checkpoint, at ``step``; it appears whole or not at all.

    Trees of arrays (Orbax copies numpy's before it writes, JAX's on the CPU it does not);
    opt_state as the optimizer of ``config`` has it; facts: where the weights
    came from, kept as import.json. Raises UserError where the folder holds something already.
    """
    workdir = checkpoints.resolve(workdir)
    with _place(workdir) as folder:
        # Not in the background: nothing goes on, and a second copy of a large model is avoided.
        store = checkpoints.Checkpoints(folder, background=False)
        try:
            store.save(step, TrainState(step=np.asarray(step, np.int32), params=params,
                                        ema_params=ema_params, opt_state=opt_state), config)
            store.wait()
        finally:
            store.close()
        checkpoints.write_json(folder / IMPORT_FACTS, facts)
        checkpoints.write_json(folder / "config.json", config)


def check_free(workdir) -> None:
    """Raise UserError now where ``write_run`` would later."""
    folder = checkpoints.resolve(workdir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--workdir={folder} exists and is not an empty folder: take another, or "
                        "remove it")


@contextlib.contextmanager
def _place(workdir):
    if "://" not in str(workdir):
        with new_folder(pathlib.Path(workdir)) as staging:
            yield type(workdir)(staging)
        return
    check_free(workdir)  # a bucket has no rename; without config.json, the last, nothing is read
    try:
        yield workdir
    except BaseException:
        workdir.rmtree(missing_ok=True)
        raise


def read_facts(workdir) -> dict:
    """What ``write_run`` kept as import.json; {} for a run that was trained here."""
    path = checkpoints.resolve(workdir) / IMPORT_FACTS
    return json.loads(path.read_text()) if path.exists() else {}
