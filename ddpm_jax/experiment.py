"""From a config to a model and its training step."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ddpm_jax.config import CLIP_SCOPES, DTYPES, check
from ddpm_jax.diffusion.objective import LOSSES
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES
from ddpm_jax.diffusion.schedule import BETAS, Schedule, make_schedule
from ddpm_jax.errors import UserError
from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel.runners import RUNNERS, Runner
from ddpm_jax.training import packing
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.steps import TrainState, init_state, train_step


class Experiment(NamedTuple):
    """What a config describes, ready to run. config: frozen; abstract_state: TrainState of
    ShapeDtypeStructs; init_params() -> params; loss_fn(params, x_start, Draws) -> [B];
    train_step(state, images, key), which takes params as a tree or packed in ``order``
    (training/packing.py)."""

    config: ConfigDict
    image_shape: tuple[int, int, int]
    schedule: Schedule
    betas: np.ndarray
    model: nn.Module
    tx: optax.GradientTransformation
    runner: Runner
    init_params: Callable
    order: tuple[int, ...]
    abstract_state: TrainState
    loss_fn: Callable
    train_step: Callable


def _call(function, field, **keywords):
    """function(**keywords), with a misspelt or impossible keyword as a UserError."""
    try:
        return function(**keywords)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.{field}: {error}") from None


def _betas(diffusion):
    keywords = dict(diffusion.schedule)
    law = BETAS[keywords.pop("name")]
    return _call(law, "diffusion.schedule", num_timesteps=diffusion.num_timesteps, **keywords)


def network(config: ConfigDict) -> UNet:
    """The U-Net of a config. Raises UserError naming a misspelt field of config.model."""
    data, model = config.data, dict(config.model)
    channels = VARIANCES[config.diffusion.variance].channels
    model["dtype"] = DTYPES[model["dtype"]]
    return _call(UNet, "model", image_size=data.image_size, in_channels=data.channels,
                 out_channels=data.channels * channels, **model)


def build(config: ConfigDict, devices=None) -> Experiment:
    """The experiment that ``config`` describes, on ``devices`` (default: all of all processes).

    Raises UserError naming the field that is unknown, impossible or does not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    check(config, len(devices))
    runner = RUNNERS[config.parallel.runner](devices)
    diffusion, data = config.diffusion, config.data
    variance, model = VARIANCES[diffusion.variance], network(config)
    betas = _betas(diffusion)
    schedule = _call(make_schedule, "diffusion.schedule", betas=betas,
                     first_log_variance=diffusion.first_log_variance)
    tx = _call(make_optimizer, "optimizer", **config.optimizer)
    predict, loss = PARAMETERIZATIONS[diffusion.predict], LOSSES[diffusion.loss]
    image_shape = (data.image_size, data.image_size, data.channels)
    order = packing.ORDERS.get(devices[0].platform, packing.AS_THEY_ARE)

    def loss_fn(params, x_start, draws):
        if isinstance(params, packing.Packed):
            params = packing.unpack(packing.kernels_as(params, model.dtype), abstract_params, order)

        def denoise_fn(x_t, t):
            return model.apply({"params": params}, x_t, t, draws.dropout_bits)

        return loss(denoise_fn, schedule, x_start, draws.t, draws.noise,
                    predict=predict, variance=variance)

    init_params = jax.jit(lambda: _init_params(model, config.seed))  # traced once for both uses
    abstract_params = jax.eval_shape(lambda: _call(init_params, "model"))
    shards = max(1, config.train.clip_replicas // (1 if runner.spread > 1 else len(devices)))

    def one_step(state, images, key):
        return train_step(
            state, images, key, loss_fn=loss_fn, tx=tx, ema_decay=config.ema.decay,
            num_timesteps=diffusion.num_timesteps, dropout_shapes=model.dropout_shapes(),
            flip=data.flip, clip=CLIP_SCOPES[config.train.clip_scope](config.train, shards),
            accumulation=config.train.accumulation, axis_name=runner.axis_name,
            spread=runner.spread)

    return Experiment(
        config=config, image_shape=image_shape, schedule=schedule, betas=betas, model=model,
        tx=tx, runner=runner, init_params=init_params, loss_fn=loss_fn, train_step=one_step,
        order=order,
        abstract_state=jax.eval_shape(lambda p: init_state(p, tx), abstract_params))


def _init_params(model, seed):
    size = model.image_size
    images = jnp.zeros((1, size, size, model.in_channels))
    return model.init(jax.random.key(seed), images, jnp.zeros(1, jnp.int32))["params"]


def new_state(experiment: Experiment) -> TrainState:
    """The state before the first update, on the runner's devices, from config.seed."""
    state = jax.jit(lambda: init_state(experiment.init_params(), experiment.tx))()
    return experiment.runner.put("replicated", jax.tree.map(np.asarray, state))


def denoise_fn(experiment: Experiment, params):
    """The network without dropout, as the equations take it: (x_t [B,H,W,C], t [B]) -> output."""
    params = packing.kernels_as(params, experiment.model.dtype)
    return lambda x_t, t: experiment.model.apply({"params": params}, x_t, t)
