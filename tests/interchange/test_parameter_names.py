"""Names and layouts: counts from the paper, round trips, and what the peers really create."""

import numpy as np
import pytest
from made_up import SMALL, assert_bit_equal, flat, older_names, random_params

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy
from ddpm_jax.interchange import parameter_names
from ddpm_jax.models.unet import UNet

CIFAR10 = UNet()
LSUN = UNet(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4))


@pytest.mark.parametrize("model, count", [(CIFAR10, 35_746_307), (LSUN, 113_673_219)])
def test_parameter_counts_of_the_paper(model, count):
    assert sum(int(np.prod(e.shape)) for e in parameter_names.entries(model)) == count


@pytest.mark.parametrize("model", [SMALL, SMALL.clone(
    num_res_blocks=2, ch_mult=(1, 1), attn_resolutions=(16, 8), out_channels=6)])
def test_the_table_is_the_models_own_tree(model):
    import jax
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32),
                            np.zeros(1, np.int32))["params"]
    assert {k: v.shape for k, v in flat(shapes).items()} == {
        ".".join(e.path): e.shape for e in parameter_names.entries(model)
    }


def test_space_to_depth_changes_the_first_and_last_convolution():
    official = {e.official.name: e.shape for e in parameter_names.entries(
        LSUN.clone(space_to_depth=2))}
    assert official["model/conv_in/W"] == (128, 3, 3, 12)
    assert official["model/conv_out/W"] == (12, 3, 3, 128)


def test_some_names_as_their_sources_spell_them():
    table = {e.official.name: e.diffusers.name for e in parameter_names.entries(CIFAR10)}
    assert len(table) == len(set(table.values())) == len(parameter_names.entries(CIFAR10))
    assert table["model/temb/dense0/W"] == "time_embedding.linear_1.weight"
    assert table["model/down_0/block_1/norm1/gamma"] == "down_blocks.0.resnets.1.norm1.weight"
    assert table["model/down_1/block_0/nin_shortcut/b"] == (
        "down_blocks.1.resnets.0.conv_shortcut.bias")
    assert table["model/down_1/attn_1/norm/beta"] == "down_blocks.1.attentions.1.group_norm.bias"
    assert table["model/down_0/downsample/conv/W"] == "down_blocks.0.downsamplers.0.conv.weight"
    assert table["model/mid/attn_1/proj_out/W"] == "mid_block.attentions.0.to_out.0.weight"
    assert table["model/mid/block_2/conv2/W"] == "mid_block.resnets.1.conv2.weight"
    assert table["model/up_3/block_2/temb_proj/W"] == "up_blocks.0.resnets.2.time_emb_proj.weight"
    assert table["model/up_1/attn_2/q/W"] == "up_blocks.2.attentions.2.to_q.weight"
    assert table["model/up_1/upsample/conv/b"] == "up_blocks.2.upsamplers.0.conv.bias"
    assert table["model/norm_out/beta"] == "conv_norm_out.bias"


def test_layouts_move_the_element_that_they_say():
    params = random_params(SMALL)
    official = parameter_names.variables_from_params(params, SMALL)
    diffusers = parameter_names.state_dict_from_params(params, SMALL)
    conv = params["down_1_block_0"]["conv1"]["kernel"]  # OHWI
    assert official["model/down_1/block_0/conv1/W"][1, 2, 3, 4] == conv[4, 1, 2, 3]  # HWIO
    assert diffusers["down_blocks.1.resnets.0.conv1.weight"][4, 3, 1, 2] == conv[4, 1, 2, 3]
    dense = params["down_1_block_0"]["temb_proj"]["kernel"]  # [in,out]
    assert official["model/down_1/block_0/temb_proj/W"][5, 6] == dense[5, 6]
    assert diffusers["down_blocks.1.resnets.0.time_emb_proj.weight"][6, 5] == dense[5, 6]
    shortcut = params["down_1_block_0"]["shortcut"]["kernel"]
    assert diffusers["down_blocks.1.resnets.0.conv_shortcut.weight"][6, 5, 0, 0] == shortcut[5, 6]
    assert diffusers["mid_block.attentions.0.to_q.weight"][6, 5] == (
        params["mid_attn"]["q"]["kernel"][5, 6])


def test_round_trips_are_bit_equal():
    params = random_params(SMALL)
    for there, back in (
            (parameter_names.variables_from_params, parameter_names.params_from_variables),
            (parameter_names.state_dict_from_params, parameter_names.params_from_state_dict)):
        theirs = there(params, SMALL)
        ours = back(theirs, SMALL)
        assert_bit_equal(params, ours)
        assert all(leaf.flags.c_contiguous for leaf in flat(ours).values())
        assert_bit_equal(theirs, there(ours, SMALL))


def test_older_fused_and_wrapped_names_read_the_same():
    params = random_params(SMALL)
    state = parameter_names.state_dict_from_params(params, SMALL)
    older = older_names(state)
    assert "mid_block.attentions.0.proj_attn.weight" in older
    assert "down_blocks.1.attentions.0.key.bias" in older
    assert not any("to_" in key for key in older)
    assert_bit_equal(params, parameter_names.params_from_state_dict(older, SMALL))
    fused = dict(state)
    for module in {k.partition(".to_q")[0] for k in state if ".to_q." in k}:
        for leaf in ("weight", "bias"):
            parts = [fused.pop(f"{module}.to_{part}.{leaf}") for part in "qkv"]
            fused[f"{module}.to_qkv.{leaf}"] = np.concatenate(parts)
    assert_bit_equal(params, parameter_names.params_from_state_dict(fused, SMALL))
    wrapped = {f"module._orig_mod.{key}": value for key, value in older.items()}
    assert_bit_equal(params, parameter_names.params_from_state_dict(wrapped, SMALL))


def test_half_precision_is_widened_and_integers_are_refused():
    state = {k: v.astype(np.float16) for k, v in parameter_names.state_dict_from_params(
        random_params(SMALL), SMALL).items()}
    ours = parameter_names.params_from_state_dict(state, SMALL)
    assert ours["conv_in"]["bias"].dtype == np.float32
    np.testing.assert_array_equal(ours["conv_in"]["bias"], state["conv_in.bias"])
    state["conv_in.bias"] = state["conv_in.bias"].astype(np.int64)
    with pytest.raises(UserError, match=r"conv_in\.bias is int64"):
        parameter_names.params_from_state_dict(state, SMALL)


def test_every_missing_extra_and_misshapen_name_is_listed_at_once():
    params = random_params(SMALL)
    variables = dict(parameter_names.variables_from_params(params, SMALL))
    del variables["model/conv_in/b"], variables["model/up_0/block_1/norm2/beta"]
    variables["model/logvar/W"] = np.zeros(1, np.float32)
    variables["model/conv_out/W"] = np.zeros((1, 1, 32, 3), np.float32)
    with pytest.raises(UserError) as error:
        parameter_names.params_from_variables(variables, SMALL)
    message = str(error.value)
    assert "\n" not in message
    assert "2 missing, 1 extra, 1 misshapen" in message
    for part in ("model/conv_in/b", "model/up_0/block_1/norm2/beta", "model/logvar/W",
                 "model/conv_out/W is (1, 1, 32, 3), not (3, 3, 32, 3)"):
        assert part in message


def test_no_value_is_read_of_a_checkpoint_that_does_not_fit():
    def fail():
        raise AssertionError("read")

    lazy = {e.official.name: Lazy((1,), np.dtype(np.float32), fail)
            for e in parameter_names.entries(SMALL)}
    with pytest.raises(UserError, match="misshapen"):
        parameter_names.params_from_variables(lazy, SMALL)


def test_values_that_are_not_finite_are_named():
    variables = dict(parameter_names.variables_from_params(random_params(SMALL), SMALL))
    variables["model/conv_in/b"] = np.full(32, np.nan, np.float32)
    with pytest.raises(UserError, match="not finite: model/conv_in/b"):
        parameter_names.params_from_variables(variables, SMALL)


def test_a_tree_of_another_model_is_refused_on_the_way_out():
    params = random_params(SMALL)
    del params["mid_attn"]["q"]
    params["down_9_block_0"] = {"conv1": {"kernel": np.zeros(3, np.float32)}}
    with pytest.raises(UserError, match=r"missing: mid_attn\.q\.kernel, mid_attn\.q\.bias; "
                                        r"extra: down_9_block_0\.conv1\.kernel"):
        parameter_names.state_dict_from_params(params, SMALL)


def test_split_checkpoint_sorts_by_suffix_and_scope():
    stored = {"model/conv_in/b": 1, "model/conv_in/b/ExponentialMovingAverage": 2,
              "model/conv_in/b/Adam": 3, "model/conv_in/b/Adam_1": 4, "beta1_power": 5,
              "global_step": 6, "model/conv_in/b/Other": 7, "model/conv_in/b/RMSProp": 8}
    assert parameter_names.split_checkpoint(stored) == {
        "params": {"model/conv_in/b": 1, "model/conv_in/b/Other": 7},
        "ema_params": {"model/conv_in/b": 2}, "mu": {"model/conv_in/b": 3},
        "nu": {"model/conv_in/b": 4},
        "other": {"beta1_power": 5, "global_step": 6, "model/conv_in/b/RMSProp": 8},
    }
