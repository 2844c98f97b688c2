"""Layers and blocks of the paper's U-Net (Ho et al. 2020, App. B; hojonathanho/diffusion, commit
1e0dceb, nn.py and models/unet.py).

Parameters are float32; ``dtype`` is what convolutions and matrix products compute in. Statistics of
the norms, softmax and the timestep embedding are float32 always. 3x3 kernels are stored OHWI, the
order that cuDNN reads, so that no step transposes them.

What the network consists of is described here once: a layer's ``shapes()`` and ``initializers()``
are its parameters, a block's ``layers()`` its layers. Flax's ``setup`` uses them, and so does
everything that has to know names, shapes or costs without running the network.
"""

import functools
import hashlib
import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import lax

from ddpm_jax.models.attention import FORMS
from ddpm_jax.models.fused_norm import GroupNorm, create_parameters
from ddpm_jax.models.shard_gradients import conv3x3, conv3x3_by_shard


@functools.cache  # equal for equal arguments: parameters are drawn by initializer and shape
def fan_average(scale, in_axis, out_axis):
    """The official ``default_init`` (nn.py:10), which turns a scale of 0 into 1e-10: bit for bit
    flax's ``variance_scaling(scale, "fan_avg", "uniform", in_axis, out_axis)``, drawn as a vector,
    which takes the compiler a third of the time of four axes."""

    def initializer(key, shape, dtype=jnp.float32):
        size, fans = math.prod(shape), shape[in_axis] + shape[out_axis]
        average = fans / 2 * size / (shape[in_axis] * shape[out_axis])
        variance = jnp.asarray(max(scale, 1e-10) / average, dtype)
        return (jax.random.uniform(key, (size,), dtype, -1) * jnp.sqrt(3 * variance)).reshape(shape)

    return initializer


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


class Conv3x3(nn.Module):
    """3x3 convolution, SAME as TensorFlow pads: at stride 2 only below and to the right."""

    features_in: int
    features: int
    stride: int = 1
    init_scale: float = 1.0
    dtype: Any = jnp.float32
    by_shard: str = ""

    @nn.nowrap
    def shapes(self):
        return {"kernel": (self.features, 3, 3, self.features_in), "bias": (self.features,)}

    @nn.nowrap
    def initializers(self):
        return {"kernel": fan_average(self.init_scale, in_axis=3, out_axis=0),
                "bias": nn.initializers.zeros}

    def setup(self):
        create_parameters(self)

    def __call__(self, x):
        return self.without_bias(x) + self.bias.astype(self.dtype)[None, None, None, :]

    def without_bias(self, x):
        args = x.astype(self.dtype), self.kernel.astype(self.dtype), self.stride
        return conv3x3_by_shard(*args, self.by_shard) if self.by_shard else conv3x3(*args)


class Dense(nn.Module):
    """x [..., in] -> [..., out], of vectors (the official ``dense``)."""

    features_in: int
    features: int
    init_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.nowrap
    def shapes(self):
        return {"kernel": (self.features_in, self.features), "bias": (self.features,)}

    @nn.nowrap
    def initializers(self):
        return {"kernel": fan_average(self.init_scale, in_axis=0, out_axis=1),
                "bias": nn.initializers.zeros}

    def setup(self):
        create_parameters(self)

    def __call__(self, x):
        return _dense(x, self.kernel, self.bias, self.dtype)


class Conv1x1(Dense):
    """A ``Dense`` over the channels of every pixel or attention position (the official ``nin``)."""


def _dense(x, kernel, bias, dtype):
    """x [..., in] @ kernel [in,out] + bias [out], computed in ``dtype``."""
    y = jnp.matmul(x.astype(dtype), kernel.astype(dtype))
    return y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


_NORMAL = nn.initializers.normal(1.0)


class Embedding(nn.Module):
    """A learned vector for each label: int32 [B] in 0 ... rows-1 -> [B,features]."""

    rows: int
    features: int
    dtype: Any = jnp.float32

    @nn.nowrap
    def shapes(self):
        return {"table": (self.rows, self.features)}

    @nn.nowrap
    def initializers(self):
        return {"table": _NORMAL}

    def setup(self):
        create_parameters(self)

    def __call__(self, labels):
        # A product, unlike a gather, has a gradient that is summed in a fixed order everywhere.
        chosen = jax.nn.one_hot(labels, self.rows, dtype=self.dtype)
        return jnp.matmul(chosen, self.table.astype(self.dtype), precision=lax.Precision.HIGHEST)


class Block(nn.Module):
    """A module whose parameters are those of its ``layers()``, {name: layer or block} in the order
    in which the official code creates them."""

    @nn.nowrap
    def layers(self):
        raise NotImplementedError

    def setup(self):
        for name, layer in self.layers().items():
            setattr(self, name, layer)


def parameter_layers(module, path=()):
    """Yields (path, layer) for each layer with parameters of an unbound module, itself included."""
    if not isinstance(module, Block):
        yield path, module
        return
    for name, inner in module.layers().items():
        yield from parameter_layers(inner, (*path, name))


def abstract_parameters(module):
    """The shapes and types of an unbound module's parameters, as ``init`` nests them."""
    return unflatten_dict({
        (*path, name): jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, layer in parameter_layers(module) for name, shape in layer.shapes().items()})


def initial_parameters(module, key):
    """The parameters of ``module.init(key, ...)["params"]``, bit for bit, without tracing the
    network. Parameters of one shape are drawn in one loop: with a draw for each of them the program
    would compile several times longer.

    module: unbound; key: a typed key.
    """
    alike = {}
    for path, layer in parameter_layers(module):
        for count, (name, shape) in enumerate(layer.shapes().items(), 1):
            numbers = alike.setdefault((layer.initializers()[name], shape), {})
            numbers[*path, name] = _folded(path, count)
    kinds = tuple((*kind, tuple(numbers.values())) for kind, numbers in alike.items())
    return unflatten_dict({path: value for numbers, values in zip(
        alike.values(), _draw(kinds, key), strict=True)
        for path, value in zip(numbers, values, strict=True)})


def _folded(path, count):
    """What flax folds into the key of ``init`` for the count-th draw of the module at ``path``
    (flax/core/scope.py:_fold_in_static): folding them one by one, as flax does, takes some
    seconds."""
    separator = b"\0" if flax.config.flax_fix_rng_separator else b""
    words = [*(name.encode() for name in path), bytes([count])]
    joined = b"".join(separator + word for word in words)
    return int.from_bytes(hashlib.sha1(joined).digest()[:4], "big")


_CONSTANTS = nn.initializers.zeros, nn.initializers.ones


@functools.partial(jax.jit, static_argnums=0)
def _draw(kinds, key):
    """For each (initializer, shape, N numbers) of ``kinds``: a list of N arrays, drawn from the key
    with each number folded in. The loop is there for the compiler: under vmap, or unrolled, the
    same draws take it several times longer."""
    def drawn(initializer, shape, keys):
        if initializer in _CONSTANTS:
            return [initializer(None, shape, jnp.float32)] * len(keys)
        return list(lax.map(lambda key: initializer(key, shape, jnp.float32), keys))

    numbers = jnp.array([n for *_, folded in kinds for n in folded], jnp.uint32)
    keys, values = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers), []
    for *kind, folded in kinds:
        values.append(drawn(*kind, keys[:len(folded)]))
        keys = keys[len(folded):]
    return values


class ResBlock(Block):
    """norm, SiLU, conv; plus the timestep; norm, SiLU, dropout, conv; plus the shortcut.

    ``temb_proj`` is applied by ``time_projections``, for all blocks of the network at once.
    """

    features_in: int
    features: int
    embedding: int
    groups: int
    rate: float = 0.0
    dtype: Any = jnp.float32
    by_shard: str = ""
    norm_form: str = "xla"

    @nn.nowrap
    def layers(self):
        features_in, features, dtype = self.features_in, self.features, self.dtype
        conv = functools.partial(Conv3x3, dtype=dtype, by_shard=self.by_shard)
        layers = {
            "norm1": GroupNorm(features_in, self.groups, form=self.norm_form),
            "conv1": conv(features_in, features),
            "temb_proj": Dense(self.embedding, features, dtype=dtype),
            "norm2": GroupNorm(features, self.groups, rate=self.rate, form=self.norm_form),
            "conv2": conv(features, features, init_scale=0.0),
        }
        if features_in != features:
            layers["shortcut"] = Conv1x1(features_in, features, dtype=dtype)
        return layers

    def __call__(self, x, projection, bits=None):
        """x [B,H,W,in]; projection [B,out], this block's of ``time_projections``; bits uint16
        [B,H,W,out] or None. -> [B,H,W,out]"""
        if self.features_in != self.features:
            # x has three readers; where it is a concatenation XLA would write it twice
            # (NOTES.md, "skip concatenations behind a barrier").
            x = lax.optimization_barrier(x)
        h = self.conv1.without_bias(self.norm1(x))
        # Added inside the norm, neither needs a pass over h, nor does the sum that is their
        # gradient.
        shift = projection.astype(jnp.float32) + self.conv1.bias[None, :]
        h = self.conv2(self.norm2(h, bits, shift))
        if self.features_in != self.features:
            x = self.shortcut(x)
        return x + h


def time_projections(blocks, temb):
    """temb [B,embedding] through the temb_proj of each block, as one matrix product: a list of
    [B,features]."""
    kernel = jnp.concatenate([b.temb_proj.kernel for b in blocks], axis=1)
    bias = jnp.concatenate([b.temb_proj.bias for b in blocks])
    widths = [b.features for b in blocks]
    ends = [sum(widths[:i]) for i in range(1, len(widths))]
    return jnp.split(_dense(temb, kernel, bias, blocks[0].dtype), ends, axis=1)


class AttentionBlock(Block):
    """Single-head self-attention over all pixels, scale C^-1/2, residual (unet.py:attn_block);
    form: a row of attention.FORMS."""

    features: int
    groups: int
    dtype: Any = jnp.float32
    norm_form: str = "xla"
    form: str = "xla"

    @nn.nowrap
    def layers(self):
        c, dtype = self.features, self.dtype
        return {
            "norm": GroupNorm(c, self.groups, silu=False, form=self.norm_form),
            "q": Conv1x1(c, c, dtype=dtype),
            "k": Conv1x1(c, c, dtype=dtype),
            "v": Conv1x1(c, c, dtype=dtype),
            "proj_out": Conv1x1(c, c, init_scale=0.0, dtype=dtype),
        }

    def __call__(self, x):
        b, height, width, c = x.shape
        h = self.norm(x).reshape(b, height * width, c)
        h = FORMS[self.form].attend(h, (self.q, self.k, self.v))
        return x + self.proj_out(h.reshape(x.shape))
