import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.layers import abstract_parameters, initial_parameters, parameter_layers
from ddpm_jax.models.unet import UNet, layout

SMALL = dict(image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1, 2), num_res_blocks=1,
             attn_resolutions=(4,), num_groups=4, dropout=0.5)


def shapes(**kwargs):
    model = UNet(**kwargs)
    s = model.image_size
    return model, jax.eval_shape(lambda: model.init(
        jax.random.key(0), jnp.zeros((1, s, s, model.in_channels)), jnp.zeros(1, jnp.int32)
    )["params"])


def made(**kwargs):
    """A model whose weights are all of order one, so that no layer's output vanishes."""
    model, rng = UNet(**{**SMALL, **kwargs}), np.random.default_rng(0)
    return model, jax.tree.map(
        lambda s: np.float32(rng.standard_normal(s.shape) * 0.3), abstract_parameters(model))


@pytest.mark.parametrize("kwargs, count", [
    (dict(), 35_746_307),
    (dict(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4)), 113_673_219),
    (dict(image_size=256, ch=192, ch_mult=(1, 1, 2, 2, 4, 4)), 255_677_955),
])
def test_parameter_counts_of_the_paper(kwargs, count):
    assert sum(p.size for p in jax.tree.leaves(shapes(**kwargs)[1])) == count


def test_attention_follows_every_block_at_16_also_on_the_way_up():
    names = [s.name for s in layout(image_size=32, ch=128, ch_mult=(1, 2, 2, 2), num_res_blocks=2,
                                    attn_resolutions=(16,)) if s.kind == "attention"]
    assert names == ["down_1_attn_0", "down_1_attn_1", "mid_attn",
                     "up_1_attn_0", "up_1_attn_1", "up_1_attn_2"]


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_initial_parameters_are_those_of_init(remat):
    model, key = UNet(**SMALL, num_classes=3, remat=remat), jax.random.key(5)

    def create(bound):
        for path, layer in parameter_layers(model):
            for name in layer.shapes():
                getattr(functools.reduce(getattr, path, bound), name)

    want = model.init(key, method=create)["params"]
    got = initial_parameters(model, key)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, abstract_parameters(model))
    called = jax.eval_shape(model.init, key, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32),
                            labels=jnp.zeros(1, jnp.int32))["params"]
    assert called == abstract_parameters(model)


def test_output_starts_near_zero_and_is_float32():
    model = UNet(**SMALL, dtype=jnp.bfloat16)
    x, t = jnp.ones((2, 8, 8, 1)), jnp.array([0, 999])
    params = initial_parameters(model, jax.random.key(0))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    y = jax.jit(model.apply)({"params": params}, x, t)
    assert y.shape == (2, 8, 8, 1) and y.dtype == jnp.float32
    assert float(jnp.abs(y).max()) < 1e-3


def bits_of(model, batch):
    rng = np.random.default_rng(2)
    return [rng.integers(0, 2**16, (batch, *shape), np.uint16) for shape in model.dropout_shapes()]


@functools.cache
def gradients(remat):
    """Of a weighted sum of the outputs."""
    model, params = made(remat=remat)
    x, weight = np.random.default_rng(1).standard_normal((2, 2, 8, 8, 1)).astype(np.float32)
    bits = bits_of(model, 2)
    return jax.device_get(jax.jit(jax.grad(lambda p: (model.apply(
        {"params": p}, x, np.array([3, 70]), bits) * weight).sum()))(params))


@pytest.mark.slow
def test_every_parameter_matters():
    for path, g in jax.tree_util.tree_leaves_with_path(gradients(remat=False)):
        name = jax.tree_util.keystr(path)
        if "'k'" in name and "bias" in name:
            continue  # softmax does not see what is added to every key
        assert np.abs(g).max() > 1e-5, name


def test_an_example_does_not_see_its_batch():
    model, params = made()
    x = np.float32(np.random.default_rng(1).standard_normal((4, 8, 8, 1)))
    t = np.array([0, 10, 500, 999])
    bits = bits_of(model, 4)
    apply = jax.jit(lambda *a: model.apply({"params": params}, *a))
    whole = apply(x, t, bits)
    for i in (0, 3):
        alone = apply(x[i:i + 1], t[i:i + 1], [b[i:i + 1] for b in bits])
        np.testing.assert_allclose(alone[0], whole[i], rtol=2e-4, atol=2e-4)
    for i, b in enumerate(bits):  # every block listens to its own
        other = [*bits[:i], 65535 - b, *bits[i + 1:]]
        assert not np.allclose(whole, apply(x, t, other), atol=1e-4), i
    with pytest.raises(ValueError, match="dropout_bits must have the shapes"):
        apply(x, t, bits[1:])


@pytest.mark.slow
def test_remat_changes_nothing():
    for a, b in zip(*(jax.tree.leaves(gradients(remat)) for remat in (False, True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(a).max() + 1e-5)


def test_space_to_depth_halves_the_network_and_keeps_the_shape():
    model, like = shapes(**{**SMALL, "space_to_depth": 2, "attn_resolutions": (2,)})
    assert like["conv_in"]["kernel"].shape == (8, 3, 3, 4)
    x = jnp.zeros((1, 8, 8, 1))
    y = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), x, jnp.zeros(1, jnp.int32))[0])
    assert y.shape == x.shape


def test_bad_input_is_refused():
    model, params = made()
    for shape in [(1, 8, 8, 3), (1, 16, 16, 1)]:
        with pytest.raises(ValueError, match="takes images"):
            model.apply({"params": params}, jnp.zeros(shape), jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="not divisible by 2"):
        shapes(**{**SMALL, "image_size": 9})
    with pytest.raises(ValueError, match="groups"):
        shapes(**{**SMALL, "num_groups": 3})


@pytest.mark.parametrize("change, word", [
    ({"ch": 0}, "ch=0"), ({"ch": 2}, "ch=2"), ({"ch": 8.5}, "ch=8.5"),
    ({"ch_mult": (1, 0)}, "ch_mult"), ({"ch_mult": ()}, "empty"),
    ({"num_groups": 0}, "num_groups=0"), ({"space_to_depth": 0}, "space_to_depth=0"),
    ({"num_res_blocks": -1}, "num_res_blocks=-1"), ({"attn_resolutions": (0,)}, "attn_resolutions"),
    ({"image_size": 0}, "image_size=0"),
])
def test_fields_that_describe_no_network_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        UNet(**{**SMALL, **change}).check()


def test_attention_at_a_resolution_that_no_level_has():
    UNet(**SMALL).check_attention()
    UNet(**{**SMALL, "attn_resolutions": ()}).check_attention()
    UNet(**{**SMALL, "space_to_depth": 2, "attn_resolutions": (4, 2)}).check_attention()
    with pytest.raises(ValueError, match=r"\(4, 16\): the levels have sides of 8, 4"):
        UNet(**{**SMALL, "attn_resolutions": (4, 16)}).check_attention()
