"""A folder that appears whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile

from ddpm_jax.errors import UserError


@contextlib.contextmanager
def new_folder(out, advice="take another"):
    """Yields a folder beside ``out`` that takes its name at the end, and is gone if anything fails.

    ``out`` may exist if it is an empty folder. Raises UserError, ending with the advice, where it
    is not, or the disk says no.
    """
    out = pathlib.Path(out).expanduser().absolute()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty folder: remove it, or {advice}")
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = pathlib.Path(tempfile.mkdtemp(
            prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; {advice}") from error
    try:
        # mkdtemp's folder is the owner's alone; one made by mkdir follows the umask.
        beside = staging / "mode"
        beside.mkdir()
        staging.chmod(beside.stat().st_mode)
        beside.rmdir()
        yield staging
        os.replace(staging, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; {advice}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
