"""ddpm import official --checkpoint=PREFIX --config=NAME --workdir=DIR
   ddpm import diffusers --path=FOLDER_OR_FILE --workdir=DIR [--config=NAME]

Make a run's folder out of somebody else's weights; `ddpm sample`, `ddpm evaluate` and `ddpm train`
then take it as their own. Ends with a parity verdict: PASS, FAIL (nothing is written, exit status
not 0) or "not compared" where diffusers and PyTorch are not installed.

  official   a TensorFlow 1 checkpoint of the paper's code (raw and EMA weights, Adam's moments,
             step), read without TensorFlow: model.ckpt-790000, its .index file, or its folder
  diffusers  a folder of UNet2DModel and DDPMScheduler, as google/ddpm-cifar10-32: safetensors, or
             .bin read without running anything in it; hf://OWNER/NAME fetches it. The config
             comes from the folder's JSON; --config adds what they do not say (data, training)
"""

import functools
import operator
import os
import re
import sys

import numpy as np

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

USAGE = "usage: ddpm import official|diffusers --workdir=DIR ... (ddpm import --help)"
# A word of a folder's name (google/ddpm-ema-celebahq-256) -> the packaged config that says what
# its JSON files do not: data and training.
BASES = {"cifar10": "cifar10", "celebahq": "celebahq256", "church": "lsun_church",
         "bedroom": "lsun_bedroom", "cat": "lsun_cat"}


def define_flags(define):
    define.config()
    define.workdir()
    define.path("checkpoint", None, "official: prefix, .index file or folder")
    define.path("path", None, "diffusers: folder, weights file, or hf://OWNER/NAME")
    define.bool("verify", True, "compare with diffusers on PyTorch before writing anything")


def main(values, words):
    kind, *rest = words or [""]
    if kind not in KINDS or rest:
        raise UserError(f"import {' '.join(words)}: {USAGE}")
    workdir = common.required(values, "workdir")
    KINDS[kind](values, workdir=workdir, verify=values.verify)
    return 0


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _official_from_flags(values, **keywords):
    import_official(common.required(values, "checkpoint"), common.required(values, "config"),
                    **keywords)


def _diffusers_from_flags(values, **keywords):
    import_diffusers(common.required(values, "path"), values.config, **keywords)


KINDS = {"official": _official_from_flags, "diffusers": _diffusers_from_flags}


# ---- the two imports ----


def import_official(checkpoint, config, *, workdir, verify=True):
    """Official TF1 checkpoint -> run folder. -> Verdict. Raises UserError; then nothing is left."""
    from ddpm_jax.config import to_json
    from ddpm_jax.interchange import official, parameter_names
    from ddpm_jax.interchange.workdir import check_free

    check_free(workdir)
    exp = _build(config)
    stored = to_json(config)
    found = official.open_official(checkpoint)
    for note in found.notes:
        _say(f"note: {note}")

    def convert(part):
        return _on_host(parameter_names.params_from_variables(part, stored))

    ema_params = convert(found.ema_params)
    result = _verdict(exp, stored, ema_params, verify)
    params = ema_params if found.params is found.ema_params else convert(found.params)
    moments = {name: convert(part) if part else None
               for name, part in (("mu", found.mu), ("nu", found.nu))}
    _write(exp, stored, workdir, found.step, params, ema_params, moments, result,
           origin=f"the official checkpoint {os.path.basename(found.prefix)}",
           source=os.path.abspath(found.prefix))
    return result


def import_diffusers(path, config=None, *, workdir, verify=True):
    """diffusers folder or weights file -> run folder. -> Verdict. Raises UserError; then nothing is
    left."""
    from ddpm_jax.config import to_json
    from ddpm_jax.interchange import diffusers, parameter_names
    from ddpm_jax.interchange.workdir import check_free

    check_free(workdir)
    local = diffusers.fetch_from_hub(path) if path.startswith("hf://") else path
    model = diffusers.open_diffusers(local, has_config=config is not None)
    base = None
    if config is None:
        base, config = _base(path, model.fields["data"])
    before = to_json(config)
    config = with_fields(config, model.fields)
    exp = _build(config)
    stored = to_json(config)
    params = _on_host(parameter_names.params_from_state_dict(model.state_dict, stored))
    result = _verdict(exp, stored, params, verify, model)
    _write(exp, stored, workdir, 0, params, params, {"mu": None, "nu": None}, result,
           origin=path, source=path if path.startswith("hf://") else os.path.abspath(path))
    _say("diffusers folders hold one set of weights: it stands for both the averaged and the raw "
         "ones, at step 0")
    if base:
        changed = " ".join(_overrides(before, stored))
        _say(f"data and training fields are those of --config={base}"
             + (f"; to train on: --config={base} {changed}" if changed else ""))
    return result


def _base(path, data):
    """-> (name, config) that a folder's name suggests and whose images have the folder's shape."""
    from ddpm_jax.config import load_config

    words = re.split(r"[^a-z0-9]+", os.path.basename(path.rstrip("/")).lower())
    for word, name in BASES.items():
        config = load_config(name)
        if word in words and all(config.data[k] == v for k, v in data.items()):
            return name, config
    return "default", with_fields(load_config("default"), {"data": {"name": "folder"}})


def _on_host(tree):
    """``tree`` with its numpy leaves replaced, one by one, by JAX arrays on the CPU: Orbax writes
    those without a copy of its own. Left as it is where JAX was told to have no CPU backend."""
    import jax

    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return tree
    for key, node in tree.items():
        tree[key] = _on_host(node) if isinstance(node, dict) else jax.device_put(node, cpu)
    return tree


def with_fields(config, fields):
    """A copy of ``config`` in which ``fields`` {section: {field: value}} are set."""
    from ml_collections import ConfigDict

    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        for section, values in fields.items():
            for field, value in values.items():
                config[section][field] = ConfigDict(value) if isinstance(value, dict) else value
    return config


def _overrides(before, after):
    from ddpm_jax.config import flatten

    before, after = flatten(before), flatten(after)
    return [f"--config.{k}={','.join(map(str, v)) if isinstance(v, list) else v}"
            for k, v in after.items() if before.get(k) != v]


def _build(config):
    import jax

    from ddpm_jax import experiment

    return experiment.build(config, jax.devices()[:1])


# ---- verdict and folder ----


def _verdict(exp, stored, params, verify, model=None):
    """The verdict on ``params``; raises UserError if it is FAIL."""
    from ddpm_jax.interchange import parity

    if not verify:
        return parity.Verdict(parity.NOT_COMPARED, None, None, (), "--noverify")
    try:
        peer = (parity.golden_peer(params, stored)
                or (_peer_of_file(model) if model else _peer_of_params(stored, params)))
    except UserError as error:  # a model that diffusers cannot express
        result = parity.Verdict(parity.NOT_COMPARED, None, None, (), str(error))
    else:
        result = parity.verdict(_eps(exp, params), peer, exp.image_shape,
                                stored["diffusion"]["num_timesteps"])
    if result.result == parity.FAIL:
        raise UserError(f"{result}; nothing was written")
    _say(str(result))
    return result


def _peer_of_params(stored, params):
    from ddpm_jax.interchange import diffusers, parameter_names, parity

    return parity.diffusers_peer(diffusers.unet_config(stored),
                                 parameter_names.state_dict_from_params(params, stored))


def _peer_of_file(model):
    """diffusers reading the file itself where that is safe, else handed the file's arrays: a .bin
    is a pickle, and whether its loader runs code depends on the versions installed."""
    from ddpm_jax.formats.lazy import load
    from ddpm_jax.interchange import diffusers, parameter_names, parity

    if model.config is None:
        raise UserError("no config.json beside the weights for diffusers to build the model from")
    if os.path.basename(model.weights) == f"{diffusers.WEIGHTS}.safetensors":
        return parity.diffusers_peer(model.config, folder=model.folder)
    state = parameter_names.current_names(model.state_dict)
    return parity.diffusers_peer(model.config, {k: load(v) for k, v in state.items()})


def _eps(exp, params):
    """(x, t) -> eps of our model in float32, products at ``highest`` precision."""
    import jax
    import jax.numpy as jnp

    model = exp.model.clone(dtype=jnp.float32)

    @jax.jit
    def apply(params, x, t):
        return model.apply({"params": params}, x, t)

    on_device = jax.device_put(params, jax.devices()[0])

    def eps(x, t):
        with jax.default_matmul_precision("highest"):
            return np.asarray(apply(on_device, x, jnp.full(len(x), t, jnp.int32)))

    return eps


def _leaf(tree, keys):
    return functools.reduce(operator.getitem, keys, tree)


def optimizer_state(abstract, step, moments):
    """optax's state filled from imported numbers: every ``count`` is ``step``; ``mu`` and ``nu``
    are the trees of ``moments``, zeros where None."""
    import jax

    def fill(path, shape):
        keys = [getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))
                for key in path]
        if keys[-1] == "count":
            return np.asarray(step, shape.dtype)
        for name, tree in moments.items():
            if name in keys and tree is not None:
                return _leaf(tree, keys[keys.index(name) + 1:])
        return np.zeros(shape.shape, shape.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def _write(exp, stored, workdir, step, params, ema_params, moments, result, *, origin, source):
    from ddpm_jax.interchange.workdir import write_run

    opt_state = optimizer_state(exp.abstract_state.opt_state, step, moments)
    facts = {"origin": origin, "source": source, "step": step,
             "averaged": ema_params is not params,
             "optimizer": moments["mu"] is not None, "parity": str(result)}
    write_run(workdir, step=step, params=params, ema_params=ema_params, opt_state=opt_state,
              config=stored, facts=facts)
    _say(f"imported {origin}, step {step:,}, into {files.resolve(workdir)}; next: "
         f"ddpm sample --workdir={workdir} --num=16 --out=samples")
