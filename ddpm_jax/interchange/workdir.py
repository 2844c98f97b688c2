"""Writes an imported model as a run's folder, as ddpm_jax.checkpoints lays it out."""

import json

import numpy as np

from ddpm_jax import checkpoints
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files
from ddpm_jax.training.steps import TrainState

IMPORT_FACTS = "import.json"


def write_run(workdir, *, step, params, ema_params, opt_state, config: dict, facts: dict) -> None:
    """Make ``workdir`` a run with one checkpoint, at ``step``; it appears whole or not at all.

    Trees of arrays (Orbax copies numpy's before it writes, JAX's on the CPU it does not);
    opt_state as the optimizer of ``config`` has it; facts: where the weights
    came from, kept as import.json. Raises UserError where the folder holds something already.
    """
    with files.new_folder(workdir) as folder:
        # Not in the background: nothing goes on, and a second copy of a large model is avoided.
        store = checkpoints.Checkpoints(folder, background=False)
        try:
            store.save(step, TrainState(step=np.asarray(step, np.int32), params=params,
                                        ema_params=ema_params, opt_state=opt_state), config)
            store.wait()
        finally:
            store.close()
        files.write_json(folder / IMPORT_FACTS, facts)
        files.write_json(folder / "config.json", config)  # last: by it a run is known


def check_free(workdir) -> None:
    """Raise UserError now where ``write_run`` would later."""
    folder = files.resolve(workdir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--workdir={folder} exists and is not an empty folder: take another, or "
                        "remove it")


def read_facts(workdir) -> dict:
    """What ``write_run`` kept as import.json; {} for a run that was trained here."""
    path = files.resolve(workdir) / IMPORT_FACTS
    return json.loads(path.read_text()) if path.exists() else {}
