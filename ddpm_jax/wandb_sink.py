"""Weights & Biases as a second place for the numbers and grids of a run (`ddpm train --wandb=NAME`;
pip install 'wandb'). WANDB_MODE=offline keeps them in RUN/wandb until `wandb sync`.

Inside a function: wandb, which is optional and slow to import.
"""

import os
import secrets

from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

ID = "wandb.json"       # in the run's folder: what a resume goes on with


def open_sink(project: str, workdir, config: dict):
    """-> the sink of the run in ``workdir``, as run_log.Writer takes it; a resumed run goes on in
    the same run of W&B. Raises UserError where wandb is not installed or cannot start."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"--wandb={project} needs the package wandb: pip install wandb, or leave "
                        "the flag out") from None
    note, remote = files.join(workdir, ID), files.is_remote(workdir)
    run_id = files.read_json(note)["id"] if files.exists(note) else secrets.token_hex(8)
    offline = os.environ.get("WANDB_MODE") == "offline"
    try:
        run = wandb.init(
            project=project, id=run_id, name=str(workdir).rstrip("/").rpartition("/")[2],
            config=config, dir=None if remote else str(workdir),
            resume=None if offline else "allow")
    except Exception as error:  # wandb's own types, and those of its transport
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--wandb={project}: {reason}; WANDB_MODE=offline needs no account"
                        ) from error
    files.write_json(note, {"id": run_id, "project": project})
    run.define_metric("*", step_metric="step")    # a resume may repeat steps
    return _Sink(wandb, run)


class _Sink:
    def __init__(self, wandb, run):
        self._wandb, self._run = wandb, run

    def scalars(self, step: int, values: dict) -> None:
        self._run.log({"step": int(step), **values})

    def images(self, step: int, name: str, picture) -> None:
        """picture: uint8 [h,w,C]."""
        picture = picture[:, :, 0] if picture.shape[2] == 1 else picture
        self._run.log({"step": int(step), name: self._wandb.Image(picture)})

    def close(self) -> None:
        self._run.finish()
