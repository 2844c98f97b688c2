"""`ddpm sample` as a process, on what training left."""

import subprocess
import sys

import numpy as np
import pytest

from ddpm_jax.cli import main


@pytest.mark.slow
def test_sample_from_a_trained_run(tmp_path, straight, capsys):
    out = tmp_path / "out"
    words = ["sample", f"--workdir={straight}", "--num=5", f"--out={out}", "--batch_size=8",
             "--noema", "--seed=3"]
    done = subprocess.run([sys.executable, "-m", "ddpm_jax", *words], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    images = np.load(out / "samples.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    assert (out / "grid.png").exists() and (out / "progressive.png").exists()
    assert not (out / "shards").exists()
    assert main.main([*words[:-1], "--seed=4"]) == 2
    assert "another request" in capsys.readouterr().err
