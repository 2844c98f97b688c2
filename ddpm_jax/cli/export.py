"""ddpm export diffusers --workdir=DIR --out=FOLDER [--step=N] [--noema]
   ddpm export safetensors --workdir=DIR --out=FILE.safetensors [--step=N] [--noema]

Write a trained model for other programs. `diffusers` writes a folder with model card, which
diffusers.DDPMPipeline.from_pretrained(FOLDER) loads; `safetensors` writes the weights under this
project's names (kernels OHWI and [in,out]), with the config in the file's metadata.
Neither overwrites anything.
"""

import json

from ddpm_jax import __version__
from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

USAGE = "usage: ddpm export diffusers|safetensors --workdir=DIR --out=PATH"


def define_flags(define):
    define.workdir()
    define.weights()
    define.path("out", None, "folder (diffusers) or file (safetensors) to write")


def _load(workdir, step, ema):
    import jax

    from ddpm_jax import checkpoints
    from ddpm_jax.sample import load_run

    exp, params, step, _ = load_run(workdir, step=step, ema=ema, devices=jax.devices()[:1],
                                    overrides={"parallel.runner": "jit"})
    return exp, params, step, checkpoints.read_config(workdir)


def export_diffusers(workdir, out, *, step=None, ema=True) -> int:
    """Write the folder; -> the step exported. Raises UserError for a model that diffusers does not
    have, naming the field."""
    from ddpm_jax.interchange.diffusers.write import write_folder
    from ddpm_jax.interchange.workdir import read_facts

    exp, params, step, config = _load(workdir, step, ema)
    facts = read_facts(workdir)
    if facts and facts["step"] == step and not facts["averaged"]:
        weights = "as they were imported (one set, averaged or not)"
    elif ema:
        weights = f"exponential moving average (decay {exp.config.ema.decay})"
    else:
        weights = "raw, not averaged"
    write_folder(out, params, exp, config, step=step, weights=weights, version=__version__,
                 origin=facts.get("origin", ""))
    return step


def export_safetensors(workdir, out, *, step=None, ema=True) -> int:
    """Write the file; -> the step exported."""
    from ddpm_jax.formats.safetensors import save_safetensors
    from ddpm_jax.interchange import parameter_names

    if files.exists(out):
        raise UserError(f"--out={out} exists: take another name, or remove it")
    exp, params, step, config = _load(workdir, step, ema)
    save_safetensors(parameter_names.plain_names(params, exp.model), out, {
        "format": "ddpm_jax", "version": __version__, "step": step,
        "weights": "averaged" if ema else "raw", "config": json.dumps(config)})
    return step


KINDS = {"diffusers": export_diffusers, "safetensors": export_safetensors}


def main(values, words):
    kind, *rest = words or [""]
    if kind not in KINDS or rest:
        raise UserError(f"export {' '.join(words)}: {USAGE}")
    workdir, out = common.required(values, "workdir"), common.required(values, "out")
    step = KINDS[kind](workdir, out, step=values.step, ema=values.ema)
    print(f"wrote {out}: step {step:,}, {'averaged' if values.ema else 'raw'} weights")
    return 0
