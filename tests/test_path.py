"""How far it is from the command to the squared error: the project's own frames on the stack."""

import json
import os
import subprocess
import sys

import pytest
from tiny_run import FLAGS
from xla_flags import xla_flags

LONGEST = 10
WALK = """
import contextlib, importlib, json, pathlib, sys, traceback
import ddpm_jax
from ddpm_jax.cli.main import run
from ddpm_jax.diffusion.objective import LOSSES

train = importlib.import_module("ddpm_jax.train")
root, mse_loss = pathlib.Path(ddpm_jax.__file__).parent, LOSSES["mse"]

def walk(*args, **options):
    codes = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))][::-1]
    ours = [c for c in codes if pathlib.Path(c.co_filename).is_relative_to(root)]
    print(json.dumps([[str(pathlib.Path(c.co_filename).relative_to(root)), c.co_name]
                      for c in ours]))
    return mse_loss(*args, **options)

# Nothing is compiled ahead on a thread, so that the step is traced where it is called.
train.compiled_ahead = lambda *a: contextlib.nullcontext([])
LOSSES["mse"] = walk
run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "per_replica"])
def test_few_frames_lie_between_the_command_and_the_loss(scope, tmp_path):
    """Closures count. As the paper trained: eight devices, each of them a replica."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(8)}
    done = subprocess.run(
        [sys.executable, "-c", WALK, "train", *FLAGS, "--config.train.steps=1",
         f"--config.train.clip_scope={scope}", f"--workdir={tmp_path / scope}"],
        env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = [json.loads(line) for line in done.stdout.splitlines()]
    assert paths
    for path in paths:
        path.append(["diffusion/objective.py", "mse_loss"])
        print(len(path), "frames:", *(f"\n  {file}: {name}" for file, name in path))
        assert path[0] == ["cli/main.py", "run"]
        assert len(path) <= LONGEST
        # No file is left and entered again.
        files = [file for file, _ in path]
        entered = [b for a, b in zip([None, *files], files, strict=False) if a != b]
        assert len(entered) == len(set(entered))
