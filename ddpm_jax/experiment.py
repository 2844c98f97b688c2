"""From a config to finished things: the one file that reads a ConfigDict."""

import importlib.util
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ddpm_jax.data.datasets import DATASETS
from ddpm_jax.data.feed import shuffled_index
from ddpm_jax.diffusion.likelihood import Bound, bpd_loop, bpd_terms, prior_bpd
from ddpm_jax.diffusion.objective import LOSSES
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
from ddpm_jax.diffusion.sampling import SAMPLERS, sample_loop, sample_progressive
from ddpm_jax.diffusion.schedule import (
    BETAS,
    FIRST_LOG_VARIANCE,
    Schedule,
    evenly_spaced,
    make_schedule,
    respace,
)
from ddpm_jax.errors import UserError
from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel.runners import RUNNERS, Runner
from ddpm_jax.training import packing, rng
from ddpm_jax.training.optimizer import EPS_RULES, make_optimizer
from ddpm_jax.training.steps import (
    Clip,
    TrainState,
    init_state,
    many_steps,
    to_uint8,
    to_unit_range,
    train_step,
)

CONFIGS = pathlib.Path(__file__).parent / "configs"
CLIP_SCOPES = {
    "per_replica": lambda train, shards: Clip(train.clip_norm, shards),
    "global": lambda train, shards: Clip(train.clip_norm, None),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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


# ---- configs ----


def packaged_configs() -> list[str]:
    return sorted(p.stem for p in CONFIGS.glob("*.py") if not p.stem.startswith("_"))


def config_path(name: str) -> str:
    """A file's path as it is; the name of a packaged config ('cifar10') as that file's path.

    'NAME:ARG' hands ARG to the config. Raises UserError listing the packaged ones.
    """
    file, colon, argument = name.partition(":")
    if pathlib.Path(file).exists():
        return name
    packaged = CONFIGS / f"{pathlib.Path(file).stem}.py"
    if file.count("/") <= (1 if file.startswith("configs/") else 0) and packaged.exists():
        return f"{packaged}{colon}{argument}"
    raise UserError(f"--config={name}: no such file, nor a packaged config; packaged: "
                    f"{', '.join(packaged_configs())}")


def load_config(name: str) -> ConfigDict:
    """The ConfigDict of a config file or packaged name (see ``config_path``)."""
    path, _, argument = config_path(name).partition(":")
    spec = importlib.util.spec_from_file_location("ddpm_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def to_json(config: ConfigDict) -> dict:
    """Plain dict with lists for tuples: what is stored beside a run."""
    return json.loads(config.to_json())


def from_json(stored: dict) -> ConfigDict:
    """The ConfigDict that ``to_json`` stored; fields that are new since get their defaults."""
    config = load_config("default")
    with config.unlocked():
        _merge(config, _tuples(stored))
    return config


def _merge(config, values):
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(config.get(key), ConfigDict):
            if key == "schedule":  # its keywords belong to the law named, not to the default's
                config[key] = ConfigDict(value)
            else:
                _merge(config[key], value)
        else:
            config[key] = value


def _tuples(value):
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _row(registry: dict, field: str, name):
    if name not in registry:
        raise UserError(f"config.{field}={name!r} is not known; known: {', '.join(registry)}")
    return registry[name]


def _positive(config, *fields):
    for field in fields:
        value = config
        for part in field.split("."):
            value = value[part]
        if value < 1:
            raise UserError(f"config.{field}={value} must be at least 1")


def check(config: ConfigDict, num_devices: int) -> None:
    """Raise UserError at the first field whose value cannot work on ``num_devices`` devices."""
    _positive(config, "train.steps", "train.batch_size", "train.accumulation",
              "train.steps_per_dispatch", "train.log_every", "diffusion.num_timesteps",
              "checkpoint.every", "checkpoint.keep", "sampler.batch_size")
    train, diffusion = config.train, config.diffusion
    _row(DATASETS, "data.name", config.data.name)
    _row(BETAS, "diffusion.schedule.name", diffusion.schedule.name)
    _row(PARAMETERIZATIONS, "diffusion.predict", diffusion.predict)
    _row(VARIANCES, "diffusion.variance", diffusion.variance)
    _row(FIRST_LOG_VARIANCE, "diffusion.first_log_variance", diffusion.first_log_variance)
    _row(LOSSES, "diffusion.loss", diffusion.loss)
    _row(CLIP_SCOPES, "train.clip_scope", train.clip_scope)
    _row(rng.GENERATORS, "train.random", train.random)
    _row(EPS_RULES, "optimizer.eps_rule", config.optimizer.eps_rule)
    _row(SAMPLERS, "sampler.name", config.sampler.name)
    _row(RUNNERS, "parallel.runner", config.parallel.runner)
    _row(DTYPES, "model.dtype", config.model.dtype)
    if not 0 <= config.model.dropout < 1:
        raise UserError(f"config.model.dropout={config.model.dropout} must be in [0, 1)")
    pieces = num_devices * train.accumulation
    if train.batch_size % pieces:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not divisible by {pieces} "
            f"({num_devices} devices x train.accumulation={train.accumulation})")
    if CLIP_SCOPES[train.clip_scope](train, 1).shards:
        shards = train.clip_replicas
        if shards % num_devices or train.batch_size % shards:
            raise UserError(
                f"config.train.clip_replicas={shards} must be a multiple of the {num_devices} "
                f"devices and divide train.batch_size={train.batch_size}; or set "
                "train.clip_scope=global")
        if train.accumulation > 1 and (train.batch_size // shards) % max(
            1, train.accumulation // (shards // num_devices)
        ):
            raise UserError(f"config.train.accumulation={train.accumulation} does not cut the "
                            f"{train.batch_size // shards} images of a clipped part evenly")
    if train.steps * train.batch_size >= 2**32:
        raise UserError(f"config.train.steps={train.steps} times train.batch_size="
                        f"{train.batch_size} reaches 2**32 images: lower one of them")
    if VARIANCES[diffusion.variance].channels > 1 and diffusion.loss in _BLIND_TO_VARIANCE:
        raise UserError(f"config.diffusion.loss={diffusion.loss} does not train a learned "
                        "variance: use diffusion.loss=kl")
    if config.sampler.steps > diffusion.num_timesteps:
        raise UserError(f"config.sampler.steps={config.sampler.steps} is more than "
                        f"diffusion.num_timesteps={diffusion.num_timesteps}")


_BLIND_TO_VARIANCE = {"mse"}


# ---- the parts ----


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


def pack_program(experiment: Experiment):
    """TrainState on the devices -> the same packed, as ``train_program`` takes it."""
    like, order = experiment.abstract_state.params, experiment.order
    return experiment.runner.compile(
        lambda state: packing.pack_state(state, like, order), ("replicated",), ("replicated",))


def unpack_program(experiment: Experiment):
    """A packed state, or a part of one, on the devices -> the named trees, in new arrays."""
    like, order = experiment.abstract_state.params, experiment.order
    return experiment.runner.compile(
        lambda state: packing.unpack_state(state, like, order), ("replicated",), ("replicated",))


# ---- programs ----


def _position(runner, b):
    """Offset of this device's share in the global batch, inside a per-device function."""
    return 0 if runner.axis_name is None else jax.lax.axis_index(runner.axis_name) * b


def train_program(experiment: Experiment, num_examples: int | None, *, most: int | None = None):
    """The compiled dispatch of up to ``most`` updates (default: train.steps_per_dispatch).

    num_examples: a data set that lives on the device; the program is then
    (state, images uint8 [N,H*W*C], seed, num_steps) -> (state, metrics, each [most]). None: images
    are streamed, uint8 [most,B,H,W,C]. The state's buffers are given away.
    """
    config, runner = experiment.config, experiment.runner
    most, batch = most or config.train.steps_per_dispatch, config.train.batch_size
    share = batch if runner.axis_name is None else batch // runner.num_devices
    generator = config.train.random

    def resident(images, seed, step, i):
        del i
        start = step.astype(jnp.uint32) * jnp.uint32(batch)
        mine = (_position(runner, share) + jnp.arange(share)).astype(jnp.uint32)
        rows = images[shuffled_index(seed, start + mine, num_examples, jnp)]
        return runner.split(rows.reshape(share, *experiment.image_shape))

    def streamed(images, seed, step, i):
        del seed, step
        return images[i]

    pick, kind = (streamed, "steps") if num_examples is None else (resident, "replicated")

    def program(state, images, seed, num_steps):
        key = rng.run_key(seed, generator)

        def one(state, i):
            return experiment.train_step(state, pick(images, seed, state.step, i), key)

        return many_steps(one, state, num_steps, most=most)

    return runner.compile(
        program, ("replicated", kind, "replicated", "replicated"), ("replicated", "replicated"),
        donate=(0,))


def train_arguments(experiment: Experiment, num_examples: int | None) -> tuple:
    """Abstract arguments of ``train_program``, for .lower()."""
    config, runner = experiment.config, experiment.runner
    if num_examples is None:
        kind, lead = "steps", (config.train.steps_per_dispatch, config.train.batch_size)
        images = jax.ShapeDtypeStruct((*lead, *experiment.image_shape), jnp.uint8)
    else:
        kind = "replicated"
        images = jax.ShapeDtypeStruct((num_examples, math.prod(experiment.image_shape)), jnp.uint8)
    like = experiment.abstract_state
    state = jax.eval_shape(lambda s: packing.pack_state(s, like.params, experiment.order), like)
    return (
        runner.abstract("replicated", state),
        runner.abstract(kind, images),
        runner.abstract("replicated", jax.ShapeDtypeStruct((), jnp.uint32)),
        runner.abstract("replicated", jax.ShapeDtypeStruct((), jnp.int32)),
    )


def _latents(key, index, image_shape):
    return rng.image_noise(key, index, jnp.int32(-1), image_shape)


class Chain(NamedTuple):
    """A reverse process over one config's network: predict(params) -> predict_fn, step_fn and
    num_steps, as ``diffusion.sampling`` takes them. noise(key, index int [B], t, image_shape) and
    start(key, index, image_shape) -> x_T, both [B,H,W,C]."""

    schedule: Schedule
    predict: Callable
    step_fn: Callable
    num_steps: int
    noise: Callable = rng.image_noise
    start: Callable = _latents


def sampling_chain(experiment: Experiment, **overrides: Any) -> Chain:
    """The chain of config.sampler; overrides: name, steps, clip_denoised.

    Raises UserError where more steps are asked for than there are timesteps.
    """
    config = experiment.config
    sampler = {**dict(config.sampler), **{k: v for k, v in overrides.items() if v is not None}}
    total = config.diffusion.num_timesteps
    try:
        visited = evenly_spaced(total, sampler["steps"] or total)
    except ValueError:
        raise UserError(f"sampler.steps={sampler['steps']} is not in 1 ... "
                        f"diffusion.num_timesteps={total}") from None
    schedule = make_schedule(respace(experiment.betas, visited), visited,
                             first_log_variance=config.diffusion.first_log_variance)
    step = _row(SAMPLERS, "sampler.name", sampler["name"])

    def predict(params):
        params = packing.kernels_as(params, experiment.model.dtype)  # once, not at every step

        def predict_fn(x_t, t):
            output = experiment.model.apply({"params": params}, x_t, schedule.timesteps[t])
            return p_mean_variance(
                schedule, output, x_t, t, predict=PARAMETERIZATIONS[config.diffusion.predict],
                variance=VARIANCES[config.diffusion.variance],
                clip_denoised=sampler["clip_denoised"])

        return predict_fn

    return Chain(schedule, predict, lambda *a: step(schedule, *a), len(visited))


def draw_images(experiment: Experiment, chain: Chain, params, seed, index):
    """x_0 float32 [B,H,W,C] in about [-1,1] of the images with global ``index`` int [B].

    Image i depends on (seed, i) alone. For use inside a per-device function.
    """
    noise_fn, x_T = _noise(experiment, chain, seed, index)
    return sample_loop(chain.predict(params), chain.step_fn, noise_fn, x_T, chain.num_steps)


def _noise(experiment, chain, seed, index):
    """-> (noise_fn(t), x_T)"""
    key, shape = rng.run_key(seed), experiment.image_shape
    return lambda t: chain.noise(key, index, t, shape), chain.start(key, index, shape)


def sample_program(experiment: Experiment, chain: Chain, finish=to_uint8, *, extra=(),
                   results=("batch",)):
    """(params, seed, index int32 [B], *extra) -> finish(x_0 [B,H,W,C], *extra), by default uint8
    images; B over all devices: one compiled program, or where loops belong on the host one that is
    called for every step. extra, results: kinds of the runner."""
    runner = experiment.runner
    if not runner.loops_on_device:
        walk = _walk(experiment, chain)
        finish = runner.compile(finish, ("batch", *extra), results)

        def stepwise(params, seed, index, *rest):
            for _, x_t, _ in walk(params, seed, index):  # noqa: B007
                pass
            return finish(x_t, *rest)

        return stepwise

    def program(params, seed, index, *rest):
        return finish(draw_images(experiment, chain, params, seed, index), *rest)

    return runner.compile(program, ("replicated", "replicated", "batch", *extra), results)


def progressive_program(experiment: Experiment, chain: Chain, every: int):
    """As ``sample_program``, also the x_0 predicted at t = ..., 2 every, every, 0: -> (uint8
    [B,H,W,C], uint8 [B,frames,H,W,C] from noise to image)."""
    runner = experiment.runner
    if not runner.loops_on_device:
        walk = _walk(experiment, chain)
        finish = runner.compile(to_uint8, ("batch",), ("batch",))
        stack = runner.compile(
            lambda *frames: to_uint8(jnp.stack(frames, axis=1)),
            ("batch",) * -(-chain.num_steps // every), ("batch",))

        def stepwise(params, seed, index):
            frames = []
            for t, x_t, x_start in walk(params, seed, index):  # noqa: B007
                if t % every == 0:
                    frames.append(x_start)
            return finish(x_t), stack(*frames)

        return stepwise

    def program(params, seed, index):
        noise_fn, x_T = _noise(experiment, chain, seed, index)
        x_0, kept, _ = sample_progressive(
            chain.predict(params), chain.step_fn, noise_fn, x_T, chain.num_steps, every)
        return to_uint8(x_0), to_uint8(kept).swapaxes(0, 1)

    return runner.compile(program, ("replicated", "replicated", "batch"), ("batch", "batch"))


def _walk(experiment: Experiment, chain: Chain):
    """The chain with its loop on the host: yields (t, x after the step, predicted x_0)."""
    def start(seed, index):
        return _noise(experiment, chain, seed, index)[1]

    def step(params, seed, index, x_t, t):
        noise_fn, _ = _noise(experiment, chain, seed, index)
        prediction = chain.predict(params)(x_t, jnp.full(x_t.shape[0], t))
        return chain.step_fn(prediction, x_t, t, noise_fn(t)), prediction.x_start

    compile = experiment.runner.compile
    start = compile(start, ("replicated", "batch"), ("batch",))
    step = compile(step, ("replicated", "replicated", "batch", "batch", "replicated"),
                   ("batch", "batch"))

    def walk(params, seed, index):
        x_t = start(seed, index)
        for t in range(chain.num_steps - 1, -1, -1):
            x_t, x_start = step(params, seed, index, x_t, np.int32(t))
            yield t, x_t, x_start

    return walk


def _bound_options(diffusion):
    return dict(predict=PARAMETERIZATIONS[diffusion.predict],
                variance=VARIANCES[diffusion.variance])


def bound(experiment: Experiment, params, seed, images, index) -> Bound:
    """The variational bound of images uint8 [B,H,W,C] with global ``index`` int32 [B]; the noise of
    image i depends on (seed, i, t) alone. For use inside a per-device function."""
    key = rng.run_key(seed)
    return bpd_loop(denoise_fn(experiment, params), experiment.schedule, to_unit_range(images),
                    lambda t: rng.image_noise(key, index, t, experiment.image_shape),
                    **_bound_options(experiment.config.diffusion))


def bound_program(experiment: Experiment):
    """(params, seed, images, index) -> ``bound``, B over all devices: as ``sample_program``, one
    program or one a step."""
    runner, schedule = experiment.runner, experiment.schedule
    args = ("replicated", "replicated", "batch", "batch")
    if runner.loops_on_device:
        compiled = runner.compile(lambda *values: tuple(bound(experiment, *values)), args,
                                  ("batch",) * len(Bound._fields))
        return lambda *values: Bound(*compiled(*values))

    num_timesteps = schedule.betas.shape[0]

    def start(images):
        none = jnp.zeros((images.shape[0], num_timesteps))
        return prior_bpd(schedule, to_unit_range(images)), none, none, none

    def step(params, seed, images, index, t, *rows):
        noise = rng.image_noise(rng.run_key(seed), index, t, experiment.image_shape)
        found = bpd_terms(denoise_fn(experiment, params), schedule, to_unit_range(images),
                          jnp.full(images.shape[0], t), noise,
                          **_bound_options(experiment.config.diffusion))
        return tuple(row.at[:, t].set(x) for row, x in zip(rows, found, strict=True))

    start = runner.compile(start, ("batch",), ("batch",) * 4)
    step = runner.compile(step, (*args, "replicated", *("batch",) * 3), ("batch",) * 3,
                          donate=(5, 6, 7))
    total = runner.compile(lambda terms, prior: terms.sum(1) + prior, ("batch",) * 2, ("batch",))

    def stepwise(params, seed, images, index):
        prior, *rows = start(images)
        for t in range(num_timesteps):
            rows = step(params, seed, images, index, np.int32(t), *rows)
        terms, mse, eps_mse = rows
        return Bound(total(terms, prior), terms, prior, mse, eps_mse)

    return stepwise


def denoise_fn(experiment: Experiment, params):
    """The network without dropout, as the equations take it: (x_t [B,H,W,C], t [B]) -> output."""
    params = packing.kernels_as(params, experiment.model.dtype)
    return lambda x_t, t: experiment.model.apply({"params": params}, x_t, t)
