"""Real runs whose output has no reader."""

import contextlib
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest
from terminals import forking
from tiny_run import FLAGS

from ddpm_jax.cli.output import RED, coloured

TRAIN = [sys.executable, "-m", "ddpm_jax", "train", *FLAGS, "--config.train.log_every=1",
         "--config.checkpoint.every=100000"]


def saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))


def wait_for_steps(workdir, count=5):
    deadline = time.time() + 300  # the start of a program beside two others
    lines = workdir / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") >= count):
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("ending", ["> >(head -c 1) 2>&1", *[
    pytest.param(ending, marks=pytest.mark.slow) for ending in
    ("<&- >&- 2>&-", "> /dev/full 2>&1")]])
def test_a_run_goes_on_to_its_end(tmp_path, ending):
    command = " ".join(f"'{word}'" for word in [*TRAIN, f"--workdir={tmp_path}/run",
                                                "--config.train.steps=20"])
    done = subprocess.run(["bash", "-c", f"{command} {ending}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "run") == [20]


@contextlib.contextmanager
def run_in_a_terminal(workdir):
    """(pid, terminal) of a training run without end, which does not outlive the test."""
    pid, terminal = pty.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGHUP):  # which the shell around may ignore
            signal.signal(number, signal.SIG_DFL)
        os.execv(sys.executable, [*TRAIN, f"--workdir={workdir}", "--config.train.steps=1000000"])
    try:
        wait_for_steps(workdir)
        yield pid, terminal
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@forking
def test_a_closed_terminal_saves(tmp_path):
    run = tmp_path / "run"
    with run_in_a_terminal(run) as (pid, terminal):
        os.close(terminal)  # the kernel sends SIGHUP, and every write fails from now on
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert len(saved(run)) == 1


@forking
@pytest.mark.slow
def test_ctrl_c_saves_and_goes_on_where_the_output_cannot_show_a_name(tmp_path):
    run = tmp_path / "läuft"
    with run_in_a_terminal(run) as (pid, terminal):
        os.write(terminal, b"\x03")
        text = b""
        with contextlib.suppress(OSError):
            while chunk := os.read(terminal, 65536):
                text += chunk
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert b"on SIGINT" in text and b"Traceback" not in text
    [step] = saved(run)
    more = subprocess.run([*TRAIN, f"--workdir={run}", f"--config.train.steps={step + 5}"],
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True,
                          text=True)
    assert more.returncode == 0 and f"from step {step}" in more.stderr, more.stderr
    assert "l\\xe4uft" in more.stderr


def test_a_pipe_that_closes_is_no_error_of_other_commands():
    done = subprocess.run(["bash", "-o", "pipefail", "-c",
                           f"{sys.executable} -m ddpm_jax data info --name=digits | true"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_ctrl_c_before_there_is_anything_to_save_is_one_line(tmp_path):
    """In commands without checkpoints too."""
    process = subprocess.Popen(
        [sys.executable, "-c",
         "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
         "from ddpm_jax.cli import main\n"
         "def wait(argv):\n    print('READY', flush=True); time.sleep(60)\n"
         "main.command = wait\nmain.run()"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)
    assert process.stdout.readline() == "READY\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.splitlines()[-1] == "ddpm: interrupted"
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_notebook_gets_its_signals_back(tmp_path):
    code = ("import signal, sys\nfrom ddpm_jax.cli.main import main\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"print(main({TRAIN[3:]!r} + ['--workdir={tmp_path}/run', '--config.train.steps=2']))\n"
            "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
            "assert not {'torch', 'sklearn'} & set(sys.modules), 'they take seconds to import'\n"
            "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "0\n", done.stderr
    assert pathlib.Path(tmp_path / "run").exists()


def test_colours_on_a_terminal_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, open(tmp_path / "log", "w") as log:
        assert coloured("no", RED, terminal) == "\033[31mno\033[0m"
        assert coloured("no", RED, log) == "no"
        monkeypatch.setenv("NO_COLOR", "1")
        assert coloured("no", RED, terminal) == "no"
    os.close(ours)
