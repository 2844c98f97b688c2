"""Attention between its norm and its last product, in the forms that ``FORMS`` has rows for: what
XLA compiles, and the kernels of attention_kernels.py."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.models import attention_kernels, norm_tiles


def _mean_of_values(q, k, v):
    """[B,N,C] each -> [B,N,C]"""
    logits = jnp.einsum("bqc,bkc->bqk", q, k).astype(jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1]**-0.5, axis=-1).astype(q.dtype)
    return jnp.einsum("bqk,bkc->bqc", weights, v)


def _xla(h, layers):
    # Joined, q, k and v would be cut apart again by copies that cost more than two more reads.
    return _mean_of_values(*(layer(h) for layer in layers))


def _joined(h, kernel, bias):
    """The kernels' operation, for other platforms."""
    qkv = jnp.matmul(h, kernel.astype(h.dtype)) + bias.astype(h.dtype)[None, None, :]
    return _mean_of_values(*jnp.split(qkv, 3, axis=-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_kernels(plans, h, kernel, bias):
    qkv = attention_kernels.dense(plans, h, kernel, bias)
    return attention_kernels.forward(plans, False, qkv)[0]


def _with_kernels_fwd(plans, h, kernel, bias):
    qkv = attention_kernels.dense(plans, h, kernel, bias)
    out, p = attention_kernels.forward(plans, True, qkv)
    return out, (h, kernel, bias, qkv, p)


def _with_kernels_bwd(plans, saved, g):
    h, kernel, bias, qkv, p = saved
    dqkv, sums = attention_kernels.backward(plans, qkv, p, g)
    dkernel = jnp.einsum("bnc,bnd->cd", h, dqkv, preferred_element_type=jnp.float32)
    return (jnp.matmul(dqkv, kernel.astype(h.dtype).T), dkernel.astype(kernel.dtype),
            sums.sum(axis=0).astype(bias.dtype))


_with_kernels.defvjp(_with_kernels_fwd, _with_kernels_bwd)


class Form(NamedTuple):
    """attend(h [B,N,C], layers of q, k and v with ``kernel`` [C,C] and ``bias`` [C]) -> [B,N,C];
    kernels: it has some for NVIDIA GPUs, which cannot be cut for several devices."""

    attend: Callable
    kernels: bool = False


def kernels_form(interpret=False) -> Form:
    """The kernels where the program is compiled for an NVIDIA GPU and the shape has plans; XLA's
    form elsewhere. interpret: as in attention_kernels.Plans."""

    def attend(h, layers):
        plans = attention_kernels.plans(h, interpret)
        if plans is None:
            return _xla(h, layers)
        kernel = jnp.concatenate([layer.kernel for layer in layers], axis=1)
        bias = jnp.concatenate([layer.bias for layer in layers])
        kernels = functools.partial(_with_kernels, plans)
        return norm_tiles.on_cuda(interpret, kernels, _joined, h, kernel, bias)

    return Form(attend, kernels=True)


FORMS = {"xla": Form(_xla), "triton": kernels_form()}
PLAIN = "xla"  # runs everywhere
# By jax.Device.device_kind and the compute type, where another row was measured to be the fastest.
FASTEST_FORMS = {(norm_tiles.H100, "bfloat16"): "triton"}


def fastest_form(device_kind, dtype, cut) -> str:
    """The row of FORMS for a device and a compute type; cut: XLA cuts the program for several
    devices."""
    return norm_tiles.fastest(FORMS, FASTEST_FORMS, PLAIN, (device_kind, dtype), cut)
