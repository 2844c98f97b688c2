"""`ddpm sample` as a process, on what `ddpm train` left."""

import subprocess
import sys

import numpy as np


def test_sample_from_a_trained_run(tmp_path, train_command, one_device):
    done = subprocess.run(
        train_command(tmp_path / "run", "--config.train.steps=2",
                      "--config.diffusion.num_timesteps=5"),
        env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "ddpm_jax", "sample", f"--workdir={tmp_path / 'run'}", "--num=5",
            f"--out={out}", "--batch_size=4", "--noema", "--seed=3"]
    done = subprocess.run(argv, env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = np.load(out / "samples.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    assert (out / "grid.png").exists() and (out / "progressive.png").exists()
    assert not (out / "shards").exists()
    again = subprocess.run([*argv[:-1], "--seed=4"], env=one_device, capture_output=True, text=True)
    assert again.returncode == 2 and "another request" in again.stderr
