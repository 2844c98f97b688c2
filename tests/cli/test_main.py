import subprocess
import sys

import pytest

from ddpm_jax.cli import main


def ddpm(*argv):
    return subprocess.run([sys.executable, "-m", "ddpm_jax", *argv], capture_output=True, text=True)


def test_help_lists_every_subcommand_without_importing_jax():
    code = ("import sys; from ddpm_jax.cli.main import main; main(['--help']); "
            "print('jax' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for name in main.SUBCOMMANDS:
        assert f"  {name} " in out
    assert out.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", main.SUBCOMMANDS)
def test_every_subcommand_explains_itself(name):
    done = ddpm(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ddpm {name}") and "flags:" in done.stdout


@pytest.mark.parametrize("argv, message", [
    (["trian"], "no subcommand 'trian'; known: train, sample"),
    (["train", "--workdir=/tmp/x"], "--config is missing"),
    (["train", "--config=digits"], "--workdir is missing"),
    (["train", "--config=nothing"], "packaged: celebahq256"),
    (["train", "--config=digits", "--config.model.chh=3"], "config has no field 'chh'"),
    (["train", "--config=digits", "--config.model.ch=many"], "--config.model.ch=many"),
    (["train", "--config=digits", "--workdir=/tmp/x", "here"], "unexpected argument 'here'"),
    (["sample", "--workdir=/nonexistent/run", "--out=/tmp/x"], "no run here"),
    (["train", "--nonsense=1"], "nonsense"),
])
def test_bad_input_is_one_line_and_status_2(argv, message):
    done = ddpm(*argv)
    assert done.returncode == 2
    lines = [s for s in done.stderr.splitlines() if s.startswith("ddpm: error:")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in done.stderr


def test_no_argument_prints_the_usage():
    done = ddpm()
    assert done.returncode == 2 and "usage: ddpm <subcommand>" in done.stdout
    assert ddpm("--version").stdout.strip().count(".") == 2
