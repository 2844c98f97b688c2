"""Checks of this machine, a run's folder and the pod: one finding each, with its remedy.

gcsfs is an optional dependency, imported where a bucket is checked.
"""

import glob
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import hosts, pod
from ddpm_jax.storage import files


class Finding(NamedTuple):
    """ok: True, False, or None for a note that is not an error."""

    name: str
    ok: bool | None
    text: str


def check_python() -> Finding:
    """The packages that the program needs, and equal versions of jax and jaxlib."""
    found = hosts.versions()
    needed = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    absent = [name for name in needed if found[name] == "absent"]
    if absent:
        return Finding("versions", False, f"{', '.join(absent)} not installed: install this "
                       "project's folder or wheel again (pip install PATH)")
    if found["jax"] != found["jaxlib"]:
        return Finding("versions", False, f"jax {found['jax']} with jaxlib {found['jaxlib']}: "
                       "install the same version of both")
    return Finding("versions", True, ", ".join(
        f"{name} {version}" for name, version in found.items() if version != "absent"))


def check_settings() -> Finding:
    """Variables of the environment about numbers or the compiled program: ignored, or in effect."""
    given = {name: f"{name.upper()}={os.environ[name.upper()]}"
             for name in hosts.SETTINGS if name.upper() in os.environ}
    ignored = [text for name, text in given.items() if name in hosts.PINNED]
    found = [text for name, text in given.items() if name not in hosts.PINNED]
    found += [f"{name}={flags}" for name, flags in hosts.settings().items()
              if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") and flags != "none"]
    parts = []
    if found:
        parts.append(f"{', '.join(found)} can change the numbers or the program: unset, or keep "
                     "the same on all hosts and in all commands of a run")
    if ignored:
        parts.append(f"{', '.join(ignored)} ignored: the numbers depend on it")
    return Finding("settings", None if parts else True, "; ".join(parts) or
                   "no JAX_* variable and no XLA flag changes the numbers")


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
    """Free space in `folder`, default the one for temporary files."""
    folder = folder or tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 1e9
    return Finding("disk", free >= need_gb, f"{free:.1f} GB free in {folder}" + (
        "" if free >= need_gb else f", {need_gb} needed: delete something, or set TMPDIR"))


def check_port(port: int, coordinator: str | None, process_id: int) -> Finding:
    """The coordinator's port: free here (process 0), or reachable at `coordinator` (another)."""
    if coordinator and process_id:
        host, port = pod.split_address(
            coordinator if ":" in coordinator else f"{coordinator}:{port}")
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
    """The devices that JAX finds; in a process of its own, for a TPU that another process holds
    blocks the one that opens it."""
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
    unused = platform == "cpu" and glob.glob("/dev/accel*") + glob.glob("/dev/nvidia0")
    return Finding("devices", not unused, f"{count} x {' '.join(kind)} ({platform})" + (
        f", but {unused[0]} is there: pip install 'jax[tpu]=={jax.__version__}' or jax[cuda12]"
        if unused else ""))


def check_workdir(workdir: str) -> list[Finding]:
    """Write, read, list and delete a small file; on gs:// also Orbax' permission on the bucket."""
    findings = []
    if workdir.startswith("gs://"):
        findings.append(_check_bucket(workdir[5:].split("/")[0]))
        if findings[0].name == "workdir":
            return findings
    folder = files.resolve(workdir)
    file = folder / f".ddpm_doctor_{socket.gethostname()}_{os.getpid()}"
    doing = "write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = str(time.time())
        file.write_text(text)
        doing = "read"
        if file.read_text() != text:
            findings.append(Finding("workdir", False,
                                    f"{workdir}: a file read back differs from what was written"))
        doing = "list"
        if file.name not in [p.name for p in folder.iterdir()]:
            findings.append(Finding("workdir", False, f"{workdir}: a new file is not listed"))
        doing = "delete"
        file.unlink()
    except Exception as error:  # OSError, and gcsfs' own, requests' and google.auth's types
        remedy = ("the service account needs roles/storage.objectAdmin, the machine --scopes="
                  "cloud-platform" if workdir.startswith("gs://")
                  else "choose a folder that this user may write to")
        return [*findings, Finding("workdir", False, f"{workdir}: cannot {doing}: "
                                   f"{_first_line(error)[:200]}; {remedy}")]
    return [*findings, Finding("workdir", True, f"{workdir}: write, read, list, delete")]


def _check_bucket(bucket: str) -> Finding:
    try:
        import gcsfs
    except ImportError:
        return Finding("workdir", False, f"gs://{bucket} needs gcsfs: pip install gcsfs")
    try:
        gcsfs.GCSFileSystem().call("GET", "b/{}", bucket)
    except Exception as error:  # as above
        return Finding("bucket", False, bucket_problem(bucket, error))
    return Finding("bucket", True, f"{bucket}: storage.buckets.get granted")


def _first_line(error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def bucket_problem(bucket: str, error) -> str:
    """One line with the remedy. Orbax needs storage.buckets.get, which objectAdmin lacks."""
    text = _first_line(error)[:160]
    if "404" in text or "not found" in text.lower() or isinstance(error, FileNotFoundError):
        return f"gs://{bucket} does not exist: gcloud storage buckets create gs://{bucket}"
    return (f"gs://{bucket}: {text}; gcloud storage buckets add-iam-policy-binding gs://{bucket} "
            "--member=serviceAccount:SA --role=roles/storage.legacyBucketReader (and "
            "roles/storage.objectAdmin)")


def check_pod(joined: pod.Pod) -> Finding:
    """Compares versions on the hosts of a joined pod and sums one number over them.

    Raises UserError naming the host that differs."""
    if joined.num_processes == 1:
        return Finding("pod", None, "this process is alone: no other host is configured here")
    hosts.check_same_everywhere({})
    total = int(np.sum(multihost_utils.process_allgather(jnp.ones((), jnp.int32))))
    return Finding("pod", total == joined.num_processes,
                   f"{total} of {joined.num_processes} hosts answer, with equal versions")
