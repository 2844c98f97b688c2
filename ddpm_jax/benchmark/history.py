"""What programs cost to compile, release by release: the runs of `ddpm bench history`.

`bytes`: the same file of the corpus through every jaxlib (XLA's share). `source`: the same source
of this project on every JAX that it supports (trace, lower, compile). Each release gets an
environment of its own that is removed after use. Before and after each release a pinned jaxlib
compiles a pinned file: what is compared is CPU seconds as a ratio to that, so that a machine that
others use, or one that is another tomorrow, still gives a history. A line of the rows file is one
compilation; one that is there is not made again.
"""

import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from ddpm_jax.benchmark import corpus, environments, matrix, replay
from ddpm_jax.benchmark.environments import PLUGINS, version_key
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

REFERENCE_RELEASE, REFERENCE_PROGRAM = "0.4.34", "ddpm_digits_flax_f32_sample"
OLDEST_SUPPORTED = (0, 10, 2)  # as in setup.cfg
NOT_INSTALLED = "not installed"  # an outcome; tried again by the next run


class Job(NamedTuple):
    """One compilation. program: a name of the corpus, or of SOURCES; target: cpu, h100, v5e."""

    release: str
    program: str
    target: str
    repetition: int


class Plan(NamedTuple):
    """What to run. kind: a row of KINDS; python: the interpreter of all environments; timeout:
    seconds of one compilation; folder: where environments are made."""

    kind: str
    releases: tuple[str, ...]
    programs: tuple[str, ...]
    targets: tuple[str, ...]
    repetitions: int
    corpus: pathlib.Path
    python: str
    timeout: float
    folder: pathlib.Path


def releases(spec: str, kind: str, python: str) -> tuple[str, ...]:
    """Releases from 'A,B' or 'all': those that the package index has for ``python``, oldest first.

    Raises UserError for what is no release or is not in the index, and for 'all' where the index
    cannot be asked.
    """
    lowest = KINDS[kind].lowest
    if spec == "all":
        return tuple(r for r in environments.listed(python) if version_key(r) >= lowest)
    found = {word.strip() for word in spec.split(",") if word.strip()}
    wrong = [r for r in found if not re.fullmatch(r"\d+(\.\d+)+", r)]
    if wrong or not found:
        raise UserError(f"releases: {', '.join(sorted(wrong)) or repr(spec)} is not a release such "
                        "as 0.10.2; give a list between commas, or all")
    old = [r for r in found if version_key(r) < lowest]
    if old:
        raise UserError(f"releases: {', '.join(sorted(old))} is older than "
                        f"{'.'.join(map(str, lowest))}, the oldest that can be measured")
    try:
        known = environments.listed(python)
    except UserError:  # no index here: the installer decides, which may have wheels of its own
        known = found
    missing = sorted(found - set(known), key=version_key)
    if missing:
        raise UserError(f"releases: the index has no jaxlib {', '.join(missing)} for {python}; "
                        f"it has {', '.join(known)}")
    return tuple(sorted(found, key=version_key))


# ---- one compilation ----


def _replay(plan: Plan, job: Job, environment: dict) -> dict:
    file = plan.corpus / f"{job.program}.mlir.bc"
    options = []
    if job.target in PLUGINS:
        plugin, folder = PLUGINS[job.target], environment["PYTHONPATH"].split(":")[0]
        options = [f"--plugin={folder}/{plugin.library}", *plugin.options]
    return replay.measure(file, python=plan.python, target=job.target, timeout=plan.timeout,
                          environment=environment, options=options)


SOURCES = {f"{config}_{program}": matrix.Cell(
    program, config, "jit", "float32", None, "cpu:1",
    ("train.clip_scope=global", "train.steps_per_dispatch=1", f"{field}={batch}"))
    for config, program, field, batch in (
        ("digits", "train_step", "train.batch_size", 64),
        ("digits", "sample", "sampler.batch_size", 64),
        ("digits", "evaluate", "sampler.batch_size", 64),
        ("cifar10", "train_step", "train.batch_size", 8))}


def _from_source(plan: Plan, job: Job, environment: dict) -> dict:
    """`ddpm compile` of the source in this checkout; see matrix.run_cell."""
    with tempfile.TemporaryDirectory() as folder:
        words = matrix.command(SOURCES[job.program], f"{folder}/out")
        try:
            done = subprocess.run([plan.python, *words[1:]], env={**os.environ, **environment},
                                  capture_output=True, text=True, check=False, cwd=folder,
                                  timeout=plan.timeout)
        except subprocess.TimeoutExpired:
            return {"outcome": "timeout", "message": f"killed after {plan.timeout:g} s"}
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            return {"outcome": "killed" if done.returncode < 0 else "error", "message": last}
        found = json.loads(pathlib.Path(folder, "out/report.json").read_text())
    counts = {key: found["hlo"][key] for key in ("instructions", "fusions", "kernels")}
    return {"outcome": "ok", **found["seconds"], **counts, "source": _source(),
            "cpus": os.cpu_count(), "cpu": replay.cpu_model(), "load": replay.load(),
            **{name: found["versions"][name] for name in ("jax", "jaxlib", "python")},
            "jaxpr_equations": found["jaxpr_equations"],
            "stablehlo": found["stablehlo"]["instructions"],
            "executable_bytes": found["executable_bytes"]}


def _source() -> str:
    """A hash of the package's Python files: rows with the same one are of the same source."""
    package = environments.ROOT / "ddpm_jax"
    return corpus.digest(b"".join(path.relative_to(package).as_posix().encode() + path.read_bytes()
                                  for path in sorted(package.rglob("*.py"))))[:12]


class Kind(NamedTuple):
    """environment(python, release, folder, shared, targets) -> variables; measure(plan, job,
    variables) -> row; stages: of a row, with seconds; lowest: release that can be measured."""

    environment: Callable
    measure: Callable
    stages: tuple[str, ...]
    lowest: tuple[int, ...]


KINDS = {"bytes": Kind(environments.jaxlib, _replay, ("read", "compile"), (0, 4, 34)),
         "source": Kind(environments.jax, _from_source, ("trace", "lower", "compile"),
                        OLDEST_SUPPORTED)}


# ---- the rows ----


def _check(row) -> None:
    """Raises where ``row`` lacks what a page needs."""
    for key in ("role", "release", "program", "target", "repetition", "batch", "outcome"):
        row[key]
    if row["kind"] not in KINDS:
        raise ValueError(f"kind {row['kind']!r}")
    if row["outcome"] == "ok":
        measured = row["role"] == "measured"
        _ = [row[stage]["cpu_s"] + 0.0
             for stage in KINDS[row["kind"] if measured else "bytes"].stages]
        _ = measured and [(row[key] or 0) + 0 for key in ("instructions", "fusions", "kernels")]


def read(file) -> list[dict]:
    """Rows of a history, a JSON object a line; a last line that was cut off is dropped.

    Raises UserError for a file that is none, with the line.
    """
    if not files.exists(file):
        return []
    rows = []
    content = files.read_bytes(file)
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            _check(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) and line[:1] == b"{" and not content.endswith(b"\n"):
                break
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"rows: {file} line {number} is not a row of a history ({reason}); "
                            "remove the line, or name another file") from None
        rows.append(row)
    return rows


def _append(file: pathlib.Path, rows: list[dict], row: dict) -> None:
    """Adds a row to the file and to ``rows``, those of the file; a line that was cut off goes."""
    with files.storage_errors(file, "write"):
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text() if file.exists() else ""
        cut = len(text.splitlines()) > len(rows)
        if cut:
            file.write_text(text[:text.rfind("\n") + 1])
        with open(file, "a") as out:
            newline = "" if cut or text[-1:] in ("", "\n") else "\n"
            out.write(newline + json.dumps(row) + "\n")
            out.flush()
            os.fsync(out.fileno())
    rows.append(row)


def _same_bytes(plan: Plan, rows: list[dict], file) -> None:
    """Raises UserError where a file of the corpus is not the manifest's, or rows are of others."""
    manifest = {r["name"]: r for r in corpus.read(plan.corpus)}
    for program in {*plan.programs, REFERENCE_PROGRAM}:
        if program not in manifest:
            raise UserError(f"corpus: {plan.corpus} has no {program}, the reference of a history")
        now = corpus.check(plan.corpus, manifest[program])
        other = {r["sha256"] for r in rows if r["program"] == program and "sha256" in r} - {now}
        if other:
            raise UserError(f"rows: {file} has rows of another {program}.mlir.bc (sha256 "
                            f"{min(other)[:12]}) than {plan.corpus} ({now[:12]}); name another "
                            "--rows, or the --corpus of these rows")


# ---- the run ----


def jobs(plan: Plan) -> list[list[Job]]:
    """The compilations of each environment in turn: every release once, then again in the other
    direction, so that a drift of the machine favours no release."""
    manifest = {r["name"]: r for r in corpus.read(plan.corpus)} if plan.kind == "bytes" else {}
    batches = []
    for repetition in range(plan.repetitions):
        for release in plan.releases[::-1 if repetition % 2 else 1]:
            batches.append([
                Job(release, program, target, repetition)
                for program in plan.programs for target in plan.targets
                if target in manifest.get(program, {"targets": ["cpu"]})["targets"]])
    return batches


def run(plan: Plan, file, *, seconds=float("inf")) -> list[dict]:
    """Make the rows of ``plan`` that ``file`` lacks, for at most ``seconds``. -> all of its rows.

    A release that cannot be installed gives rows with the outcome NOT_INSTALLED, one that compiles
    nothing rows with what became of it.
    """
    file, kind, end = pathlib.Path(file), KINDS[plan.kind], time.monotonic() + seconds
    started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())  # not a killed run's references
    rows = read(file)
    _same_bytes(plan._replace(programs=() if plan.kind == "source" else plan.programs), rows, file)
    have = {(r["kind"], r["release"], r["program"], r["target"], r["repetition"]) for r in rows
            if r["role"] == "measured" and r["outcome"] != NOT_INSTALLED}
    reference = None
    with files.staging_folder(plan.folder / "reference") as pinned:
        for batch in jobs(plan):
            todo = [job for job in batch if (plan.kind, *job) not in have]
            if not todo or time.monotonic() > end:
                continue
            name = f"{plan.kind}/{todo[0].release}/{todo[0].repetition}/{started}"
            if reference is None:
                variables = environments.jaxlib(plan.python, REFERENCE_RELEASE, pinned,
                                                plan.folder, ())
                reference = _reference(plan, variables)
            _append(file, rows, {**reference, "kind": plan.kind, "batch": name})
            with files.staging_folder(plan.folder / "release") as folder:
                made = _batch(plan, kind, todo, folder)
                for job, row in made:
                    _append(file, rows, {"kind": plan.kind, "role": "measured", "batch": name,
                                         **job._asdict(), **row})
                    print(line(rows[-1]), flush=True)
            reference = _reference(plan, variables)
            _append(file, rows, {**reference, "kind": plan.kind, "batch": name})
    return rows


def _reference(plan: Plan, variables: dict) -> dict:
    job = Job(REFERENCE_RELEASE, REFERENCE_PROGRAM, "cpu", 0)
    row = _replay(plan, job, variables)
    if row["outcome"] != "ok":
        raise UserError(f"the reference, {job.program} on jaxlib {job.release}, does not compile: "
                        f"{row['outcome']}, {row.get('message', '')}")
    return {"role": "reference", **job._asdict(), **row}


def _batch(plan: Plan, kind: Kind, todo: list[Job], folder: pathlib.Path):
    """-> (job, row) of each job of a release, one after the other."""
    try:
        variables = kind.environment(plan.python, todo[0].release, folder, plan.folder,
                                     plan.targets)
    except UserError as error:
        for job in todo:
            yield job, {"outcome": NOT_INSTALLED, "message": str(error)[:300]}
        return
    for job in todo:
        yield job, {**kind.measure(plan, job, variables),
                    "date": time.strftime("%Y-%m-%d", time.gmtime())}


def line(row: dict) -> str:
    """A row for a terminal."""
    head = f"{row['release']:10} {row['program']} {row['target']} [{row['repetition']}]"
    if row["outcome"] != "ok":
        return f"{head}: {row['outcome']}: {row.get('message', '')}"
    stages = ", ".join(f"{stage} {row[stage]['cpu_s']:.2f}" for stage in KINDS[row["kind"]].stages)
    return f"{head}: CPU seconds {stages}; {count(row['instructions'])} instructions"


def count(value: int | None) -> str:
    """A number of instructions; None where the release does not show them."""
    return "unknown" if value is None else f"{value:,}"


def plan(kind: str, *, spec: str, programs: str, corpus_folder, targets: str, repetitions: int,
         python: str | None, timeout: float, folder=None) -> Plan:
    """A Plan from what a command line has; UserError for what is unknown."""
    if kind not in KINDS:
        raise UserError(f"expected bytes or source, not {kind!r}")
    python = environments.interpreter(python)
    corpus_folder = pathlib.Path(corpus_folder)
    known = ([r["name"] for r in corpus.read(corpus_folder)] if kind == "bytes"
             else list(SOURCES))
    chosen = [w.strip() for w in programs.split(",") if w.strip()] if programs else known
    unknown = [p for p in chosen if p not in known]
    if unknown:
        raise UserError(f"programs: {', '.join(unknown)} is not known; known: {', '.join(known)}")
    chosen_targets = tuple(w.strip() for w in targets.split(",") if w.strip())
    wrong = [t for t in chosen_targets if t not in ("cpu", *PLUGINS)]
    if wrong or not chosen_targets:
        raise UserError(f"targets: {', '.join(wrong) or targets!r} is not known; known: cpu, "
                        f"{', '.join(PLUGINS)}")
    folder = pathlib.Path(folder or pathlib.Path(tempfile.gettempdir(), "ddpm_history"))
    return Plan(kind, releases(spec, kind, python), tuple(chosen),
                chosen_targets, repetitions, corpus_folder, python, timeout, folder)
