"""From a config to a model (sampling, evaluation) and to its training."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ddpm_jax.config_checks import (
    CLIP_SCOPES,
    DTYPES,
    check_model,
    check_training,
    kernel_form,
    weights_row,
)
from ddpm_jax.diffusion.objective import IMPORTANCE_SAMPLED, LOSSES, WEIGHTS
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES
from ddpm_jax.diffusion.schedule import BETAS, Schedule, make_schedule, zero_terminal_snr
from ddpm_jax.errors import UserError
from ddpm_jax.models.layers import abstract_parameters, initial_parameters
from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.cut import CUTS, Cut, make_cut, shares_links, slice_size
from ddpm_jax.parallel.runners import CUTTING_RUNNERS, RUNNERS, Runner
from ddpm_jax.training import importance, packing
from ddpm_jax.training.gradients import mean_gradient
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.steps import TrainState, init_state, to_unit_range, train_step

MOST_LEFT, PAPERS_LEFT = 0.01, 4e-5  # of x_0 at the last timestep: alpha_bar_T


class Experiment(NamedTuple):
    """The model of a config on its devices: what sampling and evaluation need. config: frozen;
    betas: float64 [T]; init_params() -> params; abstract_params: their ShapeDtypeStructs."""

    config: ConfigDict
    image_shape: tuple[int, int, int]
    schedule: Schedule
    betas: np.ndarray
    model: nn.Module
    runner: Runner
    init_params: Callable
    abstract_params: Any


class Training(NamedTuple):
    """What training adds. experiment: its runner is that of training; abstract_state: TrainState
    of ShapeDtypeStructs, with shardings where it is cut over devices, as ``cut`` has it;
    gradient: ``gradients.mean_gradient`` with its settings bound, but for its view of packed
    parameters; step(state, Batch, key): ``steps.train_step`` with its settings bound."""

    experiment: Experiment
    tx: optax.GradientTransformation
    abstract_state: TrainState
    gradient: Callable
    step: Callable
    cut: Cut | None = None

    def placement(self, state):
        """Of a TrainState, named or packed, or its abstract one, on the runner's devices."""
        return "replicated" if self.cut is None else self.cut.shardings(state)


def _call(function, field, keywords, **others):
    """function(**keywords, **others), with a misspelt or missing keyword as a UserError."""
    try:
        inspect.signature(function).bind(**keywords, **others)
    except TypeError as error:
        raise UserError(f"config.{field}: {error}") from None
    return function(**keywords, **others)


@contextlib.contextmanager
def _values_of(field):
    """Around checks that raise ValueError for impossible values of ``config.field``."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"config.{field}: {error}") from None


def _betas(diffusion):
    keywords = dict(diffusion.schedule)
    law = BETAS[keywords.pop("name")]
    with _values_of("diffusion.schedule"):
        betas = _call(law, "diffusion.schedule", keywords, num_timesteps=diffusion.num_timesteps)
    return zero_terminal_snr(betas) if diffusion.zero_terminal_snr else betas


def network(config: ConfigDict) -> UNet:
    """The U-Net of a config. Raises UserError naming a misspelt or impossible field of
    config.model."""
    data, keywords = config.data, dict(config.model)
    channels = VARIANCES[config.diffusion.variance].channels
    keywords["dtype"] = DTYPES[keywords["dtype"]]
    model = _call(UNet, "model", keywords, image_size=data.image_size, in_channels=data.channels,
                  out_channels=data.channels * channels)
    with _values_of("model"):
        model.check()
    return model


def build_model(config: ConfigDict, devices=None) -> Experiment:
    """The model that ``config`` describes, on ``devices`` (default: all of all processes).

    Raises UserError naming the field that is unknown or impossible.
    """
    check_model(config)
    hosts.pin_settings()
    runner = RUNNERS[config.parallel.runner](jax.devices() if devices is None else devices)
    forms = {"norm_form": kernel_form("norm_kernel", config, runner),
             "attention_form": kernel_form("attention_kernel", config, runner)}
    data, plain, betas = config.data, network(config), _betas(config.diffusion)
    with _values_of("diffusion.schedule"):
        schedule = make_schedule(betas, first_log_variance=config.diffusion.first_log_variance)
    return Experiment(
        config=config, image_shape=(data.image_size, data.image_size, data.channels),
        schedule=schedule, betas=betas, runner=runner,
        model=plain.clone(**forms),
        init_params=lambda: initial_parameters(plain, jax.random.key(config.seed)),
        abstract_params=abstract_parameters(plain))


def check_new(exp: Experiment) -> None:
    """Raise UserError for what a new run may not have, though runs of older versions may."""
    with _values_of("model"):
        exp.model.check_attention()


def build_training(exp: Experiment) -> Training:
    """What training adds to a model: optimizer, clip and step.

    Raises UserError naming the field that is impossible, or does not fit the number of devices.
    """
    config = exp.config
    check_training(config, exp.runner.num_devices)
    exp, cut = _cut_state(exp)
    runner, diffusion, train = exp.runner, config.diffusion, config.train
    tx = _call(make_optimizer, "optimizer", dict(config.optimizer))
    loss, predict = _loss(diffusion), PARAMETERIZATIONS[diffusion.predict]
    variance = VARIANCES[diffusion.variance]

    instances = runner.num_devices // runner.num_virtual_devices  # of the step, on devices
    shards = max(1, train.clip_replicas // instances)
    clip = CLIP_SCOPES[train.clip_scope](train, shards)._replace(
        devices=max(1, instances // train.clip_replicas))
    model, form = exp.model, kernel_form("clip_kernel", config, runner)
    if (clip.shards or 0) > runner.num_virtual_devices:  # a device has several
        model = model.clone(by_shard=form)

    def loss_fn(params, batch, draws, named=lambda params: params):
        params, labels = named(params), batch.labels
        if draws.drop_label is not None:
            labels = jnp.where(draws.drop_label, model.no_label, labels)

        def denoise_fn(x_t, t):
            return model.apply({"params": params}, x_t, t, draws.dropout_bits, labels)

        losses = loss(denoise_fn, exp.schedule, to_unit_range(batch.images), draws.t, draws.noise,
                      predict=predict, variance=variance)
        if draws.weight is None:
            return losses.mean(), None
        return (draws.weight * losses).mean(), losses

    gradient = functools.partial(
        mean_gradient, clip=clip, micro_batches=train.accumulation, axis_name=runner.axis_name,
        num_virtual_devices=runner.num_virtual_devices)
    step = functools.partial(
        train_step, loss_fn=loss_fn, gradient=gradient, tx=tx, ema_decay=config.ema.decay,
        num_timesteps=diffusion.num_timesteps, dropout_shapes=exp.model.dropout_shapes(),
        label_dropout=exp.model.label_dropout if exp.model.num_classes else 0.0,
        flip=config.data.flip, axis_name=runner.axis_name)
    training = Training(
        experiment=exp, tx=tx, gradient=gradient, step=step, cut=cut,
        abstract_state=jax.eval_shape(lambda p: init_state(p, tx, first_history(diffusion)),
                                      exp.abstract_params))
    if cut is None:
        return training
    return training._replace(abstract_state=runner.abstract(
        training.placement(training.abstract_state), training.abstract_state))


def beyond_one_slice(shards: int, one: int) -> UserError:
    """The error of ``shards`` devices that are not in one slice, or host of GPUs, of ``one``."""
    return UserError(f"config.parallel.shards={shards} does not divide the {one} devices of one "
                     "slice, or host of GPUs; take one of "
                     + ", ".join(str(n) for n in range(1, one + 1) if one % n == 0))


def _cut_state(exp):
    """-> (the Experiment on devices over which config.parallel cuts the state, Cut or None)."""
    parallel, mesh = exp.config.parallel, exp.runner.mesh
    if parallel.shards == 1:
        return exp, None
    runner = CUTTING_RUNNERS[parallel.runner](mesh.devices.flat, parallel.shards)
    if not shares_links(runner.mesh):
        raise beyond_one_slice(parallel.shards, slice_size(runner.mesh))
    cut = make_cut(runner.mesh, exp.abstract_params, fields=CUTS[parallel.cut],
                   order=packing.order_on(mesh.devices.flat[0].platform))
    return exp._replace(runner=runner._replace(loops_on_device=exp.runner.loops_on_device)), cut


def first_history(diffusion):
    """importance.History before the first update; None of a loss whose t is uniform."""
    return (importance.start(diffusion.num_timesteps)
            if diffusion.loss in IMPORTANCE_SAMPLED else None)


def _loss(diffusion):
    weights, keywords = weights_row(diffusion.weights)
    if weights is WEIGHTS["target"]:
        return LOSSES[diffusion.loss]
    return functools.partial(LOSSES[diffusion.loss],
                             weights=functools.partial(weights, **keywords))


def schedule_warning(exp: Experiment) -> str | None:
    """A warning where x_T keeps more than MOST_LEFT of x_0, so that sampling starts from a
    distribution that training never saw, with betas that keep as little as the paper's; or None."""
    left = float(np.prod(1.0 - exp.betas))
    if left <= MOST_LEFT:
        return None
    diffusion = exp.config.diffusion
    keywords = {k: v for k, v in diffusion.schedule.items() if k in ("beta_start", "beta_end")}
    factors = np.geomspace(1, 1 / max(keywords.values(), default=1), 2000)
    law = BETAS[diffusion.schedule.name]
    kept = [f for f in factors if keywords and np.prod(1.0 - law(
        diffusion.num_timesteps, **{k: f * v for k, v in keywords.items()})) <= PAPERS_LEFT]
    remedy = " and ".join(f"diffusion.schedule.{k}={kept[0] * v:.3g}" for k, v in keywords.items()
                          ) if kept else "a larger diffusion.num_timesteps"
    return (f"config.diffusion: at the last of {diffusion.num_timesteps} timesteps alpha_bar_T is "
            f"{left:.2g} (the paper's: {PAPERS_LEFT:.0e}), but samples start from pure noise; "
            f"{remedy} would keep the paper's")


def new_state(training: Training) -> TrainState:
    """The state before the first update, on the runner's devices, from config.seed."""
    exp = training.experiment
    state = jax.jit(lambda params: init_state(
        params, training.tx, first_history(exp.config.diffusion)))(exp.init_params())
    return exp.runner.put(training.placement(state), state)


def cast_kernels(experiment: Experiment, params):
    """Params with kernels in the type that products are computed in: cast once, they need no cast
    at each application of the network."""
    dtype = experiment.model.dtype
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)


def denoise_fn(experiment: Experiment, params):
    """The network without dropout, as the equations take it: (x_t [B,H,W,C], t [B], **condition)
    -> output. condition: labels int32 [B], of a model with classes."""
    return lambda x_t, t, **condition: experiment.model.apply(
        {"params": params}, x_t, t, **condition)
