"""One training step as a pure per-device function, and k of them a dispatch (Alg. 1).

The same function runs under pmap and shard_map (``axis_name`` names the axis of devices) and under
plain jit (``axis_name`` None: it sees the whole batch).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ddpm_jax.training.rng import draw, example_keys


class TrainState(NamedTuple):
    """step int32 []: updates done; params, ema_params: float32 trees; opt_state: optax's."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def init_state(params, tx) -> TrainState:
    """State before the first update; the average starts as a copy of the weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=tx.init(params),
    )


def to_unit_range(images):
    """uint8 [B,H,W,C] -> float32 in [-1, 1] (tpu_utils.py:64)."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x):
    """[-1, 1] -> the nearest of 0 ... 255."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def ema_update(ema_params, params, step, decay):
    """The average after update ``step`` (0 = the first, which copies; tpu_utils.py:89)."""
    rate = 1.0 - jnp.where(step < 1, 1e-10, decay)
    return jax.tree.map(lambda e, p: e - rate * (e - p), ema_params, params)


def _cut(tree, pieces):
    return jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), tree)


def _cut_on_devices(tree, pieces, spread):
    """[pieces, b/pieces, ...] such that every device keeps its own examples in each piece."""

    def one(x):
        x = x.reshape(spread, pieces, x.shape[0] // (spread * pieces), *x.shape[1:])
        return x.swapaxes(0, 1).reshape(pieces, -1, *x.shape[3:])

    return jax.tree.map(one, tree)


def _mean_over(function, pieces, batch, spread=1):
    """Mean of function(piece) over ``pieces`` of batch, one after the other."""
    if pieces == 1:
        return function(batch)
    cut = _cut_on_devices(batch, pieces, spread)
    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], cut))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

    def body(total, piece):
        return jax.tree.map(jnp.add, total, function(piece)), None

    total, _ = lax.scan(body, zero, cut)
    return jax.tree.map(lambda x: x / pieces, total)


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


class Clip(NamedTuple):
    """Where gradients are clipped. norm: largest allowed, 0 = off. shards: None clips the mean
    gradient of the whole batch; a number clips each of that many equal parts of what the function
    sees, before the mean, as each TPU core of the paper's did (trap: tpu_utils.py:164,
    utils.py:166-177)."""

    norm: float
    shards: int | None


def train_step(
    state, images, key, *, loss_fn, tx, ema_decay, num_timesteps, dropout_shapes, flip,
    clip, accumulation=1, axis_name=None, spread=1,
):
    """One update from images uint8 [b,H,W,C]: this device's share, or the whole batch under jit.

    loss_fn(params, x_start [b,H,W,C], Draws) -> loss per example [b]. key: the run's, the same
    everywhere. accumulation: pieces that a device takes one after the other. spread (jit only):
    devices that the batch lies on; clipped shards are then taken device by device.
    -> (TrainState, {'loss', 'grad_norm', 'clip_fraction'} scalars, equal on every device);
    grad_norm is before clipping, of the mean gradient, or the mean of the shards' norms.
    """
    b = images.shape[0]
    first = 0 if axis_name is None else lax.axis_index(axis_name) * b
    keys = example_keys(key, state.step, first + jnp.arange(b))
    draws = draw(
        keys, image_shape=images.shape[1:], num_timesteps=num_timesteps,
        dropout_shapes=dropout_shapes,
    )
    if flip:
        images = jnp.where(draws.flip[:, None, None, None], images[:, :, ::-1], images)

    def gradient(batch):
        images, draws = batch
        return jax.value_and_grad(
            lambda p: loss_fn(p, to_unit_range(images), draws).mean()
        )(state.params)

    def shard(batch, pieces):
        loss, grads = _mean_over(gradient, pieces, batch)
        grads, norms = clip_by_norm(grads, clip.norm)
        return grads, {"loss": loss, **norms}

    def share(batch, shards):
        # A device with many shards works on one at a time already: that divides accumulation.
        pieces = max(1, accumulation // shards)
        return _mean_over(lambda piece: shard(piece, pieces), shards, batch)

    batch = (images, draws)
    if clip.shards is None:
        loss, grads = _mean_over(gradient, accumulation, batch, spread)
        loss, grads = _mean(loss, axis_name), _mean(grads, axis_name)
        grads, norms = clip_by_norm(grads, clip.norm)
        metrics = {"loss": loss, **norms}
    elif spread > 1:
        mapped = jax.vmap(lambda part: share(part, clip.shards // spread))(_cut(batch, spread))
        grads, metrics = jax.tree.map(lambda x: x.mean(axis=0), mapped)
    else:
        grads, metrics = _mean(share(batch, clip.shards), axis_name)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = ema_update(state.ema_params, params, state.step, ema_decay)
    return TrainState(state.step + 1, params, ema_params, opt_state), metrics


def _mean(tree, axis_name):
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def many_steps(step_fn, state, num_steps, *, most):
    """step_fn(state, i) -> (state, metrics) num_steps times, i = 0, 1, ...; num_steps <= most.

    ``num_steps`` is data, so a shorter dispatch runs the same program. -> (state, metrics, each
    [most], of which the first num_steps count)
    """
    if most == 1:
        state, metrics = step_fn(state, 0)
        return state, jax.tree.map(lambda m: m[None], metrics)
    _, shapes = jax.eval_shape(step_fn, state, 0)
    log = jax.tree.map(lambda s: jnp.zeros((most,), s.dtype), shapes)

    def body(i, carry):
        state, log = carry
        state, metrics = step_fn(state, i)
        return state, jax.tree.map(lambda row, m: row.at[i].set(m), log, metrics)

    return lax.fori_loop(0, num_steps, body, (state, log))
