"""diffusers folders: the released JSON files, every refused field, both layouts, real diffusers."""

import json

import numpy as np
import pytest
from made_up import SMALL, assert_bit_equal, random_params, small_config

from ddpm_jax.config import load_config, packaged_configs, to_json
from ddpm_jax.errors import UserError
from ddpm_jax.formats.safetensors import open_safetensors, save_safetensors
from ddpm_jax.interchange import diffusers, parameter_names

# As published (google/ddpm-cifar10-32, google/ddpm-ema-celebahq-256, google/ddpm-church-256).
CIFAR10 = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.1.0", "act_fn": "silu",
    "attention_head_dim": None, "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False, "down_block_types": [
        "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBAHQ = {
    **CIFAR10, "block_out_channels": [128, 128, 256, 256, 512, 512], "sample_size": 256,
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
CIFAR10_CHAIN = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.0", "beta_end": 0.02,
    "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True,
    "num_train_timesteps": 1000, "trained_betas": None, "variance_type": "fixed_large",
}
CHURCH_CHAIN = {**CIFAR10_CHAIN, "_diffusers_version": "0.0.4", "timestep_values": None,
                "variance_type": "fixed_small"}


def test_released_configs_are_the_papers():
    for released, chain, ours in ((CIFAR10, CIFAR10_CHAIN, "cifar10"),
                                  (CELEBAHQ, CHURCH_CHAIN, "celebahq256")):
        config = load_config(ours)
        found = diffusers.model_fields(released) | diffusers.chain_fields(chain)
        assert found["model"].pop("dropout") == 0.0  # the JSON files do not say 0.1
        for section, values in found.items():
            for field, value in values.items():
                there = config[section][field]
                there = dict(there) if field == "schedule" else there
                assert there == value, (section, field)


def test_older_scheduler_class_and_model_class_are_refused():
    with pytest.raises(UserError, match="_class_name='GaussianDDPMScheduler'"):
        diffusers.chain_fields({"_class_name": "GaussianDDPMScheduler", "timesteps": 1000})
    with pytest.raises(UserError, match="_class_name='UNet2DConditionModel'"):
        diffusers.model_fields({**CIFAR10, "_class_name": "UNet2DConditionModel"})


@pytest.mark.parametrize("change, word", [
    ({"center_input_sample": True}, "center_input_sample=True"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
    ({"freq_shift": 0}, "freq_shift=0"),
    ({"flip_sin_to_cos": True}, "flip_sin_to_cos=True"),
    ({"mid_block_type": None}, "mid_block_type=None"),
    ({"mid_block_scale_factor": 1.41}, "mid_block_scale_factor"),
    ({"downsample_padding": 1}, "downsample_padding=1"),
    ({"downsample_type": "resnet"}, "downsample_type"),
    ({"upsample_type": "resnet"}, "upsample_type"),
    ({"act_fn": "gelu"}, "act_fn='gelu'"),
    ({"attention_head_dim": 8}, "attention_head_dim=8"),
    ({"attn_norm_num_groups": 8}, "attn_norm_num_groups=8"),
    ({"norm_eps": 1e-5}, "norm_eps=1e-05"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ({"add_attention": False}, "add_attention=False"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"num_class_embeds": 10}, "num_class_embeds=10"),
    ({"time_embedding_dim": 128}, "time_embedding_dim=128"),
    ({"out_channels": 6}, "out_channels=6"),
    ({"sample_size": None}, "sample_size=None"),
    ({"sample_size": [32, 64]}, "sample_size"),
    ({"layers_per_block": 0}, "layers_per_block=0"),
    ({"block_out_channels": [128, 200, 256, 256]}, "block_out_channels"),
    ({"block_out_channels": [128, 256]}, "down_block_types"),
    ({"down_block_types": ["DownBlock2D"] * 3 + ["SkipDownBlock2D"]}, "SkipDownBlock2D"),
    ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
    ({"a_new_field": 3}, "a_new_field=3"),
])
def test_what_the_papers_net_does_not_have_is_refused_by_name(change, word):
    with pytest.raises(UserError, match=word) as error:
        diffusers.model_fields({**CIFAR10, **change}, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")


@pytest.mark.parametrize("field", ["freq_shift", "flip_sin_to_cos", "downsample_padding",
                                   "norm_eps", "attention_head_dim"])
def test_an_absent_field_counts_as_diffusers_own_default(field):
    config = {k: v for k, v in CIFAR10.items() if k != field}
    with pytest.raises(UserError, match=field):
        diffusers.model_fields(config)


@pytest.mark.parametrize("change", [
    {"variance_type": "learned_range"}, {"variance_type": "fixed_large_log"},
    {"prediction_type": "v_prediction"}, {"beta_schedule": "sigmoid"}, {"thresholding": True},
    {"clip_sample_range": 2.0}, {"steps_offset": 1}, {"rescale_betas_zero_snr": True},
    {"trained_betas": [0.1, 0.2]}, {"num_train_timesteps": 0}, {"a_new_field": 3},
])
def test_what_the_chain_does_not_have_is_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        diffusers.chain_fields({**CIFAR10_CHAIN, **change})


def test_accepted_variants():
    whole_heads = {**CIFAR10, "attention_head_dim": 256, "act_fn": "swish", "dropout": 0.1,
                   "sample_size": [32, 32], "some_null_field": None}
    assert diffusers.model_fields(whole_heads)["model"]["dropout"] == 0.1
    found = diffusers.chain_fields({**CHURCH_CHAIN, "beta_schedule": "scaled_linear",
                                    "prediction_type": "sample", "clip_sample": False})
    assert found["diffusion"]["schedule"]["name"] == "quad"
    assert found["diffusion"]["predict"] == "x_start"
    assert found["sampler"]["clip_denoised"] is False
    cosine = diffusers.chain_fields({**CHURCH_CHAIN, "beta_schedule": "squaredcos_cap_v2"})
    assert cosine["diffusion"]["schedule"] == {"name": "cosine"}


def write_model(folder, params, config=None, *, root=False, older=False, ending=".safetensors"):
    """A folder as the hub has them: under unet/ and scheduler/, or all at the root."""
    config = config or to_json(small_config())
    unet = folder if root else folder / "unet"
    scheduler = folder if root else folder / "scheduler"
    for place in {unet, scheduler}:
        place.mkdir(parents=True, exist_ok=True)
    (unet / "config.json").write_text(json.dumps(diffusers.unet_config(config)))
    (scheduler / "scheduler_config.json").write_text(
        json.dumps(diffusers.scheduler_config(config, [])))
    state = parameter_names.state_dict_from_params(params, config)
    state = parameter_names.older_names(state) if older else state
    path = unet / f"diffusion_pytorch_model{ending}"
    save_safetensors(state, path)
    return folder


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_both_layouts_and_both_namings(tmp_path, root, older):
    params = random_params(SMALL)
    model = diffusers.open_diffusers(write_model(tmp_path, params, root=root, older=older))
    assert_bit_equal(params, parameter_names.params_from_state_dict(model.state_dict, SMALL))
    config = small_config()
    assert model.fields["model"]["attn_resolutions"] == config.model.attn_resolutions
    assert model.fields["diffusion"]["schedule"] == dict(config.diffusion.schedule)
    by_file = diffusers.open_diffusers(model.weights)
    assert by_file.fields == model.fields


def test_a_lone_weights_file_needs_a_config(tmp_path):
    path = tmp_path / "w.safetensors"
    save_safetensors(parameter_names.state_dict_from_params(random_params(SMALL), SMALL), path)
    with pytest.raises(UserError, match="no config.json"):
        diffusers.open_diffusers(path)
    model = diffusers.open_diffusers(path, has_config=True)
    assert model.fields == {} and model.config is None and len(model.state_dict) > 100


def test_incomplete_and_foreign_folders(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        diffusers.open_diffusers(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model.*it has nothing"):
        diffusers.open_diffusers(tmp_path)
    write_model(tmp_path, random_params(SMALL), root=True)
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="give --config to say which chain"):
        diffusers.open_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        diffusers.open_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        diffusers.open_diffusers(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "w.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="not one of .safetensors, .bin"):
        diffusers.open_diffusers(tmp_path / "w.ckpt", has_config=True)


def test_the_hub_without_network_or_package(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub: pip install"):
        diffusers.fetch_from_hub("hf://google/ddpm-cifar10-32")

    class Hub:
        @staticmethod
        def snapshot_download(repo, revision, allow_patterns):
            assert (repo, revision) == ("google/ddpm-cifar10-32", "main")
            raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(UserError, match="could not be fetched: no route; download"):
        diffusers.fetch_from_hub("hf://google/ddpm-cifar10-32@main")


def test_the_hub_prefers_safetensors_and_falls_back_to_bin(tmp_path, monkeypatch):
    import sys
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(repo, revision, allow_patterns):
            asked.append(allow_patterns)
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert diffusers.fetch_from_hub("hf://google/ddpm-cifar10-32") == str(tmp_path)
    assert len(asked) == 2 and any(p.endswith(".bin") for p in asked[1])
    assert not any(".bin" in p for p in asked[0])
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    diffusers.fetch_from_hub("hf://google/ddpm-cifar10-32")
    assert len(asked) == 3


@pytest.mark.parametrize("sections, word", [
    ({"model": {"space_to_depth": 2}}, "space_to_depth=2"),
    ({"diffusion": {"variance": "learned", "loss": "kl"}}, "variance=learned"),
    ({"diffusion": {"predict": "x_prev"}}, "predict=x_prev"),
])
def test_what_diffusers_does_not_have_is_refused_on_the_way_out(sections, word):
    config = to_json(small_config(**sections))
    with pytest.raises(UserError, match=word):
        diffusers.unet_config(config)
        diffusers.scheduler_config(config, [])


def test_exported_json_reads_back_as_the_same_config():
    for name in packaged_configs():
        config = to_json(load_config(name))
        if name == "cifar10_table2":
            continue
        fields = (diffusers.model_fields(diffusers.unet_config(config))
                  | diffusers.chain_fields(diffusers.scheduler_config(config, [])))
        for section, values in fields.items():
            for field, value in values.items():
                if name == "digits" and field == "first_log_variance":
                    continue  # diffusers ties it to the variance: fixed_small has a floor there
                value = list(value) if isinstance(value, tuple) else value
                assert config[section][field] == value, (name, section, field)


def test_laws_that_diffusers_lacks_are_written_out():
    config = small_config()
    config.diffusion.schedule = {"name": "warmup10", "beta_start": 1e-3, "beta_end": 0.1}
    betas = [0.1, 0.2, 0.3]
    chain = diffusers.scheduler_config(to_json(config), betas)
    assert chain["trained_betas"] == betas


def test_exported_folder(tmp_path):
    config = to_json(small_config())
    params = random_params(SMALL)
    out = tmp_path / "out"
    diffusers.write_folder(out, params, config, [], step=1234, weights="averaged", version="9.9",
                           origin="somewhere else")
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == ["README.md", "model_index.json", "scheduler/scheduler_config.json",
                     "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    card = (out / "README.md").read_text()
    for word in ("1,234 steps", "somewhere else", "averaged", "DDPMPipeline", "9.9",
                 '"num_timesteps": 50', "num_inference_steps=50"):
        assert word in card
    model = diffusers.open_diffusers(out)
    assert_bit_equal(params, parameter_names.params_from_state_dict(model.state_dict, config))
    _, metadata = open_safetensors(model.weights)
    assert metadata == {"format": "pt"}
    with pytest.raises(UserError, match="not an empty folder"):
        diffusers.write_folder(out, params, config, [], step=1, weights="averaged", version="9.9")
    assert "1,234" in (out / "README.md").read_text()


# ---- with real diffusers ----


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_names_and_shapes_are_those_of_real_diffusers():
    lib = pytest.importorskip("diffusers")
    for released in (CIFAR10, CELEBAHQ):
        fields = diffusers.model_fields(released)
        arch = parameter_names.architecture({**fields, "diffusion": {"variance": "fixed_small"}})
        import torch
        with torch.device("meta"):
            net = lib.UNet2DModel(**{k: v for k, v in released.items() if k[0] != "_"})
        theirs = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        expected = {e.diffusers: tuple(e.shape[a] for a in e.layout.diffusers)
                    + (1,) * e.layout.ones for e in parameter_names.entries(arch)}
        assert theirs == expected


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("older", [False, True])
def test_bin_files_and_folders_that_real_diffusers_wrote(tmp_path, older):
    lib = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    config = to_json(small_config())
    net = lib.UNet2DModel(**{k: v for k, v in diffusers.unet_config(config).items()
                             if k[0] != "_"})
    scheduler = lib.DDPMScheduler(num_train_timesteps=50, beta_end=0.2,
                                  variance_type="fixed_large")
    lib.DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(tmp_path)
    model = diffusers.open_diffusers(tmp_path)
    params = parameter_names.params_from_state_dict(model.state_dict, SMALL)
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    assert_bit_equal(parameter_names.state_dict_from_params(params, SMALL), state)
    for section in ("model", "diffusion"):
        for field, value in model.fields[section].items():
            value = list(value) if isinstance(value, tuple) else value
            assert config[section][field] == value
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    saved = parameter_names.older_names(net.state_dict()) if older else net.state_dict()
    torch.save(saved, weights.with_suffix(".bin"))
    again = diffusers.open_diffusers(tmp_path)
    assert again.weights.endswith(".bin")
    assert_bit_equal(params, parameter_names.params_from_state_dict(again.state_dict, SMALL))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_real_pipeline_loads_and_runs_an_exported_folder(tmp_path):
    lib = pytest.importorskip("diffusers")
    config = to_json(small_config())
    diffusers.write_folder(tmp_path / "out", random_params(SMALL), config, [], step=1,
                           weights="averaged", version="0")
    pipeline = lib.DDPMPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    assert pipeline.scheduler.config.variance_type == "fixed_large"
