"""The training loop: fetch, dispatch, hooks. Independent of diffusion, devices and files."""

import contextlib
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


def fit(
    state, *, step, last, program, arguments, hooks, on_metrics, should_stop, fetch,
    on_dispatch=lambda: None, last_good=lambda: None, save=lambda step, state: None,
) -> Outcome:
    """Run updates ``step`` ... ``last``-1.

    program.step(state, *arguments(n)) -> (state, metrics on device, each [>= n]) dispatches n <=
    program.max_steps updates and returns before they are done; fetch(metrics) waits for them. The
    metrics of one dispatch are read after the next is under way, but before any hook acts on the
    state they belong to. on_dispatch() is called after each dispatch, on_metrics(step,
    {name: [n]}) with numpy. should_stop(step) is called once a dispatch, and after hooks.
    save(step, state) is called where a stop or an error, other than divergence, ends the loop; then
    the error is raised.
    """
    cadences = [h.every for h in hooks]
    pending = None

    def read(before, n, metrics):
        values = {k: np.asarray(v)[:n] for k, v in fetch(metrics).items()}
        check_finite(before, values, last_good())
        on_metrics(before, values)

    stopped = False
    try:
        while step < last and not stopped:
            n = min(program.max_steps, next_stop(step, last, cadences) - step)
            state, metrics = program.step(state, *arguments(n))
            on_dispatch()
            previous, pending = pending, (step, n, metrics)
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
    if stopped:
        save(step, state)
    return Outcome(state, step, stopped)
