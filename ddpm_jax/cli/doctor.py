"""ddpm doctor [--workdir=DIR] [--pod] | ddpm doctor --processes=4 --devices=2

Check this machine, and --workdir (a folder or gs://bucket/path), before a run: one line each, with
what to do about it. --pod: join the other hosts too and compare versions (launch/tpu.py doctor
does so on every worker).

--processes and --devices: a dry run of a pod on this machine's CPU. Starts the real training
program as that many processes of that many devices and checks that the batches are disjoint and
complete, that every example has its own t and noise, that parameters are equal on all hosts, that
every host writes its part of a checkpoint, and that only process 0 logs.

Exit code: 0 all well, 1 something is wrong.
"""

import glob
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import hosts, pod

WORKER = "DDPM_DOCTOR_FOLDER"  # set in the processes of the dry run
STEPS = 3
# What is checked does not depend on how well the program is compiled, and that is most of the time.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Finding(NamedTuple):
    """ok: True, False, or None for something to know that is no error."""

    name: str
    ok: bool | None
    text: str


def define_flags(define):
    define.workdir()
    define.bool("pod", False, "join the other hosts and compare versions")
    define.integer("processes", 0, "dry run of a pod: processes", lower_bound=0)
    define.integer("devices", 2, "dry run of a pod: devices of each", lower_bound=1)
    define.pod()


def main(values, words):
    from ddpm_jax.cli import common
    common.no_words(words)
    if os.environ.get(WORKER):
        return _worker(values, pathlib.Path(os.environ[WORKER]))
    if values.processes:
        return report(dry_run(values.processes, values.devices))
    findings = [check_python(), *check_lock(), check_disk(), check_port(values), check_devices()]
    if values.workdir:
        findings += check_workdir(values.workdir)
    if values.pod:
        findings.append(check_pod(values))
    return report(findings)


def report(findings) -> int:
    """Prints the findings; 1 if any is wrong."""
    for name, ok, text in findings:
        print(f"{ {True: 'ok   ', False: 'WRONG', None: 'note '}[ok]} {name}: {text}")
    return int(any(ok is False for _, ok, _ in findings))


# ---- this machine ----


def check_python() -> Finding:
    found = hosts.versions()
    needed = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    absent = [name for name in needed if found[name] == "absent"]
    text = ", ".join(f"{name} {version}" for name, version in found.items()
                     if version != "absent")
    if absent:
        return Finding("versions", False,
                       f"{', '.join(absent)} not installed: pip install ddpm_jax")
    if found["jax"] != found["jaxlib"]:
        return Finding("versions", False, f"jax {found['jax']} with jaxlib {found['jaxlib']}: "
                       "install the same version of both")
    return Finding("versions", True, text)


def holders_of_tpu() -> list[int]:
    """Processes that have libtpu.so mapped."""
    pids = []
    for path in glob.glob("/proc/[0-9]*/maps"):
        try:
            if "libtpu.so" in pathlib.Path(path).read_text(errors="replace"):
                pids.append(int(path.split("/")[2]))
        except OSError:
            continue
    return [pid for pid in pids if pid != os.getpid()]


def check_lock(lock=None) -> list[Finding]:
    """A lock file of libtpu without a process behind it stops the next run."""
    lock = lock or os.environ.get("DDPM_TPU_LOCK", "/tmp/libtpu_lockfile")
    if not os.path.exists(lock):
        return []
    pids = holders_of_tpu()
    if pids:
        return [Finding("TPU lock", False, f"the TPU is in use by process {pids[0]}: wait, or end "
                        f"it (kill {pids[0]})")]
    return [Finding("TPU lock", False, f"{lock} is stale: sudo rm {lock}")]


def check_disk(folder=None, need_gb=2) -> Finding:
    folder = folder or tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 1e9
    return Finding("disk", free >= need_gb, f"{free:.1f} GB free in {folder}" + (
        "" if free >= need_gb else f", {need_gb} needed: delete something, or set TMPDIR"))


def check_port(values) -> Finding:
    """The coordinator's port: free here (process 0) or reachable (--coordinator of another)."""
    port = values.coordinator_port or int(os.environ.get("JAX_COORDINATOR_PORT")
                                         or pod.DEFAULT_PORT)
    address = values.coordinator or os.environ.get("DDPM_COORD")
    if address and (values.process_id or os.environ.get("DDPM_PROC", "0")) not in (0, "0"):
        host, port = pod.split_address(address if ":" in address else f"{address}:{port}")
        problem = pod.probe_once(host, port, 3.0)
        refused = problem is not None and "nothing listens" in problem
        return Finding("coordinator", None if refused else problem is None,
                       problem or f"{host}:{port} answers")
    try:
        pod.require_free_port(port)
    except UserError as error:
        return Finding("coordinator port", False, str(error))
    return Finding("coordinator port", True, f"{port} is free on {socket.gethostname()}")


def check_devices(timeout=120) -> Finding:
    """In a process of its own: a TPU that another process holds hangs the one that asks."""
    code = ("import jax; d = jax.local_devices(); "
            "print('DEVICES', len(d), d[0].platform, d[0].device_kind)")
    env = {k: v for k, v in os.environ.items() if k not in ("DDPM_COORD", "DDPM_NPROC")}
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        return Finding("devices", False, f"no answer in {timeout} s: on a slice all hosts must "
                       "start together (--pod), and no other process may hold the TPU")
    lines = [line for line in done.stdout.splitlines() if line.startswith("DEVICES")]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Finding("devices", False, f"{last[:200]}")
    _, count, platform, *kind = lines[0].split()
    note = platform == "cpu" and glob.glob("/dev/accel*") + glob.glob("/dev/nvidia0")
    return Finding("devices", not note, f"{count} x {' '.join(kind)} ({platform})" + (
        f", but {note[0]} is there: pip install 'ddpm_jax[tpu]' or [cuda12]" if note else ""))


# ---- the run's folder ----


def check_workdir(workdir: str) -> list[Finding]:
    """Write, read, list and delete a small file; on gs:// also what Orbax asks of the bucket."""
    from ddpm_jax.storage import files
    findings = []
    if workdir.startswith("gs://"):
        bucket = workdir[5:].split("/")[0]
        try:
            import gcsfs
        except ImportError:
            return [Finding("workdir", False, f"{workdir} needs gcsfs: pip install "
                            "'ddpm_jax[gcs]'")]
        try:
            gcsfs.GCSFileSystem().call("GET", "b/{}", bucket)
            findings.append(Finding("bucket", True, f"{bucket}: storage.buckets.get granted"))
        except Exception as error:  # gcsfs raises its own, requests' and google.auth's types
            findings.append(Finding("bucket", False, bucket_problem(bucket, error)))
    folder = files.resolve(workdir)
    file = folder / f".ddpm_doctor_{socket.gethostname()}_{os.getpid()}"
    doing = "write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = str(time.time())
        file.write_text(text)
        doing = "read"
        if file.read_text() != text:
            findings.append(Finding("workdir", False, f"{workdir}: what was read is not what was "
                                    "written"))
        doing = "list"
        if file.name not in [p.name for p in folder.iterdir()]:
            findings.append(Finding("workdir", False, f"{workdir}: a new file is not listed"))
        doing = "delete"
        file.unlink()
    except Exception as error:  # as above, and OSError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        remedy = ("the service account needs roles/storage.objectAdmin, the machine --scopes="
                  "cloud-platform" if workdir.startswith("gs://")
                  else "choose a folder that this user may write to")
        return [*findings, Finding("workdir", False, f"{workdir}: cannot {doing}: {reason}; "
                                   f"{remedy}")]
    return [*findings, Finding("workdir", True, f"{workdir}: write, read, list, delete")]


def bucket_problem(bucket: str, error) -> str:
    """One line with the remedy. Orbax needs storage.buckets.get, which objectAdmin lacks."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    if "404" in text or "not found" in text.lower() or isinstance(error, FileNotFoundError):
        return f"gs://{bucket} does not exist: gcloud storage buckets create gs://{bucket}"
    return (f"gs://{bucket}: {text}; gcloud storage buckets add-iam-policy-binding gs://{bucket} "
            "--member=serviceAccount:SA --role=roles/storage.legacyBucketReader (and "
            "roles/storage.objectAdmin)")


def check_pod(values) -> Finding:
    """Joins, compares versions (UserError names the host that differs), adds one number up."""
    joined = pod.initialize(values)
    if joined.num_processes == 1:
        return Finding("pod", None, "this process is alone: no other host is configured here")
    hosts.check_same_everywhere({})
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils
    total = int(np.sum(multihost_utils.process_allgather(jnp.ones((), jnp.int32))))
    return Finding("pod", total == joined.num_processes,
                   f"{total} of {joined.num_processes} hosts answer, with equal versions")


# ---- dry run of a pod ----


def dry_config(num_devices: int):
    """The digits with a network of a few thousand weights."""
    from ddpm_jax.config import load_config
    config = load_config("digits")
    config.model.update(ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=4)
    config.diffusion.num_timesteps = 50
    config.data.resident = False  # the case in which each host reads its own share
    config.train.update(steps=STEPS, batch_size=4 * num_devices, clip_replicas=num_devices,
                        log_every=1, steps_per_dispatch=1)
    config.checkpoint.every = STEPS
    config.eval.update(every=STEPS, sample_every=0)
    return config


def checksum(images, xp):
    """uint8 [b,H,W,C] -> uint32 [b], different for different images in all likelihood."""
    flat = images.reshape(len(images), -1).astype(xp.uint32)
    weights = xp.arange(flat.shape[1], dtype=xp.uint32) * xp.uint32(2654435761) + xp.uint32(1)
    return (flat * weights[None, :]).sum(axis=1, dtype=xp.uint32)


def _worker(values, folder) -> int:
    """One process of the dry run: the real `ddpm train`, with ears in the step."""
    from ddpm_jax.cli import common
    stop, watchdog = common.join(values)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ddpm_jax import experiment, train
    from ddpm_jax.training import steps
    heard = []
    build, draw = experiment.build, steps.draw

    def hear(kind, *values):
        heard.append([kind, *[np.asarray(v).tolist() for v in values]])

    def listening_draw(keys, **shape):
        draws = draw(keys, **shape)
        jax.debug.callback(lambda *v: hear("draw", *v), draws.t, draws.noise.reshape(
            len(draws.t), -1)[:, :4])
        return draws

    def listening_build(config, *args, **kwargs):
        exp = build(config, *args, **kwargs)

        def train_step(state, images, key):
            first = (0 if exp.runner.axis_name is None
                     else jax.lax.axis_index(exp.runner.axis_name) * len(images))
            jax.debug.callback(lambda *v: hear("batch", *v), state.step, jnp.int32(first),
                               checksum(images, jnp))
            return exp.train_step(state, images, key)

        return exp._replace(train_step=train_step)

    experiment.build, steps.draw = listening_build, listening_draw
    params = {}

    def evaluate(exp, averaged, step):
        import hashlib
        for device in jax.local_devices():
            digest = hashlib.sha256()
            for leaf in jax.tree.leaves(averaged):
                shard = next(s for s in leaf.addressable_shards if s.device == device)
                digest.update(np.asarray(shard.data).tobytes())
            params[str(device.id)] = digest.hexdigest()
        return {"dry_run": float(step)}

    config = dry_config(jax.device_count())
    train.train(config, folder / "run", stop=stop, watchdog=watchdog, evaluate=evaluate)
    jax.effects_barrier()
    (folder / f"heard_{jax.process_index()}.json").write_text(
        json.dumps({"heard": heard, "params": params}))
    return 0


def dry_run(processes: int, devices: int, timeout: float = 540.0) -> list[Finding]:
    """Starts the processes, waits, and judges what they wrote."""
    with tempfile.TemporaryDirectory(prefix="ddpm_doctor_") as name:
        folder = pathlib.Path(name)
        codes, texts = _start(folder, processes, devices, timeout)
        if any(codes):
            worst = next(i for i, code in enumerate(codes) if code)
            last = (texts[worst].strip().splitlines() or ["no output"])[-1]
            return [Finding("processes", False, f"process {worst} ended with {codes[worst]}: "
                            f"{last[:300]}")]
        heard = [json.loads((folder / f"heard_{i}.json").read_text()) for i in range(processes)]
        first = Finding("processes", True, f"{processes} x {devices} devices trained {STEPS} "
                        f"steps as one pod on {socket.gethostname()}")
        return [first, *judge(heard, processes, devices), judge_checkpoint(folder, processes),
                judge_logs(folder, texts)]


def _start(folder, processes, devices, timeout):
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
        deadline = time.monotonic() + timeout
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


def judge(heard, processes, devices) -> list[Finding]:
    """Batches, draws and parameters, from what every process heard."""
    import numpy as np

    from ddpm_jax.data import feed
    from ddpm_jax.data.datasets import open_source
    config = dry_config(processes * devices)
    batch = config.train.batch_size
    source = open_source("digits", "", "train", image_size=config.data.image_size,
                         channels=config.data.channels)
    images = source.array()
    problems, per_host = [], batch // processes
    for step in range(STEPS):
        expected = checksum(images[feed.batch_indices(config.seed, step, batch, len(source))], np)
        got = {}
        for process, one in enumerate(heard):
            mine = {}
            for kind, *values in one["heard"]:
                if kind == "batch" and values[0] == step:
                    mine.update({values[1] + i: c for i, c in enumerate(values[2])})
            if len(mine) != per_host:
                problems.append(f"process {process} saw {len(mine)} examples at step {step}")
            if set(mine) & set(got):
                problems.append(f"step {step}: process {process} repeats another's examples")
            got.update(mine)
        if [got.get(i) for i in range(batch)] != expected.tolist():
            problems.append(f"step {step}: the hosts together do not hold the batch")
    findings = [Finding("batches", not problems, problems[0] if problems else
                        f"disjoint and complete: {STEPS} x {batch} examples, {per_host} a host")]
    noise = [tuple(row) for one in heard for kind, *values in one["heard"] if kind == "draw"
             for row in values[1]]
    times = [t for one in heard for kind, *values in one["heard"] if kind == "draw"
             for t in values[0]]
    total = STEPS * batch
    distinct = len(noise) == len(set(noise)) == total
    # Equal draws on each device would leave at most a device's share of different times.
    spread = len(set(times)) > min(4 * STEPS, 15)
    findings.append(Finding(
        "t and noise", distinct and spread,
        f"{len(set(noise))} different noises of {total}, {len(set(times))} different t" + (
            "" if distinct and spread else ": devices share their random numbers")))
    digests = {d for one in heard for d in one["params"].values()}
    count = sum(len(one["params"]) for one in heard)
    findings.append(Finding(
        "parameters", len(digests) == 1 and count == processes * devices,
        f"{len(digests)} version{'s' * (len(digests) != 1)} on {count} devices after {STEPS} "
        "steps"))
    return findings


def judge_checkpoint(folder, processes) -> Finding:
    root = folder / "run" / "checkpoints" / str(STEPS)
    writers = {p.parts[p.parts.index("d") - 1] for p in root.rglob("ocdbt.process_*/d/*")}
    missing = [i for i in range(processes) if f"ocdbt.process_{i}" not in writers]
    return Finding("checkpoint", root.is_dir() and not missing,
                   f"step {STEPS} is complete, written by {len(writers)} of {processes} hosts")


def judge_logs(folder, texts) -> Finding:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]
    talkers = [i for i, text in enumerate(texts) if "training digits" in text]
    return Finding("logs", talkers == [0] and steps == list(range(1, STEPS + 1)),
                   f"processes that log: {talkers}; metrics.jsonl has steps {steps}")
