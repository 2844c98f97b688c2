"""Draw images from a trained run, in resumable shards, and write pictures of them."""

import contextlib
import functools
import hashlib
from collections.abc import Callable

import jax
import numpy as np

from ddpm_jax import checkpoints, programs, run_log
from ddpm_jax.compilation.ahead import compiled_ahead
from ddpm_jax.config import from_json, override
from ddpm_jax.data.labels import by_class, chosen_labels
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import collect
from ddpm_jax.experiment import build_model
from ddpm_jax.formats import npy
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.runners import fetch
from ddpm_jax.run_log import say
from ddpm_jax.start_line import sampling_line
from ddpm_jax.storage import files, pictures
from ddpm_jax.storage.lock import NAME as LOCK_NAME
from ddpm_jax.storage.lock import Lock

FEW_STEPS = 50  # up to here no shorter chain is proposed
PROGRESSIVE_IMAGES, FRAMES = 8, 10  # rows and columns, about, of progressive.png


@contextlib.contextmanager
def opened(workdir, *, step=None, overrides=None, devices=None):
    """-> (Experiment, read) of a run, from its stored config: read(ema) -> (weights on the devices,
    facts), of checkpoint ``step``, or the newest.

    overrides: {'parallel.runner': 'jit', ...}, applied to the stored config. facts: what identifies
    the weights wherever the run lies: step, weights (ema or raw) and their sha256. Raises UserError
    where there is no run, no checkpoint, or (read) a damaged one.
    """
    folder = files.resolve(workdir)
    stored = checkpoints.read_config(folder)
    if stored is None:
        raise UserError(f"--workdir={folder}: no run here (no config.json); train first")
    config = from_json(stored)
    override(config, overrides or {})
    exp = build_model(config, devices)
    with contextlib.closing(checkpoints.Checkpoints(folder, read_only=True)) as store:
        step = store.find(step)

        def read(ema):
            params, _ = store.restore_weights(step, exp.abstract_params, ema=ema, runner=exp.runner)
            if ema and (warning := checkpoints.start_warning(folder, config.ema.decay, step)):
                say(warning)
            return params, {"step": step, "weights": "ema" if ema else "raw",
                            "weights_sha256": _sha256(params)}

        yield exp, read


def load_run(workdir, *, ema=True, **of_opened):
    """-> (Experiment, weights on the devices, step, facts) of a run; see ``opened``."""
    with opened(workdir, **of_opened) as (exp, read):
        params, facts = read(ema)
    return exp, params, facts["step"], facts


def _sha256(params) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(fetch(params)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def sample(workdir, out, *, num, step=None, seed=0, batch_size=None, ema=True, labels=None,
           png=False, stop=None, **chosen) -> bool:
    """Draw ``num`` images into the folder ``out``: samples.npz (arr_0: uint8 NHWC; of a model with
    classes labels int32 [num] too), grid.png, progressive.png, and each image as PNG with ``png``.

    labels: words of ``data.labels.chosen_labels``. chosen: sampler, steps, nodes, guidance, None:
    the run's. Image i depends on the seed, i and its label alone. Shards of an interrupted call are
    used. Returns False where ``stop`` requested it. Raises UserError for a number out of range, a
    label that is no class, a run that cannot be read, or an ``out`` with anything else in it.
    """
    check_numbers(seed, num=num, batch_size=batch_size)
    with opened(workdir, step=step) as (exp, read):
        sampler = chosen.pop("sampler", None)
        chain = programs.sampling_chain(exp, name=sampler, labels=chosen_labels(
            labels, checkpoints.class_names(workdir), exp.model.num_classes, exp.model.no_label),
            **chosen)
        batch = batch_size or min(exp.config.sampler.batch_size, num)
        fewer = ([f"--sampler=dpmpp_2m --steps=20 ({chain.num_steps / 20:.0f} x fewer network "
                  "calls)"] if chain.num_steps > FEW_STEPS else [])
        say(sampling_line(exp, chain.num_steps, batch, fewer))
        program, ahead = _program(exp, chain, batch)
        with ahead:
            params, facts = read(ema)
    out = files.resolve(out)
    request = facts | dict(seed=seed, num=num, batch_size=batch, steps=chain.num_steps,
                           sampler=sampler or exp.config.sampler.name, **chain.choices)
    with claimed(out, request, workdir):
        labels = {name: np.asarray(x) for name, x in chain.condition(np.arange(num)).items()}
        draw_batch = functools.partial(_draw_batch, exp, program, params, seed, batch)
        frames = []  # of the first batch, once it is drawn
        if not draw(out, lambda: _producer(draw_batch, frames), num=num, batch=batch, stop=stop,
                    beside=labels):
            return False
        frames = frames[0] if frames else draw_batch(0)[1]  # the first batch was drawn before
        if hosts.is_main_process():
            images = files.read_npz(out / "samples.npz")["arr_0"]
            shown, across = by_class(labels["labels"]) if labels else (range(min(num, 100)), None)
            pictures.write_png(out / "grid.png", pictures.tile(images[list(shown)], across))
            pictures.write_png(out / "progressive.png", pictures.tile(
                frames.reshape(-1, *exp.image_shape), frames.shape[1]))
            for i, image in enumerate(images if png else ()):
                pictures.write_png(out / "png" / f"{i:06d}.png", image)
    say(f"{num} images: {out}/samples.npz, grid.png, progressive.png")
    return True


def check_numbers(seed, **at_least_one) -> None:
    """Raise UserError for a flag out of range; None is the default."""
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
        if value is not None and value >= 2**31:
            raise UserError(f"--{name}={value} must be below 2**31")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} must be in 0 ... 2**32-1")


@contextlib.contextmanager
def claimed(out, request, workdir):
    """Around work in the folder ``out``, which is this request's alone (a dict, kept in it as
    request.json). UserError where another request or command has it."""
    lock = hosts.on_main_process(_claim, out, request, str(files.resolve(workdir)))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _claim(out, request, workdir) -> Lock:
    with files.storage_errors(out, "write to --out", "choose a folder that you may write to"):
        files.check_no_file(out, "--out")
        if not files.exists(out / "request.json") and set(files.listing(out)) - {LOCK_NAME}:
            raise UserError(f"--out={out} is not empty and holds no samples of ddpm; take another")
        lock = Lock(out, "--out", say)
    try:
        if files.exists(out / "request.json"):
            _check_request(out, files.read_json(out / "request.json"), request, workdir)
        files.write_json(out / "request.json", request)
        _adopt_older_shards(out / "shards")
    except BaseException:
        lock.release()
        raise
    return lock


def _check_request(out, old, request, workdir):
    if "workdir" in old:  # older versions identified the weights by it, step and ema
        kept = {k: v for k, v in request.items() if not k.startswith("weights")}
        request = kept | {"workdir": workdir, "ema": request["weights"] == "ema"}
    if "task" not in old and old["num"] <= min(old["batch_size"], request["batch_size"]):
        # One batch, as it is now.
        old = old | {"batch_size": request["batch_size"]}
    wrong = [f"{k}: {old.get(k)!r} -> {request.get(k)!r}" for k in request | old
             if old.get(k) != request.get(k)]
    if wrong:
        raise UserError(f"--out={out} holds samples of another request ({'; '.join(wrong)}); take "
                        "another folder")


def _adopt_older_shards(folder):
    """Older versions wrote one array a shard, without a name for it."""
    for name in files.listing(folder):
        if name.endswith(".npy"):
            try:
                images = npy.read_npy(files.read_bytes(folder / name), name)
            except UserError:
                images = None  # cut short or damaged: drawn again
            if images is not None:
                files.write_npz(folder / collect.shard_name(int(name[:-4])), {"images": images})
            files.remove(folder / name)


def draw(out, producer: Callable, *, num, batch, stop, name="sample", beside=None) -> bool:
    """Write samples.npz, unless it is there, with all rows of "images" of producer()(start, count)
    as `collect.collect` takes it, and the arrays ``beside``; False where ``stop`` requested it."""
    if hosts.broadcast_json(files.exists(out / "samples.npz")):
        return True
    is_main = hosts.is_main_process()
    bar = run_log.progress(num, name=name) if is_main else None
    found = collect.collect(producer(), num=num, batch=batch, folder=out / "shards", stop=stop,
                            progress=bar and bar.update)
    if found is None:
        say(f"stopped; {out}/shards holds what is done; run the same command to resume")
        return False
    if is_main:
        bar.close()
        files.write_npz(out / "samples.npz", {"arr_0": found["images"]} | (beside or {}))
        files.remove(out / "shards")
    return True


def _program(exp, chain, batch):
    """-> (``programs.progressive_program`` that keeps a few images, context that compiles it where
    it is one program)"""
    runner, every = exp.runner, max(1, -(-chain.num_steps // FRAMES))
    program = programs.progressive_program(exp, chain, every, images=PROGRESSIVE_IMAGES)
    if not runner.loops_on_device:
        return program, contextlib.nullcontext()
    *_, total = hosts.local_slots(runner, batch)
    return program, compiled_ahead(
        program, runner.abstract("replicated", exp.abstract_params), np.uint32(0),
        runner.abstract("batch", jax.ShapeDtypeStruct((total,), np.int32)))


def _draw_batch(exp, program, params, seed, batch, start):
    """-> (uint8 [B,H,W,C], uint8 [images,frames,H,W,C] from noise to image), B at least batch"""
    # Always the whole batch's shape: one program for all of them, the last one too.
    index = hosts.local_indices(exp.runner, start, batch)
    images, frames = program(params, np.uint32(seed), index)
    return (hosts.all_rows(exp.runner, images),
            hosts.all_rows(exp.runner, frames)[:PROGRESSIVE_IMAGES])


def _producer(draw_batch, frames):
    def produce(start, count):
        images, some = draw_batch(start)
        if start == 0:
            frames.append(some)
        return {"images": images[:count]}

    return produce
