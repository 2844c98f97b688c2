"""The pod, with real processes and real jax.distributed; each takes a few seconds."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import exit_codes, hosts, pod, stop

# A stand-in for the loops: argv is a list of words, each does one thing.
PROGRAM = '''
import ctypes, os, signal, sys, time
from absl import flags
from ddpm_jax.errors import UserError
from ddpm_jax.parallel.exit_codes import EXIT_RESTART
from ddpm_jax.parallel.hosts import check_same_everywhere
from ddpm_jax.parallel.pod import define_flags, initialize
from ddpm_jax.parallel.stop import watch_for_stop
from ddpm_jax.parallel.watchdog import start_watchdog
# What a shell starts in the background ignores SIGINT, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
define_flags()
words = flags.FLAGS(["x", *sys.argv[1:]])[1:]
pod = initialize()
import jax, jax.numpy as jnp
def block(libc):
    # As a compilation: a call of C in the main thread that no signal cuts short. CDLL lets go of
    # the interpreter's lock for the call, PyDLL keeps it.
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
from jax.experimental import multihost_utils
if "facts" in words:
    try:
        check_same_everywhere({"config": os.environ["CONFIG"]})
    except UserError as error:
        print("DIFFER", error, flush=True)
        sys.exit(2)
    print("SAME", flush=True)
stop = watch_for_stop()
dog = start_watchdog()
if "compile" in words:
    print("READY", flush=True)
    block(ctypes.CDLL(None))
if "loop" in words:
    stop.unsaved(True)
    for step in range(0, 100_000, 10):
        jax.block_until_ready(multihost_utils.process_allgather(jnp.ones(())))
        dog.beat(step)
        assert step < 20 or os.environ.get("RAISE") != "1", "RAISE"
        if step == 50:
            print("READY", flush=True)
        if "hang" in words and step == 60:
            time.sleep(60)
        if "locked" in words and step == 60:
            time.sleep(0.6)  # two ticks of the watchdog
            block(ctypes.PyDLL(None))
        if stop.requested(step):
            print("SAVE", step, flush=True)
            if "slowsave" in words:
                time.sleep(2)
            print("SAVED", step, flush=True)
            stop.unsaved(False)
            sys.exit(EXIT_RESTART)
        time.sleep(0.005)
print("END", pod.process_id, pod.num_processes, flush=True)
if os.environ.get("LATE") == str(pod.process_id):
    block(ctypes.CDLL(None))
'''


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Processes:
    """Starts PROGRAM n times; `wait` gives the exit codes, `text` the output of one."""

    def __init__(self, folder, words, count, flags=(), env=(), port=None, only=None):
        port = port or free_port()
        self.files, self.popen = [], []
        for i in range(count) if only is None else only:
            e = {**os.environ, "DDPM_COORD": f"127.0.0.1:{port}", "DDPM_NPROC": str(count),
                 "DDPM_PROC": str(i), "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                 "TF_CPP_MIN_LOG_LEVEL": "3"}
            e.update(env(i) if callable(env) else env)
            if count == 1:
                e = {k: v for k, v in e.items() if not k.startswith("DDPM_")}
            file = open(pathlib.Path(folder) / f"{i}.log", "w+")
            self.files.append(file)
            self.popen.append(subprocess.Popen([sys.executable, "-c", PROGRAM, *flags, *words],
                                               stdout=file, stderr=subprocess.STDOUT, env=e))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for p in self.popen:
            p.kill()
            p.wait()
        for f in self.files:
            f.close()

    def text(self, i):
        return pathlib.Path(self.files[i].name).read_text()

    def until(self, word, seconds=60):
        deadline = time.time() + seconds
        while not all(word in self.text(i) for i in range(len(self.popen))):
            assert time.time() < deadline, [self.text(i) for i in range(len(self.popen))]
            assert all(p.poll() is None for p in self.popen), \
                [self.text(i) for i in range(len(self.popen))]
            time.sleep(0.05)

    def wait(self, seconds=60):
        deadline = time.time() + seconds
        return [p.wait(max(0.1, deadline - time.time())) for p in self.popen]


@pytest.mark.smoke
@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_to_one_process_stops_all_at_the_same_step(tmp_path, who):
    with Processes(tmp_path, ["loop", "slowsave"], 2) as run:
        run.until("READY")
        run.popen[who].send_signal(signal.SIGTERM)
        run.until("SAVE ")
        run.popen[who].send_signal(signal.SIGTERM)  # a second one leaves the save alone
        run.popen[1 - who].send_signal(signal.SIGTERM)
        assert run.wait() == [42, 42]
        lines = [[x for x in run.text(i).splitlines() if x.startswith("SAVE")] for i in (0, 1)]
    assert lines[0] == lines[1] and len(lines[0]) == 2, lines
    assert "received SIGTERM" in run.text(who) and "waiting for" in run.text(1 - who)


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_during_a_compilation_ends_all_with_42(tmp_path, who):
    with Processes(tmp_path, ["compile"], 2) as run:
        run.until("READY")
        run.popen[who].send_signal(signal.SIGTERM)
        assert run.wait(25) == [42, 42]
    assert "nothing unsaved" in run.text(who) and "is leaving" in run.text(1 - who)


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_where_the_other_is_done_leaves_it_its_code(tmp_path, who):
    """The other waits in JAX's shutdown, and would be aborted where its peer just disappears."""
    with Processes(tmp_path, [], 2, env={"LATE": str(who)}) as run:
        run.until("END")
        run.popen[who].send_signal(signal.SIGTERM)
        codes = run.wait(60)
    assert (codes[who], codes[1 - who]) == (42, 0), (run.text(0), run.text(1))


def test_single_process_stops_at_the_next_step(tmp_path):
    with Processes(tmp_path, ["loop", "slowsave"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(signal.SIGTERM)
        run.until("SAVE ")
        run.popen[0].send_signal(signal.SIGTERM)
        assert run.wait() == [42]
    assert run.text(0).count("SAVED") == 1


def test_single_process_leaves_during_a_compilation(tmp_path):
    with Processes(tmp_path, ["compile"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(signal.SIGTERM)
        assert run.wait(20) == [42]


def test_sigint_stays_keyboard_interrupt(tmp_path):
    with Processes(tmp_path, ["loop"], 1) as run:
        run.until("READY")
        run.popen[0].send_signal(signal.SIGINT)
        assert run.wait(20) != [42]
    assert "KeyboardInterrupt" in run.text(0)


def test_watchdog_prints_the_hung_line(tmp_path):
    with Processes(tmp_path, ["loop", "hang"], 1, flags=["--watchdog=1.5"]) as run:
        assert run.wait(40) == [exit_codes.EXIT_HUNG]
    text = run.text(0)
    assert "no step for 1.5 s after step 60" in text
    hung = 1 + [i for i, x in enumerate(PROGRAM.splitlines()) if "time.sleep(60)" in x][0]
    assert f'"<string>", line {hung} in <module>' in text, text


def test_watchdog_sees_a_hang_that_holds_the_interpreter(tmp_path):
    with Processes(tmp_path, ["loop", "locked"], 1, flags=["--watchdog=1"]) as run:
        assert run.wait(40) == [1]
    assert "Timeout (0:00:03)!" in run.text(0) and "in block" in run.text(0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_exception_in_one_process_ends_the_run_with_its_code(tmp_path, who):
    with Processes(tmp_path, ["loop"], 2, flags=["--heartbeat=5"],
                   env=lambda i: {"RAISE": str(int(i == who))}) as run:
        codes = run.wait(40)
    # The bug's own code survives in the process that has it; the other says "peer lost".
    assert codes[who] == 1 and codes[1 - who] in (-signal.SIGABRT, exit_codes.EXIT_LOST)
    assert "AssertionError: RAISE" in run.text(who)


@pytest.mark.multiprocess
def test_hosts_that_differ_are_named_and_equal_ones_pass(tmp_path):
    with Processes(tmp_path, ["facts"], 2, env={"CONFIG": "abc"}) as run:
        assert run.wait() == [0, 0]
    assert all("SAME" in run.text(i) for i in (0, 1))
    port = free_port()
    with Processes(tmp_path, ["facts"], 3, env={"CONFIG": "abc"}, port=port, only=[0, 2]) as run, \
            Processes(tmp_path, ["facts"], 3, env={"CONFIG": "xyz"}, port=port, only=[1]) as odd:
        assert run.wait() + odd.wait() == [2, 2, 2]
        for text in (run.text(0), run.text(1), odd.text(0)):
            assert "process 1 on" in text and "config=xyz (process 0 has abc)" in text
            assert "process 2 on" not in text.split("DIFFER")[1]


@pytest.mark.multiprocess
def test_worker_killed_ends_the_run_within_the_heartbeat(tmp_path):
    with Processes(tmp_path, ["loop"], 2, flags=["--heartbeat=5"]) as run:
        run.until("READY")
        run.popen[1].kill()
        codes = run.wait(30)
    assert codes[0] in (-signal.SIGABRT, exit_codes.EXIT_LOST)
    assert codes[1] == -signal.SIGKILL


def test_no_coordinator_is_one_line_with_host_port_and_remedy(tmp_path):
    with Processes(tmp_path, [], 2, flags=["--init_timeout=1"], only=[1]) as run:
        assert run.wait(30) == [exit_codes.EXIT_UNREACHABLE]
    said = [x for x in run.text(0).splitlines() if x.startswith("ddpm: ")]
    assert "process 1 of 2" in said[0] and "waiting for process 0 at 127.0.0.1:" in said[0]
    assert "nothing listens on port" in said[1] and "Traceback" not in run.text(0)


def test_probe_tells_the_cases_apart():
    assert "unknown here" in pod.probe("no-such-host.invalid", 8476, 0.1)
    assert "nothing listens" in pod.probe("127.0.0.1", free_port(), 0.1)
    # 192.0.2.0/24 is reserved for documentation: no route, or silence, or a refusing gateway.
    assert "192.0.2.1:8476" in pod.probe("192.0.2.1", 8476, 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert pod.probe("127.0.0.1", listener.getsockname()[1], 1.0) is None


def test_lost_peers_are_told_from_bugs():
    assert exit_codes.is_lost_peer(ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547]"))
    assert exit_codes.is_lost_peer(RuntimeError("UNAVAILABLE: Connection reset by peer"))
    assert not exit_codes.is_lost_peer(ValueError("Incompatible shapes for dot"))
    assert not exit_codes.is_lost_peer(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))


def test_firewall_command_when_packets_vanish(monkeypatch):
    def silent(address, timeout):
        raise TimeoutError("timed out")
    monkeypatch.setattr(socket, "create_connection", silent)
    assert "firewall-rules create" in pod.probe("10.0.0.2", 8476, 0.1)
    assert "tcp:8476" in pod.probe("10.0.0.2", 8476, 0.1)


def test_taken_port_is_an_error():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"coordinator_port {port} is taken"):
            pod.require_free_port(port)
    pod.require_free_port(free_port())


@pytest.fixture
def clean_env(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("DDPM_", "SLURM_", "OMPI_", "MEGASCALE_", "TPU_", "KUBERNETES_",
                            "JAX_COORD", "JOB_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_one_process_is_a_no_op(clean_env):
    assert pod.initialize() == (0, 1, None, "alone")
    hosts.check_same_everywhere({"anything": "x"})
    clean_env.setenv("DDPM_NPROC", "1")
    assert pod.initialize().num_processes == 1
    # A pod of a plain Deployment, and one task under SLURM, are alone too.
    clean_env.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    clean_env.delenv("DDPM_NPROC")
    assert pod.initialize().num_processes == 1


@pytest.mark.parametrize("env, message", [
    ({"DDPM_COORD": "a:1"}, "--num_processes is missing"),
    ({"DDPM_COORD": "a:1", "DDPM_NPROC": "2", "DDPM_PROC": "2"}, "process_id 2: must be in 0..1"),
    ({"DDPM_COORD": "a:b", "DDPM_NPROC": "2", "DDPM_PROC": "1"}, "expected HOST:PORT"),
    ({"DDPM_NPROC": "two"}, "DDPM_NPROC='two': expected int"),
])
def test_bad_settings_are_one_line(clean_env, env, message):
    for name, value in env.items():
        clean_env.setenv(name, value)
    with pytest.raises(UserError, match=message):
        pod.initialize()


def test_slurm_is_detected(clean_env):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
                        "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
                        "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}.items():
        clean_env.setenv(name, value)
    found, ids = pod._detect(None, 5)
    assert found == (1, 2, f"n1:{61440 + 7}", "slurm") and ids == [0]
    clean_env.setenv("SLURM_GPUS_ON_NODE", "4")  # one task a node: all four
    assert pod._detect(9000, 5) == ((1, 2, "n1:9000", "slurm"), [0, 1, 2, 3])
    clean_env.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert pod._detect(None, 5)[1] == [0]


def test_gke_tpu_slice_needs_no_metadata_server(clean_env):
    from jax._src.clusters import cloud_tpu_cluster
    clean_env.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    clean_env.setenv("TPU_SKIP_MDS_QUERY", "1")
    clean_env.setenv("GCE_METADATA_IP", "127.0.0.1:1")  # would raise at once if asked
    clean_env.setenv("TPU_WORKER_HOSTNAMES", "127.0.0.1,w1,w2")
    clean_env.setenv("TPU_WORKER_ID", "2")
    clean_env.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    found, ids = pod._detect(None, 2)
    assert found == (2, 3, f"127.0.0.1:{pod.DEFAULT_PORT}", "gketpu") and ids is None
    assert "MEGASCALE_NUM_SLICES" not in os.environ  # libtpu reads it too
    clean_env.setenv("MEGASCALE_NUM_SLICES", "2")
    clean_env.setenv("MEGASCALE_SLICE_ID", "1")
    clean_env.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost:9999")
    assert pod._detect(8500, 2)[0] == (5, 6, "localhost:8500", "gketpu")


def test_stop_puts_the_old_handler_back():
    before = signal.getsignal(signal.SIGTERM)
    watch = stop.watch_for_stop()
    assert not watch.requested(0)
    watch.unsaved(True)
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.requested(1) and watch.requested(2)
    watch.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_versions_name_what_must_agree():
    import jax
    assert hosts.versions()["jax"] == jax.__version__
    assert set(hosts.versions()) >= {"python", "jaxlib", "flax", "orbax-checkpoint"}
