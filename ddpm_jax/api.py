"""Use from Python: ``import ddpm_jax as ddpm`` gives ``load``, ``Run``, ``load_config``, ``train``.

Nothing here reads the command line. The signal handlers that ``train`` sets are put back when it
returns, and outside the main thread it sets none.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ddpm_jax import config as configs
from ddpm_jax import programs
from ddpm_jax import train as training
from ddpm_jax.compilation.cache import enable_compilation_cache
from ddpm_jax.diffusion import Bound, Schedule
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import monitor, run_page
from ddpm_jax.experiment import Experiment, denoise_fn
from ddpm_jax.interchange import importing
from ddpm_jax.interchange.diffusers.read import AVERAGED, READERS, WEIGHTS
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.watchdog import Watchdog
from ddpm_jax.run_log import say
from ddpm_jax.sample import load_run
from ddpm_jax.storage import files
from ddpm_jax.training.steps import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained model. experiment: its config, image_shape, network (``model``) and devices;
    params: the weights, on the devices; facts: where they are from."""

    experiment: Experiment
    params: Any
    facts: dict
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def config(self):
        """The run's ConfigDict, frozen."""
        return self.experiment.config

    @property
    def schedule(self) -> Schedule:
        """The tables of the chain that the network was trained on, float32 [T] each."""
        return self.experiment.schedule

    @functools.cached_property
    def denoise_fn(self) -> Callable:
        """(x_t [B,H,W,C] in the units of images in [-1,1], t int [B]) -> the network's output,
        [B,H,W,C] or with learned variances [B,H,W,2C]; config.diffusion.predict names what it is.
        Compiled by each shape; may be called in other compiled functions."""
        network = jax.jit(lambda params, *args, **condition: denoise_fn(
            self.experiment, params)(*args, **condition))
        return functools.partial(network, self.params)

    def sample(self, num: int, *, seed=0, sampler=None, steps=None, nodes=None, guidance=None,
               labels=None, batch_size=None):
        """``num`` images, uint8 [num,H,W,C], as `ddpm sample` draws them: image i depends on
        (seed, i) and its label alone, up to rounding.

        sampler, steps, nodes, guidance, batch_size: default: those of config.sampler. labels: of a
        model with classes, numbers of those of images 0, 1, ..., used again and again; default:
        each class in turn. Raises UserError where they do not fit each other or the model.
        """
        choices = dict(name=sampler, steps=steps, nodes=nodes, guidance=guidance,
                       labels=labels and tuple(labels))
        program = self._program(("sample", *choices.items()), lambda: programs.sample_program(
            self.experiment, programs.sampling_chain(self.experiment, **choices)))
        return self._draw(num, seed, batch_size, program)

    def sample_progressive(self, num: int, *, frames=10, seed=0, sampler=None, steps=None,
                           nodes=None, batch_size=None):
        """As ``sample``, with the x_0 predicted on the way, from noise to image: -> (uint8
        [num,H,W,C], uint8 [num,K,H,W,C]), K about ``frames``."""
        choices = dict(name=sampler, steps=steps, nodes=nodes)
        chain = programs.sampling_chain(self.experiment, **choices)
        every = max(1, -(-chain.num_steps // frames))
        program = self._program(
            ("progressive", every, *choices.items()),
            lambda: programs.progressive_program(self.experiment, chain, every))
        return self._draw(num, seed, batch_size, program)

    def bits_per_dim(self, images, labels=None, *, seed=0, batch_size=None) -> np.ndarray:
        """The variational bound of each image, bits/dim [N]; its mean over a split, in order, is
        bpd_SPLIT of `ddpm evaluate`. images: uint8 [N,H,W,C]; labels: int [N], of a model with
        classes."""
        return self.bound(images, labels, seed=seed, batch_size=batch_size).total

    def bound(self, images, labels=None, *, seed=0, batch_size=None) -> Bound:
        """As ``bits_per_dim``, with the term of each timestep, [N,T], the prior's, [N], and the
        squared errors (see ``diffusion.Bound``)."""
        exp, images = self.experiment, np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != exp.image_shape or not len(images):
            raise UserError(f"images are {images.dtype} {list(images.shape)}; this run takes uint8 "
                            f"[N, {', '.join(map(str, exp.image_shape))}]")
        classes = exp.model.num_classes
        if (labels is None) != (classes == 0) or classes and np.shape(labels) != (len(images),):
            raise UserError(f"labels: this run has {classes} classes and takes "
                            f"{'a label for each image' if classes else 'no labels'}")
        program = self._program(("bound",), lambda: programs.bound_program(exp))
        num, batch = len(images), self._batch(len(images), batch_size)
        first, count, _ = hosts.local_slots(exp.runner, batch)
        parts = []
        for start in range(0, num, batch):
            end = min(start + batch, num)
            index = np.minimum(np.arange(first, first + count, dtype=np.int32) + start, end - 1)
            some = np.asarray(labels, np.int32)[index] if classes else None
            found = program(self.params, np.uint32(seed), exp.runner.put(
                "batch", Batch(images[index], some)), exp.runner.put("batch", index))
            parts.append([hosts.all_rows(exp.runner, rows)[:end - start] for rows in found])
        return Bound(*map(np.concatenate, zip(*parts, strict=True)))

    def _program(self, key, build):
        if key not in self._programs:
            self._programs[key] = build()
        return self._programs[key]

    def _batch(self, num, batch_size) -> int:
        batch = batch_size or self.config.sampler.batch_size
        if num < 1 or batch < 1:
            raise UserError(f"num={num}, batch_size={batch}: both must be at least 1")
        return min(num, batch)

    def _draw(self, num, seed, batch_size, program):
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed} must be in 0 ... 2**32-1")
        runner, batch = self.experiment.runner, self._batch(num, batch_size)
        parts = [jax.tree.map(
            lambda rows: hosts.all_rows(runner, rows)[:batch],
            program(self.params, np.uint32(seed), hosts.local_indices(runner, start, batch)))
            for start in range(0, num, batch)]
        return jax.tree.map(lambda *rows: np.concatenate(rows)[:num], *parts)


# ---- from a folder to a Run ----


def load(path, *, step=None, ema=True, config=None) -> Run:
    """The model in ``path``: a run's folder (also gs://BUCKET/RUN), a diffusers folder, weights
    file or hf://OWNER/NAME, or a TensorFlow checkpoint of the paper's code (its prefix, .index
    file or folder). Turns JAX's compilation cache on, as the commands do.

    step: a run's checkpoint, default the newest; ema: averaged or raw weights; config: name, file
    or ConfigDict, for files that do not name their own: an official checkpoint needs one. Raises
    UserError for what is missing, damaged or does not fit.
    """
    path = os.path.expanduser(os.fspath(path))
    enable_compilation_cache()
    config = _config(config)
    imported = next((read for is_one, read in _IMPORTS if is_one(path)), None)
    if imported is None:
        if config is not None:
            raise UserError(f"config: {path} is no diffusers or official model, and a run has its "
                            "own config; leave it out")
        exp, params, _, facts = load_run(path, step=step, ema=ema)
        return Run(exp, params, facts | {"workdir": str(files.resolve(path))})
    if step is not None:
        raise UserError(f"step={step}: {path} is not a run, which alone has several checkpoints")
    exp, params, facts = imported(path, config, ema)
    return Run(exp, exp.runner.put("replicated", params), facts)


def _is_diffusers(path) -> bool:
    place = pathlib.Path(path)
    return path.startswith("hf://") or place.is_file() and place.suffix in READERS or (
        any((place / name).exists() for name in ("unet", AVERAGED, "model_index.json"))
        or any(place.glob(f"{WEIGHTS}*")))


def _is_official(path) -> bool:
    place = pathlib.Path(path)
    return (path.endswith(".index") or pathlib.Path(f"{path}.index").is_file()
            or place.is_dir() and any(place.glob("*.index")))


def _load_diffusers(path, config, ema):
    if not ema:
        raise UserError(f"ema=False: {path} has one set of weights; leave it out")
    return *importing.read_diffusers(path, config), {"origin": path}


def _load_official(path, config, ema):
    if config is None:
        raise UserError(f"{path} is a TensorFlow checkpoint, which does not name its config: add "
                        'config="cifar10", for example')
    exp, params, step = importing.read_official(path, config, ema=ema)
    return exp, params, {"origin": path, "step": step, "weights": "ema" if ema else "raw"}


_IMPORTS = ((_is_diffusers, _load_diffusers), (_is_official, _load_official))


# ---- training ----


def load_config(name, fields: dict | None = None):
    """A packaged config, a config file or a run's config.json, with ``fields`` changed:
    {"train.steps": 500}. -> ConfigDict. Raises UserError for a field or a value that no config can
    have."""
    config = configs.load_with_fields(os.path.expanduser(os.fspath(name)), fields or {})
    try:
        configs.override(config, fields or {})
    except (TypeError, ValueError) as error:
        raise UserError(f"config {name}: {error}") from None
    return config


def _config(given):
    return load_config(given) if isinstance(given, str | os.PathLike) else given


def train(config, workdir, *, init_from=None, init_optimizer=False) -> Run:
    """Train the run in ``workdir`` up to config.train.steps, from its newest checkpoint if any, as
    `ddpm train` does. -> the trained model.

    config: ConfigDict, or what ``load_config`` takes; init_from: the folder of another run, from
    whose newest weights (init_optimizer: and optimizer) a new run starts. An interrupt (Ctrl-C, a
    notebook's stop button) saves, then raises KeyboardInterrupt; the same call resumes. Raises
    UserError.
    """
    enable_compilation_cache()
    source = init_from and training.InitFrom(os.fspath(init_from), None, init_optimizer)
    with _interrupts() as stop:
        done = training.train(
            _config(config), workdir, stop=stop, watchdog=Watchdog(0.0),
            evaluate=monitor.periodic(stop=stop), check=monitor.check, init_from=source,
            page=run_page.write)
    if not done:
        raise KeyboardInterrupt(f"{workdir} is saved; the same call resumes")
    return load(workdir)


class _Interrupt:
    """The stop object of the loops: requested after a first SIGINT; a second one is raised."""

    def __init__(self):
        self._noticed = False

    def on_signal(self, number, frame):
        if self._noticed:
            raise KeyboardInterrupt
        self._noticed = True
        say("interrupted: stopping at the next step; a second interrupt leaves at once")

    def requested(self, step) -> bool:
        return self._noticed

    def unsaved(self, value):
        """Nothing is left without a return to the caller."""


@contextlib.contextmanager
def _interrupts():
    """-> _Interrupt, which gets SIGINT inside; in the main thread of a single process alone."""
    stop = _Interrupt()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, stop.on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
