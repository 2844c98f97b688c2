"""ddpm compile --config=FILE_OR_NAME --topology=NAME [--program=train_step] [--out=DIR]

Compile a program for a TPU or GPU that is not in this machine, and say: does it fit, how long does
it compile, what did the compiler make of it, how fast could it be, what would the run cost.

  ddpm compile --config=cifar10 --topology=v3-8 --optimization_level=O0
  ddpm compile --config=celebahq256 --topology=v5litepod-8 --out=reports/celebahq256
  ddpm compile --config=cifar10 --topology=h100:8 --program=sample --config.model.dtype=bfloat16

TPUs need libtpu (pip install "jax[tpu]"), an H100 the two wheels of JAX's CUDA plugin; neither
needs a device. XLA's default level takes minutes for a TPU; O0 takes about one.
"""

import json
import math
from typing import NamedTuple

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError

MFUS = (0.2, 0.3, 0.4, 0.5)


class Program(NamedTuple):
    """What can be compiled. jitted, args: for .lower(); flops: of one call, counted by hand;
    images: of one call; calls: of the config's whole run; payload: bytes summed over devices."""

    jitted: object
    args: tuple
    flops: float
    images: int
    calls: int
    payload: float = 0.0


def network_work(exp):
    """The U-Net's hand-counted work of one image."""
    from ddpm_jax.compilation import roofline

    model = exp.model
    return roofline.unet_work(
        image_size=model.image_size, ch=model.ch, ch_mult=model.ch_mult,
        num_res_blocks=model.num_res_blocks, attn_resolutions=model.attn_resolutions,
        in_channels=model.in_channels, out_channels=model.out_channels,
        space_to_depth=model.space_to_depth)


def train_step(exp, num_examples) -> Program:
    from ddpm_jax import programs

    config, work = exp.config, network_work(exp)
    resident = num_examples if config.data.resident else None
    # The loop over a dispatch's steps has a length that is data: its body, one step, counts once.
    return Program(
        programs.train_program(exp, resident), programs.train_arguments(exp, resident),
        flops=config.train.batch_size * work.train_flops, images=config.train.batch_size,
        calls=config.train.steps, payload=4.0 * work.parameters)


def _weights_seed_index(exp, batch):
    import jax
    import jax.numpy as jnp

    if batch % exp.runner.num_devices:
        raise UserError(f"config.sampler.batch_size={batch} is not divisible by the "
                        f"{exp.runner.num_devices} devices of the topology")
    runner = exp.runner
    return (runner.abstract("replicated", exp.abstract_state.params),
            runner.abstract("replicated", jax.ShapeDtypeStruct((), jnp.uint32)),
            runner.abstract("batch", jax.ShapeDtypeStruct((batch,), jnp.int32)))


def sample(exp, num_examples) -> Program:
    """The whole chain as one program, as accelerators run it."""
    from ddpm_jax import programs
    from ddpm_jax.training.steps import to_uint8

    del num_examples
    batch = exp.config.sampler.batch_size
    chain = programs.sampling_chain(exp)
    jitted = exp.runner.compile(
        lambda params, seed, index: to_uint8(
            programs.draw_images(exp, chain, params, seed, index)),
        ("replicated", "replicated", "batch"), ("batch",))
    flops = batch * chain.num_steps * network_work(exp).forward_flops
    return Program(jitted, _weights_seed_index(exp, batch), flops=flops, images=batch,
                   calls=math.ceil(50_000 / batch))


def evaluate(exp, num_examples) -> Program:
    """Bits/dim: the whole bound of a batch, as `ddpm evaluate` computes it."""
    import jax
    import jax.numpy as jnp

    from ddpm_jax import programs

    config, runner = exp.config, exp.runner
    batch = config.sampler.batch_size
    args = _weights_seed_index(exp, batch)
    images = jax.ShapeDtypeStruct((batch, *exp.image_shape), jnp.uint8)

    def bound(params, seed, index, images):
        return programs.bound(exp, params, seed, images, index).total

    jitted = runner.compile(bound, ("replicated", "replicated", "batch", "batch"), ("batch",))
    flops = batch * config.diffusion.num_timesteps * network_work(exp).forward_flops
    return Program(jitted, (*args, runner.abstract("batch", images)), flops=flops, images=batch,
                   calls=math.ceil((num_examples or 10_000) / batch))


def inception(exp, num_examples) -> Program:
    """Inception-2015 features of a batch of samples."""
    import jax
    import jax.numpy as jnp

    from ddpm_jax.evaluation.inception import network

    del num_examples
    runner, batch = exp.runner, exp.config.sampler.batch_size
    _weights_seed_index(exp, batch)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    params = {name: {"kernel": shape(*sizes), "bias": shape(sizes[-1])}
              for name, sizes in network.conv_shapes().items()}
    params["fc"] = {"kernel": shape(network.FEATURES, network.CLASSES),
                    "bias": shape(network.CLASSES)}
    images = jax.ShapeDtypeStruct((batch, *exp.image_shape), jnp.uint8)
    jitted = runner.compile(lambda p, x: network.features(p, x, precision="fast").pool_3,
                            ("replicated", "batch"), ("batch",))
    return Program(jitted, (runner.abstract("replicated", params),
                            runner.abstract("batch", images)),
                   flops=batch * network.flops_per_image(), images=batch,
                   calls=math.ceil(50_000 / batch))


PROGRAMS = {"train_step": train_step, "sample": sample, "evaluate": evaluate,
            "inception": inception}


def step_parts(config) -> dict[str, str]:
    """What a training step of `config` holds besides the network: present, and how, or absent."""
    train = config.train
    return {
        "dropout": str(config.model.dropout) if config.model.dropout else "absent",
        "clip": f"{train.clip_norm} {train.clip_scope}" if train.clip_norm else "absent",
        "EMA": str(config.ema.decay) if config.ema.decay else "absent",
        "optimizer": f"Adam, eps as {config.optimizer.eps_rule}",
        "random": train.random,
    }


def measure(config, *, topology: str, program: str, options: dict, num_examples: int, name=""):
    """Compile `program` of `config`, called `name`, for `topology`.

    -> compilation.report.Compiled whose report has about, work, fit, roofline and speed too.
    """
    from ddpm_jax import experiment
    from ddpm_jax.compilation import report, roofline
    from ddpm_jax.compilation.topology import describe

    if program not in PROGRAMS:
        raise UserError(f"program: {program!r} is not known; known: {', '.join(PROGRAMS)}")
    machine = describe(topology)
    exp = experiment.build(config, machine.devices)
    made = PROGRAMS[program](exp, num_examples)
    result = report.compile_and_report(made.jitted, made.args, options=options,
                                       programs_cache=machine.chip is None)
    devices, chip = len(machine.devices), machine.chip
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
                 "parameters": network_work(exp).parameters},
    }
    if chip is not None:
        hbm = chip.per_device(chip.hbm_bytes)
        if result.compiled is not None:
            peak = found["memory"]["peak"]
            found["fit"] = {"fits": peak <= hbm, "peak": peak, "hbm": hbm, "free": 1 - peak / hbm}
        moved = found["hlo"]["bytes"] if "hlo" in found else None
        found["roofline"] = roofline.roofline(
            chip, devices=devices, slices=machine.slices, flops=made.flops,
            bytes_per_device=moved, payload=made.payload)
        found["speed"] = [roofline.at_mfu(chip, devices=devices, flops=made.flops,
                                          steps=made.calls, mfu=mfu) for mfu in MFUS]
    return result._replace(report=found)


def define_flags(define):
    define.config()
    define.string("topology", None, "the machine: v3-8, v5litepod-8, v5e-256, v5p:4x4x4, "
                        "v6e-8, v7x-8, h100:8, cpu:8; *2 behind it: two slices")
    define.string("program", "train_step", "train_step, sample, evaluate (bits/dim) or "
                        "inception (features)")
    define.string("runner", None, "jit, pmap or shard_map; default: the config's")
    define.string("optimization_level", None, "O0 (quick), O1, O2, O3; default: XLA's own")
    define.multi_string("compiler_options", [], "an XLA option, key=value; may be repeated")
    define.integer("num_examples", 50_000, "images of a data set that lives on the device")
    define.path("out", None, "new folder for report.json, StableHLO and HLO")
    define.bool("json", False, "print the report as JSON instead of a table")


def prepare_host() -> None:
    """Nothing runs on an accelerator here: do not take one from a process that needs it."""
    import jax

    from ddpm_jax.compilation.cache import enable_compilation_cache

    jax.config.update("jax_platforms", "cpu")
    enable_compilation_cache()


def main(values, words):
    from ddpm_jax.compilation import report

    common.no_words(words)
    config, topology = common.required(values, "config"), common.required(values, "topology")
    if values.runner:
        config.parallel.runner = values.runner
    options = report.compiler_options(values.optimization_level, values.compiler_options)
    report.check_folder(values.out)
    prepare_host()
    result = measure(config, topology=topology, program=values.program, options=options,
                     num_examples=values.num_examples, name=common.config_name(values))
    if values.out:
        files = report.write_artifacts(result, values.out)
    print(json.dumps(result.report, indent=1) if values.json else report.render(result.report))
    if values.out and not values.json:
        print(f"\n{values.out}: {', '.join(files)}")
