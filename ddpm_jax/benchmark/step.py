"""A training step on random images, in turn with the same U-Net of another library."""

import jax
import numpy as np

from ddpm_jax import experiment, programs
from ddpm_jax.benchmark import peers
from ddpm_jax.benchmark.bench import Bench, first_call, random_images, random_labels
from ddpm_jax.compilation import roofline, timing
from ddpm_jax.start_line import training_line
from ddpm_jax.training.steps import Batch


def _steps(exp, num_examples):
    """-> (program, run()), which waits for at least peers.STEPS steps, and the steps of a run."""
    training, batch = experiment.build_training(exp), exp.config.train.batch_size
    runner = training.experiment.runner
    program = programs.train_program(training, num_examples)
    max_steps = program.max_steps
    if num_examples:
        data = runner.put("replicated", Batch(
            random_images(exp, num_examples).reshape(num_examples, -1),
            random_labels(exp, (num_examples,))))
    else:
        data = runner.put("steps", Batch(
            random_images(exp, max_steps * batch).reshape(max_steps, batch, *exp.image_shape),
            random_labels(exp, (max_steps, batch))))
    carry = program.start(experiment.new_state(training))
    seed, calls = np.uint32(exp.config.seed), -(-peers.STEPS // max_steps)

    def run():
        nonlocal carry
        for _ in range(calls):
            carry, metrics = program.step(carry, data, seed, np.int32(max_steps))
        jax.block_until_ready(metrics)

    return program, run, calls * max_steps


def step(bench: Bench) -> list[dict]:
    """Rows of one training step: ours, and that of bench.compare."""
    exp = bench.start()
    print(training_line(exp))
    batch, compare = exp.config.train.batch_size, bench.compare
    num_examples = max(batch, 1024) if exp.config.data.resident else None
    program, run, steps = _steps(exp, num_examples)
    first = first_call(run)
    candidates, scale = {"ddpm_jax": run}, {"ddpm_jax": steps}
    if compare:
        candidates[compare], scale[compare] = peers.training(compare, exp.config, exp.schedule)
    times = {name: [t / scale[name] for t in seconds]
             for name, seconds in bench.rounds(candidates).items()}
    traced = bench.profile and bench.trace(
        run, lambda: program.step.lower(*program.arguments).compile().as_text(),
        seconds=timing.Times.of(times["ddpm_jax"]).median, steps=steps)
    rows = [bench.row("step", name, seconds, images=batch,
                      flops=batch * roofline.unet_work(exp.model).train_flops)
            for name, seconds in times.items()]
    rows[0] |= {"first_call": first, "steps_per_dispatch": program.max_steps} | (traced or {})
    if compare:
        ratio = timing.ratios(times[compare], times["ddpm_jax"])
        rows[0]["ratio"] = f"{ratio.median:.2f} x {compare} ({ratio.low:.2f} ... {ratio.high:.2f})"
    return rows
