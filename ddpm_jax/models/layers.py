"""Layers of the paper's U-Net (Ho et al. 2020, App. B; official nn.py and models/unet.py).

Parameters are float32; ``dtype`` is what convolutions and matrix products compute in. Statistics of
the norms, softmax and the timestep embedding are float32 always. 3x3 kernels are stored OHWI, the
order that cuDNN reads, so that no step transposes them.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

DROPOUT_BITS = 16  # a probability is a multiple of 2**-16: 0.1 is drawn as 0.100006


def _initializer(scale, in_axis, out_axis):
    # The official code turns a scale of 0 into 1e-10 (nn.py:10).
    return nn.initializers.variance_scaling(
        max(scale, 1e-10), "fan_avg", "uniform", in_axis=in_axis, out_axis=out_axis
    )


def timestep_embedding(t, dim):
    """Sinusoids of t int32 [B] -> float32 [B,dim]: sines, then cosines (nn.py:90).

    Frequencies fall from 1 to 1/10000 over ``dim // 2`` channels, both ends included.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def space_to_depth(x, block):
    """[B,H,W,C] -> [B,H/block,W/block,C*block*block] (run_lsun.py:46)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // block, block, w // block, block, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // block, w // block, block * block * c)


def depth_to_space(x, block):
    """The inverse of ``space_to_depth``."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, block, block, c // (block * block))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * block, w * block, c // (block * block))


def upsample_nearest(x):
    """[B,H,W,C] -> [B,2H,2W,C], each pixel four times."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


# ---- group norm, SiLU and dropout as one differentiable operation ----
#
# Written by hand for the bytes it moves: forward and backward read the activation once for all
# sums and once to apply, keep only the activation itself (in the compute type) and a few numbers a
# channel, and the barriers stop XLA from sharing a float32 copy of it between the two reads.


def _mean_by_reshape(v, groups):
    shape = (*v.shape[:-1], groups, v.shape[-1] // groups)
    return jnp.broadcast_to(v.reshape(shape).mean(axis=-1, keepdims=True), shape).reshape(v.shape)


def _mean_by_product(v, groups):
    size = v.shape[-1] // groups
    group = jnp.arange(v.shape[-1]) // size
    same = (group[:, None] == group[None, :]).astype(v.dtype)
    return jnp.matmul(v, same, precision=lax.Precision.HIGHEST) / size


# A TPU would pad [B,groups,C/groups] to 8 or 16 times its size.
_GROUP_MEANS = {"tpu": _mean_by_product, "default": _mean_by_reshape}


def _group_mean(v, groups):
    """float32 [...,C] -> [...,C]: every channel gets the mean of its group's values."""
    ways = {k: functools.partial(f, groups=groups) for k, f in _GROUP_MEANS.items()}
    return lax.platform_dependent(v, **ways)


def _channel_sums(x):
    """Of each channel of x [B,H,W,C], float32 [B,C] each: its first pixel s, and the sums over the
    pixels of x - s and (x - s)^2. Unlike sums of x and x^2, these do not cancel where the mean is
    large beside the deviation."""
    first = x[:, :1, :1, :].astype(jnp.float32)
    centred = x.astype(jnp.float32) - first
    return first[:, 0, 0], centred.sum(axis=(1, 2)), jnp.square(centred).sum(axis=(1, 2))


def _join_channels(sums, pixels, groups):
    """From ``_channel_sums``, float32 [B,C] each: the channel's own mean, its group's mean, its
    group's variance (channels' moments joined as in Chan et al. 1983)."""
    first, centred, square = sums[0], sums[1] / pixels, sums[2] / pixels
    channel = first + centred
    mean = _group_mean(channel, groups)
    variance = _group_mean(square - jnp.square(centred) + jnp.square(channel - mean), groups)
    return channel, mean, jnp.maximum(variance, 0.0)


def _drop(x, keep, rate):
    return x * keep * (1.0 / (1.0 - _threshold(rate) / 2**DROPOUT_BITS))


def _threshold(rate):
    return round(rate * 2**DROPOUT_BITS)


def _pixels(v):
    return v[:, None, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def group_norm_act(x, shift, scale, bias, bits, groups, eps, silu, rate):
    """Group norm of x + shift, then SiLU where ``silu``, then dropout at ``rate`` where bits is
    not None.

    x [B,H,W,C] any float type; shift float32 [B,C] or None: added in here, it costs no pass over
    x; scale, bias float32 [C]; bits uint16 [B,H,W,C] or None. -> [B,H,W,C] in x's type.
    """
    return _group_norm_act_fwd(x, shift, scale, bias, bits, groups, eps, silu, rate)[0]


def _group_norm_act_fwd(x, shift, scale, bias, bits, groups, eps, silu, rate):
    # Without it a TPU repeats threefry at each use, and writes what it compares as float32.
    keep = None if bits is None else lax.optimization_barrier(bits >= _threshold(rate))
    # Without it XLA joins the sums over pixels and channels and reads x once more for each.
    x, (first, *sums) = lax.optimization_barrier((x, _channel_sums(x)))
    first = first if shift is None else first + shift
    channel, mean, variance = _join_channels((first, *sums), x.shape[1] * x.shape[2], groups)
    inverse = lax.rsqrt(variance + eps)
    factor = inverse * scale[None, :]
    offset = bias[None, :] - (mean if shift is None else mean - shift) * factor
    y = x.astype(jnp.float32) * _pixels(factor) + _pixels(offset)
    if silu:
        y = y * jax.nn.sigmoid(y)
    if keep is not None:
        y = _drop(y, keep, rate)
    return y.astype(x.dtype), (x, shift, scale, bias, keep, channel, mean, inverse)


def _group_norm_act_bwd(groups, eps, silu, rate, saved, g):
    x, shift, scale, bias, keep, channel, mean, inverse = saved
    centre = mean if shift is None else mean - shift

    def normalised_and_gradient(x, g):
        xhat = (x.astype(jnp.float32) - _pixels(centre)) * _pixels(inverse)
        dy = g.astype(jnp.float32)
        if keep is not None:
            dy = _drop(dy, keep, rate)
        if silu:
            y = xhat * scale[None, None, None, :] + bias[None, None, None, :]
            sigmoid = jax.nn.sigmoid(y)
            dy = dy * sigmoid * (1.0 + y * (1.0 - sigmoid))
        return xhat, dy

    xhat, dy = normalised_and_gradient(x, g)
    # Rows first: asked for both axes at once, XLA writes a float32 dy and reads it back.
    sums = lax.optimization_barrier((dy.sum(axis=1), (dy * xhat).sum(axis=1)))
    sum_dy, sum_dy_xhat = (v.sum(axis=1) for v in sums)
    # Without it XLA reads x and g again for the sums over the batch, and keeps a float32 dy.
    x, g, sum_dy, sum_dy_xhat = lax.optimization_barrier((x, g, sum_dy, sum_dy_xhat))
    pixels = x.shape[1] * x.shape[2]
    sums = jnp.stack([sum_dy, sum_dy_xhat]) * (scale[None, None, :] / pixels)
    mean_dy, mean_dy_xhat = _group_mean(sums, groups)
    xhat, dy = normalised_and_gradient(x, g)
    dx = _pixels(inverse) * (
        dy * scale[None, None, None, :] - _pixels(mean_dy) - xhat * _pixels(mean_dy_xhat)
    )
    dshift = None
    if shift is not None:  # the sum of dx over the pixels
        mean_xhat = (channel - mean) * inverse
        dshift = sum_dy * scale[None, :] - pixels * (mean_dy + mean_xhat * mean_dy_xhat)
        dshift = inverse * dshift
    return dx.astype(x.dtype), dshift, sum_dy_xhat.sum(axis=0), sum_dy.sum(axis=0), None


group_norm_act.defvjp(_group_norm_act_fwd, _group_norm_act_bwd)


class GroupNorm(nn.Module):
    """Group norm with eps 1e-6 (tf.contrib's default), SiLU and dropout with it where asked."""

    channels: int
    groups: int
    silu: bool = True
    rate: float = 0.0

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (self.channels,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.channels,))

    def __call__(self, x, bits=None, shift=None):
        """x [B,H,W,C]; bits, shift: as in ``group_norm_act``."""
        return group_norm_act(
            x, shift, self.scale, self.bias, bits, self.groups, 1e-6, self.silu, self.rate
        )


class Conv3x3(nn.Module):
    """3x3 convolution, SAME as TensorFlow pads: at stride 2 only below and to the right."""

    features_in: int
    features: int
    stride: int = 1
    init_scale: float = 1.0
    dtype: Any = jnp.float32

    def setup(self):
        self.kernel = self.param(
            "kernel",
            _initializer(self.init_scale, in_axis=3, out_axis=0),
            (self.features, 3, 3, self.features_in),
        )
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

    def __call__(self, x):
        return self.without_bias(x) + self.bias.astype(self.dtype)[None, None, None, :]

    def without_bias(self, x):
        return lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel.astype(self.dtype),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "OHWI", "NHWC"),
        )


class Dense(nn.Module):
    """x [..., in] -> [..., out]: the official ``dense`` and ``nin`` (a 1x1 convolution)."""

    features_in: int
    features: int
    init_scale: float = 1.0
    dtype: Any = jnp.float32

    def setup(self):
        self.kernel = self.param(
            "kernel",
            _initializer(self.init_scale, in_axis=0, out_axis=1),
            (self.features_in, self.features),
        )
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

    def __call__(self, x):
        return dense(x, self.kernel, self.bias, self.dtype)


def dense(x, kernel, bias, dtype):
    """x [..., in] @ kernel [in,out] + bias [out], computed in ``dtype``."""
    y = jnp.matmul(x.astype(dtype), kernel.astype(dtype))
    return y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class ResBlock(nn.Module):
    """norm, SiLU, conv; plus the timestep; norm, SiLU, dropout, conv; plus the shortcut."""

    features_in: int
    features: int
    embedding: int
    groups: int
    rate: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.norm1 = GroupNorm(self.features_in, self.groups)
        self.conv1 = Conv3x3(self.features_in, self.features, dtype=self.dtype)
        self.temb_proj = Dense(self.embedding, self.features, dtype=self.dtype)
        self.norm2 = GroupNorm(self.features, self.groups, rate=self.rate)
        self.conv2 = Conv3x3(self.features, self.features, init_scale=0.0, dtype=self.dtype)
        if self.features_in != self.features:
            self.shortcut = Dense(self.features_in, self.features, dtype=self.dtype)

    def __call__(self, x, projection, bits=None):
        """x [B,H,W,in]; projection [B,out] = temb_proj of the embedding, made by the U-Net for
        all blocks in one product; bits uint16 [B,H,W,out] or None. -> [B,H,W,out]"""
        if self.features_in != self.features:
            # x has three readers; where it is a concatenation XLA would write it twice.
            x = lax.optimization_barrier(x)
        h = self.conv1.without_bias(self.norm1(x))
        # Added inside the norm, neither is a pass over h, nor is the sum that is their gradient.
        shift = projection.astype(jnp.float32) + self.conv1.bias[None, :]
        h = self.conv2(self.norm2(h, bits, shift))
        if self.features_in != self.features:
            x = self.shortcut(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, scale C^-1/2, residual (unet.py:attn_block)."""

    features: int
    groups: int
    dtype: Any = jnp.float32

    def setup(self):
        self.norm = GroupNorm(self.features, self.groups, silu=False)
        self.q = Dense(self.features, self.features, dtype=self.dtype)
        self.k = Dense(self.features, self.features, dtype=self.dtype)
        self.v = Dense(self.features, self.features, dtype=self.dtype)
        self.proj_out = Dense(self.features, self.features, init_scale=0.0, dtype=self.dtype)

    def __call__(self, x):
        b, height, width, c = x.shape
        h = self.norm(x).reshape(b, height * width, c)
        # Joined, q, k and v would be cut apart again by copies that cost more than two more reads.
        q, k, v = self.q(h), self.k(h), self.v(h)
        logits = jnp.einsum("bqc,bkc->bqk", q, k).astype(jnp.float32)
        weights = jax.nn.softmax(logits * c**-0.5, axis=-1).astype(self.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, v)
        return x + self.proj_out(h.reshape(x.shape))
