"""Weights of another program -> the folder of a run.

Each import reads, converts, compares with diffusers (interchange/parity.py) and writes, in this
order, so that a failure leaves nothing behind.
"""

import os
import re
import shlex

import jax

from ddpm_jax import experiment
from ddpm_jax.config import from_json, load_config, to_json
from ddpm_jax.interchange import parameter_names, parity
from ddpm_jax.interchange.diffusers.read import fetch_from_hub, open_diffusers
from ddpm_jax.interchange.official import open_official
from ddpm_jax.interchange.workdir import check_free, training_state, write_run
from ddpm_jax.storage import files

# A word of a folder's name (google/ddpm-ema-celebahq-256) -> the packaged config with the fields
# that its JSON files do not have: data and training.
BASES = {"cifar10": "cifar10", "celebahq": "celebahq256", "church": "lsun_church",
         "bedroom": "lsun_bedroom", "cat": "lsun_cat"}


def import_official(checkpoint, config, *, workdir, verify=True, say=print) -> parity.Verdict:
    """A TensorFlow 1 checkpoint of the official code -> the run ``workdir``.

    verify: compare with diffusers; say(line) receives notes and results. Raises UserError, after
    which nothing is left, for files that are damaged or do not fit the config.
    """
    check_free(workdir)
    exp, found, convert = _open_official(checkpoint, config, jax.devices()[:1])
    for note in found.notes:
        say(f"note: {note}")
    ema_params = convert(found.ema_params)
    result = _compare(exp, ema_params, verify, say)
    params = ema_params if found.params is found.ema_params else convert(found.params)
    moments = {name: convert(part) for name, part in (("mu", found.mu), ("nu", found.nu)) if part}
    state = training_state(exp, found.step, params, ema_params, moments)
    _write(workdir, exp, state, say, parity=str(result), optimizer=bool(moments),
           origin=f"the official checkpoint {os.path.basename(found.prefix)}",
           source=os.path.abspath(found.prefix))
    return result


def import_diffusers(path, config=None, *, workdir, verify=True, say=print) -> parity.Verdict:
    """A diffusers folder or weights file, or hf://OWNER/NAME -> the run ``workdir``.

    config: gives what the folder's JSON files do not have; default: a packaged config found by the
    folder's name. verify, say, errors: as in ``import_official``.
    """
    check_free(workdir)
    exp, found, base = _open_diffusers(path, config, jax.devices()[:1])
    for note in found.notes:
        say(f"note: {note}")
    params = _on_host(parameter_names.params_from_state_dict(found.state_dict, exp.model))
    result = _compare(exp, params, verify, say, found)
    state = training_state(exp, 0, params, params)
    _write(workdir, exp, state, say, parity=str(result), optimizer=False, origin=path,
           source=path if path.startswith("hf://") else os.path.abspath(path))
    say("diffusers folders hold one set of weights: it is used as the averaged and as the raw "
        "ones, at step 0")
    if base:
        say(f"data and training fields are those of --config={base}")
    return result


def read_official(checkpoint, config, *, ema=True):
    """-> (Experiment on all devices, averaged or raw params, step) of a checkpoint, without a run.
    Errors: as in ``import_official``."""
    exp, found, convert = _open_official(checkpoint, config)
    return exp, convert(found.ema_params if ema else found.params), found.step


def _open_official(checkpoint, config, devices=None):
    exp = experiment.build_model(config, devices)
    experiment.check_new(exp)
    return exp, open_official(checkpoint), lambda part: _on_host(
        parameter_names.params_from_variables(part, exp.model))


def read_diffusers(path, config=None):
    """-> (Experiment on all devices, params) of what ``import_diffusers`` reads, without a run."""
    exp, found, _ = _open_diffusers(path, config)
    return exp, _on_host(parameter_names.params_from_state_dict(found.state_dict, exp.model))


def _open_diffusers(path, config, devices=None):
    """-> (Experiment, diffusers.read.Model, name of the config that completes the files or None)"""
    found = open_diffusers(fetch_from_hub(path) if path.startswith("hf://") else path, config)
    base = None
    if config is None:
        base, config = base_config(path, found.fields["data"])
    return experiment.build_model(_with_fields(config, found.fields), devices), found, base


def base_config(path, data):
    """-> (name, config) that a folder's name suggests and whose images have the folder's shape."""
    words = re.split(r"[^a-z0-9]+", os.path.basename(path.rstrip("/")).lower())
    for word, name in BASES.items():
        config = load_config(name)
        if word in words and all(config.data[k] == v for k, v in data.items()):
            return name, config
    return "default", _with_fields(load_config("default"), {"data": {"name": "folder"}})


def _with_fields(config, fields):
    """A copy of ``config`` in which ``fields`` {section: {field: value}} are set."""
    stored = to_json(config)
    for section, values in fields.items():
        stored[section] |= values
    return from_json(stored)


def _on_host(tree):
    """``tree`` with its numpy leaves replaced, one by one, by JAX arrays on the CPU, which Orbax
    writes without a copy of its own. Unchanged where JAX has no CPU backend."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return tree
    for key, node in tree.items():
        tree[key] = _on_host(node) if isinstance(node, dict) else jax.device_put(node, cpu)
    return tree


def _compare(exp, params, verify, say, found=None):
    if not verify:
        return parity.not_compared("--noverify")
    result = parity.check(exp.model, params, exp.config.diffusion.num_timesteps, found)
    say(str(result))
    return result


def _write(workdir, exp, state, say, *, origin, **facts):
    step = int(state.step)
    write_run(workdir, exp, state, {"origin": origin, "step": step, **facts,
                                    "averaged": state.ema_params is not state.params})
    folder = str(files.resolve(workdir))
    say(f"imported {origin}, step {step:,}, into {folder}")
    say(f"to sample: {_command('sample', workdir=folder, num=16, out='samples')}")
    config = files.join(folder, "config.json")
    say(f"to train on: {_command('train', config=config, workdir=folder)}")
    new = _command("train", config=config, workdir=f"{folder}-2", init_from=folder)
    say(f"with another rate, batch or data: {new} --config.FIELD=VALUE ...")


def _command(name, **flags):
    """A line for the shell, whatever characters the values have."""
    return shlex.join(["ddpm", name, *(f"--{flag}={value}" for flag, value in flags.items())])
