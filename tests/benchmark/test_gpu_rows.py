"""benchmarks/gpu.sh, on a CPU with --tiny: rows, a call that goes on, a row that fails."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_run
from xla_flags import xla_flags

from ddpm_jax.compilation import parts

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks/gpu.sh"


def call(*words, **variables):
    return subprocess.run(
        ["bash", SCRIPT, *map(str, words)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "COMMIT": "abc1234",
             "XLA_FLAGS": xla_flags(1), **variables})


def test_every_row_fits_a_call_and_has_a_function():
    rows = [line.split() for line in call("--list").stdout.splitlines()]
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names) >= 20
    assert all(int(seconds) <= 570 for _, seconds, *_ in rows)
    text = SCRIPT.read_text()
    assert all(f"\n{function}() {{" in text for _, _, function, *_ in rows)
    assert call().returncode == 2


def test_a_row_that_would_end_too_late_is_left_for_the_next_call(tmp_path):
    (tmp_path / "step128.json").write_text("[]")
    done = call(tmp_path, "step128", "step512", LIMIT="100")
    assert done.returncode == 75 and not (tmp_path / "step512.json").exists()
    assert "== step128: " in done.stdout and "exists" in done.stdout
    assert done.stdout.endswith("== failed: none; left for the next call: step512\n")
    assert call(tmp_path, "step128").returncode == 0


def test_the_row_of_a_training_run_is_from_its_metrics(tmp_path):
    lines = [{"step": 100 * i, "loss": 0.03, "images_per_second": rate}
             for i, rate in enumerate([50.0, *[6400.0] * 10], 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tiny_run.config(**{"train.batch_size": 128})
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "samples.json").write_text(json.dumps([{"seconds": {"median": 25.4}}]))
    done = subprocess.run(
        [sys.executable, SCRIPT.with_name("gpu_rows.py"), "run", tmp_path / "row.json", tmp_path,
         tmp_path / "samples.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [row] = json.loads((tmp_path / "row.json").read_text())
    assert row["images_per_s"] == pytest.approx(6400) and row["seconds"]["high"] == 128 / 6400
    assert row["steps"] == 1100 and row["loss"] == pytest.approx(0.03)
    assert "100 samples in 25 s" in row["note"]


@pytest.mark.slow
def test_tiny(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/cache").symlink_to(os.environ["JAX_COMPILATION_CACHE_DIR"])
    done = call("--tiny", tmp_path, "profile128", "start-warm")
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads((tmp_path / "profile128.json").read_text())
    assert row["commit"] == "abc1234" and row["date"] and row["device_kind"] == "cpu"
    profile = row["profile"]
    for part in ("convolution, forward", "convolution, filter gradient",
                 "convolution, input gradient", "optimizer, clip, average, data, sampler"):
        assert profile["parts"][part]["seconds"] > 0 and part in parts.PARTS
    assert profile["seconds"] == pytest.approx(sum(
        p["seconds"] for p in profile["parts"].values()))
    [start] = json.loads((tmp_path / "start-warm.json").read_text())
    assert start["bench"] == "start" and start["seconds"]["median"] > 1
    failed = call("--tiny", tmp_path, "profile128", "start-cold", "sample512", PYTHON="false")
    assert failed.returncode == 1 and "failed: sample512 start-cold; left" in failed.stdout
    assert not (tmp_path / "start-cold.json").exists()
