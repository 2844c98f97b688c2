"""One training step as a pure per-device function (Ho et al. 2020, Alg. 1).

The same function runs under pmap and shard_map (``axis_name`` names the axis of devices) and under
plain jit (``axis_name`` None: it sees the whole batch). Line numbers are those of the official code
(hojonathanho/diffusion).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ddpm_jax.training import importance
from ddpm_jax.training.rng import draw, example_keys


class Batch(NamedTuple):
    """images uint8 [B,H,W,C]; labels int32 [B], or None for a model without classes. Also of more
    axes in front, or of all examples of a data set."""

    images: Any
    labels: Any = None


class TrainState(NamedTuple):
    """step int32 []: updates done; params, ema_params: float32 trees; opt_state: optax's; history:
    importance.History of a loss whose t is drawn by importance, else None."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    history: Any = None


def init_state(params, tx, history=None) -> TrainState:
    """State before the first update; the average starts as a copy of the weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=tx.init(params),
        history=history,
    )


def to_unit_range(images):
    """uint8 [B,H,W,C] -> float32 in [-1, 1] (tpu_utils.py:64)."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def round_to_level(x):
    """[-1, 1] -> the nearest of 0 ... 255, as floats: NaN stays NaN."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255)


def to_uint8(x):
    """[-1, 1] -> the nearest of 0 ... 255."""
    return round_to_level(x).astype(jnp.uint8)


def ema_update(ema_params, params, step, decay):
    """The average after update ``step`` (0 = the first, which copies; tpu_utils.py:89)."""
    rate = 1.0 - jnp.where(step < 1, 1e-10, decay)
    return jax.tree.map(lambda e, p: e - rate * (e - p), ema_params, params)


def train_step(
    state, batch, key, *, loss_fn, gradient, tx, ema_decay, num_timesteps, dropout_shapes, flip,
    label_dropout=0.0, axis_name=None,
):
    """One update from a Batch of b images: this device's part of the batch, or under jit all.

    loss_fn(params, Batch, Draws) -> (mean loss, each example's or None); gradient(loss_fn, params,
    (Batch, Draws)) -> (grads, metrics, losses): ``gradients.mean_gradient`` with its settings
    bound. key: the run's, the same everywhere. -> (TrainState, metrics)
    """
    images, history = batch.images, state.history
    b = images.shape[0]
    first = 0 if axis_name is None else lax.axis_index(axis_name) * b
    keys = example_keys(key, state.step, first + jnp.arange(b))
    draws = draw(
        keys, image_shape=images.shape[1:], num_timesteps=num_timesteps,
        dropout_shapes=dropout_shapes, label_dropout=label_dropout,
        probabilities=history and importance.probabilities(history),
    )
    if flip:
        images = jnp.where(draws.flip[:, None, None, None], images[:, :, ::-1], images)
    grads, metrics, losses = gradient(loss_fn, state.params, (batch._replace(images=images), draws))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = ema_update(state.ema_params, params, state.step, ema_decay)
    if history is not None:
        history = importance.record(history, *_of_all_devices((draws.t, losses), axis_name))
    return TrainState(state.step + 1, params, ema_params, opt_state, history), metrics


def _of_all_devices(tree, axis_name):
    """[b, ...] of each device -> [B, ...], the same on all, in the order of the examples."""
    return tree if axis_name is None else lax.all_gather(tree, axis_name, tiled=True)
