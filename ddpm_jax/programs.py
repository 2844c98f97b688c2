"""The compiled programs: training, samples, predictions along the chain, the variational bound."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config_checks import (
    SAMPLER_DEFAULTS,
    check_guidance,
    clips_parts,
    sampler_row,
)
from ddpm_jax.data.feed import shuffled_index
from ddpm_jax.diffusion.guidance import guided
from ddpm_jax.diffusion.inpainting import Visits, inpaint_step
from ddpm_jax.diffusion.likelihood import Bound, bpd_terms, prior_bpd
from ddpm_jax.diffusion.nodes import is_named
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.sampling import Sampler, plan_chain, reverse_step
from ddpm_jax.diffusion.schedule import Schedule, make_schedule, respace
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import Experiment, Training, cast_kernels, denoise_fn
from ddpm_jax.parallel.loops import repeat
from ddpm_jax.training import packing, rng
from ddpm_jax.training.gradients import METRICS, View
from ddpm_jax.training.steps import Batch, to_uint8, to_unit_range


class TrainProgram(NamedTuple):
    """The compiled dispatch of up to ``max_steps`` updates. Its carry is a TrainState in a layout
    that nothing else reads: start(state) -> carry; state(carry) -> TrainState and
    ema_params(carry) -> tree, in new arrays.

    step(carry, Batch, seed, num_steps <= max_steps) -> (carry, METRICS by name, each [max_steps],
    of which the first num_steps count); the carry is donated. arguments: abstract ones of step, for
    .lower()."""

    max_steps: int
    start: Callable
    step: Callable
    state: Callable
    ema_params: Callable
    arguments: tuple


def train_program(training: Training, num_examples: int | None, *, max_steps=None) -> TrainProgram:
    """max_steps: default train.steps_per_dispatch, or 1 where loops belong on the host.

    num_examples: a data set that lives on the device; the step's Batch is all of it, with images
    uint8 [N,H*W*C]. None: batches are streamed, with images uint8 [max_steps,B,H,W,C]. labels: as
    many as images, None without classes.
    """
    exp = training.experiment
    train, runner, like = exp.config.train, exp.runner, exp.abstract_params
    max_steps = max_steps or (train.steps_per_dispatch if runner.loops_on_device else 1)
    order = packing.order_on(runner.mesh.devices.flat[0].platform)
    if num_examples is None:
        select, placement = _streamed, "steps"
        shape, examples = exp.image_shape, (max_steps, train.batch_size)
    else:
        select, placement = functools.partial(_resident, exp, num_examples), "replicated"
        shape, examples = (math.prod(exp.image_shape),), (num_examples,)
    batch = Batch(
        jax.ShapeDtypeStruct((*examples, *shape), jnp.uint8),
        jax.ShapeDtypeStruct(examples, jnp.int32) if exp.model.num_classes else None)

    def pack(state):
        return packing.pack_state(state, like, order)

    abstract_carry = jax.eval_shape(pack, training.abstract_state)
    at, carry_at = map(training.placement, (training.abstract_state, abstract_carry))
    train_step = _packed_step(training, order, carry_at)

    def train_steps(state, batch, seed, num_steps):
        key = rng.run_key(seed, train.random)
        if max_steps == 1:
            state, metrics = train_step(state, select(batch, seed, state.step, 0), key)
            return state, {name: value[None] for name, value in metrics.items()}

        def update(i, carry):
            state, rows = carry
            state, metrics = train_step(state, select(batch, seed, state.step, i), key)
            return state, {name: rows[name].at[i].set(metrics[name]) for name in METRICS}

        rows = {name: jnp.zeros(max_steps) for name in METRICS}
        return jax.lax.fori_loop(0, num_steps, update, (state, rows))

    placements = (carry_at, placement, "replicated", "replicated")
    abstract = (abstract_carry,
                batch, jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32))

    def unpack(carry):
        return packing.unpack_state(carry, like, order)

    state = ema_params = runner.compile(unpack, (carry_at,), (at,))
    if training.cut is not None:  # samplers and metrics take whole weights
        ema_params = runner.compile(unpack, (carry_at.ema_params,), ("replicated",))
    return TrainProgram(
        max_steps=max_steps, start=runner.compile(pack, (at,), (carry_at,)),
        step=runner.compile(train_steps, placements, (carry_at, "replicated"), donate=(0,)),
        state=state, ema_params=lambda carry: ema_params(carry.ema_params),
        arguments=tuple(map(runner.abstract, placements, abstract)))


def _packed_step(training, order, carry_at):
    """training.step on packed states, which lie as ``carry_at`` has it."""
    exp, cut = training.experiment, training.cut

    def named(params):
        return packing.unpack(packing.kernels_as(params, exp.model.dtype), exp.abstract_params,
                              order)

    view = View(named, lambda gradient: packing.pack(gradient, order))
    if cut is None:
        return functools.partial(
            training.step, gradient=functools.partial(training.gradient, view=view))
    view = view._replace(spread=cut.spread)
    if not clips_parts(exp.config.train):  # parts have gradients of their own
        view = view._replace(named=lambda params: cut.gathered(named(params)))

    def gradient(*args):
        gradient, *others = training.gradient(*args, view=view)
        return cut.spread(gradient), *others

    def step(*args):
        state, metrics = training.step(*args, gradient=gradient)
        return jax.lax.with_sharding_constraint(state, carry_at), metrics

    return step


def _streamed(batch, seed, step, i):
    del seed, step
    return jax.tree.map(lambda x: x[i], batch)


def _resident(experiment, num_examples, batch, seed, step, i):
    """This device's part of the batch of update ``step``, from all examples."""
    del i
    runner, batch_size = experiment.runner, experiment.config.train.batch_size
    count = batch_size // (runner.num_devices // runner.num_virtual_devices)
    device = 0 if runner.axis_name is None else jax.lax.axis_index(runner.axis_name)
    slots = (device * count + jnp.arange(count)).astype(jnp.uint32)
    first = step.astype(jnp.uint32) * jnp.uint32(batch_size)
    index = shuffled_index(seed, first + slots, num_examples, jnp)
    images = batch.images[index].reshape(count, *experiment.image_shape)
    return jax.tree.map(runner.constrain, batch._replace(
        images=images, labels=None if batch.labels is None else batch.labels[index]))


def _latents(key, index, image_shape, *_):
    return rng.image_noise(key, index, jnp.int32(-1), image_shape)


class Chain(NamedTuple):
    """A reverse process over one config's network. predict(params, **condition) -> predict_fn as
    ``diffusion.sampling`` takes it. choices: fields of config.sampler beside name and steps that
    are not left to the sampler, and labels; samples depend on them. noise(key, index int [B], t,
    image_shape) and start(key, index, image_shape, *extra) -> x_T, both [B,H,W,C]; extra: the
    program's. condition(index) -> the keywords of predict, for a model with classes {'labels':
    int32 [B]}. passes: rows of the network for an image."""

    schedule: Schedule
    predict: Callable
    sampler: Sampler
    num_steps: int
    choices: dict
    noise: Callable = rng.image_noise
    start: Callable = _latents
    condition: Callable = lambda index: {}
    passes: int = 1


def sampling_chain(experiment: Experiment, *, below=None, labels=None, **overrides: Any) -> Chain:
    """The chain of config.sampler; overrides: its fields, of which None changes nothing. Another
    name takes its own nodes, clipping and keywords.

    below: visit only timesteps under this one, to decode x_t from the middle of the chain. labels:
    those of images 0, 1, ... of a model with classes, used again and again; default: each class in
    turn. Raises UserError where the fields do not fit each other, the number of timesteps or the
    model.
    """
    diffusion, settings = experiment.config.diffusion, dict(experiment.config.sampler)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if "name" in overrides:
        settings |= SAMPLER_DEFAULTS
    settings |= overrides
    method, keywords, clip_denoised = sampler_row(settings)
    guidance = _guidance(experiment, settings["guidance"], labels, "guidance" in overrides)
    total, alphas_cumprod = diffusion.num_timesteps, np.cumprod(1.0 - experiment.betas)
    steps, nodes = settings["steps"] or total, settings["nodes"] or method.nodes
    where = f"sampler.name={settings['name']}"
    if is_named(nodes):
        where += f", sampler.steps={steps}"
    if not 1 <= steps <= total:
        raise UserError(f"sampler.steps={steps} is not in 1 ... diffusion.num_timesteps={total}")
    try:
        visits, sampler = plan_chain(method, alphas_cumprod, nodes, steps, below=below, **keywords)
    except ValueError as error:
        if not is_named(nodes) and "nodes=" not in str(error):
            where += f", sampler.nodes={nodes}"
        raise UserError(f"{where}: {error}") from None
    asked = (overrides if overrides.get("nodes") else settings).get("steps")
    if not is_named(nodes) and below in (None, total) and asked not in (None, 0, len(visits)):
        raise UserError(f"{where}, sampler.steps={asked}: nodes={nodes} lists the timesteps: leave "
                        "steps out, or take nodes by name")
    visited, positions = np.unique(visits, return_inverse=True)
    schedule = make_schedule(respace(experiment.betas, visited), visited,
                             first_log_variance=diffusion.first_log_variance)
    schedule = Schedule(*(table[positions] for table in schedule))  # some visit a timestep twice

    def predict(params, **condition):
        network, rows = denoise_fn(experiment, params), _rows(experiment)
        if guidance != 1:
            network = guided(network, guidance, experiment.model.no_label, rows["variance"])
        return lambda x_t, t: p_mean_variance(
            schedule, network(x_t, schedule.timesteps[t], **condition), x_t, t,
            clip_denoised=clip_denoised, threshold=settings["dynamic_threshold"], **rows)

    choices = {"nodes": settings["nodes"] or None, "labels": labels and list(labels),
               "dynamic_threshold": settings["dynamic_threshold"],
               "guidance": None if guidance == 1 else guidance}
    choices = keywords | {name: value for name, value in choices.items() if value is not None}
    return Chain(schedule, predict, sampler, len(visits), choices, passes=1 + (guidance != 1),
                 condition=_condition(experiment, labels))


def _guidance(experiment, guidance, labels, asked):
    """That of a chain, 1 where no image has a label. Raises UserError where it cannot be had and,
    if it was ``asked`` for beside the config, where it would change nothing."""
    check_guidance(experiment.config.model, guidance)
    if guidance == 1 or not labels or {*labels} != {experiment.model.no_label}:
        return guidance
    if asked:
        raise UserError(f"sampler.guidance={guidance} is towards a label, and no image has one; "
                        "name a label, or leave guidance out")
    return 1


def _condition(experiment, labels):
    """``Chain.condition``. Raises UserError for labels that the model does not have."""
    model = experiment.model
    if not model.num_classes:
        if labels:
            raise UserError(f"labels {', '.join(map(str, labels))}: this model has no classes "
                            "(model.num_classes=0); leave labels out")
        return lambda index: {}
    for label in labels or ():
        if not 0 <= label < model.num_labels:
            raise UserError(f"label {label} is not in 0 ... {model.num_classes - 1}, the classes "
                            f"of this model (model.num_classes={model.num_classes})")
    chosen = np.array(labels or range(model.num_classes), np.int32)
    return lambda index: {"labels": jnp.asarray(chosen)[index % len(chosen)]}


def _rows(experiment):
    diffusion = experiment.config.diffusion
    return dict(predict=PARAMETERIZATIONS[diffusion.predict],
                variance=VARIANCES[diffusion.variance])


def _reverse_process(experiment, chain):
    """-> (start, step) of ``repeat`` over the chain with the carry (x_t, the sampler's memory);
    step returns the predicted x_0 too. Image i depends on (seed, i) alone."""
    shape = experiment.image_shape

    def start(seed, index, *extra):
        x_T = chain.start(rng.run_key(seed), index, shape, *extra)
        return x_T, chain.sampler.start(x_T)

    def step(params, carry, i, seed, index, *_):
        key, t = rng.run_key(seed), chain.num_steps - 1 - i
        x_t, memory, x_start = reverse_step(
            chain.sampler, chain.schedule, chain.predict(params, **chain.condition(index)),
            lambda t: chain.noise(key, index, t, shape), carry[0], t, carry[1])
        return (x_t, memory), x_start

    return start, step


def sample_program(experiment: Experiment, chain: Chain, finish=to_uint8, *, extra=(),
                   results=("batch",)):
    """(params, seed, index int32 [B], *extra) -> finish(x_0 [B,H,W,C], *extra), by default uint8
    images; B over all devices. extra, results: placements. Compiled as ``loops.repeat`` does."""
    start, step = _reverse_process(experiment, chain)
    return repeat(
        experiment.runner, start, lambda *values: step(*values)[0],
        lambda carry, seed, index, *rest: finish(carry[0], *rest), chain.num_steps,
        args=("replicated", "replicated", "batch", *extra), results=results,
        prepare=functools.partial(cast_kernels, experiment))


def progressive_program(experiment: Experiment, chain: Chain, every: int, images=None):
    """As ``sample_program``, also the x_0 predicted at t = ..., 2 every, every, 0: -> (uint8
    [B,H,W,C], uint8 [N,frames,H,W,C] from noise to image). N: B, or ``images`` or more, of which
    the first are those of index 0, 1, ... below ``images``."""
    start, step = _reverse_process(experiment, chain)
    frames, devices = -(-chain.num_steps // every), experiment.runner.num_virtual_devices

    def kept_of(index):
        wanted = len(index) if images is None else -(-images // devices) * devices
        return min(len(index), wanted)  # on each device, or of all where it sees all

    def start_keeping(seed, index):
        carry = start(seed, index)
        return carry, jnp.zeros((kept_of(index), frames, *experiment.image_shape))

    def step_keeping(params, carry, i, seed, index):
        # A frame is overwritten until its last step.
        carry, kept = carry
        carry, x_start = step(params, carry, i, seed, index)
        frame = frames - 1 - (chain.num_steps - 1 - i) // every
        return carry, kept.at[:, frame].set(x_start[:kept_of(index)])

    return repeat(
        experiment.runner, start_keeping, step_keeping,
        lambda carry, *_: (to_uint8(carry[0][0]), to_uint8(carry[1])), chain.num_steps,
        args=("replicated", "replicated", "batch"), results=("batch", "batch"),
        prepare=functools.partial(cast_kernels, experiment))


def edit_program(experiment: Experiment, chain: Chain):
    """(params, seed, index int32 [B], images uint8 [B,H,W,C]) -> uint8 [B,H,W,C]: the images noised
    to the first step of ``chain`` (``sampling_chain`` with below=), then decoded. B over all
    devices; the noise of image i depends on (seed, i) alone. Compiled as ``loops.repeat`` does."""
    def start(key, index, image_shape, images):
        t = jnp.full(images.shape[0], chain.num_steps - 1)
        return q_sample(chain.schedule, to_unit_range(images), t,
                        _latents(key, index, image_shape))

    return sample_program(experiment, chain._replace(start=start),
                          lambda x_0, images: to_uint8(x_0), extra=("batch",))


def inpaint_program(experiment: Experiment, chain: Chain, visits: Visits):
    """(params, seed, index int32 [B], images uint8 [B,H,W,C], known bool [B,H,W,1]) -> uint8
    [B,H,W,C]: the images with new pixels where ``known`` is False, the others bit for bit. The
    chain's sampler must be one without memory. B over all devices; the noise of image i depends on
    (seed, i) and the number of the visit alone. Compiled as ``loops.repeat`` does."""
    shape, schedule = experiment.image_shape, chain.schedule

    def start(seed, index, *_):
        return chain.start(rng.run_key(seed), index, shape)

    def step(params, x, i, seed, index, images, known):
        key, predict = rng.run_key(seed), chain.predict(params, **chain.condition(index))
        return inpaint_step(
            schedule, lambda x, t, noise: reverse_step(
                chain.sampler, schedule, predict, lambda t: noise, x, t, ())[0],
            x, Visits(*(jnp.asarray(table)[i] for table in visits)), to_unit_range(images),
            known, [chain.noise(key, index, 3 * i + k, shape) for k in range(3)])

    return repeat(
        experiment.runner, start, step,
        lambda x, seed, index, images, known: jnp.where(known, images, to_uint8(x)),
        len(visits.t), args=("replicated", "replicated", "batch", "batch", "batch"),
        prepare=functools.partial(cast_kernels, experiment))


def bound_program(experiment: Experiment):
    """(params, seed, Batch of images uint8 [B,H,W,C], index int32 [B]) -> the variational Bound, B
    over all devices; the noise of image i depends on (seed, i, t) alone. Compiled as
    ``loops.repeat`` does."""
    schedule = experiment.schedule
    num_timesteps = schedule.betas.shape[0]

    def start(seed, batch, index):
        del seed, index
        return (jnp.zeros((batch.images.shape[0], num_timesteps)),) * 3

    def step(params, carry, t, seed, batch, index):
        condition = {} if batch.labels is None else {"labels": batch.labels}
        noise = rng.image_noise(rng.run_key(seed), index, t, experiment.image_shape)
        terms = bpd_terms(
            functools.partial(denoise_fn(experiment, params), **condition), schedule,
            to_unit_range(batch.images), jnp.full(batch.images.shape[0], t), noise,
            **_rows(experiment))
        return tuple(rows.at[:, t].set(x) for rows, x in zip(carry, terms, strict=True))

    def finish(carry, seed, batch, index):
        del seed, index
        terms, mse, eps_mse = carry
        prior = prior_bpd(schedule, to_unit_range(batch.images))
        return Bound(terms.sum(axis=1) + prior, terms, prior, mse, eps_mse)

    return repeat(experiment.runner, start, step, finish, num_timesteps,
                  args=("replicated", "replicated", "batch", "batch"),
                  prepare=functools.partial(cast_kernels, experiment))
