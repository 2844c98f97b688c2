import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_jax.errors import UserError
from ddpm_jax.training.loop import Hook, check_finite, fit, next_stop

saved = []  # by the last call of run, where it ended early


def run(step, last, most, hooks=(), stop_at=None, loss=lambda s: 1.0, fails=None):
    """fit over a state that is the number of updates; records what happened, in order. fails: the
    part of it that raises an OSError at step 8."""
    events, seen = [], []
    saved.clear()

    def fail(part, at):
        if part == fails and at == 8:
            raise OSError(part)

    def dispatch(state, n):
        assert 1 <= n <= most
        fail("dispatch", state)
        events.append(("dispatch", state, n))
        return state + n, {"loss": [loss(state + i) for i in range(n)] + [0.0] * (most - n)}

    def on_metrics(step, values, seconds):
        assert (seconds is None) == (not seen)
        fail("metrics", step)
        events.append(("metrics", step))
        seen.extend(range(step, step + len(values["loss"])))

    def arguments(n):
        fail("arguments", sum(e[2] for e in events if e[0] == "dispatch"))
        return (n,)

    def hook(name, step):
        events.append((name, step))
        fail(name, step)

    hooks = [Hook(every, lambda s, state, n=name: hook(n, s), last=True)
             for name, every in hooks]
    program = types.SimpleNamespace(max_steps=most, step=dispatch)
    out = fit(step, step=step, last=last, program=program,
              arguments=arguments, hooks=hooks, on_metrics=on_metrics,
              save=lambda s, state: saved.append((s, state)),
              should_stop=lambda s: stop_at is not None and s >= stop_at,
              fetch=lambda m: m, last_good=lambda: 7)
    return out, events, seen


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 50), st.integers(1, 80), st.integers(1, 20), st.integers(0, 13),
       st.integers(0, 17))
def test_every_step_runs_once_and_every_hook_fires_on_its_multiples(start, more, most, a, b):
    last = start + more
    out, events, seen = run(start, last, most, [("a", a), ("b", b)])
    assert out == (last, last, False)
    assert seen == list(range(start, last))
    for name, every in (("a", a), ("b", b)):
        want = [s for s in range(start + 1, last + 1) if (every and s % every == 0) or s == last]
        assert [e[1] for e in events if e[0] == name] == want


def test_metrics_are_read_one_dispatch_late_but_before_a_hook():
    _, events, _ = run(0, 6, 2, [("save", 4)])
    assert events == [
        ("dispatch", 0, 2), ("dispatch", 2, 2), ("metrics", 0), ("metrics", 2), ("save", 4),
        ("dispatch", 4, 2), ("metrics", 4), ("save", 6)]


def test_a_signal_stops_at_a_dispatch_with_everything_read():
    out, _, seen = run(0, 100, 8, stop_at=20)
    assert out == (24, 24, True) and seen == list(range(24))
    assert saved == [(24, 24)]
    assert not run(0, 8, 8, stop_at=8)[0].stopped and not saved  # done is done


def test_a_nan_stops_before_the_checkpoint_and_names_step_metric_and_last_good():
    with pytest.raises(UserError, match=r"loss is nan at step 4: .*last good checkpoint: step 7"):
        run(0, 100, 2, [("save", 4)], loss=lambda s: np.nan if s == 3 else 1.0)
    assert not saved


@pytest.mark.parametrize("fails, at", [
    ("arguments", 8), ("dispatch", 8), ("metrics", 12), ("evaluate", 8)])
def test_an_error_saves_what_was_done_before_it(fails, at):
    with pytest.raises(OSError, match=fails):
        run(0, 100, 2, [("evaluate", 8)], fails=fails)
    assert saved == [(at, at)]


def test_no_error_saves_a_state_that_diverged():
    with pytest.raises(OSError, match="arguments"):
        run(0, 100, 2, loss=lambda s: np.nan if s == 7 else 1.0, fails="arguments")
    assert not saved


def test_check_finite_names_the_earliest():
    with pytest.raises(UserError, match="grad_norm is inf at step 12"):
        check_finite(10, {"loss": np.array([1, 1, np.nan]),
                          "grad_norm": np.array([1, np.inf, 1])}, None)
    check_finite(10, {"loss": np.ones(3)}, None)


def test_next_stop():
    assert next_stop(0, 100, [10, 0, 25]) == 10
    assert next_stop(20, 100, [10, 25]) == 25
    assert next_stop(95, 98, [10]) == 98


def test_seconds_are_the_devices_without_hooks_and_without_the_first():
    """A device that takes 0.2 s a dispatch, a host that sometimes looks late, a hook of 0.5 s."""
    start, ready, seen = time.monotonic(), [0.0], []

    def dispatch(state):
        ready[0] = max(time.monotonic(), ready[0]) + 0.2
        return state + 1, ready[0]

    def fetch(ready):
        time.sleep(max(0.0, ready - time.monotonic()))
        return {"loss": [1.0]}

    looks = iter([0, 0.33] * 4)
    fit(0, step=0, last=8, program=types.SimpleNamespace(max_steps=1, step=dispatch),
        arguments=lambda n: (), hooks=[Hook(4, lambda step, state: time.sleep(0.5))], fetch=fetch,
        on_dispatch=lambda: time.sleep(next(looks)), should_stop=lambda step: False,
        on_metrics=lambda step, values, seconds: seen.append(seconds))
    assert seen.pop(0) is None and len(seen) == 7
    assert min(seen) > 0.1  # a clock read where the host looks gives 0.07
    assert sum(seen) < time.monotonic() - start - 1.0 - 0.2
