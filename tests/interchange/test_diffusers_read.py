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
    model = open_diffusers(path, small_config())
    assert model.fields == {} and model.config is None and len(model.state_dict) > 100


@pytest.mark.parametrize("name", [
    "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors",
    "weights_of_mine.safetensors"])
def test_weights_under_another_name(tmp_path, name):
    params = random_params(SMALL)
    folder = write_model(tmp_path, params) / "unet"
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / name)
    model = open_diffusers(tmp_path)
    assert model.weights == str(folder / name)
    assert_bit_equal(params, parameter_names.params_from_state_dict(model.state_dict, SMALL))
    (folder / name).rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors.*give the weights file"):
        open_diffusers(tmp_path)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_averages_and_half_precision_that_real_diffusers_wrote(tmp_path):
    lib = pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel
    net = lib.UNet2DModel(**{k: v for k, v in unet_config(SMALL).items() if k[0] != "_"})
    lib.DDPMScheduler(num_train_timesteps=50).save_pretrained(tmp_path / "scheduler")
    EMAModel(net.parameters(), decay=0.9, model_cls=lib.UNet2DModel,
             model_config=net.config).save_pretrained(tmp_path / "unet_ema")
    net.half().save_pretrained(tmp_path / "unet", variant="fp16")
    averaged, half = open_diffusers(tmp_path / "unet_ema"), open_diffusers(tmp_path)
    assert half.weights.endswith(".fp16.safetensors") and averaged.fields == half.fields
    ours = [parameter_names.params_from_state_dict(m.state_dict, SMALL) for m in (averaged, half)]
    kernel, rounded = (p["conv_in"]["kernel"] for p in ours)
    assert kernel.std() > 0 and (kernel.astype("float16") == rounded).all()


BOOKKEEPING = {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 5, "update_after_step": 0,
               "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}


def test_the_folder_of_averaged_weights(tmp_path):
    """unet_ema/, as diffusers' EMAModel writes it beside unet/ and scheduler/."""
    raw, averaged = random_params(SMALL), random_params(SMALL, 1)
    write_model(tmp_path, raw)
    write_model(tmp_path / "other", averaged)
    (tmp_path / "other" / "unet").rename(tmp_path / "unet_ema")
    path = tmp_path / "unet_ema" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **BOOKKEEPING}))
    model = open_diffusers(tmp_path / "unet_ema")
    assert_bit_equal(averaged, parameter_names.params_from_state_dict(model.state_dict, SMALL))
    assert model.fields == open_diffusers(tmp_path).fields and model.notes == []
    note, = open_diffusers(tmp_path).notes
    assert f"--path={tmp_path / 'unet_ema'}" in note


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_another_sampler_beside_a_config(tmp_path, name):
    folder = write_model(tmp_path, random_params(SMALL))
    path = folder / "scheduler" / "scheduler_config.json"
    chain = json.loads(path.read_text())
    del chain["variance_type"]
    path.write_text(json.dumps({**chain, "_class_name": name, "set_alpha_to_one": False,
                                "steps_offset": 1, "beta_end": 0.03}))
    with pytest.raises(UserError, match=f"'{name}' has no variance.*give --config"):
        open_diffusers(folder)
    model = open_diffusers(folder, small_config())
    assert model.fields["diffusion"] == {
        "num_timesteps": 50, "predict": "eps", "zero_terminal_snr": False,
        "schedule": {"name": "linear", "beta_start": 0.0001, "beta_end": 0.03}}
    assert "sampler" not in model.fields and name in model.notes[0]
    path.write_text(json.dumps({**chain, "_class_name": name, "trained_betas": [0.1]}))
    with pytest.raises(UserError, match="trained_betas"):
        open_diffusers(folder, small_config())


def test_the_size_is_the_configs_where_the_json_has_none(tmp_path):
    path = write_model(tmp_path, random_params(SMALL)) / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": None}))
    with pytest.raises(UserError, match="sample_size=None"):
        open_diffusers(tmp_path)
    assert open_diffusers(tmp_path, small_config()).fields["data"]["image_size"] == 16


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
        open_diffusers(tmp_path / "w.ckpt", small_config())


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
    assert len(asked) == 3 and any(p.endswith(".bin") for p in asked[1])
    assert not any(".bin" in p for p in asked[0]) and any(".*.safetensors" in p for p in asked[2])
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    fetch_from_hub("hf://google/ddpm-cifar10-32")
    assert len(asked) == 4


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
