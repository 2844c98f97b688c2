"""What training a config means, before it begins: `ddpm train --dry_run`."""

import shlex
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import checkpoints, experiment, run_log
from ddpm_jax.compilation.report import quantity, size
from ddpm_jax.compilation.roofline import unet_work
from ddpm_jax.config import flatten, load_config, to_json
from ddpm_jax.config_checks import idle_fields
from ddpm_jax.parallel.cut import held_bytes
from ddpm_jax.reproduction.paper_results import V3_8
from ddpm_jax.start_line import MEASURED
from ddpm_jax.storage import files

COPIES = 5      # of the parameters, float32: weights, average, Adam's two moments, gradient


class Speed(NamedTuple):
    """A measured speed of training. fields: what the config must have."""

    where: str
    parameters: int
    images_per_second: float
    fields: dict


SPEEDS = (
    *(Speed("a TPU v3-8, by the paper", parameters, paper["steps_per_s"] * paper["batch"],
            {"train.batch_size": paper["batch"]})
      for parameters, paper in ((35_746_307, V3_8[32]), (113_673_219, V3_8[256]))),
    *(Speed("one H100, docs/h100.md", row.parameters, row.images_per_second, {
        "train.batch_size": row.images, "model.dtype": row.dtype,
        "train.clip_scope": "global" if row.clip == "global" else "per_replica"})
      for row in MEASURED if row.clip),
)


def describe(config, name: str, workdir=None) -> str:
    """The text of a dry run. name: what --config names; workdir: the run, new or to be resumed.
    Raises UserError as training would for its config."""
    exp = experiment.build_model(config)
    training = experiment.build_training(exp)
    stored = to_json(config)
    if workdir is None or not files.listing(files.join(workdir, "checkpoints")):
        experiment.check_new(exp)
    if workdir is not None:
        checkpoints.claim(workdir, stored, write=False)
    work, train = unet_work(exp.model), config.train
    step_flops = work.train_flops * train.batch_size
    rows = [
        ("parameters", f"{work.parameters:,}"),
        ("FLOPs", f"{quantity(step_flops, 'FLOP')} a step of {train.batch_size} images, "
         f"{quantity(step_flops * train.steps, 'FLOP')} for {train.steps:,} steps (counted by "
         "hand, without recomputation)"),
        ("memory", f"{size(_state_bytes(training, work))} a device for weights, average, moments "
         "and gradient; activations come on top (ddpm compile shows the peak)"),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}, "
         f"{config.parallel.runner}"),
        *(("hours", line) for line in _hours(stored, work.parameters, workdir)),
        *(("warning", text) for text in idle_fields(config)),
        ("command", _command(name, stored, workdir)),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join([*_fields(stored), "", *(f"{label:<{width}}  {text}" for label, text in rows)])


def _state_bytes(training, work) -> int:
    state = training.abstract_state
    if training.cut is None:
        return 4 * COPIES * work.parameters
    return sum(held_bytes(part)[0] for part in (state, state.ema_params))  # so lies the gradient


def _fields(stored) -> list[str]:
    """The resolved config; a star marks what default.py has otherwise."""
    default = flatten(to_json(load_config("default")))
    return [f"{'*' if default.get(name, name) != value else ' '} {name} = {value!r}"
            for name, value in flatten(stored).items()]


def _hours(stored, parameters, workdir) -> list[str]:
    """Of all steps, at speeds that were measured: in the run itself, or for this config."""
    images, found = stored["train"]["steps"] * stored["train"]["batch_size"], []
    lines = workdir and files.join(workdir, "metrics.jsonl")
    if lines and files.exists(lines):
        rates = [r["images_per_second"] for r in run_log.read_metrics(lines)
                 if r.get("images_per_second")]
        if rates:
            found.append((float(np.median(rates)), "as this run was measured so far"))
    flat = flatten(stored)
    speeds = {}  # the fastest form of each machine: what it takes by itself
    for s in SPEEDS:
        if s.parameters == parameters and s.fields.items() <= flat.items():
            speeds[s.where] = max(s.images_per_second, speeds.get(s.where, 0))
    found += [(rate, f"on {where}") for where, rate in speeds.items()]
    return [f"{images / rate / 3600:.3g} {where} ({rate:,.0f} images/s)"
            for rate, where in found] or ["not measured for this config; ddpm bench step measures"]


def _command(name, stored, workdir) -> str:
    """The line that trains: the config's name, and the fields that differ from it."""
    base = flatten(to_json(load_config(name)))
    changed = [f"--config.{field}={tuple(value) if isinstance(value, list) else value}"
               for field, value in flatten(stored).items() if base.get(field, field) != value]
    return shlex.join(["ddpm", "train", f"--config={name}", f"--workdir={workdir or 'RUN'}",
                       *changed])
