"""ddpm doctor in the real program; the dry run of a pod really runs one."""

import pathlib
import socket
import subprocess
import sys
import time

import pytest

from ddpm_jax.parallel import pod


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


@pytest.mark.multiprocess
@pytest.mark.slow
def test_dry_run_of_a_pod():
    done = subprocess.run([sys.executable, "-m", "ddpm_jax", "doctor", "--processes=2",
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
        assert pod.probe("127.0.0.1", port, 30) is None
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


