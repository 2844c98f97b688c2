"""Train the run in a folder: resume, log, save, evaluate, stop."""

import contextlib
import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import checkpoints, programs, run_log
from ddpm_jax.compilation.ahead import compiled_ahead
from ddpm_jax.compilation.report import size
from ddpm_jax.config import SOURCE, to_json
from ddpm_jax.config_checks import idle_fields
from ddpm_jax.data import feed
from ddpm_jax.data.datasets import open_source
from ddpm_jax.data.labels import data_facts, labels_for
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import (
    Training,
    build_model,
    build_training,
    check_new,
    new_state,
    schedule_warning,
)
from ddpm_jax.init_from import InitFrom, find_fitting, first_state
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.cut import held_bytes
from ddpm_jax.parallel.runners import fetch
from ddpm_jax.run_log import say
from ddpm_jax.start_line import training_line
from ddpm_jax.storage import files
from ddpm_jax.storage.lock import Lock
from ddpm_jax.training.loop import Hook, fit
from ddpm_jax.training.optimizer import learning_rates
from ddpm_jax.training.steps import Batch

LONG_S = 10  # from here on a pause of training is named


class _Run(NamedTuple):
    """What the hooks of one call of ``train`` work with."""

    training: Training
    program: programs.TrainProgram
    stored: dict
    lock: Lock | None
    store: checkpoints.Checkpoints
    writer: run_log.Writer
    stop: Any
    watchdog: Any
    evaluate: Callable | None
    page: Callable | None


def _open_data(exp, split):
    config = exp.config
    source = open_source(config.data.name, config.data.dir, split,
                         image_size=config.data.image_size, channels=config.data.channels)
    if tuple(source.shape) != exp.image_shape:
        raise UserError(
            f"{config.data.name} has images {tuple(source.shape)}, the config has "
            f"{exp.image_shape}: set data.image_size and data.channels")
    if len(source) < 1:
        raise UserError(f"{config.data.name}, split {split}, has no images")
    facts = data_facts(source, config.model.num_classes)
    # One host may download what the others have: they wait here rather than in a collective.
    hosts.check_same_everywhere({"data": json.dumps(facts)}, patience_s=7200)
    return source, facts


def _feeder(exp, source, step, max_steps):
    """-> arguments(n): those of the next dispatch of n updates after its carry."""
    config, runner = exp.config, exp.runner
    seed, labels = np.uint32(config.seed), labels_for(source, config.model.num_classes)
    if config.data.resident:
        if not feed.is_small(source):
            raise UserError(f"config.data.resident=True: {config.data.name} is too large to keep "
                            "on the device; set data.resident=False")
        resident = runner.put("replicated", Batch(
            source.array().reshape(len(source), -1), labels))
        return lambda n: (resident, seed, np.int32(n))
    batch = config.train.batch_size
    local_batch = batch // jax.process_count()
    first = jax.process_index() * local_batch
    batches = feed.stream(source, seed=config.seed, start_step=step, batch_size=batch,
                          slots=range(first, first + local_batch), labels=labels,
                          threads=config.data.threads)
    images = np.zeros((max_steps, local_batch, *exp.image_shape), np.uint8)
    chosen = None if labels is None else np.zeros(images.shape[:2], np.int32)

    def arguments(n):
        for i in range(n):
            images[i], some = next(batches)
            if labels is not None:
                chosen[i] = some
        return runner.put("steps", jax.tree.map(np.copy, Batch(images, chosen))), seed, np.int32(n)

    return arguments


class _Log:
    """Turns per-step metrics into lines of metrics.jsonl, the progress bar and heartbeats."""

    def __init__(self, run, start):
        config, source = run.training.experiment.config, run.stored.get(SOURCE)
        # Warm-up and decay count the updates of this optimizer.
        self._updates_before = source["step"] if source and not source["optimizer"] else 0
        self._watchdog = run.watchdog
        self._every, self._batch = config.train.log_every, config.train.batch_size
        self._rate = learning_rates(config.optimizer.learning_rate, config.optimizer.warmup_steps,
                                    config.optimizer.decay_steps)
        self._writer, self._rows = run.writer, []
        self._bar = run_log.progress(config.train.steps, start, images_per_step=self._batch)
        self._seconds = []  # of each step of self._rows of which they are known
        self._done = start

    def __call__(self, step, values, seconds):
        count = len(values["loss"])
        for i in range(count):
            self._rows.append({k: float(v[i]) for k, v in values.items()})
            if seconds is not None:
                self._seconds.append(seconds / count)
            self._done = step + i + 1
            if self._done % self._every == 0:
                self._line(self._done)
        self._bar.update(self._done, seconds, loss=values["loss"][-1])
        self._watchdog.beat(self._done)

    def _line(self, step):
        means = {k: float(np.mean([r[k] for r in self._rows])) for k in self._rows[0]}
        seconds = sum(self._seconds)
        speed = ({"images_per_second": len(self._seconds) * self._batch / seconds}
                 if seconds else {})
        self._writer.scalars(step, {
            **means, "learning_rate": float(self._rate(step - 1 - self._updates_before)), **speed})
        self._rows, self._seconds = [], []

    def close(self):
        if self._rows:
            self._line(self._done)  # a last window shorter than log_every
        self._bar.close()


def _how_to_go_on(config) -> str:
    """After the last step."""
    if not config.optimizer.decay_steps:
        return "raise --config.train.steps to continue"
    return ("its learning rate has decayed to 0: a longer run is a new one, with more "
            "--config.train.steps and --config.optimizer.decay_steps")


def train(config, workdir, *, stop, watchdog, evaluate=None, check=None,
          init_from: InitFrom | None = None, page=None, sink=None) -> bool:
    """Train the run in ``workdir`` up to config.train.steps, from its newest checkpoint if any.

    stop: parallel.stop.Stop; watchdog: .beat(step), .pause(). evaluate(experiment, params,
    step) -> {name: number}, or None where a signal cut it short; called every config.eval.every
    steps, at a restart first for a step that is saved but not evaluated; check(experiment) raises
    UserError before the first step for what would end it. A new run has the weights and the step of
    init_from. On process 0, page(folder, workdir, config) makes a page after each checkpoint, and
    sink(workdir, config) -> run_log.Writer's. -> False where a signal ended it early (everything is
    saved). Raises UserError for what the user can mend; what was trained before an error, other
    than divergence, is saved.
    """
    training, folder = build_training(build_model(config)), files.resolve(workdir)
    exp = training.experiment
    programs.sampling_chain(exp)  # raises what would only end the first samples, hours later
    if not files.listing(folder / "checkpoints"):
        check_new(exp)
    _say_start(training)
    stored = _stored(training, folder, init_from)  # before the lock, which makes the folder
    with contextlib.ExitStack() as closing:
        lock = hosts.on_main_process(Lock, folder, "--workdir", say)
        if lock is not None:
            closing.callback(lock.release)
        source, store, writer = _open_folder(exp, folder, stored, closing, sink)
        if check is not None and config.eval.every:
            check(exp)
        program = programs.train_program(training, len(source) if config.data.resident else None)
        run = _Run(training, program, stored, lock, store, writer, stop, watchdog, evaluate, page)
        step, carry = _newest(run, folder)
        writer.truncate_after(step)
        if _evaluation_is_due(run, step):
            _evaluate(run, step, carry)
            if _evaluation_is_due(run, step):
                return False
        last = config.train.steps
        if step >= last:
            say(f"{folder} is at step {step} of {last}: nothing to train "
                f"({_how_to_go_on(config)})")
            return True
        arguments = _feeder(exp, source, step, program.max_steps)
        say(f"training {config.data.name} ({len(source):,} images, {source.fingerprint}) on "
            f"{exp.runner.num_devices} x {jax.devices()[0].device_kind} ({exp.runner.name}), "
            f"{sum(x.size for x in jax.tree.leaves(exp.abstract_params)):,} parameters, "
            f"steps {step:,} to {last:,} -> {folder}")
        with contextlib.closing(_Log(run, step)) as log:
            watchdog.pause()
            outcome = fit(
                carry, step=step, last=last, program=program, arguments=arguments,
                hooks=_hooks(run), on_dispatch=functools.partial(stop.unsaved, True),
                on_metrics=log, should_stop=stop.requested, fetch=fetch, last_good=store.latest,
                save=functools.partial(_save_at_end, run))
        watchdog.pause()
        store.wait()
        stop.unsaved(False)
        stopped = outcome.stopped or _evaluation_is_due(run, outcome.step)
        say(f"{'stopped at' if stopped else 'done:'} step {outcome.step}; checkpoints "
            f"{store.steps()}; {folder}/: {', '.join(writer.close())}")
        return not stopped


def _say_start(training):
    exp, parallel = training.experiment, training.experiment.config.parallel
    say(training_line(exp))
    for text in idle_fields(exp.config):
        say(f"warning: {text}")
    if training.cut is not None:
        here, whole = held_bytes(training.abstract_state)
        say(f"state cut over {parallel.shards} devices ({parallel.cut}): {size(here)} of "
            f"{size(whole)} on each")


def _stored(training, folder, init_from) -> dict:
    """What config.json holds: the config, and where the first weights are from."""
    config = training.experiment.config
    old = (checkpoints.read_config(folder) or {}).get(SOURCE)
    if files.listing(folder / "checkpoints"):
        asked = init_from and [str(files.resolve(init_from.workdir)), init_from.step]
        if asked and (old is None or asked[0] != old["workdir"]
                      or asked[1] not in (None, old["step"])):
            raise UserError(f"--init_from={init_from.workdir}: {folder} holds another run already; "
                            "leave --init_from out to resume it, or take another --workdir")
    elif init_from:
        step = find_fitting(training, init_from)[1]
        old = init_from._replace(workdir=str(files.resolve(init_from.workdir)), step=step)._asdict()
    else:
        old = None
    return to_json(config) | ({SOURCE: old} if old else {})


def _open_folder(exp, folder, stored, closing, sink):
    """-> (source, store, writer) of the run in ``folder``; ``closing`` ends the latter two."""
    config, is_main_process = exp.config, hosts.is_main_process()
    checkpoints.claim(folder, stored, write=False)
    source, facts = _open_data(exp, "train")  # before anything is written
    changed = checkpoints.claim(folder, stored, write=is_main_process)
    if changed:
        say(f"{folder} has no checkpoint and takes the new config ({'; '.join(changed)})")
    store = checkpoints.Checkpoints(folder, keep=config.checkpoint.keep,
                                    keep_every=config.checkpoint.keep_every,
                                    best=config.eval.best)
    closing.callback(store.close)
    resumed = store.latest() is not None
    checkpoints.claim_data(folder, facts, resumed=resumed, write=is_main_process)
    if not resumed:
        store.try_path()
    writer = run_log.open_writer(folder, enabled=is_main_process,
                                 config_text=json.dumps(stored, indent=2),
                                 sink=sink(folder, stored) if sink and is_main_process else None)
    closing.callback(writer.close)
    return source, store, writer


def _newest(run, folder):
    """-> (step, carry) of the newest checkpoint, or of a new state. The training step is compiled
    meanwhile, where there is one to take."""
    if (run.store.latest() or 0) >= run.training.experiment.config.train.steps:
        return _newest_state(run, folder)
    carry, batch, *_ = run.program.arguments
    with compiled_ahead(run.program.step, carry, batch, np.uint32(0), np.int32(0)) as compiled:
        found = _newest_state(run, folder)
    if compiled:
        say(str(max(compiled, key=lambda program: program.seconds)))
    return found


def _newest_state(run, folder):
    step, training = run.store.latest(), run.training
    if step is None:
        warning = schedule_warning(training.experiment)
        if warning:
            say(f"warning: {warning}")
        if SOURCE not in run.stored:
            return 0, run.program.start(new_state(training))
        step, state = first_state(training, InitFrom(**run.stored[SOURCE]))
        run.store.save(step, training.experiment.runner.to_global(state), run.stored)
        run.store.wait()
        say(f"starting from step {step} of {run.stored[SOURCE]['workdir']}")
        return step, run.program.start(state)
    say(f"resuming {folder} from step {step}")
    state = run.store.restore(step, training.abstract_state, training.experiment.runner)
    return step, run.program.start(state)


def _hooks(run) -> list[Hook]:
    config = run.training.experiment.config
    hooks = [("checkpoint", config.checkpoint.every, functools.partial(_save, run))]
    if run.evaluate and config.eval.every:
        hooks.append(("evaluation", config.eval.every, functools.partial(_evaluate, run)))
    if config.eval.sample_every:
        hooks.append(("samples", config.eval.sample_every, _grid_hook(run)))
    if run.page:
        hooks.append(("page", config.checkpoint.every, functools.partial(_page, run)))
    return [Hook(every, _named_if_long(name, do), last=True) for name, every, do in hooks]


def _named_if_long(name, do):
    """do(step, carry), with a line where training waited long for it."""

    def timed(step, carry):
        start = time.monotonic()
        do(step, carry)
        seconds = time.monotonic() - start
        if seconds >= LONG_S:
            say(f"{name} at step {step:,}: {seconds:.0f} s, not counted in images/s and time left")

    return timed


def _page(run, step, carry):
    del step, carry
    run.writer.page(run.page, str(run.store.folder.parent), run.stored)


def _save(run, step, carry):
    exp = run.training.experiment
    run.watchdog.pause()  # the first save and the last are waited for
    if run.lock is not None:
        run.lock.check()
    run.store.save(step, exp.runner.to_global(run.program.state(carry)), run.stored,
                   verify=step == exp.config.train.steps)


def _save_at_end(run, step, carry):
    """Save where a stop, which all processes agreed on, or an error ended training. Not where one
    process of several has the error: a save is made by all together."""
    if run.stop.requested(step) or hosts.all_arrive(f"save/{step}"):
        _save(run, step, carry)
        run.store.wait()


def _evaluation_is_due(run, step) -> bool:
    """Whether the metrics of ``step`` are wanted and not there yet."""
    config = run.training.experiment.config
    every = config.eval.every if run.evaluate else 0
    return bool(every and step and (step % every == 0 or step == config.train.steps)
                and step not in run.store.scores)


def _evaluate(run, step, carry):
    """Nothing is recorded where a signal cut it short: the restart evaluates the step."""
    if not _before_long_work(run, step):
        return
    exp = run.training.experiment
    values = run.evaluate(exp, run.program.ema_params(carry), step)
    if values is None:
        return
    run.writer.scalars(step, values)
    best = exp.config.eval.best
    if best and best not in values:
        raise UserError(f"config.eval.best={best!r} is not among the metrics: {', '.join(values)}")
    run.store.scored(step, values)


def _before_long_work(run, step) -> bool:
    """Whether to begin it. Where the step is saved, a signal need not wait for its end."""
    run.watchdog.pause()
    if step in run.store.steps():
        run.store.wait()
        run.stop.unsaved(False)
    return not run.stop.requested(step)


def _grid_hook(run):
    """A grid of samples of the averaged weights: the same latents each time, for comparison."""
    exp = run.training.experiment
    num, seed = exp.config.eval.sample_num, np.uint32(exp.config.seed)
    program = programs.sample_program(exp, programs.sampling_chain(exp))

    def draw(step, carry):
        if _before_long_work(run, step):
            warning = checkpoints.start_warning(
                run.store.folder.parent, exp.config.ema.decay, step)
            if warning:
                say(warning)
            index = hosts.local_indices(exp.runner, 0, num)
            images = program(run.program.ema_params(carry), seed, index)
            run.writer.images(step, "samples", hosts.all_rows(exp.runner, images)[:num])

    return draw
