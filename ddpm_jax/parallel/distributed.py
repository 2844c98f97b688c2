"""The one place that joins a pod: start-up, agreement of the hosts, stop signals, watchdog.

Exit codes of every program that uses this module (launchers, JobSet and sbatch rely on them):

====  ==========================================================================================
   0  done
   1  an uncaught exception, a bug; do not restart
   2  bad input, one line says which; do not restart
  42  ``EXIT_RESTART``: got SIGTERM, everything worth keeping is saved; restart, free of charge
 134  ``EXIT_LOST``: a peer died or did not come within --init_timeout (as a rule JAX itself
      aborts, which is the same number); restart, counted
 170  ``EXIT_HUNG``: the watchdog saw no step for too long and printed all stacks; restart, counted
 171  ``EXIT_UNREACHABLE``: no coordinator at the address; restart, counted
====  ==========================================================================================

JAX's own pieces are used as they are (coordination service, heartbeats, preemption protocol); what
is added is what they leave out: words before a silent wait, a way out during a long compilation,
and hosts that compare versions. The state of ``jax.distributed`` has no public accessor, hence the
few uses of ``jax._src.distributed.global_state``.
"""

import atexit
import contextlib
import ctypes
import errno
import faulthandler
import importlib.metadata
import json
import os
import platform
import re
import select
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple

import jax
from absl import flags

from ddpm_jax.errors import UserError

EXIT_RESTART = 42
EXIT_LOST = 134
EXIT_HUNG = 170
EXIT_UNREACHABLE = 171

# JAX's own default, 8482, is closed by the firewall rules that Google Cloud makes for TPU
# networks; 8476 is open there (jax issue 35905).
DEFAULT_PORT = 8476
LEAVE_DELAY_S = 3.0     # a main thread that is not stuck comes to requested() within this time
LEAVE_PATIENCE_S = 10.0  # how long a peer with unsaved work may take to finish its save


class Pod(NamedTuple):
    """Which process of how many this is. ``coordinator`` is host:port, None for one process."""

    process_id: int
    num_processes: int
    coordinator: str | None
    method: str


def define_flags():
    """Defines the absl flags that `initialize` reads. Each has an environment variable too."""
    flags.DEFINE_enum("multihost", "auto", ["auto", "off"],
                      "auto: join the other processes when the environment tells of any (DDPM_*, "
                      "Cloud TPU, GKE, SLURM, Open MPI, Kubernetes); off: run alone")
    flags.DEFINE_string("coordinator", None, "HOST or HOST:PORT of process 0 (env DDPM_COORD)")
    flags.DEFINE_integer("coordinator_port", None,
                         f"port of the coordinator (env JAX_COORDINATOR_PORT); {DEFAULT_PORT} "
                         "where neither says, but SLURM's own choice on SLURM", lower_bound=1,
                         upper_bound=65535)
    flags.DEFINE_integer("num_processes", None, "processes in all (env DDPM_NPROC)", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "number of this one, from 0 (env DDPM_PROC)",
                         lower_bound=0)
    flags.DEFINE_integer("init_timeout", None, "seconds to wait for the other processes; default "
                         "300, several TPU slices 3600 (env DDPM_INIT_TIMEOUT)", lower_bound=1)
    flags.DEFINE_integer("heartbeat", None, "seconds after which a silent process counts as dead "
                         "and the others end; default 30 (env DDPM_HEARTBEAT)", lower_bound=2)
    flags.DEFINE_float("watchdog", 0.0, "print all stacks and exit with "
                       f"{EXIT_HUNG} after this many seconds without a step; 0: never",
                       lower_bound=0.0)


def initialize() -> Pod:
    """Joins the pod, or does nothing for one process. Call before anything touches a device.

    Order: flags, then DDPM_COORD/DDPM_NPROC/DDPM_PROC, then what JAX detects. Says what it waits
    for and where before it waits.

    Raises:
      UserError: half of the settings given, or the port of process 0 is taken.
      SystemExit: EXIT_UNREACHABLE after one line, no coordinator within the time-out.
    """
    if _option("multihost", "DDPM_MULTIHOST", str, "auto") == "off":
        return Pod(0, 1, None, "off")
    if jax.distributed.is_initialized():
        state = _state()
        return Pod(state.process_id, state.num_processes, state.coordinator_address, "before")
    port = _option("coordinator_port", "JAX_COORDINATOR_PORT", int, None)
    timeout = _option("init_timeout", "DDPM_INIT_TIMEOUT", int, None)
    heartbeat = _option("heartbeat", "DDPM_HEARTBEAT", int, 30)
    found = _explicit(port) or _detect(port, timeout or 300)
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
        _say(f"{me} ({pod.method}): waiting for {peers} peer{'s' * (peers > 1)} at "
             f"{pod.coordinator}, up to {timeout} s")
    else:
        _say(f"{me} ({pod.method}): waiting for process 0 at {pod.coordinator}, up to {timeout} s")
        started = time.monotonic()
        problem = probe(host, port, timeout)
        if problem:
            _say(f"error: {problem}")  # not UserError: a restart may well help
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
    _say(f"{me}: joined; a process silent for {heartbeat} s ends the run")
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
            _say(f"still no coordinator at {host}:{port}: {problem}")
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


def versions() -> dict[str, str]:
    """What must be the same on every host: Python and the packages that make the program."""
    facts = {"python": platform.python_version()}
    for name in ("ddpm_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint",
                 "numpy", "grain"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "absent"
    return facts


def check_same_everywhere(facts: dict[str, str], patience_s: int = 300):
    """Compares `facts` and `versions()` with those of process 0; call on every process.

    patience_s: how long the slowest may take to come here (a dead one is known by its heartbeat).

    Goes through the coordination service, so it needs no device and no compiled program: hosts
    that differ would not compile the same program.

    Raises:
      UserError: on every process, naming the hosts that differ, the fact and both values.
    """
    client = _state().client
    if client is None:
        return
    state = _state()
    _checks.append(0)
    root = f"ddpm/facts/{len(_checks)}"
    mine = {**versions(), **{name: str(value) for name, value in facts.items()}}
    if state.process_id == 0:
        client.key_value_set(f"{root}/first", json.dumps(mine))
    first = json.loads(client.blocking_key_value_get(f"{root}/first", 1000 * patience_s))
    wrong = [f"{name}={mine.get(name, 'absent')} (process 0 has {first.get(name, 'absent')})"
             for name in sorted({*mine, *first}) if mine.get(name) != first.get(name)]
    if wrong:
        client.key_value_set(
            f"{root}/differs/{state.process_id}",
            f"process {state.process_id} on {socket.gethostname()}: {', '.join(wrong)}")
    client.wait_at_barrier(f"{root}/all", 1000 * patience_s)
    differs = sorted(client.key_value_dir_get(f"{root}/differs/"))
    if differs:
        lines = [value for _, value in differs]
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise UserError("hosts differ: " + "; ".join(lines[:4]) + more
                        + "; the same wheels, config and data belong on every host")


def leave(code: int):
    """Ends a process of a pod with `code`, without JAX's shutdown barrier of 300 s.

    For errors: the other processes wait in a collective that this one will never enter. Gives
    them 10 s to come here with the same error, then goes; they end within the heartbeat. Returns
    where there is no pod, and for the codes 0 and EXIT_RESTART, which take the ordinary way.
    """
    client = _state().client
    if client is None or code in (0, EXIT_RESTART):
        return
    with contextlib.suppress(Exception):
        client.wait_at_barrier("ddpm/error", int(1000 * LEAVE_PATIENCE_S))
    if _state().process_id == 0:
        time.sleep(1.0)  # the service lives here: let the others go first
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def in_pod() -> bool:
    """Whether `initialize` has joined other processes."""
    return _state().client is not None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because the other end is gone: the peer tells why, not we.

    JAX usually aborts by itself in this case; Gloo and NCCL sometimes raise first.
    """
    return re.search(r"gloo|nccl|\bUNAVAILABLE\b|connection (reset|closed|refused)|heartbeat|"
                     r"broken pipe|barrier", str(error), re.IGNORECASE) is not None


class Stop:
    """Tells the loops when to save and leave. Made by `watch_for_stop`."""

    def __init__(self, client, process_id: int, manager):
        self._client, self._process_id, self._manager = client, process_id, manager
        self._calls = 0
        self._noticed = self._signalled = False
        self._unsaved = self._agreed = self._leaving = False
        self._changed = threading.Condition()
        self._chain = None
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        self._old_handler = self._old_wakeup = None
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, name="ddpm-stop", daemon=True)
        self._leaver = threading.Thread(target=self._leave_if_stuck, name="ddpm-leave", daemon=True)

    def requested(self, step: int) -> bool:
        """True when all processes are to save now and exit with EXIT_RESTART.

        Every process calls it equally often, at the same steps, in every loop (training,
        evaluation, sampling); all get True from the same call on. `step` is for the log.
        """
        if self._agreed:
            return True
        self._calls += 1
        if self._manager is None:
            agreed = self._noticed
        else:
            # Calls are counted here because the protocol stops at (highest count so far) + 1:
            # given steps, it would wait for one that a loop of several steps a call never names.
            agreed = self._manager.reached_sync_point(self._calls)
        if agreed:
            with self._changed:
                self._agreed = True
            _say(f"process {self._process_id}: stopping at step {step} on SIGTERM")
        return agreed

    def unsaved(self, unsaved: bool):
        """Says whether there is work that a checkpoint does not hold yet (False at the start).

        While False, a SIGTERM that the loops do not see within 3 s (a long compilation) ends the
        process with EXIT_RESTART. Set False only after the save is complete, not while it runs.
        """
        with self._changed:
            self._unsaved = bool(unsaved)
            self._changed.notify_all()

    def close(self):
        """Puts the former signal handler back and ends the threads; runs at exit by itself."""
        if self._closed:
            return
        atexit.unregister(self._at_exit)
        if self._leaving:  # a thread is ending the process: do not race it
            self._leaver.join()
        self._closed = True
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, self._old_handler or signal.SIG_DFL)
        os.write(self._wake_write, b"\0")
        # Not left to the interpreter: a daemon thread that it ends inside a call of the
        # coordination service aborts the whole process ("exception not rethrown").
        for thread in (self._watcher, self._leaver):
            if thread.is_alive():
                thread.join(4 * LEAVE_PATIENCE_S)
        for end in (self._wake_read, self._wake_write):
            os.close(end)

    def _at_exit(self):
        self.close()
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"ddpm/done/{self._process_id}", "")
        # The process is on its way out; one more signal must not change its exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _install(self):
        before = _c_handler()
        self._old_handler = signal.signal(signal.SIGTERM, self._on_python_signal)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        # JAX's handler is C++ and only raises a flag: Python does not know of it, so it is called
        # by its address. Where the address is Python's own there is nothing to call.
        if self._client is not None and before not in (0, 1, _c_handler()):
            self._chain = ctypes.CFUNCTYPE(None, ctypes.c_int)(before)
        self._watcher.start()
        atexit.register(self._at_exit)

    def _on_python_signal(self, signum, frame):
        # In case something else took the wake-up descriptor. Nothing that takes a lock: this
        # runs between any two instructions of the main thread.
        self._noticed = True
        with contextlib.suppress(OSError):
            os.write(self._wake_write, bytes([signum]))

    def _on_signal(self):
        if self._signalled:
            return
        self._noticed = self._signalled = True
        if self._chain is not None:
            self._chain(signal.SIGTERM)
        _say(f"process {self._process_id}: received SIGTERM; stopping at the next step")
        self._leaver.start()

    def _watch(self):
        # A pipe, because the C half of Python's handler writes to it at once, while the Python
        # half waits for the main thread to come back from XLA, which may take minutes.
        every = max(2.0, _state().num_processes / 500) if self._client else None
        while not self._closed:
            ready, _, _ = select.select([self._wake_read], [], [], every)
            if self._closed:
                break
            if ready and signal.SIGTERM in os.read(self._wake_read, 4096):
                self._on_signal()
            if self._client is None or self._leaving:
                continue
            try:
                peers = self._client.key_value_dir_get("ddpm/leave/")
            except Exception:  # the service is gone: JAX itself ends the process
                break
            if peers:
                self._leaver = threading.current_thread()
                self._leave(f"{peers[0][1]} is leaving")

    def _leave_if_stuck(self):
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < LEAVE_DELAY_S:
            with self._changed:
                self._changed.wait(0.1)
                if self._closed or self._agreed or self._leaving:
                    return
                if self._unsaved:
                    idle_since = time.monotonic()
        self._leave("SIGTERM and nothing unsaved")

    def _leave(self, why: str):
        """Ends this process, and through the coordination service the others, with 42."""
        with self._changed:
            if self._leaving:
                return
            self._leaving = True
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"ddpm/leave/{self._process_id}",
                                           f"process {self._process_id}")
            deadline = time.monotonic() + LEAVE_PATIENCE_S
            with self._changed:
                while self._unsaved and time.monotonic() < deadline:
                    self._changed.wait(0.1)
            with contextlib.suppress(Exception):
                if not self._client.key_value_dir_get("ddpm/done/"):
                    self._client.wait_at_barrier("ddpm/leave", int(1500 * LEAVE_PATIENCE_S))
            with contextlib.suppress(Exception):
                if self._client.key_value_dir_get("ddpm/done/"):
                    # JAX's own way out, in which those wait: without it they would be aborted.
                    self._client.shutdown()
            if self._process_id == 0:
                time.sleep(1.0)  # the service lives here: let the others go first
        _say(f"process {self._process_id}: {why}: exit {EXIT_RESTART}")
        sys.stdout.flush()
        os._exit(EXIT_RESTART)


def watch_for_stop() -> Stop:
    """Takes SIGTERM over and returns the `Stop` that the loops ask. Main thread, once, after
    `initialize`. SIGINT stays KeyboardInterrupt."""
    state = _state()
    manager = None
    if state.client is not None and state.preemption_sync_manager is not None:
        manager = state.preemption_sync_manager
        if isinstance(manager, _NoSyncPoint):
            manager = manager.manager
        # Orbax asks the same manager with step numbers, from a thread of its own as well, and so
        # overwrites the count of whoever polls it. From here on it is told "no preemption".
        state.preemption_sync_manager = _NoSyncPoint(manager)
    stop = Stop(state.client, state.process_id, manager)
    stop._install()
    return stop


class Watchdog:
    """Ends a process whose steps have stopped. Made by `start_watchdog`."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._last = None
        self._step = None
        self._closed = threading.Event()

    def beat(self, step: int | None = None):
        """A step is done: the clock starts anew (the first call starts it)."""
        self._step = step
        self._last = time.monotonic()

    def pause(self):
        """Stops the clock until the next beat: before a compilation, say."""
        self._last = None

    def close(self):
        """Ends the watch."""
        self._closed.set()

    def _watch(self):
        tick = min(1.0, self._seconds / 4)
        while not self._closed.wait(tick):
            last = self._last
            if last is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            # Should the hung code hold the interpreter's lock, this thread stops too: then a
            # thread of C prints the stacks and exits, with 1 because it knows no other code.
            faulthandler.dump_traceback_later(2 * self._seconds + 1, exit=True,
                                              file=sys.__stderr__)
            if time.monotonic() - last <= self._seconds:
                continue
            where = "" if self._step is None else f" after step {self._step}"
            _say(f"watchdog: no step for {self._seconds:g} s{where}; stacks follow, exit "
                 f"{EXIT_HUNG}")
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            os._exit(EXIT_HUNG)
        faulthandler.cancel_dump_traceback_later()


def start_watchdog(seconds: float | None = None) -> Watchdog:
    """Watches for hung steps: `seconds` without `beat()` prints all stacks, exits EXIT_HUNG.

    `seconds` None reads --watchdog; 0 gives an object that does nothing.
    """
    if seconds is None:
        seconds = _option("watchdog", "DDPM_WATCHDOG", float, 0.0)
    watchdog = Watchdog(seconds)
    if seconds > 0:
        threading.Thread(target=watchdog._watch, name="ddpm-watchdog", daemon=True).start()
    return watchdog


_checks = []  # one entry for every check_same_everywhere of this process


class _NoSyncPoint:
    def __init__(self, manager):
        self.manager = manager

    def reached_sync_point(self, step_id):
        return False

    def shutdown(self):
        self.manager.shutdown()


def _state():
    from jax._src import distributed
    return distributed.global_state


def _say(text: str):
    print(f"ddpm: {text}", file=sys.stderr, flush=True)


def _still_waiting(joined, me: str, coordinator: str):
    waited = 0
    while not joined.wait(30):
        waited += 30
        _say(f"{me}: still waiting at {coordinator} after {waited} s; are all processes started?")


def _leave_on_exception(kind, value, trace):
    sys.__excepthook__(kind, value, trace)
    leave(EXIT_LOST if is_lost_peer(value) else 1)


def _option(flag: str, variable: str, kind, default):
    """Flag if given, else environment variable, else default."""
    values = flags.FLAGS
    if flag in values and values.is_parsed() and values[flag].present:
        return values[flag].value
    text = os.environ.get(variable)
    if text:
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{variable}={text!r}: expected {kind.__name__}") from None
    return default


def _explicit(port: int | None):
    given = {"coordinator": _option("coordinator", "DDPM_COORD", str, None),
             "num_processes": _option("num_processes", "DDPM_NPROC", int, None),
             "process_id": _option("process_id", "DDPM_PROC", int, None)}
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


def _c_handler() -> int:
    """Address of the C handler of SIGTERM (0: default, 1: ignored)."""
    # struct sigaction begins with the handler on Linux and macOS; the rest is room.
    action = (ctypes.c_void_p * 64)()
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, action)
    return action[0] or 0
