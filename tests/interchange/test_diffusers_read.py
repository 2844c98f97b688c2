"""Folders of both layouts and namings, lone files, what is incomplete; real diffusers' files."""

import json

import pytest
from made_up import SMALL, assert_bit_equal, older_names, random_params, small_config

from ddpm_jax.config import to_json
from ddpm_jax.errors import UserError
from ddpm_jax.formats.safetensors import save_safetensors
from ddpm_jax.interchange import parameter_names
from ddpm_jax.interchange.diffusers.fields import scheduler_config, unet_config
from ddpm_jax.interchange.diffusers.read import fetch_from_hub, open_diffusers


def write_model(folder, params, *, root=False, older=False):
    """A folder as the hub has them: under unet/ and scheduler/, or all at the root."""
    config = to_json(small_config())
    unet = folder if root else folder / "unet"
    scheduler = folder if root else folder / "scheduler"
    for place in {unet, scheduler}:
        place.mkdir(parents=True, exist_ok=True)
    (unet / "config.json").write_text(json.dumps(unet_config(SMALL)))
    (scheduler / "scheduler_config.json").write_text(
        json.dumps(scheduler_config(config, [])))
    state = parameter_names.state_dict_from_params(params, SMALL)
    state = older_names(state) if older else state
    path = unet / "diffusion_pytorch_model.safetensors"
    save_safetensors(state, path)
    return folder


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_both_layouts_and_both_namings(tmp_path, root, older):
    params = random_params(SMALL)
    model = open_diffusers(write_model(tmp_path, params, root=root, older=older))
    assert_bit_equal(params, parameter_names.params_from_state_dict(model.state_dict, SMALL))
    config = small_config()
    assert model.fields["model"]["attn_resolutions"] == config.model.attn_resolutions
    assert model.fields["diffusion"]["schedule"] == dict(config.diffusion.schedule)
    by_file = open_diffusers(model.weights)
    assert by_file.fields == model.fields


def test_a_lone_weights_file_needs_a_config(tmp_path):
    path = tmp_path / "w.safetensors"
    save_safetensors(parameter_names.state_dict_from_params(random_params(SMALL), SMALL), path)
    with pytest.raises(UserError, match="no config.json"):
        open_diffusers(path)
    model = open_diffusers(path, has_config=True)
    assert model.fields == {} and model.config is None and len(model.state_dict) > 100


def test_incomplete_and_foreign_folders(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_diffusers(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model.*it has nothing"):
        open_diffusers(tmp_path)
    write_model(tmp_path, random_params(SMALL), root=True)
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="give --config, which names the chain"):
        open_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        open_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_diffusers(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "w.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="not one of .safetensors, .bin"):
        open_diffusers(tmp_path / "w.ckpt", has_config=True)


def test_the_hub_without_network_or_package(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub: pip install"):
        fetch_from_hub("hf://google/ddpm-cifar10-32")

    class Hub:
        @staticmethod
        def snapshot_download(repo, revision, allow_patterns):
            assert (repo, revision) == ("google/ddpm-cifar10-32", "main")
            raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(UserError, match="could not be fetched: no route; download"):
        fetch_from_hub("hf://google/ddpm-cifar10-32@main")


def test_the_hub_prefers_safetensors_and_falls_back_to_bin(tmp_path, monkeypatch):
    import sys
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(repo, revision, allow_patterns):
            asked.append(allow_patterns)
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert fetch_from_hub("hf://google/ddpm-cifar10-32") == str(tmp_path)
    assert len(asked) == 2 and any(p.endswith(".bin") for p in asked[1])
    assert not any(".bin" in p for p in asked[0])
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    fetch_from_hub("hf://google/ddpm-cifar10-32")
    assert len(asked) == 3


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("older", [False, True])
def test_bin_files_and_folders_that_real_diffusers_wrote(tmp_path, older):
    lib = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    config = to_json(small_config())
    net = lib.UNet2DModel(**{k: v for k, v in unet_config(SMALL).items() if k[0] != "_"})
    scheduler = lib.DDPMScheduler(num_train_timesteps=50, beta_end=0.2,
                                  variance_type="fixed_large")
    lib.DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(tmp_path)
    model = open_diffusers(tmp_path)
    params = parameter_names.params_from_state_dict(model.state_dict, SMALL)
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    assert_bit_equal(parameter_names.state_dict_from_params(params, SMALL), state)
    for section in ("model", "diffusion"):
        for field, value in model.fields[section].items():
            value = list(value) if isinstance(value, tuple) else value
            assert config[section][field] == value
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    saved = older_names(net.state_dict()) if older else net.state_dict()
    torch.save(saved, weights.with_suffix(".bin"))
    again = open_diffusers(tmp_path)
    assert again.weights.endswith(".bin")
    assert_bit_equal(params, parameter_names.params_from_state_dict(again.state_dict, SMALL))
