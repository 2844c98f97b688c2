"""What a config's fields may be: tables, ranges, and what fits together."""

from typing import NamedTuple

import jax.numpy as jnp

from ddpm_jax.config import defaults, flatten, load_config, row
from ddpm_jax.data.datasets import DATASETS
from ddpm_jax.diffusion.objective import LOSSES, WEIGHTS
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES
from ddpm_jax.diffusion.sampling import SAMPLERS, Method
from ddpm_jax.diffusion.schedule import BETAS, FIRST_LOG_VARIANCE
from ddpm_jax.errors import UserError
from ddpm_jax.models import attention, fused_norm, norm_tiles, shard_gradients
from ddpm_jax.parallel.cut import CUTS
from ddpm_jax.parallel.runners import CUTTING_RUNNERS, RUNNERS
from ddpm_jax.training import rng
from ddpm_jax.training.gradients import Clip
from ddpm_jax.training.optimizer import EPS_RULES

CLIP_SCOPES = {
    "per_replica": lambda train, shards: Clip(train.clip_norm, shards),
    "global": lambda train, shards: Clip(train.clip_norm, None),
}
# Fields of config.parallel, and the module whose FORMS they choose from.
KERNELS = {"norm_kernel": fused_norm, "attention_kernel": attention,
           "clip_kernel": shard_gradients}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Channels of the network's output, over the image's, that each loss trains.
_LOSS_CHANNELS = {"mse": {1}, "kl": {1, 2}, "hybrid": {2}, "vlb": {1, 2}}
_UNWEIGHTED = {"kl", "vlb"}  # losses whose weights are the bound's own
_NEED_SIGNAL = {"eps"}  # predictions from which x_0 cannot be read where there is no signal


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
    "model.num_classes": Range(0, 2**20),
    "model.label_dropout": _real(0, 1, open_high=True),
    "diffusion.num_timesteps": Range(1, 10**6),
    "diffusion.schedule.beta_start": _real(0, 1, open_low=True),
    "diffusion.schedule.beta_end": _real(0, 1, open_low=True),
    "diffusion.schedule.max_beta": _real(0, 1, open_low=True),
    "diffusion.schedule.offset": _real(0, 1),
    "diffusion.schedule.betas": _real(0, 1, open_low=True),
    "diffusion.weights.gamma": _real(0, LARGEST, open_low=True),
    "diffusion.weights.k": _real(0, LARGEST, open_low=True),
    "sampler.steps": Range(0, 10**6),
    "sampler.eta": _real(0, 1),
    "sampler.guidance": _real(0, LARGEST),
    "sampler.dynamic_threshold": _real(0, 1, open_low=True),
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
    "parallel.shards": Range(1, 2**24),
    "checkpoint.every": Range(1, INT32),
    "checkpoint.keep": Range(1, INT32),
    "checkpoint.keep_every": Range(0, INT32),
    "eval.sample_every": Range(0, INT32),
    "eval.sample_num": Range(1, INT32),
    "eval.every": Range(0, INT32),
    "eval.num": Range(1, INT32),
    "eval.bpd_num": Range(1, INT32),
}


def _cuts_nothing(config):
    return config.parallel.shards == 1


def _clips_the_mean(config):
    return not clips_parts(config.train)


def _evaluates_never(config):
    return not config.eval.every


# Fields without effect, the field that makes them so, and when it does.
IDLE = {
    "parallel.cut": ("parallel.shards", _cuts_nothing),
    "parallel.clip_kernel": ("train.clip_scope", _clips_the_mean),
    "train.clip_replicas": ("train.clip_scope", _clips_the_mean),
    "model.label_dropout": ("model.num_classes", lambda config: not config.model.num_classes),
    "data.threads": ("data.resident", lambda config: config.data.resident),
    "eval.sample_num": ("eval.sample_every", lambda config: not config.eval.sample_every),
    **dict.fromkeys(("eval.metrics", "eval.num", "eval.bpd_num", "eval.best"),
                    ("eval.every", _evaluates_never)),
}


def idle_fields(config) -> list[str]:
    """One line for each field that is not at its default and has no effect in training."""
    values, default = flatten(config.to_dict()), flatten(load_config("default").to_dict())
    return [f"config.{field}={values[field]} has no effect with {other}={values[other]}"
            for field, (other, idle) in IDLE.items()
            if values[field] != default[field] and idle(config)]


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
    if diffusion.zero_terminal_snr and diffusion.predict in _NEED_SIGNAL:
        raise UserError(f"config.diffusion.zero_terminal_snr=True does not go with diffusion."
                        f"predict={diffusion.predict}, which holds nothing of x_0 at the last "
                        "timestep; take v or x_start")
    sampler_row(config.sampler)
    check_guidance(config.model, config.sampler.guidance)
    row(RUNNERS, "parallel.runner", config.parallel.runner)
    for field, rows in KERNELS.items():
        row({"auto": None, **rows.FORMS}, f"parallel.{field}", config.parallel[field])
    row(DTYPES, "model.dtype", config.model.dtype)
    if config.sampler.steps > diffusion.num_timesteps:
        raise UserError(f"config.sampler.steps={config.sampler.steps} is more than "
                        f"diffusion.num_timesteps={diffusion.num_timesteps}")


SAMPLER_DEFAULTS = {"nodes": "", "clip_denoised": None, "dynamic_threshold": None, "eta": None,
                    "lower_order_final": None}


def sampler_row(sampler) -> tuple[Method, dict, bool]:
    """-> (row of SAMPLERS, its keywords, whether x_start is clipped) of the fields of
    config.sampler. Raises UserError where they do not fit each other."""
    method = row(SAMPLERS, "sampler.name", sampler["name"])
    general = {"name", "steps", "nodes", "clip_denoised", "dynamic_threshold", "guidance",
               "batch_size"}
    keywords = {k: v for k, v in sampler.items() if k not in general and v is not None}
    for keyword in sorted(set(keywords) - method.keywords):
        raise UserError(f"config.sampler.{keyword}={keywords[keyword]} is not of sampler.name="
                        f"{sampler['name']}; its own: {', '.join(method.keywords) or 'none'}")
    if sampler["clip_denoised"] and not method.clips:
        raise UserError(f"config.sampler.clip_denoised=True: {sampler['name']} mixes eps, which "
                        "cannot be clipped; leave it None, or take a sampler that mixes x_start")
    clips = method.clips and sampler["clip_denoised"] is not False
    if sampler["dynamic_threshold"] is not None and not clips:
        raise UserError(
            f"config.sampler.dynamic_threshold={sampler['dynamic_threshold']} bounds x_start, "
            + ("and clip_denoised=False leaves it as it is; set one of them" if method.clips else
               f"and {sampler['name']} mixes eps; take a sampler that mixes x_start"))
    return method, keywords, clips


def weights_row(weights) -> tuple:
    """-> (row of WEIGHTS, its keywords) of the fields of config.diffusion.weights. Raises UserError
    where they do not fit each other."""
    function = row(WEIGHTS, "diffusion.weights.name", weights["name"])
    keywords = {k: v for k, v in weights.items() if k != "name" and v is not None}
    own = defaults(function)
    for keyword in sorted(set(keywords) - set(own)):
        raise UserError(f"config.diffusion.weights.{keyword}={keywords[keyword]} is not of weights."
                        f"name={weights['name']}; its own: {', '.join(own) or 'none'}")
    return function, keywords


def check_guidance(model, guidance) -> None:
    """Raise UserError for guidance by a model that has no prediction with and without a label, and
    for a number below 0."""
    if not 0 <= guidance <= LARGEST:
        raise UserError(f"sampler.guidance={guidance} must be a finite number of at least 0; 1 is "
                        "off")
    if guidance == 1:
        return
    if not model.num_classes:
        raise UserError(f"sampler.guidance={guidance} needs labels, and this model has none "
                        "(model.num_classes=0); leave it at 1")
    if not model.label_dropout:
        raise UserError(f"sampler.guidance={guidance} needs a model that is trained without labels "
                        "too, and this one is not (model.label_dropout=0); leave it at 1")


def kernel_form(field, config, runner) -> str:
    """The row that config.parallel.``field``, of ``KERNELS``, names, or that was the fastest on the
    devices of ``runner`` for "auto".

    Raises UserError for kernels that the devices or the installed JAX cannot run.
    """
    rows, name = KERNELS[field], config.parallel[field]
    device, cut = runner.mesh.devices.flat[0], runner.num_virtual_devices > 1
    name = {"auto": rows.fastest_form(device.device_kind, config.model.dtype, cut)}.get(name, name)
    if not rows.FORMS[name].kernels:
        return name
    why, others = norm_tiles.missing(), ""
    if device.platform not in norm_tiles.PLATFORMS:
        why = f"its kernels are for NVIDIA GPUs, and the devices are {device.platform}"
    elif cut:
        why = (f"parallel.runner={runner.name} cuts the program for {runner.num_devices} devices, "
               "and kernels cannot be cut")
        others = "parallel.runner=shard_map, or "
    if why:
        raise UserError(f"config.parallel.{field}={name}: {why}; take {others}"
                        f"parallel.{field}={rows.PLAIN}")
    return name


def clips_parts(train) -> bool:
    """Whether parts of a batch are clipped on their own, and not the mean gradient."""
    return CLIP_SCOPES[train.clip_scope](train, 1).shards is not None


def check_training(config, num_devices: int) -> None:
    """Raise UserError at the first field that cannot work in training on ``num_devices`` devices.
    """
    train, diffusion = config.train, config.diffusion
    _check_ranges(config, TRAINING_RANGES)
    row(LOSSES, "diffusion.loss", diffusion.loss)
    if weights_row(diffusion.weights)[0] is not WEIGHTS["target"] and diffusion.loss in _UNWEIGHTED:
        raise UserError(f"config.diffusion.weights.name={diffusion.weights.name} does not go with "
                        f"diffusion.loss={diffusion.loss}, which is the bound; leave it at target")
    row(CLIP_SCOPES, "train.clip_scope", train.clip_scope)
    row(rng.GENERATORS, "train.random", train.random)
    row(CUTS, "parallel.cut", config.parallel.cut)
    row(EPS_RULES, "optimizer.eps_rule", config.optimizer.eps_rule)
    parts = num_devices * train.accumulation
    if train.batch_size % parts:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not divisible by {parts} "
            f"({num_devices} devices x train.accumulation={train.accumulation})")
    if clips_parts(train):
        _check_clip_replicas(train, num_devices)
    if config.parallel.shards > 1:
        _check_shards(config, num_devices)
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


def _check_shards(config, num_devices):
    parallel = config.parallel
    if parallel.runner not in CUTTING_RUNNERS:
        raise UserError(f"config.parallel.shards={parallel.shards} needs parallel.runner="
                        f"{' or '.join(CUTTING_RUNNERS)}, not {parallel.runner}")
    if num_devices % parallel.shards:
        fitting = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        raise UserError(f"config.parallel.shards={parallel.shards} does not divide the "
                        f"{num_devices} devices; take one of {', '.join(map(str, fitting))}")
    if clips_parts(config.train) and "params" in CUTS[parallel.cut]:
        raise UserError(f"config.parallel.cut={parallel.cut} does not go with train.clip_scope="
                        f"{config.train.clip_scope}, which needs the whole gradient of each part; "
                        "take parallel.cut=optimizer, or in a new run train.clip_scope=global")
