import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib
import pytest

from ddpm_jax.benchmark import corpus, replay
from ddpm_jax.compilation import hlo

QUIET = {"XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def lowered():
    def loop(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x @ x) + i, x)

    return jax.jit(loop).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32))


@pytest.fixture(scope="module")
def file(lowered, tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "loop.mlir.bc"
    path.write_bytes(corpus.artifact(lowered))
    return path


def test_a_row_of_a_program(file, lowered):
    """By the script alone, without JAX in its process, and counted as `ddpm compile` does."""
    done = subprocess.run([sys.executable, replay.__file__, str(file)], capture_output=True,
                          text=True, check=True, env={**os.environ, **QUIET, "PYTHONPATH": ""})
    row = json.loads(done.stdout)
    assert row["outcome"] == "ok" and row["file"] == "loop.mlir.bc"
    assert row["sha256"] == corpus.digest(file.read_bytes())
    assert row["jaxlib"] == jaxlib.version.__version__
    assert 0 < row["read"]["cpu_s"] < row["process"]["cpu_s"]
    assert 0 < row["compile"]["cpu_s"] < row["process"]["cpu_s"]
    text = lowered.compile().as_text()
    found = hlo.summary(text)
    assert {k: row[k] for k in ("instructions", "fusions", "kernels")} == {
        k: found[k] for k in ("instructions", "fusions", "kernels")}
    assert row["kernels"] >= 7
    assert row["memory"]["argument"] == row["memory"]["output"] == 4 * 64
    assert row["maxrss_bytes"] > 2**25 and row["executable_bytes"] > 1000


def test_hlo_text_is_the_same_program(file, lowered, tmp_path):
    text = tmp_path / "loop.hlo"
    text.write_text(corpus.hlo_text(lowered))
    rows = [replay.measure(f, environment=QUIET) for f in (file, text)]
    assert [r["outcome"] for r in rows] == ["ok", "ok"]
    assert len({(r["instructions"], r["fusions"], r["kernels"]) for r in rows}) == 1
    text.write_text(text.read_text()[:200])
    row = replay.measure(text, environment=QUIET)
    assert row["outcome"] == "error" and "HloModule" in row["message"]


def test_arguments_that_cannot_be_meant(file, tmp_path, monkeypatch, capsys):
    for words, message in ((["no_file"], "no_file: No such file"), ([str(tmp_path)], "directory"),
                           ([str(file), "--timeout=-1"], "-1 is not above 0"),
                           ([str(file), f"--optimized={tmp_path}"], "is not the name of a file"),
                           ([str(file), "--option=a=1"], "--option is for --target=h100"),
                           ([str(file), "--target=h100", "--option=a"], "a is not NAME=VALUE"),
                           ([str(file), "--target=h100"], "needs --plugin and --gpu")):
        monkeypatch.setattr(sys, "argv", ["replay.py", *words])
        with pytest.raises(SystemExit) as end:
            replay.main()
        assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_what_becomes_of_a_compiler_is_a_row(file, tmp_path):
    damaged = tmp_path / "damaged.mlir.bc"
    damaged.write_bytes(file.read_bytes()[:100])
    row = replay.measure(damaged, environment=QUIET)
    assert row["outcome"] == "error" and row["message"]
    damaged.write_bytes(b"module {}")
    assert "neither a portable" in replay.measure(damaged, environment=QUIET)["message"]
    assert replay.measure(file, environment=QUIET, timeout=0.05)["outcome"] == "timeout"
    # XLA ends its process at a flag that it does not know; the kernel kills one without memory.
    row = replay.measure(file, environment={"XLA_FLAGS": "--no_such_flag"})
    assert row["outcome"] in ("error", "killed") and "no_such_flag" in row["message"]
    killed = tmp_path / "killed.sh"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    row = replay.measure(file, python=killed, environment=QUIET)
    assert row["outcome"] == "killed" and row["message"] == "SIGKILL"


def test_a_relative_path_of_modules_is_that_of_the_caller(file, tmp_path, monkeypatch):
    shows = tmp_path / "shows.sh"
    shows.write_text('#!/bin/sh\necho "$PYTHONPATH" >&2; exit 3\n')
    shows.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    row = replay.measure(file, python=shows, environment={"PYTHONPATH": "a:/b"})
    assert row["message"] == f"exit status 3 {tmp_path}/a:/b"


def test_a_limit_of_memory(file):
    row = replay.measure(file, environment=QUIET, options=["--memory_gb=0.05"])
    assert row["outcome"] in ("error", "killed")
