"""A loop whose body is compiled: one program, or on a CPU one program a step."""

import jax
import numpy as np


def repeat(runner, start, step, finish, num_steps, *, args, results=("batch",),
           prepare=lambda weights: weights):
    """(weights, *rest) -> finish(carry, *rest) on all devices of ``runner``, after
    carry = start(*rest) and num_steps times carry = step(prepare(weights), carry, i, *rest).

    args: placements of weights and rest; results: those of what ``finish`` returns. The carry is a
    tree of per-example arrays. prepare is applied once, not at every step. Where the runner loops
    on its devices the result has .lower(). Elsewhere the loop is on the host: XLA compiles
    convolutions in a loop's body without a CPU's fast kernels (jax issue 12868).
    """
    if runner.loops_on_device:
        def program(weights, *rest):
            weights = prepare(weights)
            return finish(jax.lax.fori_loop(
                0, num_steps, lambda i, carry: step(weights, carry, i, *rest), start(*rest)), *rest)

        return runner.compile(program, args, results)

    weights, *rest = args
    prepare = runner.compile(prepare, (weights,), (weights,))
    start = runner.compile(start, rest, ("batch",))
    step = runner.compile(step, (weights, "batch", "replicated", *rest), ("batch",), donate=(1,))
    finish = runner.compile(finish, ("batch", *rest), results)

    def stepwise(weights, *rest):
        weights, carry = prepare(weights), start(*rest)
        for i in range(num_steps):
            carry = step(weights, carry, np.int32(i), *rest)
        return finish(carry, *rest)

    return stepwise
