"""The training loop: fetch, dispatch, hooks. Independent of diffusion, devices and files."""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.errors import UserError


class Hook(NamedTuple):
    """do(step, state) whenever ``step`` is a multiple of ``every`` (0 = never), and at the end
    where ``last``. May not change the state."""

    every: int
    do: Callable[[int, Any], None]
    last: bool = False


class DivergedError(UserError):
    """A metric is not finite; the state is not worth saving."""


class Outcome(NamedTuple):
    """state after ``step`` updates; stopped: a signal ended training before the last step."""

    state: Any
    step: int
    stopped: bool


def next_stop(step: int, last: int, cadences) -> int:
    """The first step after ``step`` at which something is due."""
    return min([last, *((step // c + 1) * c for c in cadences if c)])


def check_finite(step: int, metrics: dict[str, np.ndarray], last_good: int | None) -> None:
    """Raise DivergedError at the first step whose metrics [n], of the steps after ``step``, are not
    finite."""
    bad = [(int(np.argmin(np.isfinite(values))), name)
           for name, values in metrics.items() if not np.isfinite(values).all()]
    if not bad:
        return
    offset, name = min(bad)
    value = metrics[name][offset]
    kept = f"step {last_good}" if last_good is not None else "none"
    raise DivergedError(
        f"{name} is {value} at step {step + offset + 1}: training diverged; last good checkpoint: "
        f"{kept}. Lower optimizer.learning_rate or use model.dtype=float32, in a new --workdir "
        "with --init_from=RUN to continue from that checkpoint"
    )


class _Reader:
    """Waits in a thread for the metrics of one dispatch after the other, so that the time at which
    the device had finished is known even where the host looks later."""

    def __init__(self, fetch):
        self._fetch = fetch
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "metrics")
        self._since = None  # when the device began with what is read next; None: it compiles first

    def submit(self, metrics):
        return self._thread.submit(lambda: (self._fetch(metrics), time.monotonic()))

    def result(self, future):
        """-> (metrics, seconds that the device took for them, or None for the first)"""
        metrics, finished = future.result()
        seconds = None if self._since is None else finished - self._since
        self._since = finished
        return metrics, seconds

    def pause(self):
        """Time until now was not the device's: it waited for a hook."""
        self._since = time.monotonic()

    def close(self):
        self._thread.shutdown(wait=False)


def fit(
    state, *, step, last, program, arguments, hooks, on_metrics, should_stop, fetch,
    on_dispatch=lambda: None, last_good=lambda: None, save=lambda step, state: None,
) -> Outcome:
    """Run updates ``step`` ... ``last``-1.

    program.step(state, *arguments(n)) -> (state, metrics on device, each [>= n]) dispatches n <=
    program.max_steps updates and returns before they are done; fetch(metrics), in a thread, waits
    for them. The metrics of one dispatch are read after the next is under way, but before any hook
    acts on the state they belong to. on_dispatch() is called after each dispatch, on_metrics(step,
    {name: [n]}, seconds) with numpy; seconds: from the end of the dispatch before, or of the hooks
    after it, to the end of this one on the device; None for the first, which may compile.
    should_stop(step) is called once a dispatch, and after hooks; save(step, state) where a stop or
    an error, other than divergence, ends the loop, before the error is raised.
    """
    cadences = [h.every for h in hooks]
    pending, reader = None, _Reader(fetch)

    def read(before, n, metrics):
        metrics, seconds = reader.result(metrics)
        values = {k: np.asarray(v)[:n] for k, v in metrics.items()}
        check_finite(before, values, last_good())
        on_metrics(before, values, seconds)

    stopped = False
    try:
        while step < last and not stopped:
            n = min(program.max_steps, next_stop(step, last, cadences) - step)
            state, metrics = program.step(state, *arguments(n))
            on_dispatch()
            previous, pending = pending, (step, n, reader.submit(metrics))
            step += n
            if previous:
                read(*previous)
            due = [h for h in hooks
                   if (h.every and step % h.every == 0) or (h.last and step == last)]
            stopped = should_stop(step) and step < last
            if due or stopped:
                previous, pending = pending, None
                read(*previous)
            for hook in due:
                hook.do(step, state)
                reader.pause()
            # Checked again: a hook may take minutes, and a signal may have cut it short.
            stopped = stopped or bool(due) and step < last and should_stop(step)
        if pending:
            read(*pending)
    except DivergedError:
        raise
    except Exception:
        with contextlib.suppress(Exception):  # the first error is the one to report
            if pending:
                read(*pending)
            save(step, state)
        raise
    finally:
        reader.close()
    if stopped:
        save(step, state)
    return Outcome(state, step, stopped)
