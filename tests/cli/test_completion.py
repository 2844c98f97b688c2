"""The printed scripts, called as the shells call them."""

import os
import select
import shutil
import subprocess
import time

import pytest

from ddpm_jax.cli import completion

CASES = {
    "ddpm tr": "train",
    "ddpm sample --wor": "--workdir=",
    "ddpm train --conf": "--config=",
    "ddpm train --config=cifar10_t": "cifar10_table2",
    "ddpm train --config.train.st": "--config.train.steps= --config.train.steps_per_dispatch=",
    "ddpm sample --noema --sampler=dpmpp_2": "dpmpp_2s dpmpp_2m",
    "ddpm import --ver": "--verify",
    "ddpm nothing --x": "",
}
CALLS = "".join(f"COMP_LINE='{line}'; COMP_POINT={len(line)}; COMPREPLY=(); _ddpm; "
                'printf "%s\\n" "${COMPREPLY[*]}"\n' for line in CASES)


def run(tmp_path, shell, text):
    (tmp_path / "script").write_text(text)
    done = subprocess.run([*shell, tmp_path / "script"], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_bash(tmp_path, capsys):
    assert completion.main(None, ["bash"]) == 0
    assert run(tmp_path, ["bash"], capsys.readouterr().out + CALLS) == list(CASES.values())
    whole = "COMP_WORDBREAKS=' '\n" + CALLS
    lines = run(tmp_path, ["bash"], completion.script() + whole)
    assert lines[3] == "--config=cifar10_table2"


def test_zsh_at_a_terminal(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here (apt-get install zsh)")
    (tmp_path / "script").write_text(completion.for_zsh())
    ours, theirs = os.openpty()
    shell = subprocess.Popen(["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs,
                             start_new_session=True, env={**os.environ, "TERM": "dumb"})
    shown = b""

    def until(text):
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 4096)
        shown = b""

    try:
        os.write(ours, f"source {tmp_path}/script && echo rea''dy\n".encode())
        until(b"ready")
        for keys, text in ((b"ddpm tra\t", b"train"), (b" --conf\t", b"--config="),
                           (b"dig\t", b"digits"), (b" --config.ema\t", b"ema.decay=")):
            os.write(ours, keys)
            until(text)
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
        os.close(theirs)
