import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for pod_processes


@pytest.fixture
def clean_env(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("DDPM_", "SLURM_", "OMPI_", "MEGASCALE_", "TPU_", "KUBERNETES_",
                            "JAX_COORD", "JOB_")):
            monkeypatch.delenv(name)
    return monkeypatch

