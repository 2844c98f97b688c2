import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ddpm_jax.models import layers as L

RNG = np.random.default_rng(0)


def rand(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def plain_norm(x, scale, bias, bits, groups, silu, rate):
    """Group norm, SiLU and dropout as one would write them, two passes for the moments."""
    b, h, w, c = x.shape
    g = x.astype(jnp.float32).reshape(b, h, w, groups, c // groups)
    mean = g.mean(axis=(1, 2, 4), keepdims=True)
    variance = jnp.square(g - mean).mean(axis=(1, 2, 4), keepdims=True)
    y = ((g - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)
    y = y * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)
    y = jax.nn.silu(y) if silu else y
    if bits is not None:
        y = y * (bits >= round(rate * 65536)) / (1 - round(rate * 65536) / 65536)
    return y


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_norm_and_its_gradients_equal_the_plain_form(silu, dropout, groups):
    x, scale, bias, g = rand(2, 6, 5, 8) + 3, rand(8), rand(8), rand(2, 6, 5, 8)
    bits = jax.random.bits(jax.random.key(0), x.shape, jnp.uint16) if dropout else None

    def ours(x, scale, bias):
        return L.group_norm_act(x, None, scale, bias, bits, groups, 1e-6, silu, 0.3)

    def plain(x, scale, bias):
        return plain_norm(x, scale, bias, bits, groups, silu, 0.3)

    got, back = jax.vjp(ours, x, scale, bias)
    want, plain_back = jax.vjp(plain, x, scale, bias)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for a, b in zip(back(g), plain_back(g), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("silu", [True, False])
def test_a_shift_inside_the_norm_is_one_before_it(silu):
    x, shift, scale, bias = rand(2, 6, 5, 8) + 3, 2 * rand(2, 8), rand(8), rand(8)
    g = rand(2, 6, 5, 8)
    bits = jax.random.bits(jax.random.key(0), x.shape, jnp.uint16)

    def inside(x, shift, scale, bias):
        return L.group_norm_act(x, shift, scale, bias, bits, 4, 1e-6, silu, 0.3)

    def before(x, shift, scale, bias):
        return plain_norm(x + shift[:, None, None, :], scale, bias, bits, 4, silu, 0.3)

    got, back = jax.vjp(inside, x, shift, scale, bias)
    want, plain_back = jax.vjp(before, x, shift, scale, bias)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for a, b in zip(back(g), plain_back(g), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("platform", L._GROUP_MEANS)
def test_every_platform_takes_the_mean_of_the_group(platform):
    v = RNG.standard_normal((3, 24)).astype(np.float32) + 1000
    want = v.astype(np.float64).reshape(3, 4, 6).mean(axis=2).repeat(6, axis=1)
    np.testing.assert_allclose(L._GROUP_MEANS[platform](jnp.asarray(v), 4), want, rtol=1e-6)


def test_norm_gradient_against_finite_differences():
    x, scale, bias = rand(2, 4, 4, 8), rand(8), rand(8)
    check_grads(lambda x, *a: L.group_norm_act(x, None, *a, None, 2, 1e-6, True, 0.0),
                (x, scale, bias), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mean", [0.0, 1000.0, -1000.0])
def test_moments_stay_right_at_large_means(mean):
    x = np.asarray(RNG.standard_normal((4, 32, 32, 64)) + mean, np.float32)
    _, got_mean, got_variance = L._join_channels(L._channel_sums(jnp.asarray(x)), 1024, 32)
    groups = x.astype(np.float64).reshape(4, -1, 32, 2)
    want = groups.mean(axis=(1, 3)), groups.var(axis=(1, 3))
    np.testing.assert_allclose(got_mean[:, ::2], want[0], atol=1e-3)
    np.testing.assert_allclose(got_variance[:, ::2], want[1], atol=1e-3)
    normed = L.group_norm_act(
        jnp.asarray(x), None, jnp.ones(64), jnp.zeros(64), None, 32, 1e-6, False, 0.0)
    exact = (groups - want[0][:, None, :, None]) / np.sqrt(want[1][:, None, :, None] + 1e-6)
    assert np.abs(np.asarray(normed).reshape(groups.shape) - exact).max() < 1e-2


def test_a_constant_channel_does_not_break_the_moments():
    x = jnp.full((1, 4, 4, 8), 7.0)
    y, back = jax.vjp(
        lambda x: L.group_norm_act(x, None, jnp.ones(8), jnp.zeros(8), None, 2, 1e-6, True, 0.0), x)
    np.testing.assert_array_equal(y, 0.0)
    assert np.isfinite(back(y + 1.0)[0]).all()


def test_bfloat16_norm_is_the_rounded_float32_one():
    x = (rand(2, 8, 8, 8) * 2 + 5).astype(jnp.bfloat16)
    args = (rand(2, 8), rand(8), rand(8), None, 4, 1e-6, True, 0.0)
    got = L.group_norm_act(x, *args)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        got, L.group_norm_act(x.astype(jnp.float32), *args).astype(jnp.bfloat16))


def test_dropout_keeps_its_share_and_the_mean():
    x = jnp.ones((8, 32, 32, 8))
    bits = jax.random.bits(jax.random.key(1), x.shape, jnp.uint16)
    keep = L._drop(jnp.ones(bits.shape), bits >= L._threshold(0.1), 0.1)
    assert float((keep == 0).mean()) == pytest.approx(0.1, abs=3e-3)
    assert float(keep.mean()) == pytest.approx(1.0, abs=3e-3)


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


def test_a_residual_block_equals_its_parts_one_after_the_other():
    block = L.ResBlock(8, 16, 32, 4)
    x, projection = rand(2, 6, 6, 8), rand(2, 16)
    params = jax.tree.map(lambda p: p + 0.3 * rand(*p.shape),
                          block.init(jax.random.key(0), x, projection))
    p = params["params"]
    h = plain_norm(x, p["norm1"]["scale"], p["norm1"]["bias"], None, 4, True, 0)
    h = L.Conv3x3(8, 16).apply({"params": p["conv1"]}, h) + projection[:, None, None, :]
    h = plain_norm(h, p["norm2"]["scale"], p["norm2"]["bias"], None, 4, True, 0)
    h = L.Conv3x3(16, 16).apply({"params": p["conv2"]}, h)
    shortcut = L.Dense(8, 16).apply({"params": p["shortcut"]}, x)
    np.testing.assert_allclose(block.apply(params, x, projection), shortcut + h, atol=1e-4)


def test_attention_equals_the_textbook_form():
    block = L.AttentionBlock(8, 4)
    x = rand(2, 3, 3, 8)
    params = jax.tree.map(lambda p: p + 0.3 * rand(*p.shape), block.init(jax.random.key(0), x))
    p = params["params"]
    h = plain_norm(x, p["norm"]["scale"], p["norm"]["bias"], None, 4, False, 0).reshape(2, 9, 8)
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
