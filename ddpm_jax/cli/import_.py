"""ddpm import official --checkpoint=PREFIX --config=NAME --workdir=DIR
   ddpm import diffusers --path=FOLDER_OR_FILE --workdir=DIR [--config=NAME]

Make a run's folder from the weights of another program, for `ddpm sample`, `ddpm evaluate` and
`ddpm train`. Ends with a parity verdict: PASS, FAIL (nothing is written, exit code not 0) or
"not compared" where diffusers and PyTorch are not installed.

  official   a TensorFlow 1 checkpoint of the paper's code (raw and EMA weights, Adam's moments,
             step), read without TensorFlow: model.ckpt-790000, its .index file, or its folder
  diffusers  a folder of UNet2DModel and DDPMScheduler, as google/ddpm-cifar10-32: safetensors, or
             .bin read without running anything in it; hf://OWNER/NAME downloads it. The config
             comes from the folder's JSON; --config adds the fields that it lacks (data, training)
"""

import sys

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError

USAGE = "usage: ddpm import official|diffusers --workdir=DIR ... (ddpm import --help)"


def define_flags(define):
    define.config()
    define.workdir()
    define.path("checkpoint", None, "official: prefix, .index file or folder")
    define.path("path", None, "diffusers: folder, weights file, or hf://OWNER/NAME")
    define.bool("verify", True, "compare with diffusers on PyTorch before writing anything")


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _official(values, **keywords):
    from ddpm_jax.interchange import importing

    importing.import_official(common.required(values, "checkpoint"),
                              common.required(values, "config"), **keywords)


def _diffusers(values, **keywords):
    from ddpm_jax.interchange import importing

    importing.import_diffusers(common.required(values, "path"), values.config, **keywords)


KINDS = {"official": _official, "diffusers": _diffusers}
_FLAG_OF_OTHERS = {"official": "path", "diffusers": "checkpoint"}


def main(values, words):
    kind, *rest = words or [""]
    if kind not in KINDS or rest:
        raise UserError(f"import {' '.join(words)}: {USAGE}")
    other = _FLAG_OF_OTHERS[kind]
    if values[other].value is not None:
        raise UserError(f"--{other} is not read by import {kind}: {USAGE}")
    KINDS[kind](values, workdir=common.required(values, "workdir"), verify=values.verify, say=_say)
    return 0
