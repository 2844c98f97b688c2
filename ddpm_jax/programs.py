"""The compiled programs: training, samples, progressive samples, the variational bound."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import row
from ddpm_jax.data.feed import shuffled_index
from ddpm_jax.diffusion.likelihood import Bound, bpd_loop, bpd_terms, prior_bpd
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
from ddpm_jax.diffusion.sampling import SAMPLERS, sample_loop, sample_progressive
from ddpm_jax.diffusion.schedule import Schedule, evenly_spaced, make_schedule, respace
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import Experiment, denoise_fn
from ddpm_jax.training import packing, rng
from ddpm_jax.training.steps import many_steps, to_uint8, to_unit_range


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
    step = row(SAMPLERS, "sampler.name", sampler["name"])

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
