"""What a config's fields may be: tables, ranges, and what fits together."""

from typing import NamedTuple

import jax.numpy as jnp

from ddpm_jax.config import flatten, row
from ddpm_jax.data.datasets import DATASETS
from ddpm_jax.diffusion.objective import LOSSES
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES
from ddpm_jax.diffusion.sampling import SAMPLERS, Method
from ddpm_jax.diffusion.schedule import BETAS, FIRST_LOG_VARIANCE
from ddpm_jax.errors import UserError
from ddpm_jax.parallel.runners import RUNNERS
from ddpm_jax.training import rng
from ddpm_jax.training.gradients import Clip
from ddpm_jax.training.optimizer import EPS_RULES

CLIP_SCOPES = {
    "per_replica": lambda train, shards: Clip(train.clip_norm, shards),
    "global": lambda train, shards: Clip(train.clip_norm, None),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Channels of the network's output, over the image's, that each loss trains.
_LOSS_CHANNELS = {"mse": {1}, "kl": {1, 2}, "hybrid": {2}}


class Range(NamedTuple):
    """Values from low to high, both included unless open. None (unset) is always allowed."""

    low: float
    high: float
    whole: bool = True
    open_low: bool = False
    open_high: bool = False

    def __str__(self):
        if self.whole:
            return f"a whole number in {self.low} ... {self.high}"
        return (f"a number in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}"
                f"{')' if self.open_high else ']'}")

    def has(self, value) -> bool:
        if value is None:
            return True
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)


def _real(low, high, open_low=False, open_high=False):
    return Range(low, high, False, open_low, open_high)


LARGEST, INT32 = 1e38, 2**31 - 1  # finite in float32
# Every number of a config, by what reads it. Of tuples: each element.
MODEL_RANGES = {
    "seed": Range(0, 2**32 - 1),
    "data.image_size": Range(1, 2**14),
    "data.channels": Range(1, 2**10),
    "data.threads": Range(1, 2**10),
    "model.ch": Range(4, 2**14),
    "model.ch_mult": Range(1, 2**10),
    "model.num_res_blocks": Range(1, 2**10),
    "model.attn_resolutions": Range(1, 2**14),
    "model.dropout": _real(0, 0.999),  # drawn from 16 bits
    "model.num_groups": Range(1, 2**14),
    "model.space_to_depth": Range(1, 2**14),
    "diffusion.num_timesteps": Range(1, 10**6),
    "diffusion.schedule.beta_start": _real(0, 1, open_low=True),
    "diffusion.schedule.beta_end": _real(0, 1, open_low=True),
    "diffusion.schedule.max_beta": _real(0, 1, open_low=True),
    "diffusion.schedule.offset": _real(0, 1),
    "sampler.steps": Range(0, 10**6),
    "sampler.eta": _real(0, 1),
    "sampler.batch_size": Range(1, 2**24),
}
TRAINING_RANGES = {
    "train.steps": Range(1, INT32),
    "train.batch_size": Range(1, 2**24),
    "train.accumulation": Range(1, 2**24),
    "train.steps_per_dispatch": Range(1, 2**20),
    "train.log_every": Range(1, INT32),
    "train.clip_norm": _real(0, LARGEST),
    "train.clip_replicas": Range(1, 2**24),
    "optimizer.learning_rate": _real(0, LARGEST),
    "optimizer.warmup_steps": Range(0, INT32),
    "optimizer.decay_steps": Range(0, INT32),
    "optimizer.b1": _real(0, 1, open_high=True),
    "optimizer.b2": _real(0, 1, open_high=True),
    "optimizer.eps": _real(0, LARGEST, open_low=True),
    "ema.decay": _real(0, 1, open_high=True),
    "checkpoint.every": Range(1, INT32),
    "checkpoint.keep": Range(1, INT32),
    "checkpoint.keep_every": Range(0, INT32),
    "eval.sample_every": Range(0, INT32),
    "eval.sample_num": Range(1, INT32),
    "eval.every": Range(0, INT32),
    "eval.num": Range(1, INT32),
    "eval.bpd_num": Range(1, INT32),
}


def _check_ranges(config, ranges):
    fields = flatten(config.to_dict())
    for field, allowed in ranges.items():
        value = fields.get(field, ())  # a schedule has not every keyword
        for number in value if isinstance(value, list | tuple) else [value]:
            if not allowed.has(number):
                raise UserError(f"config.{field}={value} must be {allowed}")


def check_model(config) -> None:
    """Raise UserError at the first field that cannot work in a model or its sampler."""
    diffusion = config.diffusion
    _check_ranges(config, MODEL_RANGES)
    row(DATASETS, "data.name", config.data.name)
    row(BETAS, "diffusion.schedule.name", diffusion.schedule.name)
    row(PARAMETERIZATIONS, "diffusion.predict", diffusion.predict)
    row(VARIANCES, "diffusion.variance", diffusion.variance)
    row(FIRST_LOG_VARIANCE, "diffusion.first_log_variance", diffusion.first_log_variance)
    sampler_row(config.sampler)
    row(RUNNERS, "parallel.runner", config.parallel.runner)
    row(DTYPES, "model.dtype", config.model.dtype)
    if config.sampler.steps > diffusion.num_timesteps:
        raise UserError(f"config.sampler.steps={config.sampler.steps} is more than "
                        f"diffusion.num_timesteps={diffusion.num_timesteps}")


SAMPLER_DEFAULTS = {"nodes": "", "clip_denoised": None, "eta": None, "lower_order_final": None}


def sampler_row(sampler) -> tuple[Method, dict, bool]:
    """-> (row of SAMPLERS, its keywords, whether x_start is clipped) of the fields of
    config.sampler. Raises UserError where they do not fit each other."""
    method = row(SAMPLERS, "sampler.name", sampler["name"])
    general = {"name", "steps", "nodes", "clip_denoised", "batch_size"}
    keywords = {k: v for k, v in sampler.items() if k not in general and v is not None}
    for keyword in sorted(set(keywords) - method.keywords):
        raise UserError(f"config.sampler.{keyword}={keywords[keyword]} is not of sampler.name="
                        f"{sampler['name']}; its own: {', '.join(method.keywords) or 'none'}")
    if sampler["clip_denoised"] and not method.clips:
        raise UserError(f"config.sampler.clip_denoised=True: {sampler['name']} mixes eps, which "
                        "cannot be clipped; leave it None, or take a sampler that mixes x_start")
    return method, keywords, method.clips and sampler["clip_denoised"] is not False


def check_training(config, num_devices: int) -> None:
    """Raise UserError at the first field that cannot work in training on ``num_devices`` devices.
    """
    train, diffusion = config.train, config.diffusion
    _check_ranges(config, TRAINING_RANGES)
    row(LOSSES, "diffusion.loss", diffusion.loss)
    row(CLIP_SCOPES, "train.clip_scope", train.clip_scope)
    row(rng.GENERATORS, "train.random", train.random)
    row(EPS_RULES, "optimizer.eps_rule", config.optimizer.eps_rule)
    parts = num_devices * train.accumulation
    if train.batch_size % parts:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not divisible by {parts} "
            f"({num_devices} devices x train.accumulation={train.accumulation})")
    if CLIP_SCOPES[train.clip_scope](train, 1).shards:
        _check_clip_replicas(train, num_devices)
    if train.steps * train.batch_size >= 2**32:
        raise UserError(f"config.train.steps={train.steps} times train.batch_size="
                        f"{train.batch_size} reaches 2**32 images: lower one of them")
    channels = VARIANCES[diffusion.variance].channels
    if channels not in _LOSS_CHANNELS.get(diffusion.loss, {channels}):
        fitting = [loss for loss, trained in _LOSS_CHANNELS.items() if channels in trained]
        raise UserError(f"config.diffusion.loss={diffusion.loss} does not go with "
                        f"diffusion.variance={diffusion.variance}; take {' or '.join(fitting)}")


def _check_clip_replicas(train, num_devices):
    shards = train.clip_replicas
    if (shards % num_devices and num_devices % shards) or train.batch_size % shards:
        raise UserError(
            f"config.train.clip_replicas={shards} must be a multiple or a divisor of the "
            f"{num_devices} devices and divide train.batch_size={train.batch_size}; use another "
            "number of devices, or in a new run train.clip_scope=global")
    if train.accumulation > 1 and (train.batch_size // shards) % max(
        1, train.accumulation // max(1, shards // num_devices)
    ):
        raise UserError(f"config.train.accumulation={train.accumulation} does not divide the "
                        f"{train.batch_size // shards} images of a clipped part evenly")
