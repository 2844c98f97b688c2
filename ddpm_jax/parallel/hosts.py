"""Agree, broadcast, gather: what the processes of a pod exchange outside compiled programs."""

import importlib.metadata
import json
import os
import platform
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.errors import UserError
from ddpm_jax.parallel.exit_codes import pod_state

SETTINGS = ("jax_threefry_partitionable", "jax_default_prng_impl", "jax_enable_custom_prng",
            "jax_random_seed_offset", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion",
            "jax_enable_x64", "jax_default_matmul_precision", "jax_softmax_custom_jvp",
            "jax_allow_f16_reductions", "jax_use_direct_linearize", "jax_disable_jit",
            "jax_debug_nans", "jax_debug_infs", "jax_enable_checks", "jax_optimization_level",
            "jax_use_shardy_partitioner")
# What the numbers of a run depend on. The environment does not change it.
PINNED = {"jax_threefry_partitionable": True, "jax_default_prng_impl": "threefry2x32",
          "jax_enable_custom_prng": False, "jax_random_seed_offset": 0, "jax_enable_x64": False,
          "jax_numpy_dtype_promotion": "standard", "jax_default_matmul_precision": None,
          "jax_softmax_custom_jvp": False}
# Flags that may differ: they are about one host, or about what it writes.
LOCAL_FLAGS = ("--xla_force_host_platform_device_count", "--xla_dump", "--xla_gpu_cuda_data_dir")
_checks = []  # one entry for every check_same_everywhere of this process


def versions() -> dict[str, str]:
    """What must be the same on every host: Python and the packages that make the program."""
    facts = {"python": platform.python_version()}
    for name in ("ddpm_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint",
                 "numpy", "grain"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "absent"
    return facts


def settings() -> dict[str, str]:
    """JAX's and XLA's settings that change numbers or the compiled program."""
    facts = {name: str(getattr(jax.config, name, "absent")) for name in SETTINGS}
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        words = [word for word in os.environ.get(name, "").split()
                 if not word.startswith(LOCAL_FLAGS)]
        facts[name] = " ".join(sorted(words)) or "none"
    return facts


def pin_settings() -> list[str]:
    """Give JAX the settings in PINNED; -> those that the environment had changed."""
    changed = []
    for name, value in PINNED.items():
        now = getattr(jax.config, name, value)
        if getattr(now, "value", now) != value:  # an enumeration or the value itself
            jax.config.update(name, value)
            changed.append(name.upper())
    return changed


def check_same_everywhere(facts: dict[str, str], patience_s: int = 300):
    """Compares `facts`, `versions` and `settings` with those of process 0; call on every process.

    patience_s: how long the slowest may take to come here (a dead one is known by its heartbeat).

    Goes through the coordination service, so it needs no device and no compiled program: hosts
    that differ would not compile the same program.

    Raises:
      UserError: on every process, naming the hosts that differ, the fact and both values.
    """
    client = pod_state().client
    if client is None:
        return
    state = pod_state()
    _checks.append(0)
    root = f"ddpm/facts/{len(_checks)}"
    mine = {**versions(), **settings(), **{name: str(value) for name, value in facts.items()}}
    if state.process_id == 0:
        client.key_value_set(f"{root}/first", json.dumps(mine))
    first = json.loads(client.blocking_key_value_get(f"{root}/first", 1000 * patience_s))
    wrong = [f"{name}={mine.get(name, 'absent')} (process 0 has {first.get(name, 'absent')})"
             for name in sorted({*mine, *first}) if mine.get(name) != first.get(name)]
    if wrong:
        client.key_value_set(
            f"{root}/differs/{state.process_id}",
            f"process {state.process_id} on {socket.gethostname()}: {', '.join(wrong)}")
    client.wait_at_barrier(f"{root}/all", 1000 * patience_s)
    differs = sorted(client.key_value_dir_get(f"{root}/differs/"))
    if differs:
        lines = [value for _, value in differs]
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise UserError("hosts differ: " + "; ".join(lines[:4]) + more
                        + "; the same wheels, settings, config and data belong on every host")


def is_main_process() -> bool:
    """Whether this is process 0, which writes the files and prints."""
    return jax.process_index() == 0


def broadcast_json(value):
    """Process 0's value, as JSON carries it, on every process; blocks until process 0 is here."""
    if jax.process_count() == 1:
        return value
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(raw), np.int32)))
    buffer = np.zeros(size, np.uint8)
    buffer[:min(size, len(raw))] = raw[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def on_main_process(function, *args):
    """function(*args) on process 0 and its result there, None elsewhere; blocks until it returned.

    Its UserError is raised on every process.
    """
    result = problem = None
    if is_main_process():
        try:
            result = function(*args)
        except UserError as error:
            problem = str(error)
    problem = broadcast_json(problem)
    if problem is not None:
        raise UserError(problem)
    return result


def all_arrive(name: str, timeout_s: float = 10.0) -> bool:
    """Whether every process comes to the point called ``name`` within the time."""
    client = pod_state().client
    if client is None:
        return True
    try:
        client.wait_at_barrier(f"ddpm/{name}", int(1000 * timeout_s))
    except Exception:  # jaxlib's own types; the barrier is not used again
        return False
    return True


def broadcast_arrays(tree):
    """Process 0's arrays (a pytree; the same shapes and dtypes on every process) as numpy."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def gather_rows(rows) -> np.ndarray:
    """The rows [n, ...] of every process, one after another: [processes * n, ...] on each."""
    if jax.process_count() == 1:
        return np.asarray(rows)
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def all_rows(runner, result) -> np.ndarray:
    """All rows of a 'batch' result of ``runner``'s program, in order, on every process."""
    return gather_rows(runner.local(result))


def local_slots(runner, batch: int) -> tuple[int, int, int]:
    """(first, count, total): this process's part of a batch rounded up to all devices."""
    total = -(-batch // runner.num_devices) * runner.num_devices
    count = total // jax.process_count()
    return jax.process_index() * count, count, total


def local_indices(runner, start: int, batch: int):
    """Global indices start ... start+batch-1, rounded up to all devices, on the devices: int32."""
    first, count, _ = local_slots(runner, batch)
    return runner.put("batch", np.arange(start + first, start + first + count, dtype=np.int32))
