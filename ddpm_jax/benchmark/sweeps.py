"""What compilation costs as a program grows along one axis, with fitted exponents."""

import math
from collections.abc import Callable
from typing import NamedTuple

from ddpm_jax.benchmark import compiled
from ddpm_jax.compilation import report
from ddpm_jax.errors import UserError


class Sweep(NamedTuple):
    """values of one axis; change(value) -> fields of the config; label: of the axis; program: a row
    of compiled.PROGRAMS."""

    values: tuple[int, ...]
    change: Callable
    label: str
    program: str = "train_step"


SWEEPS = {
    "batch": Sweep((16, 64, 256), lambda v: {"train.batch_size": v}, "images a device"),
    "image size": Sweep((16, 32, 64), lambda v: {"data.image_size": v}, "pixels a side"),
    "width": Sweep((64, 128, 256), lambda v: {"model.ch": v}, "channels (ch)"),
    "devices": Sweep((1, 2, 8), lambda v: {"train.batch_size": 64 * v}, "devices"),
    "depth": Sweep((1, 2, 4), lambda v: {"model.num_res_blocks": v},
                   "residual blocks a resolution"),
    "rolled steps": Sweep((1, 2, 4), lambda v: {"train.steps_per_dispatch": v},
                          "steps a dispatch, in a loop"),
    "unrolled steps": Sweep((1, 2, 4), lambda v: {"train.steps_per_dispatch": v},
                            "steps a dispatch, one after the other", "unrolled"),
}
STAGES = ("trace", "lower", "compile")
GROWING = {
    **{f"{stage} CPU-s": lambda r, stage=stage: r["seconds"][stage]["cpu_s"] for stage in STAGES},
    "StableHLO": lambda r: r["stablehlo"]["instructions"],
    "HLO": lambda r: r["hlo"]["instructions"],
    "executable": lambda r: r["executable_bytes"],
}


def sweep(config, kind: str, name: str, axes=None) -> list[dict]:
    """Reports of `config`, called `name`, at the sizes of SWEEPS on machines of `kind` (cpu, h100,
    v5e): 64 images a device where not swept, clipped by its global norm, one step a dispatch.
    axes: names of SWEEPS, None for all. Each row has 'sweep': [axis, value]. Raises UserError for
    an unknown axis."""
    unknown = [axis for axis in axes or () if axis not in SWEEPS]
    if unknown:
        raise UserError(f"axes: {', '.join(unknown)} is not known; known: {', '.join(SWEEPS)}")
    joint = ":" if kind in ("h100", "cpu") else "-"
    options = report.compiler_options(None if joint == ":" else "O0")
    rows, seen = [], {}
    for axis in axes or SWEEPS:
        for value in SWEEPS[axis].values:
            mine = config.copy_and_resolve_references()
            with mine.unlocked():
                mine.update_from_flattened_dict({
                    "train.batch_size": 64, "train.clip_scope": "global",
                    "train.steps_per_dispatch": 1, **SWEEPS[axis].change(value)})
            topology = f"{kind}{joint}{value if axis == 'devices' else 1}"
            program = SWEEPS[axis].program
            key = (topology, program, mine.to_json())
            if key not in seen:
                print(f"{axis} {value} on {topology}", flush=True)
                seen[key] = compiled.measure(
                    mine, topology=topology, program=program, options=options,
                    num_examples=50_000, name=name).report
            rows.append({**seen[key], "sweep": [axis, value],
                         "cell": f"{axis} {value} on {topology}"})
    return rows


def exponent(x: list[float], y: list[float]) -> float | None:
    """b of the least-squares fit y = a x^b; None where it is not defined."""
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        return None
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return (sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
            / sum((a - mean_u)**2 for a in u))


def exponents(rows: list[dict]) -> dict[str, dict]:
    """{axis: {'values': [...], what: exponent}} of the rows of a sweep that were compiled."""
    found = {}
    for axis in SWEEPS:
        mine = [r for r in rows if r.get("sweep", [None])[0] == axis and "hlo" in r]
        if len(mine) > 1:
            x = [r["sweep"][1] for r in mine]
            found[axis] = {"values": x, **{what: exponent(x, [read(r) or 0 for r in mine])
                                           for what, read in GROWING.items()}}
    return found


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of ``exponents``, for a terminal or a page."""
    lines = [[axis, ", ".join(map(str, found.pop("values"))),
              *("n/a" if b is None else f"{b:.2f}" for b in found.values())]
             for axis, found in exponents(rows).items()]
    return ["axis", "values", *GROWING], lines
