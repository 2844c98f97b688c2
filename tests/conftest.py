"""Strict settings for every test: warnings are errors, rank promotion raises, eight CPU devices."""

import gc
import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for tiny_run, bucket, ...

from xla_flags import xla_flags  # noqa: E402

for flag in xla_flags(8).split():
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
# Every test and every process that a test starts compiles the same tiny programs: share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR",
                      str(pathlib.Path(tempfile.gettempdir()) / f"ddpm_jax_tests_{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Without credentials gcsfs would ask for the kind of a bucket, and complain, at each call.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests already run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other in a loop

import bucket  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from made_up_files import make  # noqa: E402, F401 - a fixture

jax.config.update("jax_numpy_rank_promotion", "raise")


# Tracing makes many objects and few cycles: a sixth of its time is the collector's.
gc.set_threshold(50_000, 20, 50)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # A worker reads what another is still writing; JAX then compiles the program itself.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


def pytest_collection_finish():
    gc.freeze()  # what all the imports made


@pytest.fixture
def h100s():
    """Two absent H100s, for which programs can be compiled."""
    pytest.importorskip("jax_plugins.xla_cuda12", reason="the CUDA plugin is not installed")
    from ddpm_jax.compilation import topology

    return topology.describe("h100:2")


@pytest.fixture
def real_images():
    """Folder of real photographs (class folders of JPEG), named by DDPM_TEST_IMAGES; else skips."""
    folder = os.environ.get("DDPM_TEST_IMAGES")
    if not folder or not pathlib.Path(folder).exists():
        pytest.skip("DDPM_TEST_IMAGES does not name a folder of real images")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def _storage_emulator():
    process, variables = bucket.start()
    yield variables
    bucket.stop(process)


@pytest.fixture
def storage(_storage_emulator, monkeypatch):
    """A bucket, gs://ddpm, that this process and those it starts can use."""
    for name, value in _storage_emulator.items():
        monkeypatch.setenv(name, value)
    return "gs://ddpm"


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A folder with a finished run of 12 steps that nothing interrupted; not to be written to."""
    from tiny_run import train
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder)
    return folder
