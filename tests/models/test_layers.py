import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import layers as L
from ddpm_jax.models.fused_norm import plain_group_norm_act

RNG = np.random.default_rng(0)


def rand(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def plain_norm(x, p, silu):
    return plain_group_norm_act(x, None, p["scale"], p["bias"], None, 4, 1e-6, silu, 0.0)


def test_timestep_embedding_by_hand():
    e = L.timestep_embedding(jnp.array([0, 1, 999]), 8)
    assert e.shape == (3, 8)
    np.testing.assert_allclose(e[0], [0, 0, 0, 0, 1, 1, 1, 1])
    f = 10000.0 ** (-np.arange(4) / 3)
    np.testing.assert_allclose(e[2], np.r_[np.sin(999 * f), np.cos(999 * f)], atol=2e-4)
    assert L.timestep_embedding(jnp.array([5]), 9).shape == (1, 9)


def test_stride_two_pads_below_and_to_the_right():
    """A kernel with one weight at (0, 0) picks the pixels at even places: no pad above or left."""
    conv = L.Conv3x3(1, 1, stride=2)
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((1, 3, 3, 1)).at[0, 0, 0, 0].set(1.0)
    y = conv.apply({"params": {"kernel": kernel, "bias": jnp.zeros(1)}}, x)
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 2], [8, 10]])


def test_initial_weights_are_uniform_fan_avg():
    key = jax.random.key(0)
    kernel = L.Conv3x3(64, 128).init(key, jnp.zeros((1, 4, 4, 64)))["params"]["kernel"]
    limit = np.sqrt(3 / ((9 * 64 + 9 * 128) / 2))
    assert kernel.shape == (128, 3, 3, 64)
    assert float(jnp.abs(kernel).max()) == pytest.approx(limit, rel=1e-3)
    assert float(kernel.std()) == pytest.approx(limit / np.sqrt(3), rel=1e-2)
    last = L.Conv3x3(64, 64, init_scale=0.0).init(key, jnp.zeros((1, 4, 4, 64)))["params"]["kernel"]
    assert float(jnp.abs(last).max()) == pytest.approx(1e-5 * np.sqrt(3 / (9 * 64)), rel=1e-3)
    dense = L.Dense(64, 192).init(key, jnp.zeros((1, 64)))["params"]["kernel"]
    assert dense.shape == (64, 192)
    assert float(jnp.abs(dense).max()) == pytest.approx(np.sqrt(3 / 128), rel=1e-2)


@pytest.mark.parametrize("shape, in_axis, out_axis, scale", [
    ((6, 3, 3, 4), 3, 0, 1.0), ((4, 6), 0, 1, 1.0), ((6, 3, 3, 4), 3, 0, 0.0)])
def test_initial_weights_are_flax_s(shape, in_axis, out_axis, scale):
    theirs = nn.initializers.variance_scaling(
        scale or 1e-10, "fan_avg", "uniform", in_axis=in_axis, out_axis=out_axis)
    key = jax.random.key(3)
    np.testing.assert_array_equal(
        L.fan_average(scale, in_axis, out_axis)(key, shape), theirs(key, shape, jnp.float32))


def test_a_residual_block_equals_its_parts_one_after_the_other():
    block = L.ResBlock(8, 16, 32, 4)
    x, projection = rand(2, 6, 6, 8), rand(2, 16)
    params = jax.tree.map(lambda p: p + 0.3 * rand(*p.shape),
                          block.init(jax.random.key(0), x, projection))
    p = params["params"]
    h = plain_norm(x, p["norm1"], True)
    h = L.Conv3x3(8, 16).apply({"params": p["conv1"]}, h) + projection[:, None, None, :]
    h = plain_norm(h, p["norm2"], True)
    h = L.Conv3x3(16, 16).apply({"params": p["conv2"]}, h)
    shortcut = L.Conv1x1(8, 16).apply({"params": p["shortcut"]}, x)
    np.testing.assert_allclose(block.apply(params, x, projection), shortcut + h, atol=1e-4)


def test_attention_equals_the_textbook_form():
    block = L.AttentionBlock(8, 4)
    x = rand(2, 3, 3, 8)
    params = jax.tree.map(lambda p: p + 0.3 * rand(*p.shape), block.init(jax.random.key(0), x))
    p = params["params"]
    h = plain_norm(x, p["norm"], False).reshape(2, 9, 8)
    q, k, v = (np.asarray(h @ p[n]["kernel"] + p[n]["bias"][None, None], np.float64) for n in "qkv")
    out = np.zeros((2, 9, 8))
    for b in range(2):
        for i in range(9):
            w = np.exp(q[b, i] @ k[b].T / np.sqrt(8))
            out[b, i] = (w / w.sum()) @ v[b]
    out = out @ np.asarray(p["proj_out"]["kernel"]) + np.asarray(p["proj_out"]["bias"])
    np.testing.assert_allclose(block.apply(params, x), x + out.reshape(x.shape), atol=2e-5)


def test_rearrangements():
    x = rand(2, 4, 6, 3)
    np.testing.assert_array_equal(L.depth_to_space(L.space_to_depth(x, 2), 2), x)
    np.testing.assert_array_equal(L.space_to_depth(x, 2)[0, 1, 2], np.ravel(x[0, 2:4, 4:6]))
    np.testing.assert_array_equal(L.upsample_nearest(x), x.repeat(2, axis=1).repeat(2, axis=2))
