"""launch/local.py with real processes."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LOCAL = pathlib.Path(__file__).parents[2] / "launch" / "local.py"
spec = importlib.util.spec_from_file_location("launch_local", LOCAL)
local = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)


def run(tmp_path, program, *options, processes=2):
    return subprocess.run(
        [sys.executable, LOCAL, f"--processes={processes}", f"--logdir={tmp_path}", *options, "--",
         sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_all_done_is_0_and_only_process_0_is_shown(tmp_path):
    out = run(tmp_path, "import os; print('I am', os.environ['DDPM_PROC'])", processes=3)
    assert out.returncode == 0 and out.stdout == "I am 0\n"
    assert (tmp_path / "process_2.log").read_text() == "I am 2\n"


def test_failure_ends_the_others_and_names_the_log(tmp_path):
    started = time.monotonic()
    out = run(tmp_path, "import os, sys, time\n"
              "if os.environ['DDPM_PROC'] == '1': print('the cause'); sys.exit(3)\n"
              "time.sleep(50)", "--grace=0.5")
    assert out.returncode == 3 and time.monotonic() - started < 20
    assert "process 1 failed with 3" in out.stderr and "the cause" in out.stderr
    assert str(tmp_path / "process_1.log") in out.stderr


def test_42_is_no_failure_and_the_siblings_are_waited_for(tmp_path):
    out = run(tmp_path, "import os, sys, time\n"
              "time.sleep(2 * int(os.environ['DDPM_PROC'])); print('saved', flush=True)\n"
              "sys.exit(42)", "--grace=0.1")
    assert out.returncode == 42 and "failed" not in out.stderr
    assert (tmp_path / "process_1.log").read_text() == "saved\n"


PROGRAM = ("import signal, sys, time\n"
           "signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), time.sleep(WAIT),"
           " sys.exit(42)))\n"
           "print('ready', flush=True); time.sleep(50)")


# Hears SIGINT also where the tests were started in a shell's background, which ignores it, and
# SIGHUP where they were started by nohup.
HEARING = [sys.executable, "-c", "import os, signal, sys\n"
           "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
           "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"]


def start(tmp_path, wait=0, stdout=subprocess.DEVNULL, before=()):
    process = subprocess.Popen(
        [*before, sys.executable, LOCAL, f"--logdir={tmp_path}", "--", sys.executable, "-c",
         PROGRAM.replace("WAIT", str(wait))], stdout=stdout, stderr=subprocess.DEVNULL)
    until(tmp_path, "ready")
    return process


def until(tmp_path, word):
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"process_{i}.log").exists()
                  and word in (tmp_path / f"process_{i}.log").read_text() for i in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", local.SIGNALS, ids=lambda number: number.name)
def test_signals_go_to_all(tmp_path, number):
    process = start(tmp_path, before=HEARING)
    process.send_signal(number)
    assert process.wait(60) == 42


def test_second_ctrl_c_ends_all_at_once(tmp_path):
    process = start(tmp_path, wait=40, before=HEARING)
    process.send_signal(signal.SIGINT)
    until(tmp_path, "told")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_output_without_a_reader_ends_nothing(tmp_path):
    read, write = os.pipe()
    process = start(tmp_path, stdout=write)
    os.close(write)
    os.close(read)
    process.send_signal(signal.SIGTERM)  # process 0 prints, and there is no reader
    assert process.wait(60) == 42


@pytest.mark.parametrize("codes, order, expected", [
    ([0, 0], [0, 1], (0, None)),
    ([0, 42], [0, 1], (42, None)),
    ([-6, 1], [0, 1], (1, 1)),         # the abort of 0 is the consequence
    ([-9, 134], [0, 1], (137, 0)),
    ([42, -9], [1, 0], (137, 1)),
    ([2, 2], [1, 0], (2, 1)),
])
def test_verdict(codes, order, expected):
    assert local.verdict(codes, order) == expected


def test_bad_input_is_one_line(tmp_path):
    out = subprocess.run([sys.executable, LOCAL], capture_output=True, text=True)
    assert out.returncode == 2 and "put it after --" in out.stderr
    out = subprocess.run([sys.executable, LOCAL, f"--logdir={tmp_path}", "--", "no-such-program"],
                         capture_output=True, text=True)
    assert out.returncode == 127 and "local.py: error: no-such-program" in out.stderr


def test_gpus_are_shared_out_and_fake_devices_are_set(monkeypatch):
    options, _ = local.parse(["--devices=2", "--platform=cuda", "--", "x"])
    assert local.environment(options, 1, 9)["JAX_LOCAL_DEVICE_IDS"] == "2,3"
    monkeypatch.setenv("XLA_FLAGS", "--a --xla_force_host_platform_device_count=8")
    options, _ = local.parse(["--devices=2", "--", "x"])
    env = local.environment(options, 0, 9)
    assert env["XLA_FLAGS"] == "--a --xla_force_host_platform_device_count=2"
    assert env["DDPM_COORD"] == "127.0.0.1:9" and "JAX_LOCAL_DEVICE_IDS" not in os.environ
