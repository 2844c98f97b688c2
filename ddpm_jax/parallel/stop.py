"""Signals: all processes of a pod save at the same step and exit with EXIT_RESTART.

It handles SIGTERM, the signals of a terminal (INT, HUP) and those that batch systems send as a
warning (USR1, USR2, XCPU), unless they are ignored when the program starts (nohup, background
jobs).
"""

import atexit
import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time

from ddpm_jax.parallel.exit_codes import (
    EXIT_INTERRUPTED,
    EXIT_RESTART,
    LEAVE_PATIENCE_S,
    log,
    pod_state,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGXCPU)
ONE_PRESS_S = 0.2       # a shell and a launcher can both pass one Ctrl-C on
LEAVE_DELAY_S = 3.0     # a main thread that is not stuck comes to requested() within this time
RUNNING, SIGNALLED, AGREED, LEAVING, CLOSED = "running", "signalled", "agreed", "leaving", "closed"

_open = []
_kept = []  # until the interpreter ends


class Stop:
    """When the loops are to save and leave. Made by `watch_for_stop`::

        RUNNING ---signal---> SIGNALLED ---requested(): all processes agree---> AGREED
           |                      |                       the loops save, then exit with 42
           | a peer is leaving    | for 3 s nothing unsaved and no agreement
           +----------------------+-----------------------------------------> LEAVING
                                                          a thread exits with 42

    A process whose peer got the signal goes from RUNNING to AGREED, and from AGREED to LEAVING if
    the peer leaves. A second SIGINT ends the process at once with 130, in every state. `close` goes
    from any state but LEAVING, which ends the process, to CLOSED.
    """

    def __init__(self, client, process_id: int, manager):
        self._client, self._process_id, self._manager = client, process_id, manager
        self._calls = 0
        self._noticed = self._unsaved = False
        self._cause = "a signal to another process"
        self._interrupted = None  # when SIGINT came
        self._state = RUNNING
        self._changed = threading.Condition()
        self._chain = None
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        self._old_handlers, self._old_wakeup = {}, None
        self._leaver = None
        self._watcher = threading.Thread(target=self._watch, name="ddpm-stop", daemon=True)

    def requested(self, step: int) -> bool:
        """True when all processes are to save now and exit with EXIT_RESTART.

        Every process calls it equally often, at the same steps, in every loop (training,
        evaluation, sampling); all get True from the same call on. `step` is for the log.
        """
        if self._state == AGREED:
            return True
        self._calls += 1
        if self._manager is None:
            agreed = self._noticed
        else:
            # Calls are counted here because the protocol stops at (highest count so far) + 1:
            # given steps, it would wait for one that a loop of several steps a call never names.
            agreed = self._manager.reached_sync_point(self._calls)
        if agreed:
            self._go(AGREED, RUNNING, SIGNALLED)
            log(f"process {self._process_id}: stopping at step {step} on {self._cause}")
        return agreed

    def unsaved(self, unsaved: bool):
        """Sets whether there is work that no checkpoint holds yet (False at the start).

        While False, a signal that the loops do not see within 3 s (a long compilation) ends the
        process with EXIT_RESTART. Set False only after the save is complete, not while it runs.
        """
        with self._changed:
            self._unsaved = bool(unsaved)
            self._changed.notify_all()

    def close(self):
        """Puts the former signal handlers back and ends the thread; runs at exit by itself."""
        if self._state == CLOSED:
            return
        atexit.unregister(self._at_exit)
        if not self._go(CLOSED, RUNNING, SIGNALLED, AGREED):
            self._leaver.join()  # it is ending the process: do not race it
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.write(self._wake_write, b"\0")
        # Not left to the interpreter: a daemon thread that it ends inside a call of the
        # coordination service aborts the whole process ("exception not rethrown").
        self._watcher.join(4 * LEAVE_PATIENCE_S)
        for end in (self._wake_read, self._wake_write):
            os.close(end)

    def _go(self, state, *from_states) -> bool:
        with self._changed:
            if self._state in from_states:
                self._state = state
                return True
        return False

    def _at_exit(self):
        self.close()
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"ddpm/done/{self._process_id}", "")
        # The process is on its way out; one more signal must not change its exit code.
        for number in self._old_handlers:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

    def _install(self):
        before = _c_handler()
        self._old_handlers = {n: signal.signal(n, self._on_python_signal) for n in SIGNALS
                              if n == signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN}
        self._old_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        # JAX's handler is C++ and only raises a flag: Python does not know of it, so it is called
        # by its address. Where the address is Python's own there is nothing to call.
        if self._client is not None and before not in (0, 1, _c_handler()):
            self._chain = ctypes.CFUNCTYPE(None, ctypes.c_int)(before)
        self._watcher.start()
        atexit.register(self._at_exit)

    def _on_python_signal(self, signum, frame):
        # Nothing that takes a lock: this runs between any two instructions of the main thread.
        self._noticed, self._cause = True, signal.Signals(signum).name
        current = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        if current != self._wake_write:  # something else took the descriptor
            signal.set_wakeup_fd(current)
            with contextlib.suppress(OSError):
                os.write(self._wake_write, bytes([signum]))

    def _watch(self):
        # A pipe, because the C half of Python's handler writes to it at once, while the Python
        # half waits for the main thread to come back from XLA, which may take minutes.
        every = max(2.0, pod_state().num_processes / 500) if self._client else None
        asked = idle_since = time.monotonic()
        while True:
            wait = 0.1 if self._state == SIGNALLED else every
            ready, _, _ = select.select([self._wake_read], [], [], wait)
            now = time.monotonic()
            if self._state == CLOSED:
                return
            for number in os.read(self._wake_read, 4096) if ready else b"":
                if number in self._old_handlers and self._on_signal(signal.Signals(number)):
                    idle_since = now
            if self._unsaved:
                idle_since = now
            if now - idle_since > LEAVE_DELAY_S:
                self._leave(f"{self._cause} and nothing unsaved", SIGNALLED)
            if self._client is None or now - asked < every:
                continue
            asked = now
            try:
                peers = self._client.key_value_dir_get("ddpm/leave/")
            except Exception:  # the service is gone: JAX itself ends the process
                return
            if peers:
                self._leave(f"{peers[0][1]} is leaving", RUNNING, SIGNALLED, AGREED)

    def _on_signal(self, number) -> bool:
        """Whether it is the first."""
        self._noticed = True
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now - self._interrupted > ONE_PRESS_S:
                log(f"process {self._process_id}: second SIGINT: exit {EXIT_INTERRUPTED}, unsaved "
                    "work is lost")
                os._exit(EXIT_INTERRUPTED)
            self._interrupted = self._interrupted or now
        if not self._go(SIGNALLED, RUNNING):
            return False
        self._cause = number.name
        if self._chain is not None:
            self._chain(signal.SIGTERM)  # the one that JAX passes on to the other processes
        again = "; a second one leaves at once" if number == signal.SIGINT else ""
        log(f"process {self._process_id}: received {self._cause}; stopping at the next step{again}")
        return True

    def _leave(self, why: str, *from_states):
        with self._changed:  # whoever sees LEAVING can join the thread
            if self._state in from_states:
                self._leaver = threading.Thread(target=self._exit, args=[why], daemon=True)
                self._state = LEAVING
                self._leaver.start()

    def _exit(self, why: str):
        """Ends this process, and through the coordination service the others, with 42."""
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"ddpm/leave/{self._process_id}",
                                           f"process {self._process_id}")
            with self._changed:
                self._changed.wait_for(lambda: not self._unsaved, LEAVE_PATIENCE_S)
            with contextlib.suppress(Exception):
                if not self._client.key_value_dir_get("ddpm/done/"):
                    self._client.wait_at_barrier("ddpm/leave", int(1500 * LEAVE_PATIENCE_S))
            with contextlib.suppress(Exception):
                if self._client.key_value_dir_get("ddpm/done/"):
                    # JAX's own way out, in which those wait: without it they would be aborted.
                    self._client.shutdown()
            if self._process_id == 0:
                time.sleep(1.0)  # the service lives here: let the others go first
        log(f"process {self._process_id}: {why}: exit {EXIT_RESTART}")
        sys.stdout.flush()
        os._exit(EXIT_RESTART)


def watch_for_stop() -> Stop:
    """Takes SIGNALS over and returns the `Stop` that the loops poll. Main thread, once, after
    `initialize`."""
    state = pod_state()
    manager = None
    if state.client is not None and state.preemption_sync_manager is not None:
        manager = state.preemption_sync_manager
        if isinstance(manager, _NoSyncPoint):
            manager = manager.manager
        # Orbax polls the same manager with step numbers, from a thread of its own as well, and so
        # overwrites the count of whoever polls it. From here on it sees no preemption.
        state.preemption_sync_manager = _NoSyncPoint(manager)
    stop = Stop(state.client, state.process_id, manager)
    stop._install()
    _open.append(stop)
    return stop


def close_all():
    """Gives the signals back, for programs that go on after a command, such as notebooks."""
    while _open:
        _open.pop().close()


class _NoSyncPoint:
    def __init__(self, manager):
        self.manager = manager

    def reached_sync_point(self, step_id):
        return False

    def shutdown(self):
        """Leaves the manager as it is; JAX calls this before the barrier at which all leave.

        A signal that comes too late for a last `requested` starts the protocol all the same. Its
        thread would then wait 15 minutes for a process that has shut its manager down, and
        `manager.shutdown` waits for the thread, as its destructor does. Up to the barrier every
        process takes part.
        """
        _kept.append(self.manager)


def _c_handler() -> int:
    """Address of the C handler of SIGTERM (0: default, 1: ignored)."""
    # struct sigaction begins with the handler on Linux and macOS; the rest is room.
    action = (ctypes.c_void_p * 64)()
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, action)
    return action[0] or 0
