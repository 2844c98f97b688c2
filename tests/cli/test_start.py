import os
import subprocess
import sys

import jax
import pytest

from ddpm_jax.cli import start

PROGRAM = """
import os, sys, types
from ddpm_jax.cli import start
start._has_gpu = lambda: {gpu}
class Finder:
    def find_spec(self, name, *rest):
        if name == "jax":
            os.write(2, b"I0 cudart_stub.cc:31] no drivers, GPU will not be used.\\n")
            os.write(2, b"another line\\n")
sys.meta_path.insert(0, Finder())
start.start_jax()
sys.stderr.write("after\\n")
"""


@pytest.mark.parametrize("gpu, lines", [(False, 0), (True, 1)])
def test_lines_about_an_absent_gpu_are_hidden_and_others_are_not(gpu, lines):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(gpu=gpu)], capture_output=True,
                          text=True, check=True)
    assert done.stderr.count("I0 cudart_stub") == lines
    assert done.stderr.count("another line\n") == 1 and done.stderr.endswith("after\n")


@pytest.mark.peer
@pytest.mark.parametrize("tpu", [True, False])
def test_libtpu_without_a_tpu_is_silent_but_for_the_error(tpu):
    """Its warnings stay where a device file is."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    if start._has_tpu():
        pytest.skip("there is a TPU")
    program = ("from ddpm_jax.cli import start\n"
               f"start._has_tpu = lambda: {tpu}\n"
               "start.start_jax()\nimport jax\n"
               "try:\n    jax.devices()\nexcept RuntimeError as error:\n    print(error)\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}  # of other tests
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True, env={**env, "JAX_PLATFORMS": "tpu",
                                           "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    assert ("TPU" in done.stderr) == tpu
    assert "TPU initialization failed" in done.stdout


def test_only_errors_of_starting_a_backend_are_explained(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert start.backend_problem(RuntimeError("shapes differ")) is None
    jax.devices()      # there is a backend: an assertion is about something else
    assert start.backend_problem(AssertionError()) is None
    found = start.backend_problem(RuntimeError(
        "Unable to initialize backend 'x': no. (set JAX_PLATFORMS='' to automatically choose)"))
    assert found.startswith("JAX_PLATFORMS=cpu: Unable to initialize backend 'x': no; set ")


def test_flags_that_xla_knows_pass(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    start._check_xla_flags()
