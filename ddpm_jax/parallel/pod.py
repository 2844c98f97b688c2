"""The one place that joins a pod: several processes that run one program together.

JAX's detectors and its coordination service are used as they are; added are a line before each
silent wait, a check that the coordinator can be reached, and an order among the sources.
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time

import jax
from absl import flags

from ddpm_jax.errors import UserError
from ddpm_jax.parallel.exit_codes import (
    EXIT_LOST,
    EXIT_UNREACHABLE,
    is_lost_peer,
    leave,
    log,
    pod_state,
)
from ddpm_jax.parallel.launchers import Pod, find, split_address
from ddpm_jax.parallel.pod_flags import MULTIHOST


def initialize(values: flags.FlagValues = flags.FLAGS) -> Pod:
    """Joins the pod, or does nothing for one process. Call before anything touches a device.

    Each part by its flag, else DDPM_COORD, DDPM_NPROC, DDPM_PROC, else JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES, JAX_PROCESS_ID, else `launchers.find`. One line names what is waited for,
    and where, before the wait.

    Raises:
      UserError: a part is missing (launchers.find), or the port of process 0 is taken.
      SystemExit: EXIT_UNREACHABLE after one line, no coordinator within the time-out.
    """
    multihost = option(values, "multihost", str, "auto", "DDPM_MULTIHOST")
    if multihost not in MULTIHOST:
        raise UserError(f"DDPM_MULTIHOST={multihost!r}: expected {' or '.join(MULTIHOST)}")
    if multihost == "off":
        return Pod(0, 1, None, "off")
    if jax.distributed.is_initialized():
        state = pod_state()
        return Pod(state.process_id, state.num_processes, state.coordinator_address, "before")
    port = option(values, "coordinator_port", int, None, "JAX_COORDINATOR_PORT")
    timeout = option(values, "init_timeout", int, None, "DDPM_INIT_TIMEOUT")
    given = {
        "coordinator": option(values, "coordinator", str, None, "DDPM_COORD",
                              "JAX_COORDINATOR_ADDRESS"),
        "num_processes": option(values, "num_processes", int, None, "DDPM_NPROC",
                                "JAX_NUM_PROCESSES"),
        "process_id": option(values, "process_id", int, None, "DDPM_PROC", "JAX_PROCESS_ID")}
    pod = find(given, port, timeout or 300)
    if pod.num_processes > 1:
        if timeout is None:
            timeout = 3600 if int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1 else 300
        _join(pod, timeout, option(values, "heartbeat", int, 30, "DDPM_HEARTBEAT"))
    return pod


def _join(pod: Pod, timeout: int, heartbeat: int):
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
        with _interruptible():
            jax.distributed.initialize(
                pod.coordinator, pod.num_processes, pod.process_id, pod.device_ids,
                cluster_detection_method="deactivate", initialization_timeout=timeout,
                heartbeat_timeout_seconds=heartbeat)
    finally:
        joined.set()
    sys.excepthook = _leave_on_exception
    log(f"{me}: joined; a process silent for {heartbeat} s ends the run")


@contextlib.contextmanager
def _interruptible():
    """SIGINT ends the process: the wait is in C++, where Python's handler does not run."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    ours = main and handler is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)


def probe(host: str, port: int, timeout: float) -> str | None:
    """Connects to host:port, trying again until `timeout` seconds are over.

    -> None when something listens there, else one line: what is wrong and the remedy.
    """
    deadline = time.monotonic() + timeout
    reported = time.monotonic()
    while True:
        problem = probe_once(host, port, min(5.0, max(0.2, deadline - time.monotonic())))
        if problem is None:
            return None
        if time.monotonic() >= deadline:
            return f"no coordinator at {host}:{port} after {timeout:.0f} s: {problem}"
        if time.monotonic() - reported > 30:
            reported = time.monotonic()
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


def option(values, flag: str, kind, default, *variables: str):
    """Flag if given, else the first of the environment variables, else default."""
    if flag in values and values.is_parsed() and values[flag].present:
        return values[flag].value
    for variable in variables:
        text = os.environ.get(variable)
        try:
            if text:
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
