"""The one place that joins a pod: several processes that run one program together.

JAX's detectors and its coordination service are used as they are; added are a line before each
silent wait, a check that the coordinator can be reached, and an order among the sources.
"""

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from typing import NamedTuple

import jax
from absl import flags

from ddpm_jax.errors import UserError
from ddpm_jax.parallel.exit_codes import (
    EXIT_HUNG,
    EXIT_LOST,
    EXIT_UNREACHABLE,
    is_lost_peer,
    leave,
    log,
    pod_state,
)

# JAX's own default, 8482, is closed by the firewall rules that Google Cloud makes for TPU
# networks; 8476 is open there (jax issue 35905).
DEFAULT_PORT = 8476


class Pod(NamedTuple):
    """Which process of how many this is. ``coordinator`` is host:port, None for one process."""

    process_id: int
    num_processes: int
    coordinator: str | None
    method: str


def define_flags(values: flags.FlagValues = flags.FLAGS):
    """Defines in `values` the flags that `initialize` and `start_watchdog` read. Each has an
    environment variable too."""
    flags.DEFINE_enum("multihost", "auto", ["auto", "off"],
                      "auto: join the other processes when the environment tells of any (DDPM_*, "
                      "Cloud TPU, GKE, SLURM, Open MPI, Kubernetes); off: run alone",
                      flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST or HOST:PORT of process 0 (env DDPM_COORD)",
                        flag_values=values)
    flags.DEFINE_integer("coordinator_port", None,
                         f"port of the coordinator (env JAX_COORDINATOR_PORT); {DEFAULT_PORT} "
                         "where neither says, but SLURM's own choice on SLURM", lower_bound=1,
                         upper_bound=65535, flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes in all (env DDPM_NPROC)", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this one, from 0 (env DDPM_PROC)",
                         lower_bound=0, flag_values=values)
    flags.DEFINE_integer("init_timeout", None, "seconds to wait for the other processes; default "
                         "300, several TPU slices 3600 (env DDPM_INIT_TIMEOUT)", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_integer("heartbeat", None, "seconds after which a silent process counts as dead "
                         "and the others end; default 30 (env DDPM_HEARTBEAT)", lower_bound=2,
                         flag_values=values)
    flags.DEFINE_float("watchdog", 0.0, "print all stacks and exit with "
                       f"{EXIT_HUNG} after this many seconds without a step; 0: never",
                       lower_bound=0.0, flag_values=values)


def initialize(values: flags.FlagValues = flags.FLAGS) -> Pod:
    """Joins the pod, or does nothing for one process. Call before anything touches a device.

    Order: flags, then DDPM_COORD/DDPM_NPROC/DDPM_PROC, then what JAX detects. Says what it waits
    for and where before it waits.

    Raises:
      UserError: half of the settings given, or the port of process 0 is taken.
      SystemExit: EXIT_UNREACHABLE after one line, no coordinator within the time-out.
    """
    if option(values, "multihost", "DDPM_MULTIHOST", str, "auto") == "off":
        return Pod(0, 1, None, "off")
    if jax.distributed.is_initialized():
        state = pod_state()
        return Pod(state.process_id, state.num_processes, state.coordinator_address, "before")
    port = option(values, "coordinator_port", "JAX_COORDINATOR_PORT", int, None)
    timeout = option(values, "init_timeout", "DDPM_INIT_TIMEOUT", int, None)
    heartbeat = option(values, "heartbeat", "DDPM_HEARTBEAT", int, 30)
    found = _explicit(values, port) or _detect(port, timeout or 300)
    if found is None or found[0].num_processes == 1:
        return Pod(0, 1, None, found[0].method if found else "alone")
    pod, local_device_ids = found
    if timeout is None:
        timeout = 3600 if int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1 else 300
    host, port = split_address(pod.coordinator)
    # gRPC would send the coordinator's traffic to an HTTP proxy, which answers nothing.
    if any("_proxy" in name.lower() for name in os.environ):
        skip = [v for v in (os.environ.get("no_grpc_proxy"), os.environ.get("no_proxy")) if v]
        os.environ["no_grpc_proxy"] = ",".join([*skip, host])
    me = f"process {pod.process_id} of {pod.num_processes} on {socket.gethostname()}"
    if pod.process_id == 0:
        require_free_port(port)
        peers = pod.num_processes - 1
        log(f"{me} ({pod.method}): waiting for {peers} peer{'s' * (peers > 1)} at "
             f"{pod.coordinator}, up to {timeout} s")
    else:
        log(f"{me} ({pod.method}): waiting for process 0 at {pod.coordinator}, up to {timeout} s")
        started = time.monotonic()
        problem = probe(host, port, timeout)
        if problem:
            log(f"error: {problem}")  # not UserError: a restart may well help
            raise SystemExit(EXIT_UNREACHABLE)
        timeout = max(int(timeout - (time.monotonic() - started)), 30)
    joined = threading.Event()
    threading.Thread(target=_still_waiting, args=(joined, me, pod.coordinator), daemon=True).start()
    try:
        jax.distributed.initialize(
            pod.coordinator, pod.num_processes, pod.process_id, local_device_ids,
            cluster_detection_method="deactivate", initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat)
    finally:
        joined.set()
    sys.excepthook = _leave_on_exception
    log(f"{me}: joined; a process silent for {heartbeat} s ends the run")
    return pod


def probe(host: str, port: int, timeout: float) -> str | None:
    """Connects to host:port, trying again until `timeout` seconds are over.

    Returns None when something listens there, else one line: what is wrong and what to do.
    """
    deadline = time.monotonic() + timeout
    said = time.monotonic()
    while True:
        problem = probe_once(host, port, min(5.0, max(0.2, deadline - time.monotonic())))
        if problem is None:
            return None
        if time.monotonic() >= deadline:
            return f"no coordinator at {host}:{port} after {timeout:.0f} s: {problem}"
        if time.monotonic() - said > 30:
            said = time.monotonic()
            log(f"still no coordinator at {host}:{port}: {problem}")
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))


def probe_once(host: str, port: int, timeout: float) -> str | None:
    """One try of `probe`: None, or the problem and its remedy."""
    try:
        with socket.create_connection((host, port), timeout):
            return None
    except socket.gaierror as error:
        return (f"the name {host} is unknown here ({error.strerror}); check the worker list, or "
                "pass --coordinator=IP")
    except ConnectionRefusedError:
        return (f"{host} answers but nothing listens on port {port}; is the program started on "
                "process 0 too (--worker=all), and did its log end in an error?")
    except OSError as error:
        return (f"{error.strerror or error}; if a firewall is between: gcloud compute "
                f"firewall-rules create ddpm-coordinator --network=NETWORK --allow=tcp:{port} "
                "--source-ranges=10.0.0.0/8")


def require_free_port(port: int):
    """Raises UserError where `port` is taken on this machine (gRPC itself would share it)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"coordinator_port {port}: {error.strerror}") from None
            raise UserError(
                f"coordinator_port {port} is taken on this machine: another run is alive (stop "
                "it), or pass another --coordinator_port to every process") from None


def split_address(address: str) -> tuple[str, int]:
    """'host:port' -> (host, port). Raises UserError on anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"coordinator {address!r}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def option(values, flag: str, variable: str, kind, default):
    """Flag if given, else environment variable, else default."""
    if flag in values and values.is_parsed() and values[flag].present:
        return values[flag].value
    text = os.environ.get(variable)
    if text:
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{variable}={text!r}: expected {kind.__name__}") from None
    return default


def _still_waiting(joined, me: str, coordinator: str):
    waited = 0
    while not joined.wait(30):
        waited += 30
        log(f"{me}: still waiting at {coordinator} after {waited} s; are all processes started?")


def _leave_on_exception(kind, value, trace):
    sys.__excepthook__(kind, value, trace)
    leave(EXIT_LOST if is_lost_peer(value) else 1)


def _explicit(values, port: int | None):
    given = {"coordinator": option(values, "coordinator", "DDPM_COORD", str, None),
             "num_processes": option(values, "num_processes", "DDPM_NPROC", int, None),
             "process_id": option(values, "process_id", "DDPM_PROC", int, None)}
    if given["num_processes"] == 1 and given["process_id"] in (None, 0):
        return Pod(0, 1, None, "given"), None
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(f"--{missing[0]} is missing: --coordinator, --num_processes and "
                        "--process_id (DDPM_COORD, DDPM_NPROC, DDPM_PROC) go together")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(f"process_id {given['process_id']}: must be in 0.."
                        f"{given['num_processes'] - 1} (num_processes {given['num_processes']})")
    address = given["coordinator"]
    if ":" not in address:
        address = f"{address}:{port or DEFAULT_PORT}"
    split_address(address)
    return Pod(given["process_id"], given["num_processes"], address, "given"), _local_device_ids()


def _detect(port: int | None, timeout: int):
    """What the environment says, through JAX's detectors: (Pod, local device ids) or None."""
    if _kubernetes_without_job():
        return None
    from jax._src.clusters import ClusterEnv
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
            ids = _local_device_ids()
            if ids is None and "tpu" not in method:
                ids = _slurm_devices() if method == "slurm" else None
                local = env.get_local_process_id()
                if ids is None and local is not None:
                    ids = [local]
            return Pod(env.get_process_id(), count, address, method), ids
    return None


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


def _local_device_ids() -> list[int] | None:
    text = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    return [int(x) for x in text.split(",")] if text else None


def _slurm_devices() -> list[int] | None:
    """One task per node gets all its GPUs; JAX by itself would use only the first."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if tasks == "1" and gpus.isdigit() and int(gpus) > 1:
        return list(range(int(gpus)))
    return None
