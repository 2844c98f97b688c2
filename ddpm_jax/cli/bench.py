"""ddpm bench WHAT [flags]

Measure this machine (step, sample, data, eval, statistics) or XLA's compiler (compile), in one
format.

  ddpm bench step --config=digits                  a training step: ms, images/s, MFU
  ddpm bench step --config=cifar10 --compare=diffusers --config.model.dtype=bfloat16
  ddpm bench step --config=digits --profile=trace  and the costliest kernels by class
  ddpm bench sample --config=digits                a denoising step, images/s
  ddpm bench data --config=digits                  the input pipeline
  ddpm bench eval --config=cifar10                 Inception features, as a share of sampling
  ddpm bench statistics                            FID and IS from 50,000 features, host memory
  ddpm bench compile --matrix=small --out=now.json --baseline=before.json --export=corpus
  ddpm bench sweep --config=cifar10 --topology=h100 --out=sweep.json
                                                   cost as batch, image, width, devices grow
  ddpm bench page --results=benchmarks             BENCHMARKS.md and its plots from the JSON there

Times are medians of rounds with the fastest and the slowest; MFU is n/a where the chip's peak is
not in the table. --baseline ends with 1 and names what got worse.
"""

import functools

from ddpm_jax.benchmark import compiled, data, evaluation, matrix, page, sample, step
from ddpm_jax.benchmark.bench import Bench
from ddpm_jax.cli import common
from ddpm_jax.compilation import report, timing
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files


def define_flags(define):
    define.config()
    define.integer("repeats", 20, "rounds at most")
    define.float("seconds", 20.0, "stop after this long, but not before three rounds")
    define.path("out", None, "write the result as JSON into this new file")
    define.string("compare", None, "step: diffusers, or diffusers_compiled (torch.compile)")
    define.path("profile", None, "step, sample: new folder for a trace")
    define.path("matrix", "small", "compile: small, absent, programs or a JSON file of "
                  "lists by program, config, runner, dtype, level, topology, set")
    define.path("baseline", None, "compile: an older result to compare with")
    define.path("export", None, "compile: folder for a corpus of StableHLO modules")
    define.string("topology", "h100", "sweep: a kind of machine of `ddpm compile`: h100, v5e")
    define.path("results", "benchmarks", "page: folder of JSON results")
    define.path("page", "BENCHMARKS.md", "page: file to write; plots go beside --results")


MEASURED = {"step": step.step, "sample": sample.sample, "data": data.data,
            "eval": evaluation.evaluation, "statistics": evaluation.statistics}


def _measure(what, values) -> int:
    config = None
    if what != "statistics":
        config = common.required(values, "config")
    report.check_folder(values.profile)
    rows = MEASURED[what](Bench(
        config, config and common.config_name(values), values.repeats, values.seconds,
        values.compare, values.profile))
    print(timing.render(rows))
    _write(values.out, rows)
    return 0


def _compile(values) -> int:
    old = matrix.read(values.baseline) if values.baseline else None
    rows = matrix.run(matrix.cells(values.matrix), values.export)
    print("\n" + matrix.table(rows))
    _write(values.out, rows)
    worse = matrix.regressions(rows, old) if old is not None else []
    for line in worse:
        print(f"REGRESSION {line}")
    if old is not None and not worse:
        print(f"no regression against {values.baseline}")
    return 1 if worse or any("error" in r for r in rows) else 0


def _sweep(values) -> int:
    config = common.required(values, "config")
    compiled.prepare_host()
    _write(values.out, compiled.sweep(config, values.topology, common.config_name(values)))
    return 0


def _page(values) -> int:
    print(", ".join(page.write(values.results, values.page)))
    return 0


def _write(out, rows):
    if out:
        files.write_json(out, rows, sort_keys=False)


COMMANDS = {**{what: functools.partial(_measure, what) for what in MEASURED},
            "compile": _compile, "sweep": _sweep, "page": _page}


def main(values, words):
    if len(words) != 1 or words[0] not in COMMANDS:
        raise UserError(f"expected ddpm bench {'|'.join(COMMANDS)}"
                        + (f" (not {' '.join(words)})" if words else ""))
    if values.out and files.exists(values.out):
        raise UserError(f"out: {values.out} exists; name another file")
    return COMMANDS[words[0]](values)
