"""ddpm bench WHAT [flags]

Measure this machine (step, sample, data, eval, statistics) or XLA's compiler (compile, sweep,
history), and write all results in one format.

  ddpm bench step --config=digits                  a training step: ms, images/s, MFU
  ddpm bench step --config=cifar10 --compare=diffusers --config.model.dtype=bfloat16
  ddpm bench step --config=digits --profile=trace  and where its time goes, part by part
  ddpm bench sample --config=digits                a denoising step, images/s
  ddpm bench data --config=digits                  the input pipeline
  ddpm bench eval --config=cifar10                 Inception features, as a share of sampling
  ddpm bench statistics                            FID and IS from 50,000 features, host memory
  ddpm bench compile --matrix=small --out=now.json --baseline=before.json --export=corpus
  ddpm bench compile --matrix=small --compilations=5 --passes
                                                   what differs between processes; which of XLA's
                                                   passes take the time
  ddpm bench sweep --config=cifar10 --topology=h100 --out=sweep.json
                                                   cost as batch, image, width, devices grow
  ddpm bench corpus                                five programs as files that compilers read
  ddpm bench history --releases=all --python=python3.13   what those cost on each jaxlib
  ddpm bench history --same=source --releases=all --python=python3.13   on each JAX
  ddpm bench page --results=benchmarks             BENCHMARKS.md and its plots from the JSON there

Times are medians of rounds with the fastest and the slowest; MFU is n/a where the chip's peak is
not in the table. --baseline ends with 1 and names what got worse.
"""

import functools

from ddpm_jax import names
from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files


def define_flags(define):
    define.config()
    define.integer("rounds", 20, "most rounds of a measurement")
    define.renamed("repeats", "rounds")
    define.float("seconds", 20.0, "seconds of a measurement, of three rounds at least")
    define.path("out", None, "write the result as JSON into this new file")
    define.string("compare", None, "step: diffusers, or diffusers_compiled (torch.compile)")
    define.path("profile", None, "step, sample: trace one call into this new folder, and print "
                "where its time goes")
    define.path("matrix", "small", "compile: small, absent, programs, cut, cut_pod or a JSON file "
                  "of lists by program, config, runner, dtype, level, topology, set, sets")
    define.path("baseline", None, "compile: an older result to compare with")
    define.path("export", None, "compile: folder for a corpus of StableHLO modules")
    define.string("topology", "h100", "sweep: a kind of machine of `ddpm compile`: cpu, h100, v5e")
    axes = names.table("benchmark/sweeps.py", "SWEEPS")
    define.list("axes", None, f"sweep: some of {', '.join(axes)}; default: all")
    define.path("results", "benchmarks", "page: folder of JSON results")
    define.path("page", "BENCHMARKS.md", "page: file to write; plots go beside --results")
    define.integer("compilations", None, "compile: of a cell, each by a process of its own, "
                   "default 1; history: of each program on each release, default 3", lower_bound=1)
    define.renamed("repeat", "compilations")
    define.bool("passes", False, "compile: one more compilation with XLA's log of its passes")
    define.path("github", None, "compile, history: also write JSON for github-action-benchmark")
    define.path("corpus", "benchmarks/corpus", "corpus: folder to write; history: to read")
    define.bool("overwrite", False, "corpus: replace the files of --corpus that differ")
    define.path("xla", None, "corpus: also write this new folder, as XLA's benchmarks take it")
    _define_history(define)


def _define_history(define):
    define.enum("same", "bytes", names.table("benchmark/history.py", "KINDS"), "history: bytes "
                "(the files of --corpus, jaxlib alone) or source (this checkout, each JAX)")
    define.string("releases", None, "history: 0.9.2,0.10.2 or all that the package index has for "
                  "--python")
    define.string("programs", None, "history: names of programs; default: all")
    define.string("targets", "cpu", "history: cpu, h100, v5e; a program of the corpus is compiled "
                  "for those of its own targets (manifest.json) that are named here")
    define.path("rows", "benchmarks/history.jsonl", "history: file of rows; what is in it is not "
                "made again; the page and its plots go beside it")
    define.string("python", None, "history: interpreter of the environments; default: this one")
    define.float("timeout", 900.0, "history: seconds of one compilation", lower_bound=1)
    define.float("budget", float("inf"), "history: start no release after this many seconds",
                 lower_bound=0)


MEASURED = ("step", "sample", "data", "eval", "statistics")


def _measure(what, values) -> int:
    from ddpm_jax.benchmark import data, evaluation, sample, step
    from ddpm_jax.benchmark.bench import Bench
    from ddpm_jax.compilation import report, timing

    measures = dict(zip(MEASURED, (step.step, sample.sample, data.data, evaluation.evaluation,
                                   evaluation.statistics), strict=True))
    config = None
    if what != "statistics":
        config = common.required(values, "config")
    report.check_folder(values.profile, "profile")
    rows = measures[what](Bench(
        config, config and common.config_name(values), values.rounds, values.seconds,
        values.compare, values.profile))
    print(timing.render(rows))
    _write(values.out, rows)
    return 0


def _compile(values) -> int:
    from ddpm_jax.benchmark import matrix, outputs, repeats

    old = matrix.read(values.baseline) if values.baseline else None
    rows = matrix.run(matrix.cells(values.matrix), values.export, repeat=values.compilations or 1,
                      with_passes=values.passes)
    print("\n".join(["", matrix.table(rows), *repeats.notes(rows)]))
    _write(values.out, rows)
    _write(values.github, outputs.github_action(rows))
    worse = repeats.regressions(rows, old) if old is not None else []
    for line in worse:
        print(f"REGRESSION {line}")
    missed = repeats.misses(rows)
    for line in missed:
        print(f"CACHE {line}")
    if old is not None and not worse:
        print(f"no regression against {values.baseline}")
    return 1 if worse or missed or any("error" in r for r in rows) else 0


def _sweep(values) -> int:
    from ddpm_jax.benchmark import compiled, sweeps

    config = common.required(values, "config")
    compiled.prepare_host()
    rows = sweeps.sweep(config, values.topology, common.config_name(values), values.axes)
    head, lines = sweeps.table(rows)
    print("\n".join(["exponents b of value = a x^b:",
                     *("  ".join(cell.ljust(16) for cell in line) for line in (head, *lines))]))
    _write(values.out, rows)
    return 0


def _corpus(values) -> int:
    from ddpm_jax.benchmark import compiled, corpus, outputs
    from ddpm_jax.compilation import report
    from ddpm_jax.config import load_config

    report.check_folder(values.xla, "xla")
    compiled.prepare_host()
    print("\n".join(corpus.write(values.corpus, load_config,
                                 overwrite=values.overwrite)))
    if values.xla:
        print(f"{values.xla}: {', '.join(outputs.xla_folder(values.corpus, values.xla))}")
    return 0


def _history(values) -> int:
    from ddpm_jax.benchmark import history, history_page, outputs

    plan = history.plan(
        values.same, spec=common.required(values, "releases"), programs=values.programs or "",
        corpus_folder=values.corpus, targets=values.targets,
        repetitions=values.compilations or 3, python=values.python,
        timeout=values.timeout)
    rows = history.run(plan, values.rows, seconds=values.budget)
    if rows:
        print(", ".join(history_page.write(values.rows)))
    _write(values.github, outputs.github_action_of_history(rows, values.same))
    return 0


def _page(values) -> int:
    from ddpm_jax.benchmark import page

    print(", ".join(page.write(values.results, values.page)))
    return 0


def _write(out, rows):
    if out:
        files.write_json(out, rows, sort_keys=False)


COMMANDS = {**{what: functools.partial(_measure, what) for what in MEASURED},
            "compile": _compile, "sweep": _sweep, "corpus": _corpus, "history": _history,
            "page": _page}


def main(values, words):
    if len(words) != 1 or words[0] not in COMMANDS:
        raise UserError(f"expected ddpm bench {'|'.join(COMMANDS)}"
                        + (f" (not {' '.join(words)})" if words else ""))
    _check_outputs(values)
    return COMMANDS[words[0]](values)


def _check_outputs(values) -> None:
    """Raises UserError, before anything is measured, for what cannot be written after it."""
    if values.out and files.exists(values.out):
        raise UserError(f"out: {values.out} exists; name another file")
    for flag in ("out", "github", "page", "rows"):
        if values[flag].value is not None:
            files.check_no_folder(values[flag].value, f"--{flag}")
    for flag in ("export", "corpus"):
        if values[flag].value is not None:
            files.check_no_file(values[flag].value, f"--{flag}")
