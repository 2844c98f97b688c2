"""A benchmark of XLA compilation: the product of programs, configs, runners, types, levels and
machines, each compiled in a process of its own; a comparison with an older result; a corpus."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from ddpm_jax.benchmark import repeats
from ddpm_jax.compilation import passes, report
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

AXES = ("program", "config", "runner", "dtype", "level", "topology")
DEFAULTS = {"program": ["train_step"], "config": ["digits"], "runner": ["shard_map"],
            "dtype": ["float32"], "level": ["O0"], "topology": ["cpu:8"], "set": [], "sets": [[]]}
# The paper's two 256x256 models, their state whole and cut over 8 neighbours.
CUT = {"config": ["lsun_bedroom", "lsun_bedroom_large"], "runner": ["jit"], "dtype": ["bfloat16"],
       "set": ["train.clip_scope=global", "train.steps_per_dispatch=1"],
       "sets": [[], ["parallel.shards=8"], ["parallel.shards=8", "parallel.cut=params"]]}
MATRICES = {
    # A minute on two cores: what a change to the code should be tried with.
    "small": {"program": ["train_step", "sample"], "runner": ["jit", "shard_map"],
              "topology": ["cpu:2"], "set": ["train.clip_replicas=2"]},
    # The paper's step on machines that are not there; about ten minutes of two cores.
    "absent": {"config": ["cifar10"], "dtype": ["bfloat16"],
               "topology": ["v3-8", "v5litepod-8", "h100:8"]},
    "programs": {"program": ["train_step", "sample", "evaluate", "inception"],
                 "runner": ["jit", "pmap", "shard_map"], "dtype": ["float32", "bfloat16"],
                 "topology": ["cpu:8"], "set": ["train.clip_replicas=8",
                                                "sampler.batch_size=64"]},
    # Each cell takes one to two minutes of two cores.
    "cut": {**CUT, "topology": ["v5litepod-8", "h100:8"]},
    "cut_pod": {**CUT, "topology": ["v5e-256"],
                "set": [*CUT["set"], "train.batch_size=2048", "train.steps=100000"]},
}


class Cell(NamedTuple):
    """One compilation. settings: further config fields, 'a.b=c', of the table's set and of one of
    its sets."""

    program: str
    config: str
    runner: str
    dtype: str
    level: str | None
    topology: str
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        parts = [self.program, self.config, self.runner, self.dtype, self.level or "default",
                 self.topology, *self.settings]
        return "/".join(parts)


def cells(spec: str) -> list[Cell]:
    """The cells of a matrix: a name of MATRICES or a JSON file of lists by axis.

    Raises UserError for an unknown name, axis, or a file that is not such a table.
    """
    if spec in MATRICES:
        table = MATRICES[spec]
    else:
        try:
            table = json.loads(pathlib.Path(spec).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"matrix: {spec!r} is neither one of {', '.join(MATRICES)} nor a "
                            f"readable JSON file ({error})") from None
    unknown = set(table) - set(DEFAULTS) if isinstance(table, dict) else {"not a table"}
    if unknown or not all(isinstance(v, list) for v in table.values()):
        raise UserError(f"matrix: {spec!r} must hold lists under {', '.join(DEFAULTS)}"
                        + (f"; not {', '.join(sorted(unknown))}" if unknown else ""))
    full = {**DEFAULTS, **table}
    return [Cell(*values, (*full["set"], *more))
            for *values, more in itertools.product(*(full[axis] for axis in (*AXES, "sets")))]


def command(cell: Cell, out: str) -> list[str]:
    """The `ddpm compile` that measures a cell into the folder `out`."""
    words = [sys.executable, "-m", "ddpm_jax", "compile", f"--config={cell.config}",
             f"--config.model.dtype={cell.dtype}", f"--program={cell.program}",
             f"--runner={cell.runner}", f"--topology={cell.topology}", f"--out={out}", "--json"]
    if cell.level:
        words.append(f"--optimization_level={cell.level}")
    return words + [f"--config.{setting}" for setting in cell.settings]


class _ProcessError(Exception):
    """A process of a cell ended badly; the message is its last line."""


def _process(cell: Cell, out: str, variables: dict) -> tuple[dict, str]:
    """`ddpm compile` of a cell in a process of its own. -> (report, what it logged)."""
    done = subprocess.run(command(cell, out), env={**os.environ, **variables},
                          capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise _ProcessError(lines[-1] if lines else "no message")
    return json.loads(pathlib.Path(out, "report.json").read_text()), done.stderr


def _pass_times(found: dict, log: str) -> dict:
    """Where the time of a compilation went, by its log of XLA's passes."""
    total = found["seconds"]["compile"]["wall_s"]
    return {"compile_wall_s": total, "stages": passes.stages(log),
            "passes": [{**p._asdict(), "share": p.seconds / total} for p in passes.read(log)]}


def run_cell(cell: Cell, export: pathlib.Path | None = None, *, repeat=1, with_passes=False):
    """Compile a cell in ``repeat`` processes, each with an empty persistent cache and a hash seed
    of its own, and where the machine is this one's CPU once more with the first one's full cache.

    -> the report of the process with the fewest CPU seconds in XLA. 'warm': seconds of the run with
    the full cache, None for machines that are absent (JAX cannot read their programs back), and
    'warm_cache' whether it really was read ('hit'); 'repeats': see repeats.ranges; 'passes': as
    `--passes` prints. A cell that fails has 'error' only."""
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder, "cache")  # one path for all: it is part of JAX's cache key

        def process(name, seed, **log):
            result = _process(cell, f"{folder}/{name}", {
                **log, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONHASHSEED": str(seed),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})
            if cache.exists():
                cache.rename(f"{cache}_{name}")
            return result

        try:
            reports = [process(str(n), n)[0] for n in range(repeat)]
            warm = times = None
            if cell.topology.startswith("cpu"):
                first = pathlib.Path(f"{cache}_0")
                if first.exists():
                    first.rename(cache)
                warm, _ = process("warm", repeat)
            if with_passes:
                times = _pass_times(*process("passes", 0, **passes.VARIABLES))
        except _ProcessError as error:
            return {"cell": cell.name, "error": str(error)}
        if export is not None:
            _export(pathlib.Path(folder, "0"), export, cell, reports[0])
    best = min(reports, key=lambda r: r["seconds"]["compile"]["cpu_s"])
    return {"cell": cell.name, **best, "warm": warm and warm["seconds"],
            **({"warm_cache": warm["cache"]} if warm else {}),
            **({"repeats": repeats.ranges(reports)} if repeat > 1 else {}),
            **({"passes": times} if times else {})}


def run(cells: list[Cell], export=None, *, repeat=1, with_passes=False) -> list[dict]:
    """The reports of all cells, in order, as ``run_cell`` makes them; export: folder of the corpus.
    """
    if export:
        _exported(pathlib.Path(export))
    rows = []
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
        rows.append(run_cell(cell, pathlib.Path(export) if export else None, repeat=repeat,
                             with_passes=with_passes))
    return rows


def _export(source: pathlib.Path, target: pathlib.Path, cell: Cell, found: dict) -> None:
    """Add a cell's StableHLO to the corpus in `target`; equal modules are kept once."""
    target.mkdir(parents=True, exist_ok=True)
    name = f"{cell.program}-{found['fingerprint']}"
    modules = []
    for suffix in ("mlir", "mlir.bc"):
        if (source / f"stablehlo.{suffix}").exists():
            shutil.copyfile(source / f"stablehlo.{suffix}", target / f"{name}.{suffix}")
            modules.append(f"{name}.{suffix}")
    rows = [r for r in _exported(target) if r["cell"] != cell.name]
    rows.append({"cell": cell.name, **cell._asdict(), "files": modules,
                 "fingerprint": found["fingerprint"], "stablehlo": found["stablehlo"],
                 "compiler_options": found["compiler_options"], "versions": found["versions"]})
    files.write_json(target / "manifest.json", rows, sort_keys=False)


def _exported(target: pathlib.Path) -> list[dict]:
    """Rows of the manifest of exported modules in ``target``; UserError where it is another's."""
    file = target / "manifest.json"
    rows = files.read_json(file) if file.exists() else []
    if not (isinstance(rows, list) and all(isinstance(r, dict) and "cell" in r for r in rows)):
        raise UserError(f"export: {file} is not one of ddpm bench compile --export; name another "
                        "folder")
    return rows


def read(file) -> list[dict]:
    """Rows of a result file; UserError where it is none."""
    try:
        rows = json.loads(pathlib.Path(file).read_text())
        for row in rows:
            _ = row["cell"], "error" in row or [m.read(row) for m in repeats.METRICS.values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"baseline: {file} is not a result of `ddpm bench compile` ({error})"
                        ) from None
    return rows


def table(rows: list[dict]) -> str:
    """Cells as lines for a terminal."""
    lines = [("cell", "trace", "lower", "compile", "warm", "jaxpr", "StableHLO", "HLO", "kernels",
              "collectives", "moved", "peak")]
    for r in rows:
        if "error" in r:
            lines.append((r["cell"], r["error"], *[""] * 10))
            continue
        s, found = r["seconds"], r["hlo"]
        warm = f"{r['warm']['compile']['wall_s']:.1f}" if r.get("warm") else "n/a"
        lines.append((
            r["cell"], *(f"{s[k]['wall_s']:.1f}" for k in ("trace", "lower", "compile")), warm,
            f"{r['jaxpr_equations']:,}", f"{r['stablehlo']['instructions']:,}",
            f"{found['instructions']:,}", f"{found['kernels']:,}",
            str(sum(c["count"] for c in found["collectives"].values())),
            report.size(found["bytes"]), report.size(r["memory"]["peak"])))
    widths = [max(len(line[i]) for line in lines if line[2] or not i) for i in range(12)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
                     for line in lines)
