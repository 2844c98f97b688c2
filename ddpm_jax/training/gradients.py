"""The mean gradient of a batch: micro-batches, parts that are clipped on their own, devices."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

METRICS = ("loss", "grad_norm", "clip_fraction")


class Clip(NamedTuple):
    """How gradients are clipped. norm: the largest allowed, 0 = off. shards: None clips the mean
    gradient of the whole batch; a number cuts the local batch into that many equal parts and clips
    the gradient of each before the mean, as the official code does on each TPU core
    (hojonathanho/diffusion, tpu_utils.py:164, utils.py:166-177). devices: number of neighbouring
    devices over which one part extends, where shards is 1."""

    norm: float
    shards: int | None
    devices: int = 1


def clip_by_norm(grads, clip_norm):
    """Grads scaled down to a global norm of at most clip_norm (0 = never); and its metrics.

    -> (grads, {'grad_norm': before clipping, 'clip_fraction': 0 or 1})
    """
    norm = optax.tree.norm(grads)
    if not clip_norm:
        return grads, {"grad_norm": norm, "clip_fraction": jnp.zeros(())}
    scale = clip_norm / jnp.maximum(norm, clip_norm)  # tf.clip_by_global_norm
    grads = jax.tree.map(lambda g: g * scale, grads)
    return grads, {"grad_norm": norm, "clip_fraction": (norm > clip_norm).astype(jnp.float32)}


def mean_gradient(
    loss_fn, params, batch, *, clip, micro_batches=1, axis_name=None, num_virtual_devices=1,
):
    """The mean gradient over the examples of all devices, clipped.

    loss_fn(params, *batch) -> mean loss of a tree ``batch`` of arrays [b, ...]: this device's
    examples, or with ``num_virtual_devices`` > 1 (jit) those of that many devices, one after
    another. micro_batches: parts that a device takes one after the other, to save memory.
    -> (gradient, METRICS by name, scalars, equal on every device); grad_norm is before clipping,
    of the mean gradient, or the mean of the shards' norms.
    """
    gradient = jax.value_and_grad(loss_fn)
    if clip.shards and min(clip.shards, num_virtual_devices) > 1:
        parts = min(clip.shards, num_virtual_devices)
        local = functools.partial(
            mean_gradient, loss_fn, params, clip=clip._replace(shards=clip.shards // parts),
            micro_batches=micro_batches, num_virtual_devices=num_virtual_devices // parts)
        results = jax.vmap(local)(_cut(batch, parts))
        return jax.tree.map(lambda x: x.mean(axis=0), results)
    # A device with several shards takes one at a time already: that divides micro_batches.
    gradient = _accumulated(gradient, max(1, micro_batches // (clip.shards or 1)),
                            num_virtual_devices)
    if clip.shards is None:
        return _clipped(clip, *_mean(gradient(params, *batch), axis_name))
    if clip.shards == 1:
        found = gradient(params, *batch)
        if clip.devices > 1:
            groups = np.arange(lax.axis_size(axis_name)).reshape(-1, clip.devices).tolist()
            found = lax.pmean(found, axis_name, axis_index_groups=groups)
        return _mean(_clipped(clip, *found), axis_name)

    def add(total, shard):
        return jax.tree.map(jnp.add, total, _clipped(clip, *gradient(params, *shard))), None

    zero = jax.tree.map(jnp.zeros_like, params), {name: jnp.zeros(()) for name in METRICS}
    total, _ = lax.scan(add, zero, _cut(batch, clip.shards))
    return _mean(jax.tree.map(lambda x: x / clip.shards, total), axis_name)


def _clipped(clip, loss, grads):
    grads, norms = clip_by_norm(grads, clip.norm)
    return grads, {"loss": loss, **norms}


def _accumulated(gradient, micro_batches, num_virtual_devices=1):
    """gradient(params, *batch) -> (loss, grads) as the mean over micro-batches."""
    if micro_batches == 1:
        return gradient

    def accumulated(params, *batch):
        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        parts = _cut_on_devices(batch, micro_batches, num_virtual_devices)
        total, _ = lax.scan(add, zero, parts)
        return jax.tree.map(lambda x: x / micro_batches, total)

    return accumulated


def _cut(tree, parts):
    return jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), tree)


def _cut_on_devices(tree, parts, num_devices):
    """[parts, b/parts, ...] such that every device keeps its own examples in each part."""

    def one(x):
        x = x.reshape(num_devices, parts, x.shape[0] // (num_devices * parts), *x.shape[1:])
        return x.swapaxes(0, 1).reshape(parts, -1, *x.shape[3:])

    return jax.tree.map(one, tree)


def _mean(tree, axis_name):
    return tree if axis_name is None else lax.pmean(tree, axis_name)
