"""Train a run: folders, hooks, signals; no mathematics, of the config only what is due when."""

import json
import time

import jax
import numpy as np

from ddpm_jax import checkpoints, experiment, programs, run_log
from ddpm_jax.compilation.cache import count_compilations
from ddpm_jax.config import to_json
from ddpm_jax.data import feed
from ddpm_jax.data.datasets import open_source
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.runners import fetch
from ddpm_jax.run_log import say
from ddpm_jax.storage import files
from ddpm_jax.training.loop import Hook, fit
from ddpm_jax.training.optimizer import warmup


def _open_data(exp, split):
    config = exp.config
    source = open_source(config.data.name, config.data.dir, split,
                         image_size=config.data.image_size, channels=config.data.channels)
    if tuple(source.shape) != exp.image_shape:
        raise UserError(
            f"{config.data.name} has images {tuple(source.shape)}, the config says "
            f"{exp.image_shape}: set data.image_size and data.channels")
    if len(source) < 1:
        raise UserError(f"{config.data.name}, split {split}, has no images")
    # One host may download what the others have: they wait here rather than in a collective.
    hosts.check_same_everywhere({"data": source.fingerprint}, patience_s=7200)
    return source


def _feeder(exp, source, step):
    """How a dispatch gets its images: -> (num_examples or None, images(n) -> device array)."""
    config, runner = exp.config, exp.runner
    if config.data.resident:
        if not feed.is_small(source):
            raise UserError(f"config.data.resident=True: {config.data.name} is too large to keep "
                            "on the device; set data.resident=False")
        images = runner.put("replicated", source.array().reshape(len(source), -1))
        return len(source), lambda n: images
    batch, most = config.train.batch_size, _most(exp)
    share = batch // jax.process_count()
    first = jax.process_index() * share
    batches = feed.stream(source, seed=config.seed, start_step=step, batch_size=batch,
                          slots=range(first, first + share), threads=config.data.threads)
    buffer = np.zeros((most, share, *exp.image_shape), np.uint8)

    def images(n):
        for i in range(n):
            buffer[i] = next(batches)
        return runner.put("steps", buffer.copy())

    return None, images


class _Log:
    """Turns per-step metrics into lines of metrics.jsonl, and the progress bar."""

    def __init__(self, exp, writer, start):
        config = exp.config
        self._every, self._batch = config.train.log_every, config.train.batch_size
        self._rate = warmup(config.optimizer.learning_rate, config.optimizer.warmup_steps)
        self._writer, self._rows = writer, []
        self._bar = run_log.progress(config.train.steps, start, images_per_step=self._batch)
        self._mark = (start, time.monotonic())

    def __call__(self, step, values):
        for i in range(len(values["loss"])):
            self._rows.append({k: float(v[i]) for k, v in values.items()})
            done = step + i + 1
            if done % self._every == 0:
                self._line(done)
        self._bar.update(step + len(values["loss"]), loss=values["loss"][-1])

    def _line(self, step):
        means = {k: float(np.mean([r[k] for r in self._rows])) for k in self._rows[0]}
        since, then = self._mark
        self._mark = (step, time.monotonic())
        self._writer.scalars(step, {
            **means,
            "learning_rate": float(self._rate(step - 1)),
            "images_per_second": (step - since) * self._batch / max(self._mark[1] - then, 1e-9),
        })
        self._rows = []

    def close(self):
        self._bar.close()


def _most(exp):
    """Updates a dispatch."""
    return exp.config.train.steps_per_dispatch if exp.runner.loops_on_device else 1


def train(config, workdir, *, stop, watchdog, evaluate=None) -> bool:
    """Train the run in ``workdir`` up to config.train.steps, from its newest checkpoint if any.

    stop: parallel.stop.Stop; watchdog: .beat(step), .pause(). evaluate(experiment, params,
    step) -> {name: number}, or None where a signal cut it short; called every config.eval.every
    steps, at a restart first for a step that is saved but not evaluated. -> False where a signal
    ended it early (everything is saved). Raises UserError for what the user can mend.
    """
    exp = experiment.build(config)
    stored = to_json(config)
    first = jax.process_index() == 0
    folder = files.resolve(workdir)
    checkpoints.claim(folder, stored, write=first)
    source = _open_data(exp, "train")
    store = checkpoints.Checkpoints(folder, keep=config.checkpoint.keep,
                                    keep_every=config.checkpoint.keep_every,
                                    best=config.eval.best)
    writer = run_log.open_writer(folder, enabled=first, config_text=json.dumps(stored, indent=2))
    try:
        step = store.latest()
        if step is None:
            step, state = 0, experiment.new_state(exp)
        else:
            say(f"resuming {folder} from step {step}")
            state = store.restore(step, exp.abstract_state, exp.runner)
        state = programs.pack_program(exp)(state)
        writer.truncate_after(step)
        return _train(exp, state, step, folder=folder, source=source, store=store, writer=writer,
                      stop=stop, watchdog=watchdog, evaluate=evaluate)
    finally:
        writer.close()
        store.close()


def _train(exp, state, step, *, folder, source, store, writer, stop, watchdog, evaluate):
    config, runner = exp.config, exp.runner
    stored = to_json(config)
    last = config.train.steps
    named = programs.unpack_program(exp)
    interrupted = []  # steps whose evaluation a signal cut short

    def on_evaluation(step, state):
        watchdog.pause()
        _saved_already(store, step, stop)
        # Asked first: it may be what this step ends with, and the restart evaluates it.
        values = None if stop.requested(step) else evaluate(exp, named(state.ema_params), step)
        if values is None:
            interrupted.append(step)
            return
        writer.scalars(step, values)
        best = config.eval.best
        if best and best not in values:
            raise UserError(f"config.eval.best={best!r} is not among the metrics: "
                            f"{', '.join(values)}")
        store.scored(step, values)

    every = config.eval.every if evaluate else 0
    if every and step and (step % every == 0 or step == last) and step not in store.scores:
        on_evaluation(step, state)
        if interrupted:
            return False
    if step >= last:
        say(f"{folder} is at step {step} of {last}: nothing to train "
            "(raise --config.train.steps to go on)")
        return True
    num_examples, images = _feeder(exp, source, step)
    program = programs.train_program(exp, num_examples, most=_most(exp))
    say(f"training {config.data.name} ({len(source):,} images, {source.fingerprint}) on "
        f"{runner.num_devices} x {jax.devices()[0].device_kind} ({runner.name}), "
        f"{sum(x.size for x in jax.tree.leaves(exp.abstract_state.params)):,} parameters, "
        f"steps {step:,} to {last:,} -> {folder}")
    compiled = [False]

    def dispatch(state, step, n):
        data = images(n)
        if compiled[0]:
            result = program(state, data, np.uint32(config.seed), np.int32(n))
        else:
            watchdog.pause()
            with count_compilations() as found:
                result = program(state, data, np.uint32(config.seed), np.int32(n))
            if found:
                say(str(max(found, key=lambda p: p.seconds)))
            compiled[0] = True
        stop.unsaved(True)
        return result

    def save(step, state):
        store.save(step, runner.to_global(named(state)), stored)

    sampler = _GridSampler(exp, writer, folder)

    def on_samples(step, state):
        watchdog.pause()
        _saved_already(store, step, stop)
        if not stop.requested(step):
            sampler(step, named(state.ema_params))

    hooks = [Hook(config.checkpoint.every, save, last=True)]
    if every:
        hooks.append(Hook(every, on_evaluation, last=True))
    if config.eval.sample_every:
        hooks.append(Hook(config.eval.sample_every, on_samples, last=True))
    log = _Log(exp, writer, step)
    outcome = fit(
        state, step=step, last=last, most=_most(exp), dispatch=dispatch,
        hooks=hooks, on_metrics=log, should_stop=stop.requested, fetch=fetch,
        last_good=store.latest, beat=watchdog.beat)
    log.close()
    watchdog.pause()
    if outcome.stopped:
        save(outcome.step, outcome.state)
    store.wait()
    stop.unsaved(False)
    stopped = outcome.stopped or interrupted
    say(f"{'stopped at' if stopped else 'done:'} step {outcome.step}; checkpoints "
        f"{store.steps()}; {folder}/loss.png, metrics.jsonl, samples/")
    return not stopped


def _saved_already(store, step, stop):
    """Before what takes long: where the step is saved, a signal need not wait for its end."""
    if step in store.steps():
        store.wait()
        stop.unsaved(False)


class _GridSampler:
    """A grid of samples of the averaged weights: the same latents each time, so one can compare."""

    def __init__(self, exp, writer, folder):
        self._exp, self._writer, self._folder = exp, writer, folder
        self._program = None

    def __call__(self, step, params):
        exp, runner = self._exp, self._exp.runner
        if self._program is None:
            chain = programs.sampling_chain(exp)
            self._program = programs.sample_program(exp, chain)
        wanted = exp.config.eval.sample_num
        index = hosts.local_indices(runner, 0, wanted)
        images = self._program(params, np.uint32(exp.config.seed), index)
        images = hosts.all_rows(runner, images)[:wanted]
        self._writer.images(step, "samples", images)
