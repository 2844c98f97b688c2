"""The page of a history: a table and a plot a program, and the largest steps between releases."""

import math
import pathlib
import statistics
from typing import NamedTuple

from ddpm_jax.benchmark import history
from ddpm_jax.benchmark.page import markdown
from ddpm_jax.compilation.report import size
from ddpm_jax.storage.files import write_bytes

# Reported by users, with the release that brought it: does the history see it?
KNOWN = {"0.5.0": "jax #26145", "0.9.1": "xla #41173", "0.10.1": "tpu-inference #2949",
         "0.10.2": "jax #39103 (wrong results on CPUs)"}
FRONT_END = {"jaxpr_equations": "jaxpr equations", "stablehlo": "StableHLO operations"}
STEPS, LEAST = 8, 1.1  # how many are listed, and the smallest factor that is one

HEAD = """# What a training program costs to compile, release by release

Written by `ddpm bench history`; do not edit. Each line of [{rows}]({rows}) is one compilation in a
process of its own.

- **bytes**: one file of the [corpus]({corpus}), the same bytes for every release, compiled by
  jaxlib alone (`replay.py`) for one CPU device, or for an absent H100 or v5e: XLA's share.
- **source**: the source of this project on each JAX that it supports: trace, lower, compile, as
  `ddpm compile` does for one CPU device, 64 images (8 of CIFAR-10).
- **ratio**: CPU seconds (of all threads) by those of the reference, {reference} on jaxlib
  {release}, which was compiled before and after each release; of both, the least of the
  repetitions.
- CPU seconds depend on the machine; ratios less so. Steps are listed if they are larger than
  {least:.0%} and than what the two references around either release differ by: one repetition on a
  busy machine is no better. One that changes no instruction may still be the machine's.
- A release that could not be installed, or did not compile a program, has a line with the reason.

How to run one file, or this history: [for compiler people]({page}).
"""


class Point(NamedTuple):
    """One program on one release. ratio: CPU seconds of all stages by the reference's, each the
    least of the repetitions: other work on the machine makes both larger, never smaller;
    cpu: by stage; row: the row of that repetition; repetitions that were ok; noise: the greater of
    its two references by the lesser. Without one that was ok ratio is None and row the last."""

    ratio: float | None
    cpu: dict
    row: dict
    repetitions: int
    noise: float


class Step(NamedTuple):
    """program went from `before` to `after` with `times` as many CPU seconds."""

    program: str
    before: str
    after: str
    times: float
    was: Point
    now: Point


def _total(row: dict) -> float:
    return sum(row[stage]["cpu_s"] for stage in history.KINDS[row["kind"]].stages)


def references(rows: list[dict]) -> dict[int, tuple[float, ...]]:
    """{index of a measured row: CPU seconds of the reference before and after it}, of its own run:
    one where the run ended before the second, none without the first."""
    found, open_rows, last = {}, {}, {}
    for index, row in enumerate(rows):
        batch = row["batch"]
        if row["role"] == "measured":
            found[index] = last.get(batch, ())
            open_rows.setdefault(batch, []).append(index)
            continue
        last[batch] = (row["read"]["cpu_s"] + row["compile"]["cpu_s"],)
        for waiting in open_rows.pop(batch, ()):
            found[waiting] += last[batch]
    return found


def points(rows: list[dict], kind: str) -> dict[str, dict[str, Point]]:
    """{'program target': {release: Point}}, releases oldest first."""
    around, grouped = references(rows), {}
    for index, row in enumerate(rows):
        if row["role"] == "measured" and row["kind"] == kind:
            name = f"{row['program']} {row['target']}"
            tried = grouped.setdefault(name, {}).setdefault(row["release"], [])
            tried.append((row, around[index]))
    found = {}
    for name, by_release in sorted(grouped.items()):
        found[name] = {}
        for release in sorted(by_release, key=history.version_key):
            tried = by_release[release]
            good = [(row, base) for row, base in tried if row["outcome"] == "ok" and base]
            if not good:
                found[name][release] = Point(None, {}, tried[-1][0], 0, 1.0)
                continue
            best, base = min(good, key=lambda g: _total(g[0]))
            cpu = {stage: best[stage]["cpu_s"] for stage in history.KINDS[kind].stages}
            reference = min(sum(base) / len(base) for _, base in good)
            found[name][release] = Point(_total(best) / reference, cpu, best, len(good),
                                         max(base) / min(base))
    return found


def steps(found: dict[str, dict[str, Point]]) -> list[Step]:
    """Every change from a release to the next that compiles, the largest factor first."""
    out = []
    for program, by_release in found.items():
        good = [(release, p) for release, p in by_release.items() if p.ratio is not None]
        for (before, was), (after, now) in zip(good, good[1:], strict=False):
            out.append(Step(program, before, after, now.ratio / was.ratio, was, now))
    return sorted(out, key=lambda s: -abs(math.log(s.times)))


def spread(rows: list[dict]) -> float:
    """How much the reference's CPU seconds differed within the history: greatest by least."""
    seconds = [second for base in references(rows).values() for second in base]
    return max(seconds) / min(seconds) if seconds else 1.0


def _table(by_release: dict[str, Point]) -> str:
    lines = []
    front = [key for key in FRONT_END if any(key in p.row for p in by_release.values())]
    for release, p in by_release.items():
        if p.ratio is None:
            lines.append([release, p.row["outcome"], p.row.get("message", "")[:120],
                          *[""] * (len(front) + 6)])
            continue
        row = p.row
        rss = row.get("maxrss_bytes")
        lines.append([
            release, f"{p.ratio:.2f}", ", ".join(f"{s} {t:.2f}" for s, t in p.cpu.items()),
            *(history.count(row[key]) for key in (*front, "instructions", "fusions", "kernels")),
            size(row.get("executable_bytes")), size(rss), str(p.repetitions)])
    return markdown(["release", "ratio", "CPU seconds", *(FRONT_END[key] for key in front),
                     "HLO instructions", "fusions", "kernels", "executable",
                     "memory of the compiler", "repetitions"], lines)


def _steps(found, rows) -> str:
    if not any(s for s in found.values()):
        return ""
    every = [s for s in steps(found) if abs(math.log(s.times)) > math.log(
        max(LEAST, s.was.noise, s.now.noise))]
    noise = [p.noise for by_release in found.values() for p in by_release.values()]
    parts = [f"The reference's CPU seconds differed by a factor of {spread(rows):.2f} within the "
             f"history, the two around a release by {statistics.median(noise):.2f} (median)."]
    for title, mine in (("More expensive", [s for s in every if s.times > 1][:STEPS]),
                        ("Cheaper", [s for s in every if s.times < 1][:STEPS])):
        if mine:
            parts.append(f"**{title}**, the largest steps:\n\n" + markdown(
                ["release", "program", "ratio", "times", "instructions", "kernels", "executable"],
                [[f"{s.before} -> **{s.after}**", s.program,
                  f"{s.was.ratio:.2f} -> {s.now.ratio:.2f}", f"{s.times:.2f}",
                  *(f"{history.count(s.was.row[k])} -> {history.count(s.now.row[k])}"
                    for k in ("instructions", "kernels")),
                  f"{size(s.was.row.get('executable_bytes'))} -> "
                  f"{size(s.now.row.get('executable_bytes'))}"] for s in mine]))
    failed = [f"{name} on {release}: {p.row['outcome']} ({p.row.get('message', '')[:120]})"
              for name, by in found.items() for release, p in by.items() if p.ratio is None]
    if failed:
        parts.append("Not compiled: " + "; ".join(failed) + ".")
    return "\n\n".join(parts)


def _releases(found: dict[str, dict[str, Point]]) -> str:
    names = sorted({r for by in found.values() for r in by}, key=history.version_key)
    return f"{len(names)} releases, {names[0]} to {names[-1]}; programs: {len(found)}."


def _plot(found: dict[str, dict[str, Point]], title: str, file: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    releases = sorted({r for by in found.values() for r in by}, key=history.version_key)
    figure, axes = pyplot.subplots(figsize=(14, 4.5))
    for name, by_release in found.items():
        if len(by_release) == 1 < len(releases):
            continue  # no line; its height would flatten those of the others
        x = [i for i, r in enumerate(releases) if r in by_release]
        axes.plot(x, [by_release[releases[i]].ratio or float("nan") for i in x], "o-", label=name)
        bad = [i for i in x if by_release[releases[i]].ratio is None]
        axes.plot(bad, [0] * len(bad), "kx")
    for release, issue in KNOWN.items():
        if release in releases:
            at = releases.index(release)
            axes.axvline(at, color="grey", lw=0.7, ls=":")
            axes.text(at, 1, issue, rotation=90, va="top", ha="right", fontsize=7, color="grey",
                      transform=axes.get_xaxis_transform())
    axes.set_xticks(range(len(releases)), releases, rotation=60, fontsize=8)
    axes.set(title=title, ylabel="CPU seconds by the reference's", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def _how(rows: list[dict]) -> str:
    """How it was run: machines, Pythons, dates, load, repetitions."""
    mine = [r for r in rows if r["role"] == "measured"]
    loads = [r["load"] for r in rows if "load" in r]
    text = [f"{len(mine)} compilations, {len(rows) - len(mine)} of the reference"]
    for key, label in (("cpu", "CPU"), ("cpus", "cores"), ("python", "Python"), ("date", "date"),
                       ("source", "source, a hash of the package's files")):
        values = sorted({str(r[key]) for r in rows if r.get(key)})
        if values:
            text.append(f"{label}: {', '.join(values)}")
    if loads:
        text.append(f"load of the machine {min(loads):.1f} to {max(loads):.1f}"
                    + (" (others used it)" if max(loads) > 2 else ""))
    return "; ".join(text) + "."


def write(rows_file, target=None) -> list[str]:
    """Write the page of a history beside its rows, with a plot for each kind. -> paths written."""
    rows_file = pathlib.Path(rows_file)
    rows = history.read(rows_file)
    target = pathlib.Path(target or rows_file.with_suffix(".md"))
    text = [HEAD.format(rows=rows_file.name, corpus="corpus/manifest.json",
                        page="COMPILERS.md", least=LEAST - 1,
                        reference=history.REFERENCE_PROGRAM, release=history.REFERENCE_RELEASE)]
    written = [str(target)]
    text.append(f"How it was run: {_how(rows)}\n")
    for kind in history.KINDS:
        found = points(rows, kind)
        if not found:
            continue
        file = target.parent / f"{target.stem}-{kind}.png"
        _plot(found, f"the same {kind}", file)
        written.append(str(file))
        text.append(f"## The same {kind}\n\n{_releases(found)}\n\n![{kind}]({file.name})\n\n"
                    f"{_steps(found, [r for r in rows if r['kind'] == kind])}\n")
        for name, by_release in found.items():
            text.append(f"### {name}\n\n{_table(by_release)}\n")
    text.append("jaxlib 0.10.2 computes some vmapped products wrongly on CPUs (jax #39103): its "
                "rows are what that compiler costs.\n")
    write_bytes(target, "\n".join(text).encode())
    return written
