"""Write docs/scaling.md, a model of the training step on many chips: python docs/make_scaling.py"""

import json
import pathlib
import sys
from typing import NamedTuple

from ddpm_jax.compilation.hardware import CHIPS, Chip
from ddpm_jax.compilation.roofline import all_reduce_seconds, unet_work
from ddpm_jax.config import load_config
from ddpm_jax.experiment import network

PAGE = pathlib.Path(__file__).with_name("scaling.md")
COMPILED = [PAGE.parent.parent / "benchmarks" / f"{name}.json"
            for name in ("matrix-cut", "matrix-cut-pod")]
MFU = 0.3
SHARDS = 8
UPDATE_BYTES = 36  # a parameter: weight, average, two moments read and written, gradient read
COUNTS = (1, 8, 64, 128, 256, 512, 1024, 4096)

HEAD = """# Scaling

Written by `python docs/make_scaling.py`; do not edit. **Estimated**: no step was timed on more
than one chip, and none on a TPU. This page helps to choose a number of chips, 1 to {most:,}, for
{configs}: it estimates what the paper's batch gains from more of them, what a larger batch gains,
and what cutting the state saves.

Vendors' figures of a chip, from [hardware.py](../ddpm_jax/compilation/hardware.py):

{chips}
The step is the sum of four terms, of which none overlaps another:

| term | assumption |
|---|---|
{terms}

Left out: latency of the collectives, the per-replica clip (the paper's; 9 % of a step on an
[H100](h100.md)), input, checkpoints, evaluation, waiting for the slowest chip, failures. Memory
is not checked: 8 images of a 256x256 model need 4.4 to 12.4 GB beside the state (compiled, see
below), so a chip may take its images only in parts (`train.accumulation`), which leaves the
network's term as it is.

- *efficiency*: images a second and chip, divided by those of one chip with as many images a step
  (at the paper's batch: with all of them). It can exceed 100 %, because a chip updates only its
  part of a cut state.
- *chip-hours*: for as many images as the paper's run has; divided by the number of chips they are
  the hours of the run. Whether a larger batch reaches the same FID is not predicted.

ZeRO-1 is `parallel.shards={shards}`, FSDP also `parallel.cut=params`, which takes
`train.clip_scope=global`; both need `parallel.runner=jit`
([Training](training.md#a-state-that-is-cut-over-devices)). With fewer than {shards} chips the
state is cut over all of them.
"""
TERMS = {
    "network": f"floating-point operations counted by hand, at {MFU:.0%} of the chip's bfloat16 "
    "peak whatever the batch (an H100 reached 28 % with 128 images of `cifar10` and 35 % with 512, "
    "[measured](h100.md))",
    "update": f"{UPDATE_BYTES} bytes a parameter at HBM's full rate: gradient read, weight, "
    "average and two moments read and written; of a chip's part, where the state is cut",
    "links": "rings at the full rate of a chip's links: one all-reduce of float32 gradients; where "
    f"the state is cut, over {SHARDS} neighbours a reduce-scatter of float32 gradients and a "
    "gather of weights (ZeRO-1: new ones in float32; FSDP: once a step in bfloat16), and between "
    "such groups an all-reduce of each chip's part",
    "between slices": "an all-reduce over slices (v5e: 256 chips) or hosts (H100: 8 chips), at the "
    "chips' share of the network, each with its part of the gradient",
}


class Model(NamedTuple):
    """parameters; flops: of a training image; batch, steps: the paper's run."""

    config: str
    parameters: int
    flops: float
    batch: int
    steps: int


class Step(NamedTuple):
    """Seconds of the terms of one training step."""

    network: float
    update: float
    links: float
    between: float


def model_of(name) -> Model:
    config = load_config(name)
    work, train = unet_work(network(config)), config.train
    return Model(name, work.parameters, work.train_flops, train.batch_size, train.steps)


class Kind(NamedTuple):
    """How the state is laid out. Bytes a parameter: moved, by a reduce-scatter and a gather (None:
    nothing is cut); whole and cut, of state and gradient on a chip."""

    moved: int | None
    whole: int
    cut: int


KINDS = {"replicated": Kind(None, 20, 0), "ZeRO-1": Kind(4 + 4, 4, 16),
         "FSDP": Kind(4 + 2, 2, 20)}


def step(model: Model, chip: Chip, chips: int, images: float, kind: Kind) -> Step:
    """One step of ``images`` a chip on ``chips`` chips, in as few slices (or hosts) as hold them.
    A ring moves (n-1)/n of an array out of each chip for a reduce-scatter, and for a gather."""
    slices, shards = -(-chips // chip.ici_chips), 1 if kind.moved is None else min(SHARDS, chips)
    inside, part = chips // slices, model.parameters / shards
    moved = (kind.moved or 0) * (model.parameters - part) / chip.ici_bandwidth
    return Step(
        network=images * model.flops / (MFU * chip.bf16_flops),
        update=UPDATE_BYTES * part / chip.hbm_bandwidth,
        links=moved + all_reduce_seconds(chip, inside // shards, 1, 4 * part),
        between=all_reduce_seconds(chip, slices, slices, 4 * model.parameters / inside))


def _rows(model, chip, images_of):
    """Cells for each number of chips; images_of(chips) -> images a chip, 0 = no row."""
    for chips in COUNTS:
        images = images_of(chips)
        if not images:
            continue
        yield f"{chips:,}"
        yield f"{images * chips:,.0f}"
        for kind in KINDS.values():
            seconds = sum(step(model, chip, chips, images, kind))
            alone = sum(step(model, chip, 1, images_of(1), kind)) * images / images_of(1)
            hours = model.steps * model.batch / (images * chips) * seconds * chips / 3600
            yield from (f"{1e3 * seconds:,.2f}", f"{alone / seconds:.0%}", f"{hours:,.0f}")


def _table(head, cells) -> str:
    cells = [*head, *["--:"] * len(head), *cells]
    return "\n".join("| " + " | ".join(cells[i:i + len(head)]) + " |"
                     for i in range(0, len(cells), len(head))) + "\n"


def _memory(models):
    for model in models:
        yield model.config
        for kind in KINDS.values():
            yield f"{(kind.whole + kind.cut / SHARDS) * model.parameters / 1e9:.2f}"


def _chips():
    head = ["chip", "bfloat16 TFLOP/s", "HBM GB", "HBM GB/s", "links GB/s", "joined by links",
            "network GB/s"]
    cells = []
    for name in ("v5e", "h100"):
        c = CHIPS[name]
        rates = (c.bf16_flops / 1e12, c.hbm_bytes / 1e9, c.hbm_bandwidth / 1e9,
                 c.ici_bandwidth / 1e9, c.ici_chips, c.dcn_bandwidth / 1e9)
        cells += [name, *(f"{rate:,g}" for rate in rates)]
    return _table(head, cells)


COMPILED_HEAD = """
## What has been compiled

Training steps of the two 256x256 models, 8 images a chip, compiled for chips that were not there
(`ddpm bench compile --matrix=cut` and `--matrix=cut_pod`; none has run). *State* is what a chip
holds between steps, without the gradient; *peak* what it needs in a step. *Sent* is what a ring
moves out of a chip for the program's collectives, beside what the third term counts for the same
step. Collectives one by one: [BENCHMARKS.md](../BENCHMARKS.md), sections "matrix-cut" and
"matrix-cut-pod".

"""
COMPILED_TAIL = """
Less is sent than the third term counts because XLA's partitioner (`jit`) sums the gradients of
kernels in bfloat16; the default runner, `shard_map`, sums float32. On 8 chips the cut steps have
reduce-scatters (on a TPU fusions of their own): FSDP sends as much as a replicated step, ZeRO-1,
which gathers new weights in float32, more. On 256 chips, 32 groups of 8, they have none: each
gradient is summed whole over all chips and each chip takes its part, so that both send more. What
cutting saves is memory, and the update's time.
"""


def sent(row, chips: int) -> float:
    """Bytes out of a chip for the collectives of a compiled step, all as rings."""
    ring = {"all-reduce": 2 * (chips - 1) / chips, "reduce-scatter": (SHARDS - 1) / SHARDS,
            "all-gather": SHARDS - 1}  # of operands: an all-gather's is a part
    return sum(ring[name] * c["bytes"] for name, c in row["hlo"]["collectives"].items())


def _compiled(models):
    by_name = {model.config: model for model in models}
    rows = [row for file in COMPILED for row in json.loads(file.read_text())]
    for row in sorted(rows, key=lambda row: row["about"]["config"]):
        about, words = row["about"], row["cell"].split("/")
        name = ("FSDP" if "parallel.cut=params" in words else
                "ZeRO-1" if f"parallel.shards={SHARDS}" in words else "replicated")
        model, chips = by_name[about["config"]], about["devices"]
        chip = CHIPS["h100" if about["topology"].startswith("h100") else "v5e"]
        assumed = step(model, chip, chips, 0, KINDS[name]).links * chip.ici_bandwidth
        yield from (model.config, about["topology"], name, *(
            f"{value / 1e9:.2f}" for value in (row["memory"]["argument"], row["memory"]["peak"],
                                               sent(row, chips), assumed)))


def page() -> str:
    models = [model_of(name) for name in ("cifar10", "lsun_bedroom", "lsun_bedroom_large")]
    terms = "\n".join(f"| {name} | {text} |" for name, text in TERMS.items())
    parts = [HEAD.format(terms=terms, shards=SHARDS, chips=_chips(), most=COUNTS[-1],
                         configs=", ".join(f"`{model.config}`" for model in models)),
             f"\n## State and gradient on a chip, GB\n\nOver {SHARDS} chips, without activations: "
             "20 bytes a parameter; ZeRO-1 4 whole and 16 in parts, FSDP 20 in parts and a whole "
             "copy in bfloat16.\n\n", _table(["config", *KINDS], _memory(models)),
             COMPILED_HEAD,
             _table(["config", "machine", "", "state GB", "peak GB", "sent GB", "counted GB"],
                    _compiled(models)), COMPILED_TAIL]
    head = ["chips", "batch", *(f"{kind} {what}" for kind in KINDS
                                for what in ("ms", "efficiency", "chip-hours"))]
    for model in models:
        each = model.batch // 8
        batches = {f"the paper's batch of {model.batch}":
                   lambda chips, m=model: m.batch / chips if chips <= m.batch else 0,
                   f"{each} images a chip": lambda chips, n=each: n}
        parts.append(f"\n## {model.config}: {model.parameters:,} parameters\n")
        parts += [f"\n{chip}, {what}:\n\n" + _table(head, _rows(model, CHIPS[chip], images_of))
                  for chip in ("v5e", "h100") for what, images_of in batches.items()]
    return "".join(parts)


if __name__ == "__main__":
    out = page()
    PAGE.write_text(out)
    print(f"{PAGE.name}: {out.count(chr(10))} lines", file=sys.stderr)
