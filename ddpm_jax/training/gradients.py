"""The mean gradient of a batch: micro-batches, parts that are clipped on their own, devices."""

import functools
from collections.abc import Callable
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


class View(NamedTuple):
    """Parameters as an optimizer keeps them and as a network takes them. named(params) -> the
    network's tree, its kernels perhaps in a smaller type; packed(gradient of that tree, float32)
    -> that of params. spread(gradient of params) -> the same, of which each device keeps its part
    where the state is cut over devices."""

    named: Callable = lambda params: params
    packed: Callable = lambda gradient: gradient
    spread: Callable = lambda gradient: gradient


def mean_gradient(
    loss_fn, params, batch, *, clip, micro_batches=1, axis_name=None, num_virtual_devices=1,
    view=View(),  # noqa: B008
):
    """The mean gradient over the examples of all devices, clipped.

    loss_fn(params, *batch, named=view.named) -> (mean loss of a tree ``batch`` of arrays [b, ...],
    losses [b] of its examples or None), of the network with named(params), by default params: this
    device's examples, or with ``num_virtual_devices`` > 1 (jit) those of that many devices, one
    after another. micro_batches: parts that a device takes one after the other, to save memory.
    -> (gradient, METRICS by name, scalars, equal on every device; the losses [b] or None);
    grad_norm is before clipping, of the mean gradient, or the mean of the shards' norms.
    """
    if clip.shards and min(clip.shards, num_virtual_devices) > 1:
        parts = min(clip.shards, num_virtual_devices)
        local = functools.partial(
            mean_gradient, loss_fn, params, clip=clip._replace(shards=clip.shards // parts),
            micro_batches=micro_batches, num_virtual_devices=num_virtual_devices // parts,
            view=view)
        *results, losses = jax.vmap(local)(_cut(batch, parts))
        return *jax.tree.map(lambda x: x.mean(axis=0), results), _flat(losses)
    if clip.shards and clip.shards > 1:
        found, losses = _of_shards(loss_fn, params, batch, clip, micro_batches, view)
        return *_mean(found, axis_name), losses
    gradient = _gradient(functools.partial(loss_fn, named=view.named), micro_batches,
                         num_virtual_devices)
    (loss, losses), grads = gradient(params, *batch)
    found = loss, grads
    if clip.shards is None:
        loss, grads = _mean(found, axis_name)
        return *_clipped(clip, loss, view.spread(grads)), losses
    if clip.devices > 1:
        groups = np.arange(lax.axis_size(axis_name)).reshape(-1, clip.devices).tolist()
        found = lax.pmean(found, axis_name, axis_index_groups=groups)
    return *_mean(_clipped(clip, *found), axis_name), losses


def _of_shards(loss_fn, params, batch, clip, micro_batches, view):
    """The mean over the shards of one device's examples, of gradients clipped one by one, with its
    metrics; and the examples' losses.

    As many shards as the memory of a micro-batch holds are taken together. They share the named
    parameters, so that ``vmap`` merges their forward passes and their activations' gradients; the
    kernels' gradients are one a shard (models/shard_gradients.py) and stay in the type and the
    arrays in which they were made until they are clipped.
    """
    gradient = _gradient(loss_fn, max(1, micro_batches // clip.shards))
    named = view.named(params)
    most = max(1, clip.shards // micro_batches)
    at_once = max(n for n in range(1, most + 1) if clip.shards % n == 0)

    def together(batch):
        (means, losses), grads = jax.vmap(lambda shard: gradient(named, *shard))(
            _cut(batch, at_once))
        norms = jnp.sqrt(_squares(jax.tree.leaves(grads)))
        scales = jnp.ones(at_once)
        metrics = {"loss": means, "grad_norm": norms, "clip_fraction": jnp.zeros(at_once)}
        if clip.norm:
            scales = clip.norm / jnp.maximum(norms, clip.norm)
            metrics["clip_fraction"] = (norms > clip.norm).astype(jnp.float32)
        grads = jax.tree.map(lambda g: _weighted(g, scales / clip.shards), grads)
        return (grads, jax.tree.map(lambda x: x.sum() / clip.shards, metrics)), losses

    if at_once == clip.shards:
        (grads, metrics), losses = together(batch)
    else:
        def add(total, group):
            found, losses = together(group)
            return jax.tree.map(jnp.add, total, found), losses

        zero = (jax.tree.map(lambda x: jnp.zeros(x.shape), named),
                {name: jnp.zeros(()) for name in METRICS})
        (grads, metrics), losses = lax.scan(add, zero, _cut(batch, clip.shards // at_once))
    return (view.packed(grads), metrics), _flat(losses)


def _squares(grads):
    """Each [shards, ...] -> the sum of all squares of each shard, float32 [shards]. Sums over the
    last axes first: a few numbers are left of each array, and all arrays' are joined."""
    rows = [jnp.square(g.astype(jnp.float32)) for g in grads]
    rows = [g.sum(axis=tuple(range(2, g.ndim))) if g.ndim > 1 else g[:, None] for g in rows]
    return jnp.concatenate(rows, axis=1).sum(axis=1)


def _weighted(g, scales):
    """[shards, ...], [shards] -> the sum over the shards of scale * g, float32 [...]. As a
    reduction it is a pass of its own on a GPU, and 20 times slower on a CPU."""
    return sum(scales[i] * g[i].astype(jnp.float32) for i in range(g.shape[0]))


def _clipped(clip, loss, grads):
    grads, norms = clip_by_norm(grads, clip.norm)
    return grads, {"loss": loss, **norms}


def _gradient(loss_fn, micro_batches, num_virtual_devices=1):
    """-> f(params, *batch) -> ((loss, losses), grads); loss and grads: means of micro-batches"""
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        return gradient

    def accumulated(params, *batch):
        def add(total, part):
            (loss, losses), grads = gradient(params, *part)
            part = jax.tree.map(lambda x: x.astype(jnp.float32), (loss, grads))
            return jax.tree.map(jnp.add, total, part), losses

        zero = jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros(x.shape), params)
        parts = _cut_on_devices(batch, micro_batches, num_virtual_devices)
        total, losses = lax.scan(add, zero, parts)
        in_order = _cut_on_devices(_flat(losses), num_virtual_devices, micro_batches)
        loss, grads = jax.tree.map(lambda x: x / micro_batches, total)
        return (loss, _flat(in_order)), grads

    return accumulated


def _cut(tree, parts):
    return jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), tree)


def _cut_on_devices(tree, parts, num_devices):
    """[parts, b/parts, ...] such that every device keeps its own examples in each part."""

    def one(x):
        x = x.reshape(num_devices, parts, x.shape[0] // (num_devices * parts), *x.shape[1:])
        return x.swapaxes(0, 1).reshape(parts, -1, *x.shape[3:])

    return jax.tree.map(one, tree)


def _flat(losses):
    """[..., b] in the order of the examples -> [b]"""
    return jax.tree.map(lambda x: x.reshape(-1), losses)


def _mean(tree, axis_name):
    return tree if axis_name is None else lax.pmean(tree, axis_name)
