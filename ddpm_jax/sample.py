"""Draw images from a trained run: shards, the files of the result, and pictures of it."""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax import checkpoints, experiment, programs, run_log
from ddpm_jax.config import from_json
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import collect
from ddpm_jax.run_log import say
from ddpm_jax.storage import files, pictures


def load_run(workdir, *, step=None, ema=True, overrides=None, devices=None):
    """-> (Experiment, weights on the devices, step) of a trained run, from its stored config.

    overrides: {'parallel.runner': 'jit', ...}, applied to the stored config. Raises UserError
    where there is no run, no checkpoint, or a damaged one.
    """
    folder = files.resolve(workdir)
    stored = checkpoints.read_config(folder)
    if stored is None:
        raise UserError(f"--workdir={folder}: no run here (no config.json); train first")
    config = from_json(stored)
    config.update_from_flattened_dict(overrides or {})
    devices = jax.devices() if devices is None else devices
    _make_fit(config, len(devices))
    exp = experiment.build(config, devices)
    store = checkpoints.Checkpoints(folder, read_only=True)
    try:
        params, step = store.restore_weights(
            step, exp.abstract_state.params, ema=ema, runner=exp.runner)
    finally:
        store.close()
    return exp, params, step


def _make_fit(config, num_devices):
    """Training's batch need not suit the machine that samples."""
    config.train.batch_size = config.train.clip_replicas = num_devices
    config.train.accumulation = 1


def sample(workdir, out, *, num, step=None, seed=0, batch_size=None, ema=True, sampler=None,
           steps=None, png=False, stop=None) -> bool:
    """Draw ``num`` images into the folder ``out``: samples.npz (arr_0: uint8 NHWC), grid.png,
    progressive.png, and each image as PNG with ``png``.

    Image i depends on the seed and i alone. Resumes where it was cut off. -> False where a signal
    ended it early.
    """
    if num < 1:
        raise UserError(f"--num={num} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} must be in 0 ... 2**32-1")
    exp, params, step = load_run(workdir, step=step, ema=ema)
    runner, config = exp.runner, exp.config
    chain = programs.sampling_chain(exp, name=sampler, steps=steps)
    batch = batch_size or config.sampler.batch_size
    if batch < 1:
        raise UserError(f"--batch_size={batch} must be at least 1")
    out = files.resolve(out)
    request = dict(
        workdir=str(files.resolve(workdir)), step=step, seed=seed, ema=ema, num=num,
        batch_size=batch, sampler=sampler or config.sampler.name, steps=chain.num_steps)
    done = _claim_samples(out, request, num, batch)
    program = programs.sample_program(exp, chain)
    starts = range(0, num, batch)
    bar = run_log.progress(num, 0, name="sample") if jax.process_index() == 0 else None
    for k, start in enumerate(starts):
        if stop is not None and stop.requested(k):
            say(f"stopped; {out} holds {k} of {len(starts)} shards; the same command goes on")
            return False
        count = min(batch, num - start)
        if not done[k]:
            # Always the whole batch's shape: one program for all of them, the last one too.
            images = collect.shared_rows(runner, program(
                params, np.uint32(seed), collect.my_indices(runner, start, batch)))[:count]
            if jax.process_index() == 0:
                _write_npy(_shard(out, k), images)
        if bar:
            bar.update(start + count)
    if bar:
        bar.close()
    frames = _progressive(exp, chain, params, seed)
    if jax.process_index() == 0:
        _finish(out, len(starts), frames, png)
        say(f"{num} images: {out}/samples.npz, grid.png, progressive.png")
    return True


def _shard(out, k):
    return out / "shards" / f"{k:05d}.npy"


def _claim_samples(out, request, num, batch) -> np.ndarray:
    """Which shards are there already, agreed by all processes."""
    problem = ""
    done = np.zeros(-(-num // batch), bool)
    if jax.process_index() == 0:
        problem, done = _look_at_samples(out, request, done)
    if jax.process_count() > 1:
        done = np.asarray(multihost_utils.broadcast_one_to_all(done))
        if multihost_utils.broadcast_one_to_all(np.array(bool(problem))) and not problem:
            problem = "stopped: see the message of process 0"
    if problem:
        raise UserError(problem)
    return done


def _look_at_samples(out, request, done):
    file = out / "request.json"
    try:
        if file.exists():
            old = json.loads(file.read_text())
            wrong = [f"{k}: {old.get(k)!r} -> {v!r}" for k, v in request.items() if old.get(k) != v]
            if wrong:
                return (f"--out={out} holds samples of another request ({'; '.join(wrong)}); take "
                        "another folder"), done
        elif out.exists() and any(out.iterdir()):
            return f"--out={out} is not empty and holds no samples of ddpm; take another", done
        (out / "shards").mkdir(parents=True, exist_ok=True)
        files.write_json(file, request)
    except UserError as error:
        return str(error), done
    except OSError as error:
        return f"cannot write to --out={out}: {error.strerror or error}", done
    finished = (out / "samples.npz").exists()
    return "", np.array([finished or _shard(out, k).exists() for k in range(len(done))])


def _write_npy(path, array):
    with files.whole_file(path) as file:
        np.save(file, array)


def _progressive(exp, chain, params, seed, images=8, frames=10):
    """x_0 predictions of a few images on the way from noise, [images*frames,H,W,C] row by row."""
    every = max(1, -(-chain.num_steps // frames))
    program = programs.progressive_program(exp, chain, every)
    _, kept = program(params, np.uint32(seed), collect.my_indices(exp.runner, 0, images))
    kept = collect.shared_rows(exp.runner, kept)[:images]
    return kept.reshape(-1, *exp.image_shape), kept.shape[1]


def _finish(out, shards, progressive, png):
    final = out / "samples.npz"
    if not final.exists():
        parts = []
        for k in range(shards):
            with _shard(out, k).open("rb") as file:
                parts.append(np.load(file))
        images = np.concatenate(parts)
        with files.whole_file(final) as file:
            np.savez(file, images)
        (out / "shards").rmtree()
    with final.open("rb") as file:
        images = np.load(file)["arr_0"]
    frames, columns = progressive
    if "://" not in str(out):
        pictures.write_png(out / "grid.png", pictures.tile(images[:100]))
        pictures.write_png(out / "progressive.png", pictures.tile(frames, columns=columns))
        if png:
            (out / "png").mkdir(exist_ok=True)
            for i, image in enumerate(images):
                pictures.write_png(out / "png" / f"{i:06d}.png", image)
