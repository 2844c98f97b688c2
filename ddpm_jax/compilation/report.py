"""Trace, lower and compile a program stage by stage, with a report as plain data.

Times are wall and CPU seconds of this process. Sizes and counts come from the compiler's own text,
memory analysis and cost analysis; a figure that a backend lacks, or that is negative or not finite,
is None and prints as n/a.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import time
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax._src.lib import _jax  # portable artifacts have no public writer
from jax._src.lib.mlir.dialects import hlo as dialect
from jax.experimental import serialize_executable

from ddpm_jax.compilation import hlo
from ddpm_jax.compilation.cache import (
    count_compilations,
    key_parts,
    without_compilation_cache,
)
from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import write_bytes

SCHEMA = 1
# What people type for --optimization_level -> XLA's EffortLevel. O2 is XLA's own default.
LEVELS = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}
MEMORY_KINDS = ("argument", "output", "alias", "temp", "generated_code")


class Compiled(NamedTuple):
    """report: plain data, see `compile_and_report`; lowered, compiled: JAX's stages, compiled is
    None where the program does not fit the device's memory."""

    report: dict
    lowered: Any
    compiled: Any


@contextlib.contextmanager
def _clock(row: dict, stage: str):
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    row[stage] = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def compiler_options(level: str | None = None, pairs=()) -> dict[str, Any]:
    """--optimization_level and 'key=value' pairs as XLA's options.

    Values are numbers or true/false where they read as such. Raises UserError on a malformed pair
    or an unknown level.
    """
    options: dict[str, Any] = {}
    if level:
        if level not in LEVELS:
            raise UserError(f"optimization_level: {level!r} is not one of {', '.join(LEVELS)}")
        options["optimization_level"] = LEVELS[level]
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"compiler_options: {pair!r} is not of the form key=value")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def count_equations(jaxpr) -> int:
    """Equations of a jaxpr and of every jaxpr inside it, loop bodies once."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns")
                                         or hasattr(v, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += count_equations(inner)
    return total


def sensible(value, *, zero=False) -> float | None:
    """A cost model's figure, or None where it is absent, negative, not finite, or 0 unless `zero`
    may be: 'n/a' is better than nonsense."""
    if value is None or not 0 <= value < float("inf") or (value == 0 and not zero):
        return None
    return float(value)


def cost(compiled) -> dict[str, float | None]:
    """XLA's own cost model for one device: estimated, bodies of loops counted once."""
    try:
        model = compiled.cost_analysis() or {}
    except Exception:  # a backend without a cost model raises its own type
        model = {}
    if isinstance(model, list):
        model = model[0] if model else {}
    return {"status": "estimated", "flops": sensible(model.get("flops")),
            "bytes": sensible(model.get("bytes accessed")),
            "transcendentals": sensible(model.get("transcendentals"), zero=True),
            "optimal_seconds": sensible(model.get("optimal_seconds"))}


def memory(compiled) -> dict[str, int | None]:
    """Bytes on one device by kind, and their peak: arguments + results - aliased + temporaries +
    code. What is donated is in arguments and in alias."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return dict.fromkeys((*MEMORY_KINDS, "peak"))
    kinds = {k: int(getattr(analysis, f"{k}_size_in_bytes")) for k in MEMORY_KINDS}
    peak = sum(kinds.values()) - 2 * kinds["alias"]
    return {**kinds, "peak": peak}


def versions() -> dict[str, str]:
    """Everything that decides what a compiler makes of a program."""
    found = {}
    for name in ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {**found, "python": platform.python_version(), "machine": platform.machine(),
            "cpus": str(os.cpu_count()), "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


def fingerprint(text: str) -> str:
    """16 hex digits of a StableHLO module without its source locations."""
    lines = (line for line in text.splitlines() if not line.startswith("#loc"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def compile_and_report(jitted, args, *, options=None, programs_cache=True) -> Compiled:
    """Compile jitted(*args) for abstract or real `args`, stage by stage.

    jitted: what jax.jit or jax.pmap returns. options: XLA's compiler options. programs_cache=False
    leaves the persistent cache alone (it cannot read programs for absent devices back).
    Raises UserError for an option that XLA does not know. A program that does not fit the device's
    memory is no error: `compiled` is None and report['fits'] False, with XLA's message.
    """
    seconds: dict[str, dict[str, float]] = {}
    with _clock(seconds, "trace"):
        traced = None
        with contextlib.suppress(AttributeError):  # what jax.pmap returns has no trace
            traced = jitted.trace(*args)
        jaxpr = traced.jaxpr if traced else jax.make_jaxpr(lambda *a: jitted(*a))(*args)
    with _clock(seconds, "lower"):
        lowered = traced.lower() if traced else jitted.lower(*args)
    text = lowered.as_text()
    stablehlo = hlo.stablehlo_opcodes(text)
    report = {
        "schema": SCHEMA, "seconds": seconds, "versions": versions(),
        "compiler_options": dict(options or {}), "fingerprint": fingerprint(text),
        "jaxpr_equations": count_equations(jaxpr.jaxpr),
        "stablehlo": {"instructions": sum(stablehlo.values()), "opcodes": stablehlo},
    }
    cached = contextlib.nullcontext if programs_cache else without_compilation_cache
    try:
        with (cached(), key_parts() as key, count_compilations() as done,
              _clock(seconds, "compile")):
            compiled = lowered.compile(compiler_options=dict(options or {}) or None)
    except Exception as error:  # XlaRuntimeError, ValueError: distinguished by their messages
        message = " ".join(str(error).split())
        if "compile option" in message.lower():
            raise UserError(f"compiler_options: {message[:200]}") from error
        if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
            raise
        return Compiled({**report, "fits": False, "why": message[:600]}, lowered, None)
    optimized = compiled.as_text()
    report |= {"hlo": hlo.summary(optimized), "memory": memory(compiled),
               "cost": cost(compiled), "executable_bytes": executable_bytes(compiled),
               "optimized": hlo.fingerprint(optimized), "cache_key": dict(key),
               "cache": done[-1].cache if done else "off"}
    return Compiled(report, lowered, compiled)


def executable_bytes(compiled) -> int | None:
    """Size of the serialised executable, None where the backend cannot serialise it."""
    try:
        return len(serialize_executable.serialize(compiled)[0])
    except Exception:  # a backend that cannot raises its own type
        return None


def check_folder(folder: str | os.PathLike | None, flag="out") -> pathlib.Path | None:
    """`folder` as a path; UserError naming ``flag`` where something is in it already. None stays
    None."""
    if folder is None:
        return None
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag}: {folder} exists and is not an empty folder; name another")
    return folder


def write_artifacts(result: Compiled, folder: str | os.PathLike) -> list[str]:
    """Write report.json, stablehlo.mlir, a portable StableHLO artifact, the unoptimised HLO as text
    and protobuf, and the optimised HLO into a new or empty `folder`. -> names of the files."""
    folder = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    computation = result.lowered.compiler_ir("hlo")
    files = {
        "stablehlo.mlir": result.lowered.as_text().encode(),
        "unoptimized_hlo.txt": computation.as_hlo_text().encode(),
        "unoptimized_hlo.pb": computation.as_serialized_hlo_module_proto(),
    }
    portable = portable_artifact(result.lowered)
    if portable is not None:
        files["stablehlo.mlir.bc"] = portable
    if result.compiled is not None:
        files["optimized_hlo.txt"] = result.compiled.as_text().encode()
    files["report.json"] = (json.dumps(result.report, indent=1) + "\n").encode()
    for name, data in files.items():
        write_bytes(folder / name, data)
    return sorted(files)


def portable_artifact(lowered) -> bytes | None:
    """The module as versioned StableHLO bytecode, which other tools and later versions read; None
    where it holds operations that StableHLO does not have. Shardings stay as attributes of the
    dialect that JAX writes them in (sdy)."""
    version = dialect.get_version_from_compatibility_requirement(
        dialect.StablehloCompatibilityRequirement.WEEK_12)
    module = lowered.compiler_ir("stablehlo")
    try:
        # The last argument keeps what is not StableHLO (sdy) beside it instead of refusing.
        return _jax.mlir.serialize_portable_artifact(module, version, True)
    except Exception:  # the dialect's own error types are not exported
        return None


# ---- as a table ----


def size(count: float | None) -> str:
    """Bytes with a decimal unit: 1,250,000 -> '1.25 MB'; None -> 'n/a'."""
    return quantity(count, "B")


def quantity(value: float | None, unit: str = "") -> str:
    """A number with a decimal prefix and three digits; None -> 'n/a'."""
    if value is None:
        return "n/a"
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _seconds(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _top(table: dict, count: int) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in list(table.items())[:count])


def render(report: dict) -> str:
    """The report as lines for a terminal. Estimated figures are marked."""
    rows: list[tuple[str, str]] = []
    about, seconds = report.get("about", {}), report["seconds"]
    for key in ("program", "config", "machine", "runner", "dtype", "batch", "step"):
        if key in about:
            value = about[key]
            rows.append((key, ", ".join(f"{k} {v}" for k, v in value.items())
                         if isinstance(value, dict) else str(value)))
    rows.append(("seconds", ", ".join(
        f"{stage} {s['wall_s']:.1f} (CPU {s['cpu_s']:.1f})" for stage, s in seconds.items())))
    rows.append(("source", f"{report['jaxpr_equations']:,} jaxpr equations, "
                 f"{report['stablehlo']['instructions']:,} StableHLO operations, fingerprint "
                 f"{report['fingerprint']}"))
    fit = report.get("fit")
    if fit:
        rows.append(("fits", f"yes: {size(fit['peak'])} of {size(fit['hbm'])} a device, "
                     f"{fit['free']:.1%} free" if fit["fits"] else
                     f"NO: {size(fit['peak'])} of {size(fit['hbm'])} a device"))
    if "hlo" not in report:
        rows.append(("fits", f"NO: {report.get('why', '')}"))
    else:
        rows += _program_rows(report)
    roof = report.get("roofline")
    if roof:
        rows.append(("roofline", f"{_seconds(roof['seconds'])} a call at least, bound by "
                     f"{roof['bound']} (compute {_seconds(roof['compute_s'])}, memory "
                     f"{_seconds(roof['memory_s'])}, all-reduce {_seconds(roof['all_reduce_s'])}; "
                     f"{quantity(roof['intensity'])} FLOP/byte, ridge {quantity(roof['ridge'])}) "
                     "[estimated]"))
    timed = report.get("at_measured_rates")
    if timed:
        dearest = ", ".join(f"{kind} {_seconds(s)}" for kind, s in timed["by_class"].items())
        rows.append(("at measured rates", f"{_seconds(timed['seconds'])} a call: {dearest} "
                     f"[estimated; rates of each class measured on {timed['device_kind']}, "
                     f"{timed['dtype']}, commit {timed['commit']}, {timed['date']}]"))
    for at in report.get("speed", []):
        rows.append((f"at {at['mfu']:.0%} MFU", f"{at['steps_per_s']:.3g} calls/s, whole run "
                     f"{at['hours']:.3g} h, {at['chip_hours']:.3g} chip-hours [estimated]"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _program_rows(report: dict) -> list[tuple[str, str]]:
    found, memory_kinds, model = report["hlo"], report["memory"], report["cost"]
    rows = [
        ("HLO", f"{found['instructions']:,} instructions ({found['entry_instructions']:,} in the "
         f"entry), {found['fusions']:,} fusions, {found['copies']:,} copies, "
         f"{found['transposes']:,} transposes; executable {size(report['executable_bytes'])}"),
        ("operations", _top(found["opcodes"], 8)),
        ("collectives", ", ".join(f"{n} {c['count']} ({size(c['bytes'])})"
                                  for n, c in found["collectives"].items()) or "none"),
        ("memory", ", ".join(f"{k} {size(v)}" for k, v in memory_kinds.items())),
        ("kernels", f"{found['kernels']:,} a call; {size(found['bytes'])} moved, "
         f"{size(found['bytes_sliced'])} counting only what slices touch [estimated]"),
    ]
    if found["custom_calls"]:
        rows.append(("custom calls", _top(found["custom_calls"], 6)))
    for name, row in found["by_class"].items():
        rows.append((f"  {name}", f"{row['kernels']:,} kernels, {size(row['bytes'])}"))
    unknown = [loop for loop in found["loops"] if loop["trips"] is None]
    known = [loop["trips"] for loop in found["loops"] if loop["trips"] is not None]
    if known:
        rows.append(("loops", f"bodies times {', '.join(map(str, known))}; XLA's own cost model "
                     "below counts a body once"))
    if unknown:
        rows.append(("loops", f"{len(unknown)} of unknown length, counted once"))
    rows.append(("XLA's cost", f"{quantity(model['flops'], 'FLOP')}, {size(model['bytes'])}, "
                 f"optimal {_seconds(model['optimal_seconds'])}, a device [estimated]"))
    work = report.get("work")
    if work:
        rows.append(("work", f"{quantity(work['flops_per_call'], 'FLOP')} a call, counted by hand "
                     f"({quantity(work['flops_per_image'], 'FLOP')} an image)"))
    return rows
