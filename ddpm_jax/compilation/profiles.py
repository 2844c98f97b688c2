"""Where the time of a step goes, from a trace that jax.profiler.trace wrote.

A device's plane has the lines of what ran (a GPU's streams, a TPU's operations) and others that the
profiler derives from them, which repeat the same time; only the former are read. Without a device's
plane (a CPU) the events of the host's threads that carry an instruction's name are. Loops and calls
there, and on a TPU, span what runs inside them, which has events of its own: they are left out. A
stream holds nothing but kernels and copies.
"""

import collections
import pathlib
from typing import NamedTuple

from ddpm_jax.compilation import parts
from ddpm_jax.errors import UserError

# By the kind of device in a plane's name: whether a line holds what ran.
LINES = {"GPU": lambda name: name.startswith("Stream #"), "TPU": lambda name: name == "XLA Ops"}
SPANS = {"gpu": ()}  # names of events that span others, by platform
CONTROL = ("while", "call", "conditional")  # of the other platforms
UNKNOWN = "not in the program's text"
# Share of the step by which the kernels' sum may differ from it, by platform: a CPU's threads
# overlap, and wait between kernels.
TOLERANCE = {"cpu": 0.25}


class Event(NamedTuple):
    """One run of an instruction: start and end in nanoseconds; module: of HLO, '' if unknown."""

    name: str
    module: str
    start: float
    end: float


def _event(event) -> Event:
    stats = dict(event.stats)
    name = str(stats.get("hlo_op", event.name)).removeprefix("%").partition(" ")[0]
    return Event(name, str(stats.get("hlo_module", "")), event.start_ns,
                 event.start_ns + event.duration_ns)


def read(folder, platform: str) -> dict[str, list[Event]]:
    """{plane: events} of a trace's devices of `platform`, or of the host's threads for 'cpu'.

    Raises UserError where the trace has no line of that platform's kernels.
    """
    from jax.profiler import ProfileData

    kind, found = platform.upper(), {}
    for file in sorted(pathlib.Path(folder).rglob("*.xplane.pb")):
        for plane in ProfileData.from_file(str(file)).planes:
            if kind in LINES and plane.name.startswith(f"/device:{kind}"):
                events = [_event(e) for line in plane.lines if LINES[kind](line.name)
                          for e in line.events]
            elif kind == "CPU" and plane.name.startswith("/host:"):
                events = [_event(e) for line in plane.lines for e in line.events
                          if any(key == "hlo_op" for key, _ in e.stats)]
            else:
                continue
            if events:
                found[f"{file.name} {plane.name}"] = events
    if not found:
        raise UserError(f"profile: the trace in {folder} has no kernels of a {kind}; on a GPU the "
                        "profiler needs CUPTI and the right to use it (NVIDIA's "
                        "ERR_NVGPUCTRPERM: run as root)")
    return found


def _module(name: str) -> str:
    """A module's name without the number that some versions of XLA add."""
    return name.partition(".")[0]


def _busy(events: list[Event]) -> float:
    """Nanoseconds in which at least one event was running."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def table(folder, text: str, *, platform: str, steps: int, steps_in_text: int = 1) -> dict:
    """Kernels of a trace of `steps` steps on each device, by part of the network, class and name.

    text: the optimised HLO of the program, of which one call covers `steps_in_text` steps (a loop
    of unknown length counts once). Times are seconds of a step on one device. Raises UserError as
    `read` does. -> {'platform', 'devices', 'steps', 'seconds' (sum), 'busy_s', 'parts', 'by_class',
    'kernels': [{name, part, class, op_name, launches, seconds, bytes, bytes_per_s}]}
    """
    known, module = parts.origins(text), _module(text.partition(" ")[2].partition(",")[0])
    planes = read(folder, platform)
    spans = SPANS.get(platform, CONTROL)
    planes = {plane: [e for e in events if not e.name.startswith(spans)]
              for plane, events in planes.items()}
    share = 1e9 * steps * len(planes)
    time: collections.Counter = collections.Counter()
    launches: collections.Counter = collections.Counter()
    for event in (e for events in planes.values() for e in events):
        key = event.name, event.name in known and _module(event.module) in ("", module)
        time[key] += (event.end - event.start) / share
        launches[key] += 1
    rows = []
    for (name, ours), seconds in time.most_common():
        row = {"name": name, "part": UNKNOWN, "class": UNKNOWN, "op_name": "",
               "launches": launches[name, ours] * 1e9 / share, "seconds": seconds,
               "bytes": None, "bytes_per_s": None}
        if ours:
            kernel, origin, op_name = known[name]
            moved = kernel.sliced * kernel.runs / steps_in_text
            row |= {"part": parts.part(origin), "class": kernel.kind, "op_name": op_name,
                    "bytes": moved, "bytes_per_s": moved / seconds if seconds else None}
        rows.append(row)
    return {"platform": platform, "devices": len(planes), "steps": steps,
            "seconds": sum(time.values()),
            "busy_s": sum(map(_busy, planes.values())) / share,
            "parts": _sums(rows, "part"), "by_class": _sums(rows, "class"), "kernels": rows}


def _sums(rows: list[dict], key: str) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for row in rows:
        total = found.setdefault(row[key], {"seconds": 0.0, "launches": 0.0, "bytes": 0.0})
        for field in total:
            total[field] += row[field] or 0
    return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))


def check(found: dict, step: float) -> list[str]:
    """Lines that hold a table against the measured seconds of a step: one, and a warning below it
    where they differ by more than 5 % (a CPU: what is busy, by more than 25 %)."""
    cpu = found["platform"] == "cpu"
    added = found["busy_s"] if cpu else found["seconds"]
    share, limit = added / step, TOLERANCE.get(found["platform"], 0.05)
    lines = [f"kernels {found['seconds'] * 1e3:.2f} ms a step, at least one running "
             f"{found['busy_s'] * 1e3:.2f} ms; measured step {step * 1e3:.2f} ms: {share:.1%}"]
    if abs(share - 1) > limit:
        lines.append(
            f"WARNING: profile: the kernels are {share:.0%} of the measured step, not "
            f"{1 - limit:.0%} to {1 + limit:.0%}; " + (
                "the rest is time between kernels" if share < 1 else
                "kernels ran side by side, or tracing slowed them down"))
    unknown = found["parts"].get(UNKNOWN, {"seconds": 0.0})["seconds"]
    if unknown > 0.02 * found["seconds"]:
        lines.append(f"WARNING: profile: {unknown / found['seconds']:.0%} of the time is of "
                     "kernels that the program's text does not name")
    return lines


def render(found: dict, kernels: int = 20) -> str:
    """The tables by part and by class, and the costliest kernels."""
    lines = []
    for title, rows in (("part", found["parts"]), ("class", found["by_class"])):
        lines.append(f"{'ms a step':>10}  {'share':>6}  {'launches':>8}  {'GB/s':>6}  {title}")
        for name, row in rows.items():
            lines.append(_line(row, found["seconds"], name))
    lines.append(f"{'ms a step':>10}  {'share':>6}  {'launches':>8}  {'GB/s':>6}  kernel")
    for row in found["kernels"][:kernels]:
        lines.append(_line(row, found["seconds"],
                           f"{row['name']} ({row['part']}) {row['op_name']}".rstrip()))
    return "\n".join(lines)


def _line(row, total, name):
    rate = f"{row['bytes'] / row['seconds'] / 1e9:,.0f}" if row["bytes"] else ""
    return (f"{row['seconds'] * 1e3:10.3f}  {row['seconds'] / total:6.1%}  {row['launches']:8,.0f}"
            f"  {rate:>6}  {name}")
