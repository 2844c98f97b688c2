import os
import pathlib
import sys

import pytest

from ddpm_jax.parallel import launchers

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for pod_processes


@pytest.fixture
def clean_env(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("DDPM_", "SLURM_", "OMPI_", "MEGASCALE_", "TPU_", "KUBERNETES_",
                            "JAX_COORD", "JAX_NUM_P", "JAX_PROC")):
            monkeypatch.delenv(name)
    for row in launchers.LAUNCHERS:
        for name in filter(None, row[1:8]):
            monkeypatch.delenv(name, raising=False)
    return monkeypatch

