"""Ends a process whose steps have stopped, after printing where it stands."""

import faulthandler
import os
import sys
import threading
import time

from absl import flags

from ddpm_jax.parallel import pod
from ddpm_jax.parallel.exit_codes import EXIT_HUNG, log


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
            # If the hung code holds the interpreter's lock, this thread stops too: then
            # faulthandler's C thread prints the stacks and exits, with 1, its only exit code.
            faulthandler.dump_traceback_later(2 * self._seconds + 1, exit=True,
                                              file=sys.__stderr__)
            if time.monotonic() - last <= self._seconds:
                continue
            where = "" if self._step is None else f" after step {self._step}"
            log(f"watchdog: no step for {self._seconds:g} s{where}; stacks follow, exit "
                 f"{EXIT_HUNG}")
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            os._exit(EXIT_HUNG)
        faulthandler.cancel_dump_traceback_later()


def start_watchdog(values: flags.FlagValues = flags.FLAGS) -> Watchdog:
    """Watches for hung steps: --watchdog seconds without `beat()` print all stacks and exit with
    EXIT_HUNG; 0 gives an object that does nothing."""
    seconds = pod.option(values, "watchdog", float, 0.0, "DDPM_WATCHDOG")
    watchdog = Watchdog(seconds)
    if seconds > 0:
        threading.Thread(target=watchdog._watch, name="ddpm-watchdog", daemon=True).start()
    return watchdog
