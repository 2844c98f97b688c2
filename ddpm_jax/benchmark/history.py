"""What programs cost to compile, release by release: the runs of `ddpm bench history`.

`bytes`: the same file of the corpus through every jaxlib (XLA's share). `source`: the same source
of this project on every JAX that it supports (trace, lower, compile). Each release gets an
environment of its own that is removed after use. Before and after each release a pinned jaxlib
compiles a pinned file: what is compared is CPU seconds as a ratio to that, so that a machine that
others use, or one that is another tomorrow, still gives a history. A line of the rows file is one
compilation; one that is there is not made again.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from ddpm_jax.benchmark import corpus, matrix, replay
from ddpm_jax.errors import UserError

REFERENCE_RELEASE, REFERENCE_PROGRAM = "0.4.34", "ddpm_digits_flax_f32_sample"
NEEDED = ("numpy", "ml_dtypes", "scipy")  # by a jaxlib without JAX
OLDEST_SUPPORTED = (0, 10, 2)  # as in setup.cfg
ROOT = pathlib.Path(__file__).resolve().parents[2]


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


def version_key(release: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", release))


def releases(spec: str, kind: str, python: str) -> tuple[str, ...]:
    """Releases from 'A,B' or 'all': those that the package index has for ``python``, oldest first.

    Raises UserError for what is no release, and where the index cannot be asked.
    """
    if spec != "all":
        found = tuple(word.strip() for word in spec.split(",") if word.strip())
        wrong = [r for r in found if not re.fullmatch(r"\d+(\.\d+)+", r)]
        if wrong or not found:
            raise UserError(f"releases: {', '.join(wrong) or spec!r} is not a release such as "
                            "0.10.2; give a list between commas, or all")
        return tuple(sorted(set(found), key=version_key))
    done = subprocess.run([python, "-m", "pip", "index", "versions", "jaxlib"],
                          capture_output=True, text=True, check=False)
    listed = re.search(r"Available versions: (.*)", done.stdout)
    if not listed:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"releases: `{python} -m pip index versions jaxlib` fails ({last}); give "
                        "a list, such as --releases=0.10.1,0.10.2")
    found = (r.strip() for r in listed[1].split(","))
    lowest = KINDS[kind].lowest
    return tuple(sorted((r for r in found if version_key(r) >= lowest), key=version_key))


# ---- environments ----


def install(python: str, folder: pathlib.Path, packages, *, dependencies=False) -> None:
    """Packages into a folder of their own, for PYTHONPATH, by uv where there is one, else by pip.

    Raises UserError with the installer's last line.
    """
    uv = shutil.which("uv")
    words = [uv, "pip", "install", "-q", "--python", python] if uv else [
        python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    words += ["--target", str(folder), *([] if dependencies else ["--no-deps"]), *packages]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"cannot install {' '.join(packages)}: {(lines or ['no message'])[-1]}")


def _jaxlib_environment(plan: Plan, release: str, folder: pathlib.Path) -> dict:
    """A jaxlib alone. -> environment variables."""
    shared = plan.folder / "needed"
    if not shared.exists():
        install(plan.python, shared, NEEDED)
    install(plan.python, folder, [f"jaxlib=={release}"])
    for target in plan.targets:
        if target in PLUGINS:
            with contextlib.suppress(UserError):  # its row will be an error: there is no plugin
                PLUGINS[target].install(plan.python, folder, release)
    return {"PYTHONPATH": f"{folder}:{shared}"}


def _install_cuda(python: str, folder: pathlib.Path, release: str) -> None:
    install(python, folder, [f"jax-cuda12-pjrt=={release}"])


def _install_libtpu(python: str, folder: pathlib.Path, release: str) -> None:
    """The libtpu that JAX of this release pins."""
    install(python, folder, [f"jax=={release}"])
    [metadata] = folder.glob("jax-*.dist-info/METADATA")
    pinned = re.search(r"^Requires-Dist: (libtpu)\s*\(?([^);]*)\)?\s*;.*tpu", metadata.read_text(),
                       re.MULTILINE)
    if not pinned:
        raise UserError(f"jax {release} pins no libtpu")
    install(python, folder, [f"libtpu{pinned[2].strip()}"])


class Plugin(NamedTuple):
    """An accelerator's compiler. install(python, folder, release); library: in the folder; options:
    further flags of replay.py."""

    install: Callable
    library: str
    options: tuple[str, ...] = ()


H100 = pathlib.Path(__file__).resolve().parent.parent / "compilation/h100.txtpb"
PLUGINS = {
    "h100": Plugin(_install_cuda, "jax_plugins/xla_cuda12/xla_cuda_plugin.so", (f"--gpu={H100}",)),
    "v5e": Plugin(_install_libtpu, "libtpu/libtpu.so")}


def _jax_environment(plan: Plan, release: str, folder: pathlib.Path) -> dict:
    """A JAX and its jaxlib before everything else that this project needs."""
    if not (ROOT / "setup.cfg").exists():
        raise UserError("the history of the source needs a checkout of it; this is an installed "
                        "package")
    shared = plan.folder / "project"
    if not shared.exists():
        install(plan.python, shared, [str(ROOT)], dependencies=True)
    install(plan.python, folder, [f"jax=={release}", f"jaxlib=={release}"])
    return {"PYTHONPATH": f"{folder}:{ROOT}:{shared}", "JAX_COMPILATION_CACHE_DIR": "",
            "JAX_PLATFORMS": "cpu"}


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
    return {"outcome": "ok", **found["seconds"], **counts, "jax": found["versions"]["jax"],
            "jaxlib": found["versions"]["jaxlib"], "python": found["versions"]["python"],
            "jaxpr_equations": found["jaxpr_equations"],
            "stablehlo": found["stablehlo"]["instructions"],
            "executable_bytes": found["executable_bytes"]}


class Kind(NamedTuple):
    """environment(plan, release, folder) -> variables; measure(plan, job, variables) -> row;
    stages: of a row, with seconds; lowest: release that can be measured."""

    environment: Callable
    measure: Callable
    stages: tuple[str, ...]
    lowest: tuple[int, ...]


KINDS = {"bytes": Kind(_jaxlib_environment, _replay, ("read", "compile"), (0, 4, 34)),
         "source": Kind(_jax_environment, _from_source, ("trace", "lower", "compile"),
                        OLDEST_SUPPORTED)}


# ---- the run ----


def read(file) -> list[dict]:
    """Rows of a history, a JSON object a line; a last line that was cut off is dropped."""
    file = pathlib.Path(file)
    if not file.exists():
        return []
    rows = []
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not {"kind", "release", "program", "outcome"} <= set(row):
                raise ValueError("not a row of a history")
        except (ValueError, TypeError) as error:
            if number == len(lines) and not isinstance(error, TypeError) and line[:1] == "{":
                break
            raise UserError(f"rows: {file} line {number}: {error}; name another file") from None
        rows.append(row)
    return rows


def _append(file: pathlib.Path, rows: list[dict], row: dict) -> None:
    """Adds a row to the file and to ``rows``; a last line that was cut off goes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text() if file.exists() else ""
    if text and not text.endswith("\n"):
        file.write_text(text[:text.rfind("\n") + 1])
    with open(file, "a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())
    rows.append(row)


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

    A release that cannot be installed, or compiles nothing, gives rows that say so.
    """
    file, kind, end = pathlib.Path(file), KINDS[plan.kind], time.monotonic() + seconds
    rows = read(file)
    have = {(r["kind"], r["release"], r["program"], r["target"], r["repetition"]) for r in rows
            if r["role"] == "measured"}
    reference = None
    plan.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ddpm_reference_", dir=plan.folder) as pinned:
        for batch in jobs(plan):
            todo = [job for job in batch if (plan.kind, *job) not in have]
            if not todo or time.monotonic() > end:
                continue
            name = f"{plan.kind}/{todo[0].release}/{todo[0].repetition}"
            if reference is None:
                variables = _jaxlib_environment(plan._replace(targets=("cpu",)),
                                                REFERENCE_RELEASE, pathlib.Path(pinned))
                reference = _reference(plan, variables)
            _append(file, rows, {**reference, "kind": plan.kind, "batch": name})
            with tempfile.TemporaryDirectory(prefix="ddpm_release_", dir=plan.folder) as folder:
                made = _batch(plan, kind, todo, pathlib.Path(folder))
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
        variables = kind.environment(plan, todo[0].release, folder)
    except UserError as error:
        for job in todo:
            yield job, {"outcome": "error", "message": str(error)[:300]}
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
    return f"{head}: CPU seconds {stages}; {row['instructions']:,} instructions"


def plan(kind: str, *, spec: str, programs: str, corpus_folder, targets: str, repetitions: int,
         python: str | None, timeout: float, folder=None) -> Plan:
    """A Plan from what a command line has; UserError for what is unknown."""
    if kind not in KINDS:
        raise UserError(f"expected bytes or source, not {kind!r}")
    python = _interpreter(python)
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


def _interpreter(python: str | None) -> str:
    found = shutil.which(python) if python else sys.executable
    if not found:
        raise UserError(f"python: {python!r} is not found; give its path")
    return found
