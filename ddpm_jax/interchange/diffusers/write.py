"""Writes the folder that ``diffusers.DDPMPipeline.from_pretrained`` loads, with its model card."""

import json
from collections.abc import Mapping

from ddpm_jax.experiment import Experiment
from ddpm_jax.formats.safetensors import save_safetensors
from ddpm_jax.interchange import parameter_names
from ddpm_jax.interchange.diffusers.fields import FORMAT_VERSION, scheduler_config, unet_config
from ddpm_jax.interchange.diffusers.read import WEIGHTS
from ddpm_jax.storage import files

MODEL_INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": FORMAT_VERSION,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def model_card(config: Mapping, *, step: int, weights: str, version: str, origin="") -> str:
    """README.md of an exported folder: what it is, how it was trained, how to run it.

    weights: which of the two sets, in words. origin: the source of imported weights; '' for a model
    trained here.
    """
    train, optimizer = config["train"], config["optimizer"]
    model, data, diffusion = config["model"], config["data"], config["diffusion"]
    done = f"{step:,} steps"
    laws = ", ".join(f"{k} {v}" for k, v in dict(diffusion["schedule"]).items() if k != "name")
    flips = "random horizontal flips" if data["flip"] else "no flips"
    steps, kind = diffusion["num_timesteps"], "class-" if model["num_classes"] else "un"
    return f"""---
tags: [ddpm, diffusers, {kind}conditional-image-generation]
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
{_with_labels(model) if model["num_classes"] else
 f"image = pipeline(num_inference_steps={steps}).images[0]"}
```

With fewer inference steps diffusers spaces timesteps in its own way, so images then differ from
those of `ddpm sample --steps`. The whole config:

```json
{json.dumps(config, indent=2, sort_keys=True)}
```
"""


def _with_labels(model) -> str:
    """Lines that sample with labels and guidance, which DDPMPipeline does not know."""
    classes, none = model["num_classes"], bool(model["label_dropout"])
    lines = [
        "import torch", "",
        "unet, scheduler = pipeline.unet, pipeline.scheduler  # DDPMPipeline itself has no labels",
        f"labels = torch.arange({min(classes, 10)})  # of {classes} classes"
        + (f"; {classes} stands for no label" if none else ""),
        "x = torch.randn(len(labels), unet.config.in_channels, unet.config.sample_size, "
        "unet.config.sample_size)",
        *["guidance = 1.0  # 1 is off"] * none,
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        "        output = unet(x, t, class_labels=labels).sample"]
    if none:
        lines += [
            f"        without = unet(x, t, class_labels=torch.full_like(labels, {classes})).sample",
            "        c = x.shape[1]  # channels; those of a learned variance follow, and stay",
            "        output[:, :c] = without[:, :c] + guidance * (output - without)[:, :c]"]
    return "\n".join([*lines, "        x = scheduler.step(output, t, x).prev_sample"])


def write_folder(out, params, exp: Experiment, config: Mapping, *, step: int, weights: str,
                 version: str, origin=""):
    """Write the folder that ``diffusers.DDPMPipeline.from_pretrained`` loads; it appears whole or
    not at all.

    config: the run's, JSON-able; the rest is for the ``model_card``. Raises UserError where ``out``
    exists with something in it, and for a model that diffusers does not have, naming the field.
    """
    contents = {
        "unet/config.json": unet_config(exp.model),
        "scheduler/scheduler_config.json": scheduler_config(config, exp.betas),
        "model_index.json": MODEL_INDEX,
    }
    state_dict = parameter_names.state_dict_from_params(params, exp.model)
    card = model_card(config, step=step, weights=weights, version=version, origin=origin)
    with files.new_folder(out) as staging:
        for name, value in contents.items():
            files.write_json(staging / name, value, indent=2)
        save_safetensors(state_dict, staging / "unet" / f"{WEIGHTS}.safetensors",
                         {"format": "pt"})
        files.write_bytes(staging / "README.md", card.encode())
