"""A dry run of a pod on this machine's CPU: `ddpm train` in several processes, and what they saw.

The loss is a row of LOSSES that also records the examples, timesteps and noise that reach it.
"""

import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from ddpm_jax import train
from ddpm_jax.config import load_config
from ddpm_jax.data import feed
from ddpm_jax.data.datasets import open_source
from ddpm_jax.diffusion.objective import LOSSES
from ddpm_jax.doctor.checks import Finding
from ddpm_jax.training.steps import to_uint8

WORKER = "DDPM_DOCTOR_FOLDER"  # set in the processes of the dry run
LOSS = "recorded"
STEPS = 3
TIMEOUT_S = 540.0
# What is checked does not depend on how well the program is compiled, and that is most of the time.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def dry_config(num_devices: int):
    """The digits with a network of a few thousand weights."""
    config = load_config("digits")
    config.model.update(ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=4)
    config.diffusion.update(num_timesteps=50, loss=LOSS)
    config.data.resident = False  # the case in which each host reads its own share
    config.train.update(steps=STEPS, batch_size=4 * num_devices, clip_replicas=num_devices,
                        log_every=1, steps_per_dispatch=1)
    config.checkpoint.every = STEPS
    config.eval.update(every=STEPS, sample_every=0)
    return config


def checksum(images) -> np.ndarray:
    """uint8 [b,H,W,C] -> uint32 [b], different for different images in all likelihood."""
    flat = np.asarray(images).reshape(len(images), -1).astype(np.uint32)
    weights = np.arange(flat.shape[1], dtype=np.uint32) * np.uint32(2654435761) + np.uint32(1)
    return (flat * weights[None, :]).sum(axis=1, dtype=np.uint32)


def recording(loss, record):
    """`loss` of diffusion/objective.py; record(images uint8, t, noise) of each batch it gets."""
    def recorded(denoise_fn, schedule, x_start, t, noise, **options):
        jax.debug.callback(record, to_uint8(x_start), t, noise)
        return loss(denoise_fn, schedule, x_start, t, noise, **options)

    return recorded


# ---- a process of the dry run ----


def worker(folder: pathlib.Path, stop, watchdog) -> None:
    """Train as `ddpm train` does, and write what this process saw into `folder`."""
    examples, params = [], {}

    def record(images, t, noise):
        parts = np.asarray(noise).reshape(len(t), -1)[:, :4]
        examples.extend(zip(checksum(images).tolist(), np.asarray(t).tolist(), parts.tolist(),
                            strict=True))

    def evaluate(exp, averaged, step):
        for device in jax.local_devices():
            digest = hashlib.sha256()
            for leaf in jax.tree.leaves(averaged):
                shard = next(s for s in leaf.addressable_shards if s.device == device)
                digest.update(np.asarray(shard.data).tobytes())
            params[str(device.id)] = digest.hexdigest()
        return {"dry_run": float(step)}

    LOSSES[LOSS] = recording(LOSSES["mse"], record)
    train.train(dry_config(jax.device_count()), folder / "run", stop=stop, watchdog=watchdog,
                evaluate=evaluate)
    jax.effects_barrier()
    (folder / f"seen_{jax.process_index()}.json").write_text(
        json.dumps({"examples": examples, "params": params}))


# ---- the process that starts them ----


def dry_run(processes: int, devices: int) -> list[Finding]:
    """Start the processes, wait for them, and check what they recorded and wrote."""
    with tempfile.TemporaryDirectory(prefix="ddpm_doctor_") as name:
        folder = pathlib.Path(name)
        codes, texts = _run_processes(folder, processes, devices)
        if any(codes):
            worst = next(i for i, code in enumerate(codes) if code)
            last = (texts[worst].strip().splitlines() or ["no output"])[-1]
            return [Finding("processes", False, f"process {worst} ended with {codes[worst]}: "
                            f"{last[:300]}")]
        seen = [json.loads((folder / f"seen_{i}.json").read_text()) for i in range(processes)]
        started = Finding("processes", True, f"{processes} x {devices} devices trained {STEPS} "
                          f"steps as one pod on {socket.gethostname()}")
        return [started, check_batches(seen, devices), check_draws(seen, devices),
                check_parameters(seen, devices), check_checkpoint(folder, processes),
                check_logs(folder, texts)]


def _run_processes(folder, processes, devices):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    running, ended = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    try:
        for index in range(processes):
            env = {**os.environ, WORKER: str(folder), "JAX_PLATFORMS": "cpu", "DDPM_NPROC":
                   str(processes), "DDPM_PROC": str(index), "DDPM_COORD": f"127.0.0.1:{port}",
                   "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY}"}
            with open(folder / f"log_{index}", "wb") as log:
                running.append(subprocess.Popen(
                    [sys.executable, "-m", "ddpm_jax", "doctor"], env=env, stdout=log,
                    stderr=subprocess.STDOUT))
        deadline = time.monotonic() + TIMEOUT_S
        while any(p.poll() is None for p in running) and time.monotonic() < deadline and not ended:
            if any(p.poll() for p in running):
                deadline = min(deadline, time.monotonic() + 15)  # the others end by themselves
            time.sleep(0.1)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
        signal.signal(signal.SIGTERM, before)
    if ended:
        sys.exit(128 + signal.SIGTERM)
    codes = [p.wait() for p in running]
    return codes, [(folder / f"log_{i}").read_text(errors="replace") for i in range(processes)]


# ---- checks of what they saw: seen[process] = {"examples": [[checksum, t, noise]], "params"} ----


def check_batches(seen, devices) -> Finding:
    """Each process has its own part of every step's batch, and together they have all of it."""
    config = dry_config(len(seen) * devices)
    batch = config.train.batch_size
    source = open_source("digits", "", "train", image_size=config.data.image_size,
                         channels=config.data.channels)
    images, per_host = source.array(), batch // len(seen)
    expected = [checksum(images[feed.batch_indices(config.seed, step, batch, len(source))])
                for step in range(STEPS)]
    problems, so_far = [], set()
    for process, one in enumerate(seen):
        mine = [example[0] for example in one["examples"]]
        part = slice(process * per_host, (process + 1) * per_host)
        if so_far & set(mine):
            problems.append(f"process {process} repeats another's examples")
        if len(mine) != STEPS * per_host:
            problems.append(f"process {process} saw {len(mine)} examples, not {STEPS * per_host}")
        elif sorted(mine) != sorted(np.concatenate([rows[part] for rows in expected]).tolist()):
            problems.append(f"process {process} saw examples that are not its part of the batches")
        so_far |= set(mine)
    return Finding("batches", not problems, problems[0] if problems else
                   f"disjoint and complete: {STEPS} x {batch} examples, {per_host} a host")


def check_draws(seen, devices) -> Finding:
    """Every example has its own noise, and t is not shared between devices."""
    total = STEPS * dry_config(len(seen) * devices).train.batch_size
    noise = [tuple(noise) for one in seen for _, _, noise in one["examples"]]
    times = {t for one in seen for _, t, _ in one["examples"]}
    # Equal draws on each device would leave at most one device's number of different timesteps.
    ok = len(noise) == len(set(noise)) == total and len(times) > min(4 * STEPS, 15)
    return Finding("t and noise", ok, f"{len(set(noise))} different noises of {total}, "
                   f"{len(times)} different t" + (
                       "" if ok else ": devices share their random numbers"))


def check_parameters(seen, devices) -> Finding:
    """The averaged parameters are equal on all devices."""
    digests = {digest for one in seen for digest in one["params"].values()}
    count = sum(len(one["params"]) for one in seen)
    return Finding("parameters", len(digests) == 1 and count == len(seen) * devices,
                   f"{len(digests)} version{'s' * (len(digests) != 1)} on {count} devices after "
                   f"{STEPS} steps")


def check_checkpoint(folder, processes) -> Finding:
    """Every process wrote its part of the checkpoint."""
    root = folder / "run" / "checkpoints" / str(STEPS)
    writers = {p.parts[p.parts.index("d") - 1] for p in root.rglob("ocdbt.process_*/d/*")}
    missing = [i for i in range(processes) if f"ocdbt.process_{i}" not in writers]
    return Finding("checkpoint", root.is_dir() and not missing,
                   f"step {STEPS} is complete, written by {len(writers)} of {processes} hosts")


def check_logs(folder, texts) -> Finding:
    """Process 0 alone prints, and metrics.jsonl has each step once."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
    printing = [i for i, text in enumerate(texts) if "training digits" in text]
    return Finding("logs", printing == [0] and steps == list(range(1, STEPS + 1)),
                   f"processes that log: {printing}; metrics.jsonl has steps {steps}")
