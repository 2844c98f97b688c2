"""Resumable, sharded collection of per-image arrays."""

import hashlib
import json
from collections.abc import Callable

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import hosts
from ddpm_jax.storage import files

LAYOUT = 1       # raise when shards of older code must not be read
PLACES = ("workdir", "samples")  # where a subject lies; its sha256 in the request identifies it
SUM = "sum_"     # arrays of this prefix are added over shards; all others are rows, one an image


def key(request: dict) -> str:
    """Eight characters that identify a request to this version of the code, wherever it lies."""
    content = {name: fact for name, fact in request.items() if name not in PLACES}
    text = json.dumps(content | {"layout": LAYOUT}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def shard_name(k: int) -> str:
    return f"shard-{k:05d}.npz"


def _rows(arrays):
    return max((len(a) for name, a in arrays.items() if not name.startswith(SUM)), default=0)


def _stored(folder, num, batch) -> dict[int, dict]:
    """The shards on disk that have the right number of images; others are made again."""
    here, found = set(files.listing(folder)), {}
    for k, start in enumerate(range(0, num, batch)):
        if shard_name(k) in here:
            try:
                arrays = files.read_npz(files.join(folder, shard_name(k)))
            except UserError:
                continue  # cut short or damaged
            if _rows(arrays) == min(batch, num - start):
                found[k] = arrays
    return found


def check_finite(arrays: dict, start: int, what: str) -> None:
    """Raise UserError naming the first image whose numbers are not finite."""
    for name, a in arrays.items():
        if a.dtype.kind == "f" and not np.all(np.isfinite(a)):
            bad = start + int(np.argmin(np.isfinite(a.reshape(len(a), -1)).all(1)))
            raise UserError(f"{what} {bad}: {name} is not finite; the model diverged, or its "
                            "precision is too low: no metric is written")


def collect(produce: Callable[[int, int], dict], *, num: int, batch: int, folder=None,
            request: dict | None = None, stop=None, what: str = "image",
            progress: Callable[[int], None] | None = None) -> dict | None:
    """All rows of produce(start, count) over 0 ... num-1, on the main process (elsewhere {}).

    produce: called on every process, -> {name: numpy [count, ...] (or fewer rows, where only the
    first images are wanted) or, for a name starting with 'sum_', any shape}.
    Shards found in ``folder`` are not made again; ``request`` is kept beside them as a note.
    Returns None where ``stop`` requested it. Raises UserError where a number is not finite or
    a shard cannot be written.
    """
    is_main = hosts.is_main_process()
    parts = _stored(folder, num, batch) if is_main and folder is not None else {}
    done = set(hosts.broadcast_json(sorted(parts)))
    if is_main and folder is not None and request is not None and not done:
        files.write_json(files.join(folder, "request.json"), request)
    for k, start in enumerate(range(0, num, batch)):
        if stop is not None and stop.requested(k):
            return None
        count = min(batch, num - start)
        if k not in done:
            arrays = produce(start, count)
            check_finite(arrays, start, what)
            if is_main:
                parts[k] = arrays
                if folder is not None:
                    files.write_npz(files.join(folder, shard_name(k)), arrays)
        if progress is not None:
            progress(start + count)
    if not is_main:
        return {}
    shards = [parts[k] for k in sorted(parts)]
    return {name: (np.sum([s[name] for s in shards], axis=0) if name.startswith(SUM)
                   else np.concatenate([s[name] for s in shards])) for name in shards[0]}
