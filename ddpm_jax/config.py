"""Config files: load, store. Also what a resumed run may change."""

import importlib.machinery
import importlib.util
import inspect
import json
import pathlib
import traceback

from ml_collections import ConfigDict

from ddpm_jax.diffusion.schedule import BETAS
from ddpm_jax.errors import UserError, did_you_mean
from ddpm_jax.names import CONFIGS, packaged_configs
from ddpm_jax.storage.files import read_json

SOURCE = "init_from"  # in config.json, the run of the first weights; no field of a config
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


def config_path(name: str) -> tuple[str, str]:
    """-> (file, argument for its get_config) of 'FILE', 'NAME', 'FILE:ARGUMENT' or 'NAME:ARGUMENT',
    where NAME is a packaged config ('cifar10', whatever the current folder holds).

    Raises UserError listing the packaged ones.
    """
    for file, argument in ((name, ""), name.rpartition(":")[::2]):
        packaged = CONFIGS / f"{pathlib.Path(file).stem}.py"
        if file in (packaged.stem, packaged.name) and packaged.exists():
            return str(packaged), argument
        if pathlib.Path(file).is_file():
            return file, argument
        if file == f"configs/{packaged.name}" and packaged.exists():
            return str(packaged), argument
    if pathlib.Path(name).is_dir():
        raise UserError(f"--config={name} is a folder; a run's config is {name}/config.json")
    raise UserError(f"--config={name}: no such file, nor a packaged config; packaged: "
                    f"{', '.join(packaged_configs())}")


def load_config(name: str) -> ConfigDict:
    """The config of a Python file with ``get_config``, of a run's config.json, or a packaged one
    (see ``config_path``).

    Raises UserError naming the line of the file for whatever goes wrong in it, and for a field that
    configs/default.py does not have.
    """
    if name.endswith(".json"):
        config = from_json(read_json(name))
        _check_fields(config, f"--config={name}")
        return config
    path, argument = config_path(name)
    loader = importlib.machinery.SourceFileLoader("ddpm_config", path)
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("ddpm_config", loader))
    try:
        loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:  # the file is the user's: whatever it raises
        raise UserError(f"--config={name}: {_place(error, path)}{error}; a config is a Python file "
                        "with get_config(), or a run's config.json") from None
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
    place = f"{path}, line {lines[-1]}" if lines else path
    return f"{place}: {type(error).__name__}: "


def load_with_fields(name: str, fields) -> ConfigDict:
    """``load_config``, locked, for a command line that then sets ``fields``: {'a.b': text}.

    A beta schedule that is named there brings its own keywords, which may then be set. Raises
    UserError for a field that does not exist, naming similar ones.
    """
    config = load_config(name)
    schedule = config.diffusion.schedule
    with config.unlocked():
        use_schedule(config, fields.get("diffusion.schedule.name", schedule.name))
    known = flatten(config.to_dict())
    for field in fields:
        if field not in known and not any(k.startswith(f"{field}.") for k in known):
            near = did_you_mean(field, known, "--config.")
            raise UserError(f"config has no field {field!r}{near}; the fields and their defaults "
                            "are in configs/default.py")
    return config.lock()


def use_schedule(config: ConfigDict, name: str) -> None:
    """Make ``name`` the beta schedule: its keywords are those given for it, else its defaults."""
    law = row(BETAS, "diffusion.schedule.name", name)
    old = config.diffusion.schedule.to_dict()
    given = old if old["name"] == name else {}
    config.diffusion.schedule = ConfigDict({"name": name} | defaults(law) | given)


def defaults(function) -> dict:
    """{keyword: default} of a function's parameters that have one."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()
            if p.default is not p.empty}


def override(config: ConfigDict, fields: dict) -> None:
    """Set fields, {'a.b': value}; a changed beta schedule takes its own keywords."""
    name = fields.get("diffusion.schedule.name")
    if name is not None and name != config.diffusion.schedule.name:
        with config.unlocked():
            use_schedule(config, name)
    config.update_from_flattened_dict(fields)


def to_json(config: ConfigDict) -> dict:
    """Plain dict with lists for tuples: what is stored beside a run."""
    return json.loads(config.to_json())


def from_json(stored: dict) -> ConfigDict:
    """The ConfigDict that ``to_json`` stored; fields that are new since get their defaults.

    Raises UserError where it is no such config.
    """
    config = load_config("default")
    try:
        with config.unlocked():
            _merge(config, _tuples({k: v for k, v in stored.items() if k != SOURCE}))
    except (AttributeError, TypeError, ValueError) as error:  # a value of another type
        raise UserError(f"the stored config is damaged: {error}; restore it from a copy, or from "
                        "the 'config' item of a checkpoint beside it") from error
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
    """Fields that a resume may not change and that differ, as 'field: old -> new'. A field that is
    newer than the run has its default there."""
    known = flatten(to_json(load_config("default")))
    old, new = (
        {name: value for name, value in known.items()
         if not name.startswith("diffusion.schedule.")}
        | flatten(_with_schedule_defaults(c) | {SOURCE: {}}) for c in (old, new))
    return [
        f"{name}: {old.get(name, 'absent')!r} -> {new.get(name, 'absent')!r}"
        for name in sorted({*old, *new})
        if old.get(name, None) != new.get(name, None) and not name.startswith(RESUME_MAY_CHANGE)
    ]


def _with_schedule_defaults(config: dict) -> dict:
    """A stored config with every keyword of its beta schedule, also those left to the default."""
    diffusion = config.get("diffusion", {})
    schedule = diffusion.get("schedule", {})
    law = BETAS.get(schedule.get("name"))
    if law is None:
        return config
    return config | {"diffusion": diffusion | {"schedule": defaults(law) | schedule}}


def row(registry: dict, field: str, name):
    if name not in registry:
        raise UserError(f"config.{field}={name!r} is not known; known: {', '.join(registry)}")
    return registry[name]
