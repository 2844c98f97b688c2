"""Seconds of XLA's passes, read from the compiler's own log.

XLA logs a line at the end of each pass with what it took, passes inside it included. A pass's own
(exclusive) seconds are that without the passes that ended inside it on the same thread. Logging
costs time itself: these are shares, not what to compare compilations by.
"""

import re
from typing import NamedTuple

# Read when XLA or a plugin loads; the TPU's are libtpu's own.
VARIABLES = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "hlo_pass_pipeline=1",
             "TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0",
             "TPU_VMODULE": "hlo_pass_pipeline=1"}
LINE = re.compile(
    r"^I\d{4} (?:00:00:(?P<epoch>\d+\.\d+)|(?P<clock>\d\d:\d\d:\d\d\.\d+))\s+(?P<thread>\d+) "
    r"\S+\] HLO pass: (?P<name>\S+) time: [^(]*\((?P<us>\d+) us\)", re.MULTILINE)
STAGE = re.compile(r"\] (HLO_PASSES|BACKEND_PASSES|CODE_GENERATION) stage duration: (\S+)")
PART = re.compile(r"([\d.]+)(h|ms|m|us|ns|s)")
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
SLACK = 1e-4  # seconds by which a line is logged late


class Pass(NamedTuple):
    """seconds: exclusive, of all its runs; runs: how often it ran."""

    name: str
    seconds: float
    runs: int


def _end(match) -> float:
    if match["epoch"]:
        return float(match["epoch"])
    hours, minutes, seconds = match["clock"].split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def read(log: str) -> list[Pass]:
    """The passes of a log, the dearest first; [] where it has none."""
    own: dict[str, list[float]] = {}
    finished: dict[str, list[tuple[float, float]]] = {}  # thread -> (start, seconds), outermost
    for match in LINE.finditer(log):
        seconds = int(match["us"]) * 1e-6
        start, stack = _end(match) - seconds, finished.setdefault(match["thread"], [])
        inside = 0.0
        while stack and stack[-1][0] >= start - SLACK:
            inside += stack.pop()[1]
        stack.append((start, seconds))
        own.setdefault(match["name"], []).append(max(0.0, seconds - inside))
    found = [Pass(name, sum(values), len(values)) for name, values in own.items()]
    return sorted(found, key=lambda p: -p.seconds)


def stages(log: str) -> dict[str, float]:
    """{stage: seconds} of libtpu's stages, summed over the modules of a log; {} elsewhere."""
    found: dict[str, float] = {}
    for name, text in STAGE.findall(log):
        seconds = sum(float(value) * UNITS[unit] for value, unit in PART.findall(text))
        found[name] = found.get(name, 0.0) + seconds
    return found
