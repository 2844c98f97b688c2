"""ddpm compile --config=FILE_OR_NAME --topology=NAME [--program=train_step] [--out=DIR]

Compile a program for a TPU or GPU that is not in this machine, and report: whether it fits, how
long it compiles, what the compiler made of it, how fast it could be, what the run would cost.

  ddpm compile --config=cifar10 --topology=v3-8 --optimization_level=O0
  ddpm compile --config=celebahq256 --topology=v5litepod-8 --out=reports/celebahq256
  ddpm compile --config=cifar10 --topology=h100:8 --program=sample --config.model.dtype=bfloat16

TPUs need libtpu (pip install "jax[tpu]"), an H100 the two wheels of JAX's CUDA plugin; neither
needs a device. XLA's default level takes minutes for a TPU; O0 takes about one.
"""

import json
import sys

from ddpm_jax.cli import common


def define_flags(define):
    define.config()
    define.string("topology", None, "the machine: v3-8, v5litepod-8, v5e-256, v5p:4x4x4, "
                  "v6e-8, v7x-8, h100:8, cpu:8; *2 behind it: two slices")
    define.string("program", "train_step", "train_step, unrolled (train.steps_per_dispatch "
                  "steps without a loop), sample, evaluate (bits/dim) or inception (features)")
    define.string("runner", None, "jit, pmap or shard_map; default: the config's")
    define.string("optimization_level", None, "O0 (quick), O1, O2, O3; default: XLA's own")
    define.multi_string("compiler_options", [], "an XLA option, key=value")
    define.integer("num_examples", 50_000, "images of the dataset that is kept on the device")
    define.path("out", None, "new folder for report.json, StableHLO and HLO")
    define.bool("json", False, "print the report as JSON instead of a table")


def main(values, words):
    from ddpm_jax.benchmark import compiled
    from ddpm_jax.compilation import report
    from ddpm_jax.config_checks import idle_fields

    common.no_words(words)
    config, topology = common.required(values, "config"), common.required(values, "topology")
    if values.runner:
        config.parallel.runner = values.runner
    options = report.compiler_options(values.optimization_level, values.compiler_options)
    report.check_folder(values.out)
    compiled.prepare_host()
    for text in idle_fields(config):
        print(f"warning: {text}", file=sys.stderr)
    result = compiled.measure(
        config, topology=topology, program=values.program, options=options,
        num_examples=values.num_examples, name=common.config_name(values))
    if values.out:
        files = report.write_artifacts(result, values.out)
    print(json.dumps(result.report, indent=1) if values.json else report.render(result.report))
    if values.out and not values.json:
        print(f"\n{values.out}: {', '.join(files)}")
