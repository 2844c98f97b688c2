"""Config files: load, check, store. Also what a resumed run may change."""

import importlib.util
import json
import pathlib
import traceback

import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax.data.datasets import DATASETS
from ddpm_jax.diffusion.objective import LOSSES
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES
from ddpm_jax.diffusion.sampling import SAMPLERS, Method
from ddpm_jax.diffusion.schedule import BETAS, FIRST_LOG_VARIANCE
from ddpm_jax.errors import UserError, did_you_mean
from ddpm_jax.parallel.runners import RUNNERS
from ddpm_jax.storage.files import read_json
from ddpm_jax.training import rng
from ddpm_jax.training.gradients import Clip
from ddpm_jax.training.optimizer import EPS_RULES

CONFIGS = pathlib.Path(__file__).parent / "configs"
CLIP_SCOPES = {
    "per_replica": lambda train, shards: Clip(train.clip_norm, shards),
    "global": lambda train, shards: Clip(train.clip_norm, None),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_BLIND_TO_VARIANCE = {"mse"}

# What a resumed run may change; everything else belongs to the run and must stay.
RESUME_MAY_CHANGE = (
    "train.steps",
    "train.steps_per_dispatch",
    "train.log_every",
    "checkpoint.",
    "eval.",
    "sampler.",
    "parallel.",
    "data.dir",
    "data.threads",
)


def packaged_configs() -> list[str]:
    return sorted(p.stem for p in CONFIGS.glob("*.py") if not p.stem.startswith("_"))


def config_path(name: str) -> str:
    """A file's path as it is; the name of a packaged config ('cifar10') as that file's path.

    'NAME:ARG' hands ARG to the config. Raises UserError listing the packaged ones.
    """
    file, colon, argument = name.partition(":")
    if pathlib.Path(file).exists():
        return name
    packaged = CONFIGS / f"{pathlib.Path(file).stem}.py"
    if file.count("/") <= (1 if file.startswith("configs/") else 0) and packaged.exists():
        return f"{packaged}{colon}{argument}"
    raise UserError(f"--config={name}: no such file, nor a packaged config; packaged: "
                    f"{', '.join(packaged_configs())}")


def load_config(name: str) -> ConfigDict:
    """The ConfigDict of a config file or packaged name (see ``config_path``), or of the config.json
    of a run.

    Raises UserError naming the line of the file for whatever goes wrong in it, and for a field that
    configs/default.py does not have.
    """
    if name.endswith(".json"):
        return from_json(read_json(name))
    path, _, argument = config_path(name).partition(":")
    spec = importlib.util.spec_from_file_location("ddpm_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={name}: {_place(error, path)}{error}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name}: get_config() returns {type(config).__name__}, not a "
                        "ConfigDict")
    if pathlib.Path(path) != CONFIGS / "default.py":
        _check_fields(config, f"--config={name}")
    return config


def _check_fields(config, where):
    known = flatten(to_json(load_config("default")))
    for field in flatten(to_json(config)):
        if field not in known and not field.startswith("diffusion.schedule."):
            raise UserError(f"{where}: config has no field {field!r}{did_you_mean(field, known)}")


def _place(error, path) -> str:
    """'FILE, line N: KIND: ' of an error in a config file; its message follows."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == path]
    if isinstance(error, SyntaxError):  # its message has file and line
        return "SyntaxError: "
    return f"{path}, line {lines[-1]}: {type(error).__name__}: " if lines else f"{path}: "


def to_json(config: ConfigDict) -> dict:
    """Plain dict with lists for tuples: what is stored beside a run."""
    return json.loads(config.to_json())


def from_json(stored: dict) -> ConfigDict:
    """The ConfigDict that ``to_json`` stored; fields that are new since get their defaults."""
    config = load_config("default")
    with config.unlocked():
        _merge(config, _tuples(stored))
    return config


def _merge(config, values):
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(config.get(key), ConfigDict):
            if key == "schedule":  # its keywords belong to the law named, not to the default's
                config[key] = ConfigDict(value)
            else:
                _merge(config[key], value)
        else:
            config[key] = value


def _tuples(value):
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def flatten(config: dict, prefix="") -> dict:
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differing_fields(old: dict, new: dict) -> list[str]:
    """Fields that a resume may not change and that differ, as 'field: old -> new'."""
    old, new = flatten(old), flatten(new)
    return [
        f"{name}: {old.get(name, 'absent')!r} -> {new.get(name, 'absent')!r}"
        for name in sorted({*old, *new})
        if old.get(name, None) != new.get(name, None) and not name.startswith(RESUME_MAY_CHANGE)
    ]


def row(registry: dict, field: str, name):
    if name not in registry:
        raise UserError(f"config.{field}={name!r} is not known; known: {', '.join(registry)}")
    return registry[name]


def _at_least_1(config, *fields):
    for field in fields:
        value = config
        for part in field.split("."):
            value = value[part]
        if value < 1:
            raise UserError(f"config.{field}={value} must be at least 1")


def check_model(config: ConfigDict) -> None:
    """Raise UserError at the first field that cannot work in a model or its sampler."""
    diffusion = config.diffusion
    _at_least_1(config, "diffusion.num_timesteps", "sampler.batch_size")
    row(DATASETS, "data.name", config.data.name)
    row(BETAS, "diffusion.schedule.name", diffusion.schedule.name)
    row(PARAMETERIZATIONS, "diffusion.predict", diffusion.predict)
    row(VARIANCES, "diffusion.variance", diffusion.variance)
    row(FIRST_LOG_VARIANCE, "diffusion.first_log_variance", diffusion.first_log_variance)
    sampler_row(config.sampler)
    row(RUNNERS, "parallel.runner", config.parallel.runner)
    row(DTYPES, "model.dtype", config.model.dtype)
    if not 0 <= config.model.dropout < 1:
        raise UserError(f"config.model.dropout={config.model.dropout} must be in [0, 1)")
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


def check_training(config: ConfigDict, num_devices: int) -> None:
    """Raise UserError at the first field that cannot work in training on ``num_devices`` devices.
    """
    train, diffusion = config.train, config.diffusion
    _at_least_1(config, "train.steps", "train.batch_size", "train.accumulation",
                "train.steps_per_dispatch", "train.log_every", "checkpoint.every",
                "checkpoint.keep")
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
    if VARIANCES[diffusion.variance].channels > 1 and diffusion.loss in _BLIND_TO_VARIANCE:
        raise UserError(f"config.diffusion.loss={diffusion.loss} does not train a learned "
                        "variance: use diffusion.loss=kl")


def _check_clip_replicas(train, num_devices):
    shards = train.clip_replicas
    if shards % num_devices or train.batch_size % shards:
        raise UserError(
            f"config.train.clip_replicas={shards} must be a multiple of the {num_devices} "
            f"devices and divide train.batch_size={train.batch_size}; or set "
            "train.clip_scope=global")
    if train.accumulation > 1 and (train.batch_size // shards) % max(
        1, train.accumulation // (shards // num_devices)
    ):
        raise UserError(f"config.train.accumulation={train.accumulation} does not divide the "
                        f"{train.batch_size // shards} images of a clipped part evenly")
