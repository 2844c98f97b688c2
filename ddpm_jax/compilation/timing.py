"""Timing of things that run: repeats in rounds, a median with its spread."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from ddpm_jax.compilation import hardware, report

SCHEMA = 1


class Times(NamedTuple):
    """Seconds of one unit of work: the median of the repeats, the fastest and the slowest."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds):
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def rounds(candidates: dict[str, Callable[[], None]], *, repeats: int, seconds: float):
    """Time every candidate once a round, in turn, so that other load affects all alike.

    Ends after `repeats` rounds, or earlier once `seconds` have passed and three rounds are done.
    -> {name: [seconds of each round]}. A candidate returns when its work is done.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in candidates.items():
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    return times


def ratios(slow: list[float], quick: list[float]) -> Times:
    """How many times `quick` is as fast as `slow`, round by round."""
    return Times.of([a / b for a, b in zip(slow, quick, strict=True)])


def result(bench: str, *, name: str, times: Times, images: int, flops: float | None = None,
           devices=(), **more) -> dict:
    """One row of a benchmark, the same for every member of the family.

    times: of one unit (a training step, a denoising step, a batch); images: in it; flops: of it,
    counted by hand. mfu is None where the chip's peak is not in the table.
    """
    chip = hardware.chip_of(devices[0].device_kind) if devices else None
    peak = chip.per_device(chip.bf16_flops) * len(devices) if chip else None
    return {
        "schema": SCHEMA, "bench": bench, "name": name,
        "seconds": times._asdict(), "images_per_s": images / times.median, "images": images,
        "flops": flops,
        "mfu": flops / times.median / peak if flops and peak else None,
        "device_kind": devices[0].device_kind if devices else None, "devices": len(devices),
        "versions": report.versions(), **more,
    }


def render(rows: list[dict]) -> str:
    """Rows of one family as a table for a terminal."""
    head = ("bench", "name", "median", "low ... high", "images/s", "MFU", "note")
    lines = [head]
    for r in rows:
        s = r["seconds"]
        note = "; ".join([f"{k} {r[k]}" for k in ("first_call", "ratio") if r.get(k)]
                         + ([r["note"]] if r.get("note") else []))
        lines.append((
            r["bench"], r["name"], f"{s['median'] * 1e3:,.2f} ms",
            f"{s['low'] * 1e3:,.2f} ... {s['high'] * 1e3:,.2f}", f"{r['images_per_s']:,.1f}",
            "n/a" if r["mfu"] is None else f"{r['mfu']:.1%}", note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
                     for line in lines)
