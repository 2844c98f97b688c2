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
from ddpm_jax.interchange.diffusers.fields import chain_fields, model_fields
from ddpm_jax.storage.files import read_json

WEIGHTS = "diffusion_pytorch_model"
READERS = {
    ".safetensors": lambda path: open_safetensors(path)[0],
    ".bin": open_torch,
    ".pt": open_torch,
    ".pth": open_torch,
}


class Model(NamedTuple):
    """A model as its files have it. weights: the file's path; state_dict: {key: Lazy}; fields:
    sections of our config; config: the UNet2DModel's JSON; folder: where config.json lies. The last
    two are None where a weights file was given without one."""

    weights: str
    state_dict: Mapping[str, Lazy]
    fields: dict
    config: dict | None
    folder: str | None


def _read_json(path):
    value = read_json(path)
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
                        f"{', '.join(there) or 'nothing'}); if the weights have another name, "
                        "give the file itself")
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
                        "give --config, which names the chain that the weights belong to")
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
        raise UserError(f"--path={address} needs huggingface_hub: pip install huggingface_hub, or "
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
