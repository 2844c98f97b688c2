"""Shards of a long evaluation: made once each, kept whole, gone on with after a stop."""

import hashlib
import json

import jax
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

LAYOUT = 1       # raise when shards of older code must not be read
SUM = "sum_"     # arrays of this prefix are added over shards; all others are rows, one an image


def key(request: dict) -> str:
    """Eight characters that name a request to this version of the code."""
    text = json.dumps(request | {"layout": LAYOUT}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _name(k):
    return f"shard-{k:05d}.npz"


def _rows(arrays):
    return max((len(a) for name, a in arrays.items() if not name.startswith(SUM)), default=0)


def _is_whole(path, count):
    try:
        return _rows(files.read_npz(path)) == count
    except UserError:
        return False      # cut short or damaged: made again


def finished(folder, num: int, batch: int) -> np.ndarray:
    """Which shards are on disk with the right number of images; the same on all processes."""
    count = -(-num // batch)
    done = np.zeros(count, bool)
    if folder is not None and jax.process_index() == 0:
        here = set(files.listing(folder))
        for k in range(count):
            path = files.join(folder, _name(k))
            done[k] = _name(k) in here and _is_whole(path, min(batch, num - k * batch))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        done = np.asarray(multihost_utils.broadcast_one_to_all(done))
    return done


def check_finite(arrays: dict, start: int, what: str) -> None:
    """UserError naming the first image whose numbers are not finite."""
    for name, a in arrays.items():
        if a.dtype.kind == "f" and not np.all(np.isfinite(a)):
            bad = start + int(np.argmin(np.isfinite(a.reshape(len(a), -1)).all(1)))
            raise UserError(f"{what} {bad}: {name} is not finite; the model diverged, or its "
                            "precision is too low: no metric is written")


def collect(produce, *, num: int, batch: int, folder=None, request=None, stop=None,
            what: str = "image", progress=None) -> dict | None:
    """All rows of produce(start, count) over 0 ... num-1, on process 0 (elsewhere {}).

    produce: on every process, -> {name: numpy [count, ...] (or fewer rows, where only the first
    images are wanted) or, for a name starting with 'sum_', any shape}.
    Shards found in ``folder`` are not made again. -> None where `stop` asked to leave.
    """
    first = jax.process_index() == 0
    done = finished(folder, num, batch)
    if folder is not None and first and not done.any():
        files.write_json(files.join(folder, "request.json"), request or {})
    parts = []
    for k, start in enumerate(range(0, num, batch)):
        if stop is not None and stop.requested(k):
            return None
        count = min(batch, num - start)
        path = None if folder is None else files.join(folder, _name(k))
        if done[k]:
            arrays = files.read_npz(path) if first else {}
        else:
            arrays = produce(start, count)
            check_finite(arrays, start, what)
            if path is not None and first:
                files.write_npz(path, arrays)
        if first:
            parts.append(arrays)
        if progress is not None:
            progress(start + count)
    if not first:
        return {}
    return {name: (np.sum([p[name] for p in parts], axis=0) if name.startswith(SUM)
                   else np.concatenate([p[name] for p in parts])) for name in parts[0]}


def shared_rows(runner, result) -> np.ndarray:
    """A 'batch' result of a runner's program: all rows, on every process, in order."""
    share = runner.local(result)
    if jax.process_count() == 1:
        return share
    from jax.experimental import multihost_utils
    return np.asarray(multihost_utils.process_allgather(share, tiled=True))


def my_slots(runner, batch: int) -> tuple[int, int, int]:
    """(first, count, total): this process's share of a batch rounded up to all devices."""
    total = -(-batch // runner.num_devices) * runner.num_devices
    share = total // jax.process_count()
    return jax.process_index() * share, share, total


def my_indices(runner, start: int, batch: int):
    """Global indices start ... start+batch-1, rounded up to all devices, on the devices: int32."""
    first, share, _ = my_slots(runner, batch)
    return runner.put("batch", np.arange(start + first, start + first + share, dtype=np.int32))
