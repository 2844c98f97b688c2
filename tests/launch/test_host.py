"""host.sh as a worker runs it: the real wheel with all it needs, in a new home folder."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from cloud_tpu import staging

REPO = pathlib.Path(__file__).parents[2]

OLD_PYTHON = """#!/bin/sh
case "$*" in
--version) echo "Python 3.10.12" ;;
*version_info*) exit 1 ;;
*) exec {real} "$@" ;;
esac
"""


@pytest.fixture
def host(tmp_path):
    """host(*arguments) on a machine whose python3 says it is 3.10."""
    index = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "jax"],
                           capture_output=True, text=True)
    if index.returncode:
        pytest.skip("no package index within reach")
    for name in ("bin", "home"):
        (tmp_path / name).mkdir()
    old = tmp_path / "bin/python3"
    old.write_text(OLD_PYTHON.format(real=shutil.which("python3", path="/usr/bin:/usr/local/bin")
                                     or sys.executable))
    old.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"HOME": str(tmp_path / "home"), "DDPM_PYTHON": "python3", "PIP_NO_COMPILE": "1",
            "PATH": f"{tmp_path}/bin:{env['PATH']}", "DDPM_NEED_MB": "2000"}

    def run(*arguments):
        return subprocess.run(["sh", REPO / "launch/host.sh", *arguments], env=env, text=True,
                              capture_output=True, timeout=900)

    return run


@pytest.mark.slow
def test_setup_provides_python_311_and_installs_the_wheel(tmp_path, host):
    folder = tmp_path / "wheel"
    source = tmp_path / "source"  # a build leaves its own folders behind
    shutil.copytree(REPO / "ddpm_jax", source / "ddpm_jax",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet",
                    f"--wheel-dir={folder}", source], check=True, timeout=300)
    staging.stage(folder, [])
    done = host("setup", str(folder), "")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Python 3.10.12 on this image, 3.11 needed: uv provides it" in done.stdout
    assert "installed ddpm_jax-" in done.stdout and "with Python 3.11" in done.stdout
    assert "up to date" in host("setup", str(folder), "").stdout
    found = host("run", "--", "ddpm", "data", "info", "--name=digits")
    assert found.returncode == 0 and "train: 1,442 images 8x8x1" in found.stdout, found.stderr
