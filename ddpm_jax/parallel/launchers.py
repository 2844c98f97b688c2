"""What a launcher left in the environment: which process of how many this is.

SLURM, Cloud TPU, GKE, Open MPI 4 and (with the package `kubernetes`) indexed Kubernetes jobs are
read by JAX's detectors, but for what they leave out; all others are rows of LAUNCHERS. A process
of a multi-process job never falls back to running alone: a missing part is a UserError.
"""

import contextlib
import os
import re
import zlib
from importlib.util import find_spec
from typing import NamedTuple

from jax._src.clusters import ClusterEnv, K8sCluster, OmpiCluster, SlurmCluster

from ddpm_jax.errors import UserError
from ddpm_jax.parallel.pod_flags import DEFAULT_PORT


class Pod(NamedTuple):
    """Which process of how many this is. coordinator: host:port of process 0, None for one process.
    device_ids: of this process; None: all of its host."""

    process_id: int | None
    num_processes: int | None
    coordinator: str | None
    method: str
    device_ids: list[int] | None = None


class Launcher(NamedTuple):
    """Names of a launcher's variables; None: it sets none. coordinator: host, or host:port, of
    process 0. local_id, local_count: of the processes on this host. job: differs between two jobs
    on one host. port_offset: added to the port, where the launcher itself listens."""

    name: str
    process_id: str
    num_processes: str | None = None
    coordinator: str | None = None
    port: str | None = None
    local_id: str | None = None
    local_count: str | None = None
    job: str | None = None
    port_offset: int = 0


LAUNCHERS = (
    Launcher("Kubeflow", "PROCESS_ID", "NUM_PROCESSES", "COORDINATOR_ADDRESS", "COORDINATOR_PORT"),
    Launcher("torchrun", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK",
             "LOCAL_WORLD_SIZE", port_offset=1),
    Launcher("one process a node", "NODE_RANK", "NNODES", "JAX_COORDINATOR_IP",
             "JAX_COORDINATOR_PORT"),
    Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
             local_id="OMPI_COMM_WORLD_LOCAL_RANK", local_count="OMPI_COMM_WORLD_LOCAL_SIZE",
             job="PMIX_NAMESPACE"),
    Launcher("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", local_id="MPI_LOCALRANKID",
             local_count="MPI_LOCALNRANKS", job="I_MPI_HYDRA_UUID"),
    Launcher("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
             local_id="MV2_COMM_WORLD_LOCAL_RANK", local_count="MV2_COMM_WORLD_LOCAL_SIZE"),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE",
             local_id="JSM_NAMESPACE_LOCAL_RANK", local_count="JSM_NAMESPACE_LOCAL_SIZE"),
    Launcher("Horovod", "HOROVOD_RANK", "HOROVOD_SIZE", local_id="HOROVOD_LOCAL_RANK",
             local_count="HOROVOD_LOCAL_SIZE"),
    Launcher("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    Launcher("PMIx", "PMIX_RANK"),
    Launcher("indexed Kubernetes job", "JOB_COMPLETION_INDEX"),
)
OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"
VARIABLES = {"coordinator": "DDPM_COORD", "num_processes": "DDPM_NPROC", "process_id": "DDPM_PROC"}


def find(given: dict, port: int | None, timeout: int) -> Pod:
    """The pod of this process, or one of a single process.

    given: coordinator, num_processes and process_id as flags and DDPM_* name them, else None.

    Raises:
      UserError: a part is neither given nor in the environment; the line has the remedy.
    """
    if given["num_processes"] == 1 and not given["process_id"]:
        return Pod(0, 1, None, "given")
    found = None
    if None in given.values():
        found = _detect(given["coordinator"], port, timeout)
    named = {name: value for name, value in given.items() if value is not None}
    if found is None and not named:
        return Pod(0, 1, None, "alone")
    pod = (found or Pod(None, None, None, "given", device_ids()))._replace(**named)
    if pod.num_processes == 1:
        return Pod(0, 1, None, pod.method)
    missing = [name for name in VARIABLES if getattr(pod, name) is None]
    if missing and found is None:
        raise UserError(f"--{missing[0]} is missing: --coordinator, --num_processes and "
                        "--process_id (DDPM_COORD, DDPM_NPROC, DDPM_PROC) go together")
    if missing:
        raise UserError(
            f"{pod.method} started this as one of several processes, but "
            f"{' and '.join(missing)} cannot be read from its variables; set "
            f"{' and '.join(VARIABLES[name] for name in missing)} for every process (DDPM_COORD is "
            "HOST:PORT of process 0), or --multihost=off to run this one alone")
    if not 0 <= pod.process_id < pod.num_processes:
        raise UserError(f"process_id {pod.process_id}: must be in 0..{pod.num_processes - 1} "
                        f"(num_processes {pod.num_processes})")
    host, port = split_address(pod.coordinator, port or DEFAULT_PORT)
    return pod._replace(coordinator=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def split_address(address: str, default_port: int | None = None) -> tuple[str, int]:
    """'host:port', 'host' or '[IPv6]:port' -> (host, port).

    Raises UserError on anything else, and on a missing port without a default.
    """
    match = re.fullmatch(r"(?:\[([^]]+)\]|([^][:]+))(?::(\d+))?", address)
    port = int(match[3] or default_port or 0) if match else 0
    if not 0 < port < 65536:
        raise UserError(f"coordinator {address!r}: expected HOST:PORT, or [IPv6]:PORT")
    return match[1] or match[2], port


def device_ids() -> list[int] | None:
    """JAX_LOCAL_DEVICE_IDS, by which several processes share the GPUs of a host."""
    text = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    try:
        return [int(x) for x in text.split(",")] if text else None
    except ValueError:
        raise UserError(f"JAX_LOCAL_DEVICE_IDS={text!r}: expected numbers, as 0,1") from None


def _detect(coordinator: str | None, port: int | None, timeout: int) -> Pod | None:
    """A launcher's whole set of variables, else JAX's detectors, else what a launcher names."""
    rows = [pod for row in LAUNCHERS if (pod := _read(row, port)) and pod.num_processes != 1]
    whole = [pod for pod in rows if None not in pod[:3]]
    if whole and OPEN_MPI_4 not in os.environ:  # which JAX knows, with its port
        return whole[0]
    found = _by_jax(coordinator, port, timeout)
    partial = rows[0] if rows else None
    # mpirun in a SLURM job: SLURM counts the daemons of mpirun, not the processes.
    if found and partial and partial.num_processes not in (None, found.num_processes):
        return partial
    if not found and "JOB_COMPLETION_INDEX" in os.environ and find_spec("kubernetes"):
        found = _by_jax(coordinator, port, timeout, [K8sCluster])
    return found or partial


def _read(row: Launcher, port: int | None) -> Pod | None:
    """None: not started by it; one variable alone, where there would be more, means nothing."""
    named = [name for name in (row.process_id, row.num_processes, row.coordinator) if name]
    if sum(bool(os.environ.get(name)) for name in named) < min(2, len(named)):
        return None
    local_id, local_count = _number(row.local_id), _number(row.local_count)
    num_processes, its_port = _number(row.num_processes), _number(row.port)
    coordinator = os.environ.get(row.coordinator or "")
    if not coordinator and local_count and local_count == num_processes:
        coordinator = "127.0.0.1"
    if coordinator:
        job = os.environ.get(row.job or "")  # a port of its own, as JAX chooses one by the job
        default = 61440 + zlib.crc32(job.encode()) % 4096 if job else DEFAULT_PORT
        host, its_port = split_address(
            coordinator, its_port + row.port_offset if its_port else default)
        coordinator = f"[{host}]:{port or its_port}"
    ids = device_ids() or ([local_id] if local_id is not None and local_count != 1 else None)
    return Pod(_number(row.process_id), num_processes, coordinator or None, row.name, ids)


def _number(name: str | None) -> int | None:
    text = os.environ.get(name or "")
    if text and not text.isdigit():
        raise UserError(f"{name}={text!r}: expected a number; --multihost=off to run alone")
    return int(text) if text else None


def _by_jax(coordinator: str | None, port: int | None, timeout: int, detectors=None) -> Pod | None:
    with _environment(port):
        for env in detectors or ClusterEnv._cluster_types:
            # K8sCluster needs a package and permissions, and comes after the table.
            if env.opt_in_only_method or env is K8sCluster and not detectors:
                continue
            # For Open MPI 5, JAX from 0.12 on needs a package too.
            if env is OmpiCluster and OPEN_MPI_4 not in os.environ and not find_spec("mpi4py"):
                continue
            method = env.name or env.__name__
            try:
                if env.is_env_present():
                    return _ask(env, method, coordinator, port, timeout)
            except UserError:
                raise
            except Exception as error:  # whatever a metadata server or a cluster's API answers
                raise UserError(
                    f"{method}: {' '.join(str(error).split())}; set DDPM_COORD, DDPM_NPROC and "
                    "DDPM_PROC for every process, or --multihost=off to run alone") from error
    return None


def _ask(env, method: str, coordinator: str | None, port: int | None, timeout: int) -> Pod:
    """The pod by one of JAX's detectors."""
    if "tpu" in method:
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(port or DEFAULT_PORT))
    count = env.get_process_count()
    if count == 1:
        return Pod(0, 1, None, method)
    ids = device_ids()
    if env is SlurmCluster:
        _require_slurm_step(count)
        ids = ids or _slurm_devices()
    if ids is None and "tpu" not in method and env.get_local_process_id() is not None:
        ids = [env.get_local_process_id()]
    return Pod(env.get_process_id(), count, coordinator or env.get_coordinator_address(
        timeout_secs=timeout, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")),
        method, ids)


@contextlib.contextmanager
def _environment(port: int | None):
    """What JAX's detectors read, for the time of the detection only: libtpu reads some too."""
    before = dict(os.environ)
    if port:
        os.environ["JAX_COORDINATOR_PORT"] = str(port)
    # On GKE a pod of a single slice has no MEGASCALE_*; JAX then queries the metadata server, which
    # pods may not reach, and fails (jax issue 40854). Empty means "one slice" without a query.
    if "TPU_WORKER_HOSTNAMES" in os.environ or "TPU_PROCESS_ADDRESSES" in os.environ:
        for name in ("NUM_SLICES", "SLICE_ID", "COORDINATOR_ADDRESS"):
            os.environ.setdefault(f"MEGASCALE_{name}", "")
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _require_slurm_step(count: int):
    """Raises UserError in the shell of an allocation, which is one task in place of `count`."""
    # salloc's shell is a step of its own. That of srun --pty is not, but it alone has a terminal:
    # what srun starts in it inherits its variables, not its terminal.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", str(count))
    terminal = "SLURM_PTY_PORT" in os.environ and any(map(os.isatty, range(3)))
    if tasks != str(count) or terminal:
        raise UserError(f"this is the interactive shell of {count} SLURM tasks: start all of them "
                        "with srun (srun ddpm ...), or --multihost=off to run this one alone")


def _slurm_devices() -> list[int] | None:
    """One task per node gets all its GPUs; JAX by itself would use only the first."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if tasks == "1" and gpus.isdigit() and int(gpus) > 1:
        return list(range(int(gpus)))
    return None
