"""Real processes of a real jax.distributed, a few seconds each."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from xla_flags import xla_flags

# A stand-in for the loops: argv is a list of words, each does one thing.
PROGRAM = '''
import ctypes, os, signal, sys, time
from absl import flags
from ddpm_jax.errors import UserError
from ddpm_jax.parallel.exit_codes import EXIT_RESTART, pod_state
from ddpm_jax.parallel.hosts import check_same_everywhere
from ddpm_jax.parallel.pod import initialize
from ddpm_jax.parallel.pod_flags import define_flags
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
if "last" in words:
    # A signal after the last question. JAX looks for signals once a second: one process leaves
    # before it has heard, the other after.
    stop.requested(0)
    signalled, first = map(int, os.environ["LAST"].split())
    if pod.process_id == signalled:
        signal.raise_signal(signal.SIGTERM)
        while stop._state == "running":  # closed before its thread woke, it would pass nothing on
            time.sleep(0.001)
    if pod.process_id != first:
        pod_state().client.blocking_key_value_get("RECEIVED_PREEMPTION_NOTICE", 20_000)
print("END", pod.process_id, pod.num_processes, flush=True)
if os.environ.get("LATE") == str(pod.process_id):
    block(ctypes.CDLL(None))
'''


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]



# Starts what follows with signals ignored, as nohup does, and with SIGHUP heard though nohup
# started the tests. Between fork and exec of this process Python code may not run: JAX has threads.
IGNORING = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for number in sys.argv[1].split(",") if sys.argv[1] else ():
    signal.signal(int(number), signal.SIG_IGN)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Processes:
    """Starts PROGRAM n times; `wait` gives the exit codes, `text` the output of one.
    env: variables of all, or of process i; None removes one. program: another than PROGRAM."""

    def __init__(self, folder, words, count, flags=(), env=(), port=None, only=None,
                 ignored=(), program=PROGRAM):
        port = port or free_port()
        self.files, self.popen = [], []
        for i in range(count) if only is None else only:
            e = {**os.environ, "DDPM_COORD": f"127.0.0.1:{port}", "DDPM_NPROC": str(count),
                 "DDPM_PROC": str(i), "XLA_FLAGS": xla_flags(1),
                 "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONFAULTHANDLER": "1"}
            e.update(env(i) if callable(env) else env)
            e = {k: v for k, v in e.items() if v is not None
                 and not (count == 1 and k.startswith("DDPM_"))}
            file = open(pathlib.Path(folder) / f"{i}.log", "w+")
            self.files.append(file)
            before = [sys.executable, "-c", IGNORING, ",".join(str(int(n)) for n in ignored)]
            self.popen.append(subprocess.Popen(
                [*before, sys.executable, "-c", program, *flags, *words],
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

    def until(self, word, seconds=120):
        deadline = time.time() + seconds
        while not all(word in self.text(i) for i in range(len(self.popen))):
            assert time.time() < deadline, [self.text(i) for i in range(len(self.popen))]
            assert all(p.poll() is None for p in self.popen), \
                [self.text(i) for i in range(len(self.popen))]
            time.sleep(0.05)

    def wait(self, seconds=60):
        deadline = time.time() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.time())) for p in self.popen]
        except subprocess.TimeoutExpired:
            for p in self.popen:
                p.send_signal(signal.SIGABRT)  # with PYTHONFAULTHANDLER: stacks of all threads
            for p in self.popen:
                p.wait()
            raise AssertionError([self.text(i) for i in range(len(self.popen))]) from None

