"""BENCHMARKS.md from the committed JSON results: tables, and plots of cost as work grows."""

import pathlib

from ddpm_jax.benchmark import sweeps
from ddpm_jax.compilation import report
from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import read_json, write_bytes

HEAD = """# Benchmarks

Written by `ddpm bench page` from the JSON in `{folder}`; do not edit. What was tried and why is in
[NOTES.md]({folder}/NOTES.md).

Rows of `ddpm bench compile` and `ddpm compile` are the compiler's own figures for machines that
need not be there: instructions, kernels, collectives and memory are those of one compilation by the
versions named (a GPU's compiler may decide otherwise in another process, xla #49047;
`--compilations` shows it), bytes moved, roofline times and times at measured rates are
**estimated**. Rows of `ddpm bench step|sample|data|eval` are measured on the machine named.
"""


def _load(folder: pathlib.Path) -> dict[str, list[dict]]:
    """{name: rows} of every result: of a file, or of all files of a folder in it, whose rows are
    then called by their files' names; UserError where there is none."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        rows = read_json(file)
        found[file.stem] = rows if isinstance(rows, list) else [rows]
    for inner in sorted({file.parent for file in folder.glob("*/*.json")}):
        rows = [{**row, "row": file.stem} for file in sorted(inner.glob("*.json"))
                for row in read_json(file) if "bench" in row]
        found |= {inner.name: rows} if rows else {}
    found = dict(sorted(found.items()))
    if not found:
        raise UserError(f"results: no JSON in {folder}; write some with ddpm bench ... --out")
    return found


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
                     for row in rows)


def _compiled(rows: list[dict]) -> str:
    """A table of compilations; those with a machine's chip also show whether they fit, those with
    measured rates of it (rates.py) how long a call would take."""
    lines, timed = [], any("at_measured_rates" in r for r in rows)
    for r in rows:
        name = r.get("cell") or " ".join(
            str(r["about"][k]) for k in ("program", "config", "runner", "dtype", "topology"))
        if "error" in r or "hlo" not in r:
            lines.append([name, r.get("error") or r.get("why", ""), *[""] * (10 + timed)])
            continue
        h, fit = r["hlo"], r.get("fit")
        reduces = ", ".join(f"{n} {c['count']} ({report.size(c['bytes'])})"
                            for n, c in h["collectives"].items()) or "none"
        lines.append([
            name, f"{sum(s['wall_s'] for s in r['seconds'].values()):.0f}",
            f"{r['seconds']['compile']['cpu_s']:.0f}",
            f"{sum(s['wall_s'] for s in r['warm'].values()):.1f}" if r.get("warm") else "",
            f"{r['stablehlo']['instructions']:,}", f"{h['instructions']:,}", f"{h['kernels']:,}",
            report.size(h["bytes"]), report.size(r["cost"]["bytes"]), reduces,
            report.size(r["memory"]["peak"]), f"{fit['free']:.0%}" if fit else "n/a",
            *([f"{r['at_measured_rates']['seconds'] * 1e3:,.1f}" if "at_measured_rates" in r
               else "n/a"] if timed else [])])
    return markdown(["program", "wall s", "compile CPU-s", "warm wall s", "StableHLO", "HLO",
                      "kernels", "moved (counted)", "moved (XLA)", "collectives", "peak memory",
                      "HBM free", *(["ms at measured rates (estimated)"] if timed else [])], lines)


def _measured(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        s = r["seconds"]
        lines.append([
            r.get("row", r["bench"]), r["name"],
            f"{r.get('config', '')} {r.get('dtype', '')}".strip(),
            f"{r['devices']} x {r['device_kind']}" if r["device_kind"] else "host",
            f"{s['median'] * 1e3:,.2f}", f"{s['low'] * 1e3:,.2f} to {s['high'] * 1e3:,.2f}",
            f"{r['images_per_s']:,.1f}", "n/a" if r["mfu"] is None else f"{r['mfu']:.1%}",
            str(r.get("ratio") or (r.get("note", "") if "row" in r else ""))])
    return markdown(["what", "by", "config", "machine", "median ms", "range", "images/s", "MFU",
                      "ratio"], lines) + _parts([r for r in rows if r.get("profile")])


def _parts(rows: list[dict]) -> str:
    """A table of the parts of a step, ms, a column for each row with a profile; '' without one."""
    if not rows:
        return ""
    parts = dict.fromkeys(part for r in rows for part in r["profile"]["parts"])
    lines = []
    for part in parts:
        found = [r["profile"]["parts"].get(part) for r in rows]
        lines.append([part, *(f"{f['seconds'] * 1e3:.2f} ({f['launches']:,.0f})" if f else ""
                              for f in found)])
    lines.append(["all kernels", *(f"{r['profile']['seconds'] * 1e3:.2f}" for r in rows)])
    lines.append(["measured step", *(f"{r['seconds']['median'] * 1e3:.2f}" for r in rows)])
    head = ["ms of a step (kernels)", *(r.get("row", r["bench"]) for r in rows)]
    return "\n\n" + markdown(head, lines)


def _plots(rows: list[dict], folder: pathlib.Path, name: str) -> list[str]:
    """One figure for each sweep in the rows ('sweep': [axis, value]). -> file names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    for axis, of_axis in sweeps.SWEEPS.items():
        mine = sorted((r for r in rows if r.get("sweep", [None])[0] == axis and "hlo" in r),
                      key=lambda r: r["sweep"][1])
        if len(mine) < 2:
            continue
        x = [r["sweep"][1] for r in mine]
        curves = {
            "bytes moved a device, GB": [r["hlo"]["bytes"] / 1e9 for r in mine],
            "peak memory a device, GB": [r["memory"]["peak"] / 1e9 for r in mine],
            **({"roofline ms (estimated)": [r["roofline"]["seconds"] * 1e3 for r in mine]}
               if all("roofline" in r for r in mine) else
               {"StableHLO operations": [r["stablehlo"]["instructions"] for r in mine]}),
            "compile CPU-seconds": [r["seconds"]["compile"]["cpu_s"] for r in mine]}
        figure, axes = pyplot.subplots(1, len(curves), figsize=(14, 3))
        for panel, (title, y) in zip(axes, curves.items(), strict=True):
            panel.plot(x, y, "o-")
            panel.set(title=title, xlabel=of_axis.label, ylim=(0, None))
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [str(v) for v in x])
            panel.grid(alpha=0.3)
        about = mine[0]["about"]
        figure.suptitle(f"{about['program']}, {about['dtype']}: {axis}")
        figure.tight_layout()
        file = f"{name}-{axis.replace(' ', '-')}.png"
        figure.savefig(folder / file, dpi=80)
        pyplot.close(figure)
        files.append(file)
    return files


def _versions(rows: list[dict]) -> str:
    return "; ".join(sorted({", ".join(
        f"{k} {v}" for k, v in {**r["versions"], "commit": r.get("commit"),
                                "date": r.get("date")}.items() if v)
        for r in rows if "versions" in r}))


def write(folder, target) -> list[str]:
    """Write the page `target` from the results in `folder`, plots beside them. -> paths written.

    A file holds rows of `ddpm bench`, or one report of `ddpm compile`; a folder, such files of
    measured rows. A file NAME.md beside NAME.json, or beside the folder NAME, is put above its
    table.
    """
    folder, target = pathlib.Path(folder), pathlib.Path(target)
    text, written = [HEAD.format(folder=folder.name)], []
    for name, rows in _load(folder).items():
        about = folder / f"{name}.md"
        text.append(f"\n## {name.replace('_', ' ')}\n")
        if about.exists():
            text.append(about.read_text().strip() + "\n")
        text.append((_measured if "bench" in rows[0] else _compiled)(rows) + "\n")
        head, lines = sweeps.table(rows)
        if lines:
            text.append(f"\nExponents b of a least-squares fit value = a x^b along each axis:\n\n"
                        f"{markdown(head, lines)}\n")
        for file in _plots(rows, folder, name):
            text.append(f"\n![{file}]({folder.name}/{file})\n")
            written.append(str(folder / file))
        text.append(f"\nVersions: {_versions(rows)}\n")
    write_bytes(target, "\n".join(text).encode())
    return [str(target), *written]
