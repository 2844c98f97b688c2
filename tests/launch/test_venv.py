"""launch/venv.sh chooses the newest Python that can make an environment, wherever it is."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
REAL = os.path.realpath(sys.executable)


def find_python(tmp_path, **env):
    """The Python that venv.sh finds when the PATH is tmp_path/bin alone; also its exit status."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    done = subprocess.run(
        [shutil.which("bash"), "-c", ". launch/venv.sh; find_python"], cwd=ROOT, text=True,
        capture_output=True, env={"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), **env})
    return done.stdout.strip() or done.stderr, done.returncode


def a_python(path, *, works=True):
    """A file that runs this Python, or one that fails as a shim of pyenv without a version does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = f'exec {REAL} "$@"' if works else "exit 127"
    path.write_text(f"#!{shutil.which('sh')}\n{command}\n")
    path.chmod(0o755)
    return str(path)


def test_the_newest_with_wheels_is_taken(tmp_path):
    for name in ("python3", "python3.11", "python3.14"):
        a_python(tmp_path / "bin" / name)
    newest = a_python(tmp_path / "bin" / "python3.12")
    assert find_python(tmp_path) == (newest, 0)


def test_pyenv_and_uv_are_searched_where_a_shim_does_not_work(tmp_path):
    a_python(tmp_path / "bin/python3.13", works=False)
    a_python(tmp_path / "bin/python3.12")
    uv = a_python(tmp_path / ".local/share/uv/python/cpython-3.13.2-linux-x86_64-gnu/bin/python3")
    assert find_python(tmp_path) == (uv, 0)
    pyenv = a_python(tmp_path / ".pyenv/versions/3.13.0/bin/python")
    assert find_python(tmp_path) == (pyenv, 0)
    elsewhere = a_python(tmp_path / "else/versions/3.13.1/bin/python")
    assert find_python(tmp_path, PYENV_ROOT=str(tmp_path / "else")) == (elsewhere, 0)


def test_python_of_the_shell_is_the_last_resort(tmp_path):
    plain = a_python(tmp_path / "bin/python3")
    assert find_python(tmp_path) == (plain, 0)


@pytest.mark.parametrize("env, part", [
    ({}, "install one"),
    ({"PYTHON": "python3.9"}, "PYTHON=python3.9 is no Python >= 3.11"),
])
def test_none_is_one_line(tmp_path, env, part):
    message, status = find_python(tmp_path, **env)
    assert status == 1 and part in message and message.count("\n") == 1


def test_a_named_python_wins(tmp_path):
    a_python(tmp_path / "bin/python3.13")
    named = a_python(tmp_path / "mine")
    assert find_python(tmp_path, PYTHON=named) == (named, 0)
