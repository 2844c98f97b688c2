"""Weights & Biases, the real package, offline: a run, its resume, its numbers."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("wandb", reason="wandb is not installed (the extra wandb)")

CODE = """
import sys, numpy as np
from ddpm_jax import run_log, wandb_sink
config = {"seed": 3}
writer = run_log.open_writer(sys.argv[1], sink=wandb_sink.open_sink("trial", sys.argv[1], config))
writer.scalars(int(sys.argv[2]), {"loss": 0.625, "bpd_test": float("nan")})
writer.images(int(sys.argv[2]), "samples", np.zeros((4, 8, 8, 1), np.uint8))
print(writer.close())
"""


@pytest.mark.slow
def test_offline_run_and_its_resume(tmp_path):
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    for step in (4, 8):
        done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "run"), str(step)],
                              env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "continues" not in done.stderr, done.stderr
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name            # one id: `wandb sync` joins them
    content = second.read_bytes()
    assert b"loss" in content and b"0.625" in content and b"bpd_test" in content
    assert list(second.parent.rglob("*.png"))
