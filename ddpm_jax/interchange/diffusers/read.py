"""Reads diffusers' model folders and weights files, without diffusers or PyTorch.

Two layouts: files at the folder's root (google/ddpm-cifar10-32 and its siblings) or under unet/ and
scheduler/ (as DDPMPipeline.save_pretrained writes them).

huggingface_hub is imported inside a function: it is optional.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy
from ddpm_jax.formats.safetensors import open_safetensors
from ddpm_jax.formats.torch_pickle import open_torch
from ddpm_jax.interchange.diffusers.fields import (
    chain_fields,
    check_outputs,
    model_fields,
    shared_chain_fields,
)
from ddpm_jax.storage.files import read_json

WEIGHTS = "diffusion_pytorch_model"
AVERAGED = "unet_ema"  # folder that diffusers' EMAModel writes beside unet/
# Schedulers that share the training fields of DDPMScheduler and sample by other chains.
OTHER_CHAINS = ("DDIMScheduler", "DDIMInverseScheduler", "DPMSolverMultistepScheduler",
                "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler",
                "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
                "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
READERS = {
    ".safetensors": lambda path: open_safetensors(path)[0],
    ".bin": open_torch,
    ".pt": open_torch,
    ".pth": open_torch,
}


class Model(NamedTuple):
    """A model as its files have it. weights: the file's path; state_dict: {key: Lazy}; fields:
    sections of our config; config: the UNet2DModel's JSON; folder: where config.json lies. The last
    two are None where a weights file was given without one. notes: lines for the user."""

    weights: str
    state_dict: Mapping[str, Lazy]
    fields: dict
    config: dict | None
    folder: str | None
    notes: list[str]


def _read_json(path):
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _first(paths):
    return next((p for p in paths if p.is_file()), None)


def _weights_in(folder):
    """The weights file of a folder: of full precision, else a variant (fp16), else the only one."""
    for pattern in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", f"{WEIGHTS}.*.safetensors",
                    f"{WEIGHTS}.*.bin", "*"):
        found = [p for p in sorted(folder.glob(pattern)) if p.is_file() and p.suffix in READERS]
        if len(found) == 1:
            return found[0]
    there = sorted(p.name for p in folder.glob("*") if p.is_file())
    raise UserError(f"{folder}: no {WEIGHTS}.safetensors or .bin there (it has "
                    f"{', '.join(there) or 'nothing'}); give the weights file itself")


def _chain(root, config):
    """-> (fields of the scheduler's file, where there is one and it is read; notes)."""
    path = _first([root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json"])
    if path is None and config is None:
        raise UserError(f"{root}: no scheduler/scheduler_config.json or scheduler_config.json; "
                        "give --config, which names the chain that the weights belong to")
    if path is None:
        return {}, []
    scheduler = _read_json(path)
    name = scheduler.get("_class_name")
    if name in OTHER_CHAINS and config is not None:
        return shared_chain_fields(scheduler, str(path)), [
            f"{path} is a {name}: its timesteps, betas and prediction are taken, the variance and "
            "the sampler are those of --config"]
    if name in OTHER_CHAINS:
        raise UserError(f"{path}: _class_name={name!r} has no variance of the paper's chain; give "
                        "--config, which names one (cifar10: fixed_large, others: fixed_small)")
    return chain_fields(scheduler, str(path)), []


def open_diffusers(path, config=None) -> Model:
    """The model in a folder (either layout), or in a weights file with its JSON beside it.

    config: the caller's, with which the JSON files may be absent. Raises UserError for what is
    missing, damaged or unlike the paper's model.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        folder = next((path / n for n in ("unet", AVERAGED) if (path / n).is_dir()), path)
        weights = _weights_in(folder)
    elif path.is_file():
        folder, weights = path.parent, path
    else:
        raise UserError(f"--path={path}: no such file or folder")
    reader = READERS.get(weights.suffix)
    if reader is None:
        raise UserError(f"--path={weights}: not one of {', '.join(READERS)}")
    json_path = _first([folder / "config.json"])
    if json_path is None and config is None:
        raise UserError(f"{folder}: no config.json there; give --config for weights without one")
    unet = json_path and _read_json(json_path)
    size = None if config is None else config.data.image_size
    fields = model_fields(unet, str(json_path), size) if unet else {}
    chain, notes = _chain(folder.parent if folder.name in ("unet", AVERAGED) else folder, config)
    if unet and "variance" in chain.get("diffusion", ()):
        check_outputs(unet, fields | chain, str(json_path))
    if folder.name == "unet" and (folder.parent / AVERAGED).is_dir():
        notes.append(f"{folder} is imported; the averaged weights beside it are imported with "
                     f"--path={folder.parent / AVERAGED}")
    return Model(str(weights), reader(weights), fields | chain, unet, unet and str(folder), notes)


def fetch_from_hub(address: str) -> str:
    """hf://OWNER/NAME[@REVISION] -> local folder, through huggingface_hub and its cache.

    Raises UserError where the package is absent, the network closed or the model unknown.
    """
    repo, _, revision = address.removeprefix("hf://").partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"--path={address} needs huggingface_hub: pip install huggingface_hub, or "
                        "download the folder yourself and give its path") from None
    try:
        for endings in ((".safetensors",), (".bin",), (".*.safetensors", ".*.bin")):
            names = [f"{place}{WEIGHTS}{ending}" for ending in endings for place in ("", "*/")]
            folder = snapshot_download(repo, revision=revision or None,
                                       allow_patterns=["*.json", *names])
            if any(path.suffix in READERS for path in pathlib.Path(folder).rglob(f"{WEIGHTS}*")):
                break
    except Exception as error:  # the hub's and its transport's many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--path={address} could not be fetched: {reason}; download the folder on "
                        "a machine with network and give its path") from error
    return folder
