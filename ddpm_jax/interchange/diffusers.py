"""Model folders of huggingface/diffusers: UNet2DModel and DDPMScheduler, in and out.

Read without diffusers or PyTorch. Two layouts: files at the folder's root (google/ddpm-cifar10-32
and its siblings) or under unet/ and scheduler/ (what DDPMPipeline.save_pretrained writes). A field
that the paper's U-Net or chain does not have is refused by name; a field that is absent counts as
diffusers' own default, which often differs from the paper's.

Where the two chains differ (measured, tests/interchange/test_parity.py):
- DDPMScheduler computes its tables in float32, we in float64. With the released configs
  (clip_sample, fixed_large or fixed_small) one step on the same x_t, eps and noise differs by at
  most 8e-5 of images in [-1, 1], near t = 2; a chain of 50 steps gives the same 8-bit images.
- ``fixed_large`` there has no rule for the first step's log-variance. No noise is drawn at t = 0,
  so samples agree; the likelihood needs the rule, and an import sets the paper's for it.
- ``fixed_large_log`` and the learned variances there are not the paper's: refused.
- Fewer inference steps than T: diffusers takes multiples of T // steps, we spread evenly from 0 to
  T-1; such images differ.
- Half precision: float16 and bfloat16 weights are read and widened; everything here is float32.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy
from ddpm_jax.formats.safetensors import open_safetensors, save_safetensors
from ddpm_jax.formats.torch_pickle import open_torch
from ddpm_jax.interchange import parameter_names
from ddpm_jax.storage.files import new_folder

WEIGHTS = "diffusion_pytorch_model"
READERS = {
    ".safetensors": lambda path: open_safetensors(path)[0],
    ".bin": open_torch,
    ".pt": open_torch,
    ".pth": open_torch,
}
FORMAT_VERSION = "0.30.0"  # diffusers whose field names the exported JSON files use

# ---- fields: (default of diffusers where absent, values that mean the paper's) ----

_UNET_FIXED = {  # models/unets/unet_2d.py, UNet2DModel.__init__
    "center_input_sample": (False, (False,)),
    "time_embedding_type": ("positional", ("positional",)),
    "freq_shift": (0, (1,)),
    "flip_sin_to_cos": (True, (False,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "downsample_padding": (1, (0,)),
    "downsample_type": ("conv", ("conv",)),
    "upsample_type": ("conv", ("conv",)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_eps": (1e-5, (1e-6,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "add_attention": (True, (True,)),
    "class_embed_type": (None, (None,)),
    "num_class_embeds": (None, (None,)),
}
_UNET_READ = ("_class_name", "sample_size", "in_channels", "out_channels", "down_block_types",
              "up_block_types", "block_out_channels", "layers_per_block", "dropout",
              "attention_head_dim", "norm_num_groups", "attn_norm_num_groups",
              "time_embedding_dim", "num_train_timesteps")

_SCHEDULER_FIXED = {  # schedulers/scheduling_ddpm.py, DDPMScheduler.__init__
    "trained_betas": (None, (None,)),
    "thresholding": (False, (False,)),
    "clip_sample_range": (1.0, (1.0,)),
    "steps_offset": (0, (0,)),
    "rescale_betas_zero_snr": (False, (False,)),
}
# Spacing matters to shortened chains only, the other two to thresholding.
_SCHEDULER_READ = ("_class_name", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule",
                   "variance_type", "clip_sample", "prediction_type", "timestep_spacing",
                   "dynamic_thresholding_ratio", "sample_max_value")

# Their beta law -> ours and which of their numbers it takes.
_LAWS = {
    "linear": ("linear", ("beta_start", "beta_end")),
    "scaled_linear": ("quad", ("beta_start", "beta_end")),
    "squaredcos_cap_v2": ("cosine", ()),
}
# fixed_small_log is the same deviation, computed through a logarithm (_get_variance there).
_VARIANCES = {
    "fixed_small": {"variance": "fixed_small", "first_log_variance": "floor"},
    "fixed_small_log": {"variance": "fixed_small", "first_log_variance": "floor"},
    "fixed_large": {"variance": "fixed_large", "first_log_variance": "next"},
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x_start"}


def _refuse_unknown(config, known, where):
    for field, value in config.items():
        if field not in known and not field.startswith("_") and value is not None:
            raise UserError(f"{where}: field {field}={value!r} is not one of the paper's model")


def _refuse_other(config, fixed, where):
    for field, (default, allowed) in fixed.items():
        value = config.get(field, default)
        if value not in allowed:
            absent = "" if field in config else " (diffusers' default; the field is absent)"
            raise UserError(f"{where}: {field}={value!r}{absent} is not what the paper's model "
                            f"has: {allowed[0]!r}")


def _class(config, expected, where):
    if config.get("_class_name") != expected:
        raise UserError(f"{where}: _class_name={config.get('_class_name')!r}, not {expected}")


def _row(table, config, field, default, where):
    value = config.get(field, default)
    if value not in table:
        raise UserError(f"{where}: {field}={value!r} is not supported (known: {', '.join(table)})")
    return table[value]


def _integer(config, field, default, where):
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {field}={value!r} must be a positive whole number")
    return value


def model_fields(config: Mapping, where="unet config") -> dict:
    """{'model': {...}, 'data': {...}} of our config from a UNet2DModel's config.json.

    Raises UserError naming the first field that the paper's U-Net does not have.
    """
    _class(config, "UNet2DModel", where)
    _refuse_unknown(config, {*_UNET_FIXED, *_UNET_READ}, where)
    _refuse_other(config, _UNET_FIXED, where)
    size = config.get("sample_size")
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    size = _integer({"sample_size": size}, "sample_size", None, where)
    widths = config.get("block_out_channels", [224, 448, 672, 896])
    down = config.get("down_block_types", ["DownBlock2D"] + ["AttnDownBlock2D"] * 3)
    up = config.get("up_block_types", ["AttnUpBlock2D"] * 3 + ["UpBlock2D"])
    if any(w % widths[0] for w in widths):
        raise UserError(f"{where}: block_out_channels={widths} are no multiples of the first")
    if len(down) != len(widths):
        raise UserError(f"{where}: down_block_types={down} do not match {len(widths)} "
                        "block_out_channels")
    kinds = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
    for kind in down:
        if kind not in kinds:
            raise UserError(f"{where}: down_block_types has {kind!r}, not one of {list(kinds)}")
    if list(up) != [kinds[k] for k in reversed(down)]:
        raise UserError(f"{where}: up_block_types={up} is not down_block_types mirrored")
    attending = [i for i, kind in enumerate(down) if kind == "AttnDownBlock2D"]
    heads = config.get("attention_head_dim", 8)
    for width in [widths[i] for i in attending] + [widths[-1]]:
        if heads is not None and heads != width:
            raise UserError(f"{where}: attention_head_dim={heads!r} cuts {width} channels into "
                            "several heads; the paper's attention has one (null)")
    groups = _integer(config, "norm_num_groups", 32, where)
    if config.get("attn_norm_num_groups") not in (None, groups):
        raise UserError(f"{where}: attn_norm_num_groups={config['attn_norm_num_groups']} differs "
                        f"from norm_num_groups={groups}")
    if config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise UserError(f"{where}: time_embedding_dim={config['time_embedding_dim']} is not "
                        f"4 x {widths[0]}")
    channels = _integer(config, "in_channels", 3, where)
    if config.get("out_channels", 3) != channels:
        raise UserError(f"{where}: out_channels={config.get('out_channels', 3)} differs from "
                        f"in_channels={channels} (a learned variance is not supported)")
    return {
        "model": {
            "ch": widths[0],
            "ch_mult": tuple(w // widths[0] for w in widths),
            "num_res_blocks": _integer(config, "layers_per_block", 2, where),
            "attn_resolutions": tuple(size >> i for i in attending),
            "dropout": float(config.get("dropout", 0.0)),
            "num_groups": groups,
            "space_to_depth": 1,
        },
        "data": {"image_size": size, "channels": channels},
    }


def chain_fields(config: Mapping, where="scheduler config") -> dict:
    """{'diffusion': {...}, 'sampler': {...}} of our config from a DDPMScheduler's config.

    Raises UserError naming the first field that our chain does not have.
    """
    _class(config, "DDPMScheduler", where)
    _refuse_unknown(config, {*_SCHEDULER_FIXED, *_SCHEDULER_READ}, where)
    _refuse_other(config, _SCHEDULER_FIXED, where)
    law, numbers = _row(_LAWS, config, "beta_schedule", "linear", where)
    defaults = {"beta_start": 0.0001, "beta_end": 0.02}
    schedule = {"name": law, **{n: float(config.get(n, defaults[n])) for n in numbers}}
    return {
        "diffusion": {
            "num_timesteps": _integer(config, "num_train_timesteps", 1000, where),
            "schedule": schedule,
            "predict": _row(_PREDICTIONS, config, "prediction_type", "epsilon", where),
            **_row(_VARIANCES, config, "variance_type", "fixed_small", where),
        },
        "sampler": {"clip_denoised": bool(config.get("clip_sample", True)), "steps": 0},
    }


# ---- reading ----


class Model(NamedTuple):
    """``fields``: sections of our config; state_dict: {key: Lazy}; folder holds config.json (None
    where a file was given without one); config: the UNet2DModel's JSON."""

    weights: str
    state_dict: Mapping[str, Lazy]
    fields: dict
    config: dict | None
    folder: str | None


def _read_json(path):
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _first(paths):
    return next((p for p in paths if p.is_file()), None)


def _weights_in(folder):
    found = _first([folder / f"{WEIGHTS}{ending}" for ending in (".safetensors", ".bin")])
    if found is None:
        there = sorted(p.name for p in folder.glob("*") if p.is_file())
        raise UserError(f"{folder}: no {WEIGHTS}.safetensors or .bin there (it has "
                        f"{', '.join(there) or 'nothing'}); name the weights file itself if it "
                        "is called otherwise")
    return found


def open_diffusers(path, *, has_config=False) -> Model:
    """The model in a folder (either layout), or in a weights file with its JSON beside it.

    has_config: the caller has a config of its own, so that the JSON files may be absent.
    Raises UserError for what is missing, damaged or unlike the paper's model.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        folder = path / "unet" if (path / "unet").is_dir() else path
        weights = _weights_in(folder)
    elif path.is_file():
        folder, weights = path.parent, path
    else:
        raise UserError(f"--path={path}: no such file or folder")
    root = folder.parent if folder.name == "unet" else folder
    unet = _first([folder / "config.json"])
    scheduler = _first([root / "scheduler" / "scheduler_config.json",
                        root / "scheduler_config.json"])
    fields: dict = {}
    if unet is not None:
        fields |= model_fields(_read_json(unet), str(unet))
    elif not has_config:
        raise UserError(f"{folder}: no config.json there; give --config for weights without one")
    if scheduler is not None:
        fields |= chain_fields(_read_json(scheduler), str(scheduler))
    elif not has_config:
        raise UserError(f"{root}: no scheduler/scheduler_config.json or scheduler_config.json; "
                        "give --config to say which chain the weights belong to")
    reader = READERS.get(weights.suffix)
    if reader is None:
        raise UserError(f"--path={weights}: not one of {', '.join(READERS)}")
    return Model(str(weights), reader(weights), fields, unet and _read_json(unet),
                 unet and str(folder))


def fetch_from_hub(address: str) -> str:
    """hf://OWNER/NAME[@REVISION] -> local folder, through huggingface_hub and its cache.

    Raises UserError where the package is absent, the network closed or the model unknown.
    """
    repo, _, revision = address.removeprefix("hf://").partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"--path={address} needs huggingface_hub: pip install 'ddpm_jax[hub]', or "
                        "download the folder yourself and give its path") from None
    try:
        folder = snapshot_download(
            repo, revision=revision or None,
            allow_patterns=["*.json", f"{WEIGHTS}.safetensors", f"*/{WEIGHTS}.safetensors"])
        if not any(pathlib.Path(folder).rglob(f"{WEIGHTS}.safetensors")):
            folder = snapshot_download(
                repo, revision=revision or None,
                allow_patterns=["*.json", f"{WEIGHTS}.bin", f"*/{WEIGHTS}.bin"])
    except Exception as error:  # the hub's and its transport's many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--path={address} could not be fetched: {reason}; download the folder on "
                        "a machine with network and give its path") from error
    return folder


# ---- writing ----


def unet_config(config: Mapping) -> dict:
    """config.json of the UNet2DModel that computes what a config's model computes.

    Raises UserError naming the field that diffusers has no equal of.
    """
    model, data, diffusion = config["model"], config["data"], config["diffusion"]
    if model["space_to_depth"] != 1:
        raise UserError(f"config.model.space_to_depth={model['space_to_depth']}: UNet2DModel has "
                        "no space-to-depth; only 1 can be exported")
    if diffusion["variance"] == "learned":
        raise UserError("config.diffusion.variance=learned: diffusers reads a learned variance "
                        "differently (as a variance, not a log-variance); not exportable")
    levels = len(model["ch_mult"])
    attends = [(data["image_size"] >> i) in tuple(model["attn_resolutions"])
               for i in range(levels)]
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    fixed = {field: allowed[0] for field, (_, allowed) in _UNET_FIXED.items()}
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": FORMAT_VERSION,
        **fixed,
        "attention_head_dim": None,
        "attn_norm_num_groups": None,
        "block_out_channels": [model["ch"] * m for m in model["ch_mult"]],
        "down_block_types": down,
        "dropout": float(model["dropout"]),
        "in_channels": data["channels"],
        "layers_per_block": model["num_res_blocks"],
        "norm_num_groups": model["num_groups"],
        "num_train_timesteps": None,
        "out_channels": data["channels"],
        "sample_size": data["image_size"],
        "up_block_types": [k.replace("Down", "Up") for k in reversed(down)],
    }


def scheduler_config(config: Mapping, betas) -> dict:
    """scheduler_config.json of the DDPMScheduler that walks a config's full chain.

    betas float64 [T]: written out for the laws that diffusers does not have.
    Raises UserError naming the field that diffusers has no equal of.
    """
    diffusion, schedule = config["diffusion"], dict(config["diffusion"]["schedule"])
    law = schedule.pop("name")
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if diffusion["predict"] not in predictions:
        raise UserError(f"config.diffusion.predict={diffusion['predict']}: diffusers' scheduler "
                        f"has only {', '.join(predictions)}")
    theirs = next((t for t, (ours, numbers) in _LAWS.items()
                   if ours == law and set(schedule) <= set(numbers)), None)
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": FORMAT_VERSION,
        "num_train_timesteps": diffusion["num_timesteps"],
        "beta_start": schedule.get("beta_start", 0.0001),
        "beta_end": schedule.get("beta_end", 0.02),
        "beta_schedule": theirs or "linear",
        "trained_betas": None if theirs else [float(b) for b in betas],
        "variance_type": diffusion["variance"],
        "clip_sample": bool(config["sampler"]["clip_denoised"]),
        "clip_sample_range": 1.0,
        "prediction_type": predictions[diffusion["predict"]],
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }


MODEL_INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": FORMAT_VERSION,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def model_card(config: Mapping, *, step: int, weights: str, version: str, origin="") -> str:
    """README.md of an exported folder: what it is, how it was trained, how to run it.

    weights: which set, in words. origin: where imported ones came from; '' for a model trained
    here.
    """
    train, optimizer = config["train"], config["optimizer"]
    model, data, diffusion = config["model"], config["data"], config["diffusion"]
    done = f"{step:,} steps"
    laws = ", ".join(f"{k} {v}" for k, v in dict(diffusion["schedule"]).items() if k != "name")
    flips = "random horizontal flips" if data["flip"] else "no flips"
    steps = diffusion["num_timesteps"]
    return f"""---
tags: [ddpm, diffusers, unconditional-image-generation]
library_name: diffusers
---
# DDPM, {data['name']}, {data['image_size']}x{data['image_size']}

A denoising diffusion probabilistic model (Ho, Jain & Abbeel 2020, arXiv:2006.11239), exported by
ddpm_jax {version}.
{f'''
Weights imported from {origin}.
''' if origin else ''}
| | |
|---|---|
| images | {data['image_size']}x{data['image_size']}, {data['channels']} channel(s), {flips} |
| U-Net | ch {model['ch']}, ch_mult {tuple(model['ch_mult'])}, {model['num_res_blocks']} blocks a \
level, attention at {tuple(model['attn_resolutions'])}, dropout {model['dropout']} |
| chain | T = {steps}, {diffusion['schedule']['name']} betas ({laws or 'no numbers'}), predicts \
{diffusion['predict']}, variance {diffusion['variance']} |
| weights | {weights} |
| trained | {done}, batch {train['batch_size']}, Adam, learning rate \
{optimizer['learning_rate']} after {optimizer['warmup_steps']} warm-up steps, loss \
{diffusion['loss']}, gradients clipped at {train['clip_norm']} ({train['clip_scope']}) |
| computed in | {model['dtype']} products, float32 weights |

```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("path/to/this/folder")
image = pipeline(num_inference_steps={steps}).images[0]
```

With fewer inference steps diffusers spaces timesteps in its own way, so images then differ from
those of `ddpm sample --steps`. The whole config:

```json
{json.dumps(config, indent=2, sort_keys=True)}
```
"""


def write_folder(out, params, config: Mapping, betas, *, step: int, weights: str, version: str,
                 origin=""):
    """Write the folder that ``diffusers.DDPMPipeline.from_pretrained`` loads; config is JSON-able.

    Appears whole or not at all. Raises UserError where ``out`` exists with something in it.
    """
    out = pathlib.Path(out).expanduser().absolute()
    files = {
        "unet/config.json": unet_config(config),
        "scheduler/scheduler_config.json": scheduler_config(config, betas),
        "model_index.json": MODEL_INDEX,
    }
    state_dict = parameter_names.state_dict_from_params(params, config)
    with new_folder(out) as staging:
        for name, value in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
        save_safetensors(state_dict, staging / "unet" / f"{WEIGHTS}.safetensors",
                         {"format": "pt"})
        card = model_card(config, step=step, weights=weights, version=version,
                          origin=origin)
        (staging / "README.md").write_text(card)
