"""What differs between compilations of one program: between processes, and against a baseline."""

import collections
from collections.abc import Callable
from typing import NamedTuple

LEAST, SPREADS = 0.15, 3.0  # a time may grow by 15 %, or by three times its measured spread
DEAREST = 10


class Metric(NamedTuple):
    """read(report) -> number or None. A new value above old * times + plus is a regression; for
    seconds only where their spread was not measured (bench compile --compilations)."""

    read: Callable
    times: float
    plus: float = 0.0
    seconds: bool = False


def _stage(name: str) -> Callable:
    return lambda r: r["seconds"][name]["cpu_s"]


def _collectives(key: str) -> Callable:
    return lambda r: sum(c[key] for c in r["hlo"]["collectives"].values())


METRICS = {
    "jaxpr equations": Metric(lambda r: r["jaxpr_equations"], 1.02),
    "StableHLO operations": Metric(lambda r: r["stablehlo"]["instructions"], 1.02),
    "HLO instructions": Metric(lambda r: r["hlo"]["instructions"], 1.03),
    "kernels": Metric(lambda r: r["hlo"]["kernels"], 1.02),
    "bytes moved": Metric(lambda r: r["hlo"]["bytes"], 1.02),
    "copies": Metric(lambda r: r["hlo"]["copies"], 1.05, 4),
    "transposes": Metric(lambda r: r["hlo"]["transposes"], 1.05, 4),
    "collectives": Metric(_collectives("count"), 1.0),
    "collective bytes": Metric(_collectives("bytes"), 1.01),
    "peak memory": Metric(lambda r: r["memory"]["peak"], 1.03),
    "executable bytes": Metric(lambda r: r["executable_bytes"], 1.1),
    "trace CPU seconds": Metric(_stage("trace"), 2.0, 1, seconds=True),
    "lower CPU seconds": Metric(_stage("lower"), 2.0, 1, seconds=True),
    "compile CPU seconds": Metric(_stage("compile"), 2.0, 5, seconds=True),
    "warm compile CPU seconds": Metric(
        lambda r: r["warm"]["compile"]["cpu_s"] if r.get("warm") else None, 2.0, 2, seconds=True),
}


def ranges(reports: list[dict]) -> dict:
    """What differs between reports of one program by several processes.

    -> {'count', 'metrics': {name: [lowest, highest]}, 'executables': {fingerprint of the optimised
    HLO: processes}, 'cache_key': names of the parts of the persistent cache's key that differ}
    """
    metrics = {}
    for name, metric in METRICS.items():
        values = [v for v in (metric.read(r) for r in reports) if v is not None]
        if values:
            metrics[name] = [min(values), max(values)]
    keys = [r.get("cache_key") or {} for r in reports]
    parts = sorted({part for key in keys for part in key})
    return {"count": len(reports), "metrics": metrics,
            "executables": dict(collections.Counter(
                r["optimized"] for r in reports if "optimized" in r).most_common()),
            "cache_key": [p for p in parts if len({key.get(p) for key in keys}) > 1]}


def _range(report: dict, name: str) -> tuple[float, float] | None:
    """Lowest and highest of a metric, equal where it was measured once; None where it was not."""
    measured = report.get("repeats", {}).get("metrics", {}).get(name)
    value = METRICS[name].read(report)
    return None if value is None else tuple(measured or (value, value))


def limit(old: dict, new: dict, name: str) -> float | None:
    """The value above which ``name`` of ``new`` is a regression against ``old``; None where either
    lacks it. Counts: the metric's factor on the highest of the old ones. Seconds: on the lowest,
    by the spread of both where repeats measured it."""
    metric, a, b = METRICS[name], _range(old, name), _range(new, name)
    if a is None or b is None:
        return None
    spreads = [high / low - 1 for r, (low, high) in ((old, a), (new, b))
               if low > 0 and name in r.get("repeats", {}).get("metrics", {})]
    if metric.seconds and spreads:
        return a[0] * (1 + max(LEAST, SPREADS * max(spreads)))
    return (a[0] if metric.seconds else a[1]) * metric.times + metric.plus


def regressions(new: list[dict], old: list[dict]) -> list[str]:
    """One line for every metric of a cell that got worse than its limit, and for every cell that
    fails now and did not before, or is gone. Seconds name the pass that grew most, if known."""
    before = {r["cell"]: r for r in old}
    now = {r["cell"]: r for r in new}
    lines = [f"{cell}: not measured any more" for cell in before if cell not in now]
    for cell, mine in now.items():
        theirs = before.get(cell)
        if theirs is None or "error" in theirs:
            continue
        if "error" in mine:
            lines.append(f"{cell}: fails now ({mine['error']})")
            continue
        for name, metric in METRICS.items():
            most = limit(theirs, mine, name)
            if most is None or _range(mine, name)[0] <= most:
                continue
            lines.append(f"{cell}: {name} {metric.read(theirs):,.6g} -> {metric.read(mine):,.6g} "
                         f"(limit {most:,.6g})" + _grown(theirs, mine, name))
    return lines


def _grown(old: dict, new: dict, name: str) -> str:
    """The pass that grew most, for a metric of XLA's seconds."""
    if name != "compile CPU seconds" or not (old.get("passes") and new.get("passes")):
        return ""
    was = {p["name"]: p["seconds"] for p in old["passes"]["passes"]}
    growth = {p["name"]: p["seconds"] - was.get(p["name"], 0.0) for p in new["passes"]["passes"]}
    if not growth:
        return ""
    worst = max(growth, key=growth.get)
    after = was.get(worst, 0.0) + growth[worst]
    return f"; the pass that grew most: {worst} {was.get(worst, 0.0):.3g} -> {after:.3g} s"


def misses(rows: list[dict]) -> list[str]:
    """One line for each cell whose program was to be read from the cache and was not."""
    return [f"{r['cell']}: compiled again although it lay in the persistent cache "
            f"({r['warm_cache']})" for r in rows if r.get("warm_cache", "hit") != "hit"]


def notes(rows: list[dict]) -> list[str]:
    """What repeats and passes found, as lines for a terminal."""
    lines = []
    for r in rows:
        found = r.get("repeats")
        if found:
            differing = [f"{name} {low:,.6g} to {high:,.6g}" for name, (low, high)
                         in found["metrics"].items() if low != high]
            programs = len(found["executables"])
            lines.append(f"{r['cell']}: {found['count']} processes, {programs} different "
                         f"executable{'s' if programs != 1 else ''}; "
                         + ("; ".join(differing) or "nothing differs")
                         + ("; parts of the cache's key that differ: "
                            + ", ".join(found["cache_key"]) if found["cache_key"] else ""))
            if programs > 1:
                lines += [f"    {name} {count} times" for name, count
                          in found["executables"].items()]
        if r.get("passes"):
            lines += _dearest(r)
    return lines


def _dearest(row: dict) -> list[str]:
    found = row["passes"]
    inside = sum(p["share"] for p in found["passes"])
    stages = "".join(f", {name} {seconds:.2f} s" for name, seconds in found["stages"].items())
    return [f"{row['cell']}: HLO passes {inside:.0%} of {found['compile_wall_s']:.2f} s{stages}",
            *(f"    {p['share']:6.1%} {p['seconds'] * 1e3:9.1f} ms {p['runs']:5d} x  {p['name']}"
              for p in found["passes"][:DEAREST])]
