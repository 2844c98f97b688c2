"""3x3 convolutions, and their kernels' gradients where ``vmap`` runs over shards of a batch.

Under ``vmap`` over shards that share a kernel, the forward passes and the inputs' gradients of all
shards are one convolution each. Of the kernel's gradient there is one a shard; ``vmap``'s own rule
makes a grouped convolution of them, which XLA takes minutes to compile and runs slowly. Here they
are one convolution a shard.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def conv3x3(x, kernel, stride):
    """x [B,H,W,in], kernel [out,3,3,in] of one type -> [B,H/stride,W/stride,out], SAME."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv3x3_by_shard(x, kernel, stride):
    """``conv3x3``, whose gradient may be taken under ``vmap`` over x with a shared kernel. For a
    second ``vmap`` around that one its own rules hold: under jit it runs over the devices."""
    return conv3x3(x, kernel, stride)


def _fwd(x, kernel, stride):
    return conv3x3(x, kernel, stride), (x, kernel)


def _bwd(stride, saved, g):
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: conv3x3(x, kernel, stride), x)(g)
    return dx, _kernel_gradient(stride)(x, g)


conv3x3_by_shard.defvjp(_fwd, _bwd)


@functools.cache
def _kernel_gradient(stride):
    """(x [B,H,W,in], g [B,H/stride,W/stride,out]) -> [out,3,3,in]"""

    def of_one(x, g):
        kernel = jax.ShapeDtypeStruct((g.shape[-1], 3, 3, x.shape[-1]), x.dtype)
        (gradient,) = jax.linear_transpose(lambda k: conv3x3(x, k, stride), kernel)(g)
        return gradient

    gradient = jax.custom_batching.custom_vmap(of_one)

    @gradient.def_vmap
    def of_shards(shards, batched, x, g):
        if not all(batched):  # what is the same for all shards: not in this U-Net
            return jax.vmap(of_one, [0 if b else None for b in batched])(x, g), True
        return jnp.stack([of_one(x[i], g[i]) for i in range(shards)]), True

    return gradient
