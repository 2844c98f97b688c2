"""A denoising step of the sampler, from whole chains."""

import jax
import numpy as np

from ddpm_jax import programs
from ddpm_jax.benchmark import compiled
from ddpm_jax.benchmark.bench import Bench, first_call
from ddpm_jax.compilation import timing
from ddpm_jax.compilation.roofline import unet_work
from ddpm_jax.start_line import sampling_line


def chain_run(exp, chain, batch):
    """-> run(), which draws a batch of images with weights of zero and waits for them."""
    program = programs.sample_program(exp, chain)
    params = exp.runner.put("replicated", jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype), exp.abstract_params))
    index = exp.runner.put("batch", np.arange(batch, dtype=np.int32))
    return lambda: jax.block_until_ready(program(params, np.uint32(0), index))


def _text(exp) -> str:
    """Optimised HLO of the chain; '' where its loop runs on the host, in a program for each step,
    so that kernels are known by their names alone."""
    if not exp.runner.loops_on_device:
        return ""
    made = compiled.sample(exp, None)
    return made.jitted.lower(*made.args).compile().as_text()


def sample(bench: Bench) -> list[dict]:
    """The row of one denoising step of config.sampler."""
    exp = bench.start()
    batch, chain = exp.config.sampler.batch_size, programs.sampling_chain(exp)
    print(sampling_line(exp, chain.num_steps, batch))
    run = chain_run(exp, chain, batch)
    first = first_call(run)
    seconds = bench.rounds({"ours": run})["ours"]
    traced = {}
    if bench.profile:
        steps = chain.num_steps
        traced = bench.trace(run, lambda: _text(exp), steps=steps, steps_in_text=steps,
                             seconds=timing.Times.of(seconds).median / steps)
    row = bench.row("sample", "ddpm_jax", [t / chain.num_steps for t in seconds], images=batch,
                    flops=batch * chain.passes * unet_work(exp.model).forward_flops,
                    first_call=first, denoising_steps=chain.num_steps, **traced)
    row["finished_images_per_s"] = row["images_per_s"] / chain.num_steps
    return [row]
