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
from collections.abc import Callable
from typing import NamedTuple

from ddpm_jax.compilation import report
from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import write_json

AXES = ("program", "config", "runner", "dtype", "level", "topology")
DEFAULTS = {"program": ["train_step"], "config": ["digits"], "runner": ["shard_map"],
            "dtype": ["float32"], "level": ["O0"], "topology": ["cpu:8"], "set": []}
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
}


class Cell(NamedTuple):
    """One compilation. settings: further config fields, 'a.b=c'."""

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
    return [Cell(*values, tuple(full["set"]))
            for values in itertools.product(*(full[axis] for axis in AXES))]


def command(cell: Cell, out: str) -> list[str]:
    """The `ddpm compile` that measures a cell into the folder `out`."""
    words = [sys.executable, "-m", "ddpm_jax", "compile", f"--config={cell.config}",
             f"--config.model.dtype={cell.dtype}", f"--program={cell.program}",
             f"--runner={cell.runner}", f"--topology={cell.topology}", f"--out={out}", "--json"]
    if cell.level:
        words.append(f"--optimization_level={cell.level}")
    return words + [f"--config.{setting}" for setting in cell.settings]


def run_cell(cell: Cell, export: pathlib.Path | None = None) -> dict:
    """Compile a cell with an empty persistent cache, and where the machine is this one's CPU again
    with a full one. -> its report; 'warm' holds the second run's seconds, None for machines that
    are absent (JAX cannot read their programs back). A cell that fails has 'error' only."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
                       "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        reports = []
        for temperature in ("cold", "warm") if cell.topology.startswith("cpu") else ("cold",):
            out = f"{folder}/{temperature}"
            done = subprocess.run(command(cell, out), env=environment, capture_output=True,
                                  text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                return {"cell": cell.name, "error": lines[-1] if lines else "no message"}
            reports.append(json.loads(pathlib.Path(out, "report.json").read_text()))
        if export is not None:
            _export(pathlib.Path(folder, "cold"), export, cell, reports[0])
    warm = reports[1]["seconds"] if len(reports) > 1 else None
    return {"cell": cell.name, **reports[0], "warm": warm}


def run(cells: list[Cell], export=None) -> list[dict]:
    """The reports of all cells, in order; export: folder of the corpus."""
    rows = []
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
        rows.append(run_cell(cell, pathlib.Path(export) if export else None))
    return rows


def _export(source: pathlib.Path, target: pathlib.Path, cell: Cell, found: dict) -> None:
    """Add a cell's StableHLO to the corpus in `target`; equal modules are kept once."""
    target.mkdir(parents=True, exist_ok=True)
    name = f"{cell.program}-{found['fingerprint']}"
    files = []
    for suffix in ("mlir", "mlir.bc"):
        if (source / f"stablehlo.{suffix}").exists():
            shutil.copyfile(source / f"stablehlo.{suffix}", target / f"{name}.{suffix}")
            files.append(f"{name}.{suffix}")
    manifest = target / "manifest.json"
    rows = json.loads(manifest.read_text()) if manifest.exists() else []
    rows = [r for r in rows if r["cell"] != cell.name]
    rows.append({"cell": cell.name, **cell._asdict(), "files": files,
                 "fingerprint": found["fingerprint"], "stablehlo": found["stablehlo"],
                 "compiler_options": found["compiler_options"], "versions": found["versions"]})
    write_json(manifest, rows, sort_keys=False)


class Metric(NamedTuple):
    """read(report) -> number or None; times, plus: a new value above old * times + plus is a
    regression."""

    read: Callable
    times: float
    plus: float = 0.0


METRICS = {
    "jaxpr equations": Metric(lambda r: r["jaxpr_equations"], 1.02),
    "StableHLO operations": Metric(lambda r: r["stablehlo"]["instructions"], 1.02),
    "HLO instructions": Metric(lambda r: r["hlo"]["instructions"], 1.03),
    "kernels": Metric(lambda r: r["hlo"]["kernels"], 1.02),
    "bytes moved": Metric(lambda r: r["hlo"]["bytes"], 1.02),
    "copies": Metric(lambda r: r["hlo"]["copies"], 1.05, 4),
    "transposes": Metric(lambda r: r["hlo"]["transposes"], 1.05, 4),
    "collectives": Metric(
        lambda r: sum(c["count"] for c in r["hlo"]["collectives"].values()), 1.0),
    "collective bytes": Metric(
        lambda r: sum(c["bytes"] for c in r["hlo"]["collectives"].values()), 1.01),
    "peak memory": Metric(lambda r: r["memory"]["peak"], 1.03),
    "executable bytes": Metric(lambda r: r["executable_bytes"], 1.1),
    # Seconds differ between machines and hours: only a doubling counts.
    "compile CPU seconds": Metric(lambda r: r["seconds"]["compile"]["cpu_s"], 2.0, 5),
    "warm compile CPU seconds": Metric(
        lambda r: r["warm"]["compile"]["cpu_s"] if r.get("warm") else None, 2.0, 2),
}


def regressions(new: list[dict], old: list[dict]) -> list[str]:
    """One line for every metric of a cell that got worse than its limit, and for every cell that
    fails now and did not before, or is gone."""
    before = {r["cell"]: r for r in old}
    now = {r["cell"]: r for r in new}
    lines = [f"{cell}: not measured any more" for cell in before if cell not in now]
    for cell, report_now in now.items():
        report_old = before.get(cell)
        if report_old is None or "error" in report_old:
            continue
        if "error" in report_now:
            lines.append(f"{cell}: fails now ({report_now['error']})")
            continue
        for name, metric in METRICS.items():
            a, b = metric.read(report_old), metric.read(report_now)
            if a is None or b is None:
                continue
            limit = a * metric.times + metric.plus
            if b > limit:
                lines.append(f"{cell}: {name} {a:,.6g} -> {b:,.6g} (limit {limit:,.6g})")
    return lines


def read(file) -> list[dict]:
    """Rows of a result file; UserError where it is none."""
    try:
        rows = json.loads(pathlib.Path(file).read_text())
        if not all("cell" in r for r in rows):
            raise ValueError("rows without a cell")
    except (OSError, ValueError, TypeError) as error:
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
