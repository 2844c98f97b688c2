"""3x3 convolutions, and their kernels' gradients where ``vmap`` runs over shards of a batch.

Under ``vmap`` over shards that share a kernel, the forward passes and the inputs' gradients of all
shards are one convolution each. Of the kernel's gradient there is one a shard; ``vmap``'s own rule
makes a grouped convolution of them, which XLA takes minutes to compile and runs slowly. ``FORMS``
has a row for each way of computing them; what each costs is in benchmarks/NOTES.md.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models import filter_kernels, norm_tiles

THIN = 8  # fewer channels are not worth a convolution: the network's first and last


def conv3x3(x, kernel, stride):
    """x [B,H,W,in], kernel [out,3,3,in] of one type -> [B,H/stride,W/stride,out], SAME."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv3x3_by_shard(x, kernel, stride, form="convolutions"):
    """``conv3x3``, whose gradient may be taken under ``vmap`` over x with a shared kernel. For a
    second ``vmap`` around that one its own rules hold: under jit it runs over the devices. form: a
    row of ``FORMS``."""
    return conv3x3(x, kernel, stride)


def _fwd(x, kernel, stride, form):
    return conv3x3(x, kernel, stride), (x, kernel)


def _bwd(stride, form, saved, g):
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: conv3x3(x, kernel, stride), x)(g)
    return dx, _kernel_gradient(stride, form)(x, g)


conv3x3_by_shard.defvjp(_fwd, _bwd)


def _of_one(x, g, stride):
    """x [B,H,W,in], g [B,H/stride,W/stride,out] -> [out,3,3,in]"""
    kernel = jax.ShapeDtypeStruct((g.shape[-1], 3, 3, x.shape[-1]), x.dtype)
    (gradient,) = jax.linear_transpose(lambda k: conv3x3(x, k, stride), kernel)(g)
    return gradient


@functools.cache
def _kernel_gradient(stride, form):
    gradient = jax.custom_batching.custom_vmap(functools.partial(_of_one, stride=stride))

    @gradient.def_vmap
    def of_shards(shards, batched, x, g):
        if not all(batched):  # what is the same for all shards: not in this U-Net
            return jax.vmap(functools.partial(_of_one, stride=stride),
                            [0 if b else None for b in batched])(x, g), True
        return FORMS[form].gradients(x, g, stride), True

    return gradient


def _convolutions(x, g, stride):
    return jnp.stack([_of_one(x[i], g[i], stride) for i in range(x.shape[0])])


def _turned(x, g, stride):
    """g convolved with x: XLA's CPU compiler then does not transpose the result."""
    if stride > 1:
        return _convolutions(x, g, stride)
    labels = lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (0, 3, 1, 2))
    return jnp.stack([
        lax.conv_general_dilated(g, x, (1, 1), [(1, 1)] * 2, dimension_numbers=labels)[
            :, ::-1, ::-1] for x, g in zip(x, g, strict=True)])


def _of_patches(x, g, stride):
    """One product of all shards, of g and what each pixel's taps see of x, side by side."""
    shards, _, tall, wide, outputs = g.shape
    border = int(stride == 1)
    x = jnp.pad(x, [(0, 0), (0, 0), (border, 1), (border, 1), (0, 0)])
    taps = [x[:, :, i:i + stride * (tall - 1) + 1:stride, j:j + stride * (wide - 1) + 1:stride]
            for i in range(3) for j in range(3)]
    seen = jnp.stack(taps, axis=4).reshape(shards, -1, 9 * x.shape[-1])
    gradient = jnp.einsum("spo,spi->soi", g.reshape(shards, -1, outputs), seen)
    return gradient.reshape(shards, outputs, 3, 3, -1)


def _kernels(x, g, stride):
    plan = filter_kernels.plan(x, g)
    if plan is not None:
        return filter_kernels.gradients(plan, stride, x, g)
    if x.shape[-1] < THIN:
        return _of_patches(x, g, stride)
    if g.shape[-1] < THIN and stride == 1:  # the same product, of what each pixel of x acts upon
        turned = _of_patches(g, x, stride)[:, :, ::-1, ::-1]
        return turned.transpose(0, 4, 2, 3, 1)
    return _convolutions(x, g, stride)


class Form(NamedTuple):
    """gradients(x [S,b,H,W,in], g [S,b,H/stride,W/stride,out], stride) -> [S,out,3,3,in]; kernels:
    it has some for NVIDIA GPUs, which cannot be cut for several devices."""

    gradients: Callable
    kernels: bool = False


FORMS = {
    "convolutions": Form(_convolutions),
    "turned": Form(_turned),
    "kernels": Form(_kernels, kernels=True),
}
PLAIN = "convolutions"  # runs everywhere
# By jax.Device.device_kind and the compute type, where another row was measured to be the fastest.
FASTEST_FORMS = {
    ("cpu", "float32"): "turned",
    (norm_tiles.H100, "bfloat16"): "kernels",
}


def fastest_form(device_kind, dtype, cut) -> str:
    """The row of FORMS for a device and a compute type; cut: XLA cuts the program for several
    devices."""
    return norm_tiles.fastest(FORMS, FASTEST_FORMS, PLAIN, (device_kind, dtype), cut)
