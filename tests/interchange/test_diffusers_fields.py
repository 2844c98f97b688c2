"""The released JSON files, every refused field, and back."""

import numpy as np
import pytest
from made_up import small_config

from ddpm_jax.config import load_config, packaged_configs, to_json
from ddpm_jax.diffusion.schedule import BETAS, zero_terminal_snr
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model, network
from ddpm_jax.interchange import parameter_names
from ddpm_jax.interchange.diffusers.fields import (
    chain_fields,
    model_fields,
    scheduler_config,
    shared_chain_fields,
    unet_config,
)
from ddpm_jax.models.unet import UNet

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
        found = model_fields(released) | chain_fields(chain)
        assert found["model"].pop("dropout") == 0.0  # the JSON files do not say 0.1
        for section, values in found.items():
            for field, value in values.items():
                there = config[section][field]
                there = dict(there) if field == "schedule" else there
                assert there == value, (section, field)


WEIRD = [None, "x", -1, 1.5, [], {}, [0], ["x"], [None], [128, "a", 256, 256], 1e30, float("nan")]


@pytest.mark.parametrize("read, released", [
    (model_fields, CIFAR10), (chain_fields, CIFAR10_CHAIN), (shared_chain_fields, CIFAR10_CHAIN)])
def test_a_field_of_another_type_is_named(read, released):
    for field in [*released, "dropout", "prediction_type", "attn_norm_num_groups", "thresholding"]:
        for value in WEIRD:
            try:
                read({**released, field: value})
            except UserError as error:
                assert f"{field}=" in str(error), (field, value)


def test_older_scheduler_class_and_model_class_are_refused():
    with pytest.raises(UserError, match="_class_name='GaussianDDPMScheduler'"):
        chain_fields({"_class_name": "GaussianDDPMScheduler", "timesteps": 1000})
    with pytest.raises(UserError, match="_class_name='UNet2DConditionModel'"):
        model_fields({**CIFAR10, "_class_name": "UNet2DConditionModel"})


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
    ({"num_class_embeds": 0}, "num_class_embeds=0"),
    ({"num_class_embeds": 1, "_label_dropout": 0.1}, "num_class_embeds=1"),
    ({"time_embedding_dim": 128}, "time_embedding_dim=128"),
    ({"out_channels": 4}, "out_channels=4"),
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
        model_fields({**CIFAR10, **change}, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")


@pytest.mark.parametrize("field", ["freq_shift", "flip_sin_to_cos", "downsample_padding",
                                   "norm_eps", "attention_head_dim"])
def test_an_absent_field_counts_as_diffusers_own_default(field):
    config = {k: v for k, v in CIFAR10.items() if k != field}
    with pytest.raises(UserError, match=field):
        model_fields(config)


@pytest.mark.parametrize("change", [
    {"variance_type": "learned"}, {"variance_type": "fixed_large_log"},
    {"prediction_type": "flow"}, {"beta_schedule": "sigmoid"}, {"thresholding": True},
    {"clip_sample_range": 2.0}, {"steps_offset": 1},
    {"rescale_betas_zero_snr": "yes"}, {"trained_betas": [0.1, 0.2]}, {"num_train_timesteps": 0},
    {"a_new_field": 3},
])
def test_what_the_chain_does_not_have_is_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        chain_fields({**CIFAR10_CHAIN, **change})


def test_accepted_variants():
    whole_heads = {**CIFAR10, "attention_head_dim": 256, "act_fn": "swish", "dropout": 0.1,
                   "sample_size": [32, 32], "some_null_field": None}
    assert model_fields(whole_heads)["model"]["dropout"] == 0.1
    found = chain_fields({**CHURCH_CHAIN, "beta_schedule": "scaled_linear",
                                    "prediction_type": "sample", "clip_sample": False})
    assert found["diffusion"]["schedule"]["name"] == "quad"
    assert found["diffusion"]["predict"] == "x_start"
    assert found["sampler"]["clip_denoised"] is False
    assert chain_fields({**CHURCH_CHAIN, "prediction_type": "v_prediction"})["diffusion"][
        "predict"] == "v"
    assert chain_fields({**CHURCH_CHAIN, "tensor_format": "pt", "predict_epsilon": True}) == (
        chain_fields(CHURCH_CHAIN))
    old = chain_fields({**CHURCH_CHAIN, "predict_epsilon": False, "skip_prk_steps": True})
    assert old["diffusion"]["predict"] == "x_start"
    learned = chain_fields({**CHURCH_CHAIN, "variance_type": "learned_range",
                            "rescale_betas_zero_snr": True})["diffusion"]
    assert learned["variance"] == "learned_range" and learned["loss"] == "hybrid"
    assert learned["zero_terminal_snr"] is True
    cosine = chain_fields({**CHURCH_CHAIN, "beta_schedule": "squaredcos_cap_v2"})
    assert cosine["diffusion"]["schedule"] == {"name": "cosine"}


@pytest.mark.parametrize("sections, word", [
    ({"model": {"space_to_depth": 2}}, "space_to_depth=2"),
    ({"diffusion": {"variance": "learned", "loss": "kl"}}, "variance=learned"),
    ({"diffusion": {"predict": "x_prev"}}, "predict=x_prev"),
])
def test_what_diffusers_does_not_have_is_refused_on_the_way_out(sections, word):
    config = small_config(**sections)
    with pytest.raises(UserError, match=word):
        unet_config(network(config))
        scheduler_config(to_json(config), [])


def test_exported_json_reads_back_as_the_same_config():
    for name in packaged_configs():
        if name == "cifar10_table2":
            continue
        config = load_config(name)
        law = config.diffusion.schedule.to_dict()
        betas = BETAS[law.pop("name")](config.diffusion.num_timesteps, **law)
        if config.diffusion.zero_terminal_snr:
            betas = zero_terminal_snr(betas)
        model, config = network(config), to_json(config)
        fields = (model_fields(unet_config(model))
                  | chain_fields(scheduler_config(config, betas)))
        for section, values in fields.items():
            for field, value in values.items():
                value = list(value) if isinstance(value, tuple) else value
                assert config[section][field] == value, (name, section, field)


@pytest.mark.parametrize("ours, theirs", [(None, True), (True, True), (False, False)])
def test_clipping_is_on_unless_it_is_turned_off(ours, theirs):
    config = to_json(small_config(sampler={"clip_denoised": ours}))
    chain = scheduler_config(config, [])
    assert chain["clip_sample"] is theirs
    assert (chain_fields(chain)["sampler"]["clip_denoised"] is not False) is theirs


def test_laws_that_diffusers_lacks_are_written_out():
    config = small_config()
    config.diffusion.schedule = {"name": "warmup10", "beta_start": 1e-3, "beta_end": 0.1}
    betas = BETAS["warmup10"](50, 1e-3, 0.1)
    chain = scheduler_config(to_json(config), betas)
    assert chain["trained_betas"] == list(betas)
    schedule = to_json(config)["diffusion"]["schedule"]
    assert chain_fields(chain)["diffusion"]["schedule"] == schedule


def test_betas_of_no_known_law_are_read_as_they_are():
    """As other programs write them: without a law's name, or with one that they are not of."""
    config = small_config()
    config.diffusion.schedule = {"name": "warmup10", "beta_start": 1e-3, "beta_end": 0.1}
    betas = [0.01 * (k + 1) for k in range(50)]
    chain = scheduler_config(to_json(config), betas)
    assert chain_fields(chain) == chain_fields({**chain, "_betas": None})
    found = chain_fields(chain)["diffusion"]
    assert found["schedule"] == {"name": "listed", "betas": tuple(betas)}
    config.diffusion.schedule = found["schedule"]
    np.testing.assert_array_equal(build_model(config).betas, betas)
    again = scheduler_config(to_json(config), betas)
    assert again["trained_betas"] == betas and "_betas" not in again
    for wrong in ([0.1] * 49, [0.1] * 49 + [0.0], [0.1] * 49 + ["x"], "cosine"):
        with pytest.raises(UserError, match="trained_betas=.*num_train_timesteps=50 numbers"):
            chain_fields({**chain, "trained_betas": wrong})


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_names_and_shapes_are_those_of_real_diffusers():
    lib = pytest.importorskip("diffusers")
    for released in (CIFAR10, CELEBAHQ):
        fields = model_fields(released)
        model = UNet(**fields["model"], image_size=released["sample_size"])
        import torch
        with torch.device("meta"):
            net = lib.UNet2DModel(**{k: v for k, v in released.items() if k[0] != "_"})
        theirs = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        assert theirs == {e.diffusers.name: e.diffusers.shape
                          for e in parameter_names.entries(model)}
