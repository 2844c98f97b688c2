"""What a launcher (SLURM, Open MPI, Cloud TPU, GKE, Kubernetes) left in the environment.

JAX's detectors are used as they are, but for what they leave out.
"""

import contextlib
import os
from typing import NamedTuple

from jax._src.clusters import ClusterEnv

# JAX's own default, 8482, is closed by the firewall rules that Google Cloud makes for TPU
# networks; 8476 is open there (jax issue 35905).
DEFAULT_PORT = 8476


class Pod(NamedTuple):
    """Which process of how many this is. ``coordinator`` is host:port, None for one process."""

    process_id: int
    num_processes: int
    coordinator: str | None
    method: str


def detect(port: int | None, timeout: int):
    """(Pod, ids of this process's devices or None: all) by JAX's detectors; None: no pod."""
    if _kubernetes_without_job():
        return None
    with _environment(_overrides(port)):
        for env in ClusterEnv._cluster_types:
            if env.opt_in_only_method or not env.is_env_present():
                continue
            method = env.name or env.__name__
            if "tpu" in method:
                os.environ.setdefault("JAX_COORDINATOR_PORT", str(port or DEFAULT_PORT))
            count = env.get_process_count()
            if count == 1:
                return Pod(0, 1, None, method), None
            address = env.get_coordinator_address(
                timeout_secs=timeout,
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"))
            ids = local_device_ids()
            if ids is None and "tpu" not in method:
                ids = _slurm_devices() if method == "slurm" else None
                local = env.get_local_process_id()
                if ids is None and local is not None:
                    ids = [local]
            return Pod(env.get_process_id(), count, address, method), ids
    return None


def local_device_ids() -> list[int] | None:
    text = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    return [int(x) for x in text.split(",")] if text else None


def _overrides(port):
    values = {}
    if port:
        values["JAX_COORDINATOR_PORT"] = str(port)
    # On GKE a pod of a single slice has no MEGASCALE_*; JAX then asks the metadata server, which
    # pods may not reach, and fails (jax issue 40854). Empty means "one slice" without asking.
    if "TPU_WORKER_HOSTNAMES" in os.environ or "TPU_PROCESS_ADDRESSES" in os.environ:
        for name in ("NUM_SLICES", "SLICE_ID", "COORDINATOR_ADDRESS"):
            if f"MEGASCALE_{name}" not in os.environ:
                values[f"MEGASCALE_{name}"] = ""
    return values


@contextlib.contextmanager
def _environment(values: dict[str, str]):
    """Sets variables for the time of the detection only: libtpu reads some of them too."""
    names = {*values, "JAX_COORDINATOR_PORT"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _kubernetes_without_job() -> bool:
    """A pod that is no member of an indexed Job, nor a TPU worker, is alone."""
    return ("KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ
            and "TPU_WORKER_ID" not in os.environ and "SLURM_JOB_ID" not in os.environ)


def _slurm_devices() -> list[int] | None:
    """One task per node gets all its GPUs; JAX by itself would use only the first."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if tasks == "1" and gpus.isdigit() and int(gpus) > 1:
        return list(range(int(gpus)))
    return None
