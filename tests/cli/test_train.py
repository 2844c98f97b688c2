"""`ddpm train` as a process: config by name, resume, SIGTERM."""

import json
import signal
import subprocess
import time

import pytest


@pytest.mark.slow
def test_train_then_extend(tmp_path, train_command, one_device):
    first = train_command(tmp_path, "--config.train.steps=10", "--config.checkpoint.every=5")
    # The run's own config; a field stands before the folder.
    then = [*first[:4], "--config.train.steps=15", f"--workdir={tmp_path}"]
    for argv in (first, then):
        done = subprocess.run(argv, env=one_device, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "Trained for 15 of 15 steps" in (tmp_path / "index.html").read_text()
    assert "resuming" in done.stderr and "compilation cache:" in done.stderr
    assert "1 x cpu (shard_map); float32; clip 1 of " in done.stderr
    steps = [json.loads(s)["step"] for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15]


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_42(tmp_path, train_command, one_device):
    run = subprocess.Popen(train_command(tmp_path, "--config.train.steps=1000000"), env=one_device,
                           stderr=subprocess.PIPE, text=True)
    try:
        lines = tmp_path / "metrics.jsonl"
        deadline = time.time() + 120
        while not (lines.exists() and lines.read_text().count("\n") >= 2):
            assert run.poll() is None and time.time() < deadline
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 42, err
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    last = json.loads(lines.read_text().splitlines()[-1])["step"]
    assert saved >= last >= 10 and f"stopped at step {saved}" in err
