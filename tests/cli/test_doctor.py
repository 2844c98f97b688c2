"""ddpm doctor: each check can fail, and the dry run of a pod really runs one."""

import json
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from ddpm_jax.cli import doctor
from ddpm_jax.data import feed
from ddpm_jax.data.datasets import open_source


def test_workdir_is_written_and_left_clean(tmp_path):
    [finding] = doctor.check_workdir(str(tmp_path / "new"))
    assert finding.ok and list((tmp_path / "new").iterdir()) == []


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    [finding] = doctor.check_workdir(str(tmp_path / "file" / "run"))
    assert finding.ok is False and "cannot write" in finding.text and "choose a folder" in (
        finding.text)


def test_stale_lock_and_live_lock(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    assert doctor.check_lock(str(lock)) == []
    lock.write_text("")
    monkeypatch.setattr(doctor, "holders_of_tpu", lambda: [])
    [finding] = doctor.check_lock(str(lock))
    assert finding.ok is False and f"sudo rm {lock}" in finding.text
    monkeypatch.setattr(doctor, "holders_of_tpu", lambda: [77])
    assert "in use by process 77" in doctor.check_lock(str(lock))[0].text


def test_full_disk(tmp_path):
    assert doctor.check_disk(tmp_path, need_gb=0).ok
    finding = doctor.check_disk(tmp_path, need_gb=10**9)
    assert finding.ok is False and "needed" in finding.text


def test_versions_that_do_not_match(monkeypatch):
    assert doctor.check_python().ok
    found = {**doctor.hosts.versions(), "jaxlib": "0.0.1"}
    monkeypatch.setattr(doctor.hosts, "versions", lambda: found)
    assert "same version of both" in doctor.check_python().text
    found["optax"] = "absent"
    assert "optax not installed" in doctor.check_python().text


def test_bucket_problem_names_the_role():
    assert "does not exist" in doctor.bucket_problem("b", FileNotFoundError("b"))
    text = doctor.bucket_problem("b", OSError("403, x does not have storage.buckets.get access"))
    assert "roles/storage.legacyBucketReader" in text and "gs://b" in text


def test_taken_port_in_the_real_program():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "ddpm_jax", "doctor", f"--coordinator_port={port}"],
            capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"WRONG coordinator port: coordinator_port {port} is taken" in done.stdout
    assert "ok    devices:" in done.stdout and "Traceback" not in done.stderr


PROCESSES, DEVICES = 2, 2


@pytest.fixture
def heard():
    """What the processes of a healthy pod hear."""
    config = doctor.dry_config(PROCESSES * DEVICES)
    batch = config.train.batch_size
    share = batch // (PROCESSES * DEVICES)
    source = open_source("digits", "", "train", image_size=8, channels=1)
    images = source.array()
    rng = np.random.default_rng(0)
    out = []
    for process in range(PROCESSES):
        lines = []
        for step in range(doctor.STEPS):
            rows = doctor.checksum(
                images[feed.batch_indices(config.seed, step, batch, len(source))], np)
            for device in range(DEVICES):
                first = (process * DEVICES + device) * share
                lines.append(["batch", step, first, rows[first:first + share].tolist()])
                lines.append(["draw", rng.integers(0, 50, share).tolist(),
                              rng.normal(size=(share, 4)).tolist()])
        out.append({"heard": lines, "params": {str(d): "abc" for d in range(DEVICES)}})
    return out


def verdicts(heard):
    return {f.name: f.ok for f in doctor.judge(heard, PROCESSES, DEVICES)}


def test_healthy_pod_passes(heard):
    assert verdicts(heard) == {"batches": True, "t and noise": True, "parameters": True}


def test_the_same_batch_on_every_host_is_found(heard):
    """What today's ports do: each host reads the data set from its start."""
    theirs = [line for line in heard[0]["heard"] if line[0] == "batch"]
    mine = [line for line in heard[1]["heard"] if line[0] == "batch"]
    for a, b in zip(mine, theirs, strict=True):
        a[3] = b[3]
    assert verdicts(heard) == {"batches": False, "t and noise": True, "parameters": True}


def test_shared_noise_is_found(heard):
    draws = [[line for line in one["heard"] if line[0] == "draw"] for one in heard]
    for a, b in zip(*draws, strict=True):
        a[2] = b[2]
    assert not verdicts(heard)["t and noise"]


def test_one_t_for_all_is_found(heard):
    for one in heard:
        for line in one["heard"]:
            if line[0] == "draw":
                line[1] = [7] * len(line[1])
    assert not verdicts(heard)["t and noise"]


def test_different_parameters_are_found(heard):
    heard[1]["params"]["1"] = "xyz"
    assert not verdicts(heard)["parameters"]


def test_missing_part_of_a_checkpoint_and_second_talker(tmp_path):
    run = tmp_path / "run"
    part = run / "checkpoints" / str(doctor.STEPS) / "params" / "ocdbt.process_0" / "d"
    part.mkdir(parents=True)
    (part / "x").write_text("")
    assert doctor.judge_checkpoint(tmp_path, 1).ok
    assert doctor.judge_checkpoint(tmp_path, 2).ok is False
    lines = [json.dumps({"step": i + 1, "loss": 1.0}) for i in range(doctor.STEPS)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert doctor.judge_logs(tmp_path, ["training digits", ""]).ok
    assert doctor.judge_logs(tmp_path, ["training digits"] * 2).ok is False
    (run / "metrics.jsonl").write_text("\n".join(lines * 2) + "\n")
    assert doctor.judge_logs(tmp_path, ["training digits", ""]).ok is False


@pytest.mark.multiprocess
@pytest.mark.slow
def test_dry_run_of_a_pod():
    done = subprocess.run([sys.executable, "-m", "ddpm_jax", "doctor", "--processes=4",
                           "--devices=2"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == [f"ok    {name}" for name in (
        "processes", "batches", "t and noise", "parameters", "checkpoint", "logs")]


@pytest.mark.multiprocess
def test_dry_run_that_is_ended_leaves_no_process():
    process = subprocess.Popen([sys.executable, "-m", "ddpm_jax", "doctor", "--processes=2"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(pids := started.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    assert not [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_bucket_on_the_storage_emulator(tmp_path):
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator")
    pytest.importorskip("gcsfs", reason="gcsfs")
    import os
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [str(pathlib.Path(sys.executable).parent / "gcp-storage-emulator"), "start",
         f"--port={port}", "--in-memory", "--default-bucket=ddpm"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    env = {**os.environ, "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
           "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
           "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x"}
    try:
        assert doctor.pod.probe("127.0.0.1", port, 30) is None
        done = subprocess.run(
            [sys.executable, "-m", "ddpm_jax", "doctor", "--workdir=gs://ddpm/run"], env=env,
            capture_output=True, text=True, timeout=120)
        assert "ok    bucket: ddpm" in done.stdout, done.stdout + done.stderr
        assert "ok    workdir: gs://ddpm/run: write, read, list, delete" in done.stdout
        done = subprocess.run(
            [sys.executable, "-m", "ddpm_jax", "doctor", "--workdir=gs://absent/run"], env=env,
            capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and "WRONG bucket: gs://absent does not exist" in done.stdout
    finally:
        server.kill()
        server.wait()


