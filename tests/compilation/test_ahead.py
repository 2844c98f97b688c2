"""A program that was compiled ahead is not traced or compiled again by its call."""

import threading

import jax
import numpy as np
import pytest

from ddpm_jax.compilation.ahead import compiled_ahead
from ddpm_jax.compilation.cache import count_compilations
from ddpm_jax.parallel.runners import RUNNERS


@pytest.mark.parametrize("name", RUNNERS)
def test_the_call_finds_what_was_compiled(name):
    runner, traced = RUNNERS[name](jax.devices()[:4]), []

    def fn(weights, batch, number):
        traced.append(threading.current_thread())
        return weights, batch * weights + number

    placements = ("replicated", "batch", "replicated")
    program = runner.compile(fn, placements, ("replicated", "batch"), donate=(0,))
    values = np.float32([2.0]), np.arange(8, dtype=np.float32), np.int32(3)
    abstract = [runner.abstract(placement, jax.ShapeDtypeStruct(x.shape, x.dtype))
                for placement, x in zip(placements[:2], values[:2], strict=True)]
    with compiled_ahead(program, *abstract, np.int32(0)) as compiled:
        weights, batch, _ = map(runner.put, placements, values)
    # Python on the thread and in the block would take longer than one after the other.
    assert compiled and traced == [threading.current_thread()]
    with count_compilations() as more:
        weights, out = program(weights, batch, values[2])
        program(weights, batch, values[2])
    assert len(traced) == 1 and not more
    np.testing.assert_array_equal(runner.local(out), 2 * values[1] + 3)


def test_an_error_is_left_for_the_call():
    def fn(x):
        raise ZeroDivisionError("no")

    program = jax.jit(fn)
    with compiled_ahead(program, jax.ShapeDtypeStruct((), np.float32)) as compiled:
        pass
    assert not compiled
    with pytest.raises(ZeroDivisionError):
        program(1.0)
