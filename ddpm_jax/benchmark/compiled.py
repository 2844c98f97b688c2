"""Programs compiled for a machine that may be absent: their arguments, work, fit and speed."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax import experiment, programs
from ddpm_jax.compilation import cache, rates, report, roofline
from ddpm_jax.compilation.topology import describe
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.inception import network
from ddpm_jax.training.steps import Batch

MFUS = (0.2, 0.3, 0.4, 0.5)


class Program(NamedTuple):
    """A program and its work. jitted, args: for .lower(); flops: of one call, counted by hand;
    images: of one call; calls: of the config's whole run; payload: bytes summed over devices."""

    jitted: object
    args: tuple
    flops: float
    images: int
    calls: int
    payload: float = 0.0


def train_step(exp, num_examples) -> Program:
    """A training step; num_examples: of a data set kept on the device."""
    config, work = exp.config, roofline.unet_work(exp.model)
    resident = num_examples if config.data.resident else None
    # The loop over a dispatch's steps has a length that is data: its body, one step, counts once.
    program = programs.train_program(experiment.build_training(_on_device(exp)), resident)
    return Program(
        program.step, program.arguments,
        flops=config.train.batch_size * work.train_flops, images=config.train.batch_size,
        calls=config.train.steps, payload=4.0 * work.parameters)


def unrolled(exp, num_examples) -> Program:
    """config.train.steps_per_dispatch training steps one after the other instead of in a loop."""
    config, work = exp.config, roofline.unet_work(exp.model)
    resident = num_examples if config.data.resident else None
    program = programs.train_program(experiment.build_training(_on_device(exp)), resident,
                                     max_steps=1)
    steps = config.train.steps_per_dispatch

    def train_steps(carry, images, seed, one):
        for _ in range(steps):
            carry, metrics = program.step(carry, images, seed, one)
        return carry, metrics

    images = steps * config.train.batch_size
    return Program(
        jax.jit(train_steps, donate_argnums=0), program.arguments,
        flops=images * work.train_flops, images=images,
        calls=math.ceil(config.train.steps / steps), payload=4.0 * steps * work.parameters)


def _on_device(exp):
    """The same with loops inside the program, as accelerators run it."""
    return exp._replace(runner=exp.runner._replace(loops_on_device=True))


def _sampler_batch(exp) -> int:
    batch = exp.config.sampler.batch_size
    if batch % exp.runner.num_devices:
        raise UserError(f"config.sampler.batch_size={batch} is not divisible by the "
                        f"{exp.runner.num_devices} devices of the topology")
    return batch


def _weights_seed_index(exp, batch):
    runner = exp.runner
    return (runner.abstract("replicated", exp.abstract_params),
            runner.abstract("replicated", jax.ShapeDtypeStruct((), jnp.uint32)),
            runner.abstract("batch", jax.ShapeDtypeStruct((batch,), jnp.int32)))


def _images(exp, batch):
    return exp.runner.abstract("batch", jax.ShapeDtypeStruct((batch, *exp.image_shape), jnp.uint8))


def sample(exp, num_examples) -> Program:
    """The whole chain as one program, as accelerators run it."""
    del num_examples
    batch, chain = _sampler_batch(exp), programs.sampling_chain(exp)
    jitted = programs.sample_program(_on_device(exp), chain)
    flops = batch * chain.num_steps * chain.passes * roofline.unet_work(exp.model).forward_flops
    return Program(jitted, _weights_seed_index(exp, batch), flops=flops, images=batch,
                   calls=math.ceil(50_000 / batch))


def evaluate(exp, num_examples) -> Program:
    """Bits/dim: the whole bound of a batch, as `ddpm evaluate` computes it."""
    batch = _sampler_batch(exp)
    params, seed, index = _weights_seed_index(exp, batch)
    work = roofline.unet_work(exp.model)
    flops = batch * exp.config.diffusion.num_timesteps * work.forward_flops
    labels = index if exp.model.num_classes else None
    args = params, seed, Batch(_images(exp, batch), labels), index
    return Program(programs.bound_program(_on_device(exp)), args, flops=flops, images=batch,
                   calls=math.ceil((num_examples or 10_000) / batch))


def inception(exp, num_examples) -> Program:
    """Inception-2015 features of a batch of samples."""
    del num_examples
    batch = _sampler_batch(exp)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    params = {name: {"kernel": shape(*sizes), "bias": shape(sizes[-1])}
              for name, sizes in network.conv_shapes().items()}
    params["fc"] = {"kernel": shape(network.FEATURES, network.CLASSES),
                    "bias": shape(network.CLASSES)}
    jitted = exp.runner.compile(lambda p, x: network.features(p, x, precision="fast"),
                                ("replicated", "batch"), ("batch",))
    return Program(jitted, (exp.runner.abstract("replicated", params), _images(exp, batch)),
                   flops=batch * network.flops_per_image(), images=batch,
                   calls=math.ceil(50_000 / batch))


PROGRAMS = {"train_step": train_step, "unrolled": unrolled, "sample": sample,
            "evaluate": evaluate, "inception": inception}
TRAINING = ("train_step", "unrolled")  # the programs that have config.parallel's cut state


def step_parts(config) -> dict[str, str]:
    """What a training step of `config` holds besides the network: present, and how, or absent."""
    train, parallel = config.train, config.parallel
    return {
        "dropout": str(config.model.dropout) if config.model.dropout else "absent",
        "clip": f"{train.clip_norm} {train.clip_scope}" if train.clip_norm else "absent",
        "EMA": str(config.ema.decay) if config.ema.decay else "absent",
        "optimizer": f"Adam, eps as {config.optimizer.eps_rule}",
        "random": train.random,
        **({"state": f"{parallel.cut} cut over {parallel.shards}"} if parallel.shards > 1 else {}),
    }


def prepare_host() -> None:
    """Keep JAX off the accelerators, which another process may need: nothing runs on them here."""
    jax.config.update("jax_platforms", "cpu")
    cache.enable_compilation_cache()


def measure(config, *, topology: str, program: str, options: dict, num_examples: int, name=""):
    """Compile `program` of `config`, called `name`, for `topology`.

    -> compilation.report.Compiled whose report has about, work, fit, roofline and speed too.
    Raises UserError for an unknown program or topology, for a batch that does not fit it,
    and for a state that would be cut over its slices or hosts.
    """
    if program not in PROGRAMS:
        raise UserError(f"program: {program!r} is not known; known: {', '.join(PROGRAMS)}")
    machine = describe(topology)
    exp = experiment.build_model(config, machine.devices)
    made, devices = PROGRAMS[program](exp, num_examples), len(machine.devices)
    one, shards = devices // machine.slices, config.parallel.shards
    if program in TRAINING and one % shards:  # absent GPUs do not report which share a host
        raise experiment.beyond_one_slice(shards, one)
    with machine.lowering():
        result = report.compile_and_report(made.jitted, made.args, options=options,
                                           programs_cache=machine.chip is None)
    found = result.report | {
        "about": {
            "program": program, "config": name or config.data.name,
            "machine": f"{topology}: {devices} devices ({machine.devices[0].device_kind})",
            "topology": topology, "devices": devices, "runner": config.parallel.runner,
            "dtype": config.model.dtype,
            "batch": f"{made.images} ({made.images // devices} a device)",
            **({"step": step_parts(config)} if program == "train_step" else {}),
        },
        "work": {"flops_per_call": made.flops, "flops_per_image": made.flops / made.images,
                 "images_per_call": made.images,
                 "parameters": roofline.unet_work(exp.model).parameters},
    }
    if machine.chip is not None:
        found |= _on_chip(machine, made, found, config.model.dtype)
    return result._replace(report=found)


def _on_chip(machine, made, found, dtype) -> dict:
    """Parts of the report that need a chip's figures: fit (if compiled), roofline,
    at_measured_rates (if compiled, and there are rates), speed."""
    chip, devices, parts = machine.chip, len(machine.devices), {}
    hbm = chip.per_device(chip.hbm_bytes)
    if "memory" in found:
        peak = found["memory"]["peak"]
        parts["fit"] = {"fits": peak <= hbm, "peak": peak, "hbm": hbm, "free": 1 - peak / hbm}
    parts["roofline"] = roofline.roofline(
        chip, devices=devices, slices=machine.slices, flops=made.flops,
        bytes_per_device=found["hlo"]["bytes"] if "hlo" in found else None, payload=made.payload)
    reduce = parts["roofline"]["all_reduce_s"]
    timed = rates.estimate(chip, dtype, found["hlo"]["by_class"]) if "hlo" in found else None
    if timed and reduce is not None:
        parts["at_measured_rates"] = timed | {
            "seconds": timed["seconds"] + reduce, "all_reduce_s": reduce}
    parts["speed"] = [roofline.at_mfu(chip, devices=devices, flops=made.flops, steps=made.calls,
                                      mfu=mfu) for mfu in MFUS]
    return parts
