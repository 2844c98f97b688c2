"""The fused norm against its plain form, its statistics against float64, its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ddpm_jax.models import fused_norm as F

RNG = np.random.default_rng(0)


def rand(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize(("form", "groups"), [("xla", 1), ("xla", 4), ("xla", 8), ("stored", 4)])
def test_norm_and_its_gradients_equal_the_plain_form(silu, dropout, form, groups):
    x, scale, bias, g = rand(2, 6, 5, 8) + 3, rand(8), rand(8), rand(2, 6, 5, 8)
    bits = jax.random.bits(jax.random.key(0), x.shape, jnp.uint16) if dropout else None

    def ours(x, scale, bias):
        return F.group_norm_act(x, None, scale, bias, bits, groups, 1e-6, silu, 0.3, form)

    def plain(x, scale, bias):
        return F.plain_group_norm_act(
            x, None, scale, bias, bits, groups, 1e-6, silu, 0.3)

    got, back = jax.vjp(ours, x, scale, bias)
    want, plain_back = jax.vjp(plain, x, scale, bias)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for a, b in zip(back(g), plain_back(g), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("silu", "form"), [(True, "xla"), (False, "xla"), (True, "stored")])
def test_a_shift_inside_the_norm_equals_one_before_it(silu, form):
    x, shift, scale, bias = rand(2, 6, 5, 8) + 3, 2 * rand(2, 8), rand(8), rand(8)
    g = rand(2, 6, 5, 8)
    bits = jax.random.bits(jax.random.key(0), x.shape, jnp.uint16)

    def inside(x, shift, scale, bias):
        return F.group_norm_act(x, shift, scale, bias, bits, 4, 1e-6, silu, 0.3, form)

    def before(x, shift, scale, bias):
        return F.plain_group_norm_act(
            x, shift, scale, bias, bits, 4, 1e-6, silu, 0.3)

    got, back = jax.vjp(inside, x, shift, scale, bias)
    want, plain_back = jax.vjp(before, x, shift, scale, bias)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for a, b in zip(back(g), plain_back(g), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("platform", F._GROUP_MEANS)
def test_every_platform_takes_the_mean_of_the_group(platform):
    v = RNG.standard_normal((3, 24)).astype(np.float32) + 1000
    want = v.astype(np.float64).reshape(3, 4, 6).mean(axis=2).repeat(6, axis=1)
    np.testing.assert_allclose(F._GROUP_MEANS[platform](jnp.asarray(v), 4), want, rtol=1e-6)


def test_norm_gradient_against_finite_differences():
    x, scale, bias = rand(2, 4, 4, 8), rand(8), rand(8)
    check_grads(lambda x, *a: F.group_norm_act(x, None, *a, None, 2, 1e-6, True, 0.0),
                (x, scale, bias), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mean", [0.0, 1000.0, -1000.0])
def test_moments_stay_right_at_large_means(mean):
    x = np.asarray(RNG.standard_normal((4, 32, 32, 64)) + mean, np.float32)
    _, got_mean, got_variance = F._join_channels(F._channel_sums(jnp.asarray(x)), 1024, 32)
    groups = x.astype(np.float64).reshape(4, -1, 32, 2)
    want = groups.mean(axis=(1, 3)), groups.var(axis=(1, 3))
    np.testing.assert_allclose(got_mean[:, ::2], want[0], atol=1e-3)
    np.testing.assert_allclose(got_variance[:, ::2], want[1], atol=1e-3)
    normed = F.group_norm_act(
        jnp.asarray(x), None, jnp.ones(64), jnp.zeros(64), None, 32, 1e-6, False, 0.0)
    exact = (groups - want[0][:, None, :, None]) / np.sqrt(want[1][:, None, :, None] + 1e-6)
    assert np.abs(np.asarray(normed).reshape(groups.shape) - exact).max() < 1e-2


def test_a_constant_channel_does_not_break_the_moments():
    x = jnp.full((1, 4, 4, 8), 7.0)
    y, back = jax.vjp(
        lambda x: F.group_norm_act(x, None, jnp.ones(8), jnp.zeros(8), None, 2, 1e-6, True, 0.0), x)
    np.testing.assert_array_equal(y, 0.0)
    assert np.isfinite(back(y + 1.0)[0]).all()


def test_bfloat16_norm_is_the_rounded_float32_one():
    x = (rand(2, 8, 8, 8) * 2 + 5).astype(jnp.bfloat16)
    args = (rand(2, 8), rand(8), rand(8), None, 4, 1e-6, True, 0.0)
    got = F.group_norm_act(x, *args)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        got, F.group_norm_act(x.astype(jnp.float32), *args).astype(jnp.bfloat16))


def test_dropout_keeps_its_share_and_the_mean():
    x = jnp.ones((8, 32, 32, 8))
    bits = jax.random.bits(jax.random.key(1), x.shape, jnp.uint16)
    keep = F._drop(jnp.ones(bits.shape), bits >= F._threshold(0.1), F._kept(0.1))
    assert float((keep == 0).mean()) == pytest.approx(0.1, abs=3e-3)
    assert float(keep.mean()) == pytest.approx(1.0, abs=3e-3)
