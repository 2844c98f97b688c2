"""Features of images, sampled or given: compiled programs and resumable collections."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import programs
from ddpm_jax.data.datasets import open_source, read_rows
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import collect, extract, protocols, small_cnn
from ddpm_jax.evaluation.options import OFFLINE_REALS, REAL, REAL_BATCH, StoppedError
from ddpm_jax.parallel import hosts
from ddpm_jax.storage import files


class Subject(NamedTuple):
    """Whose images. draw: (extractor, quantise) -> produce(start, count) of `collect.collect`;
    facts: what the images depend on; sources: {split: Source} of real images, may be empty."""
    draw: Callable
    facts: dict
    num: int | None
    batch: int
    image_shape: tuple
    sources: dict
    runner: Any


def _named(build, program, names, memory, key):
    """build(program, kinds of its results) -> compiled(*args) -> {name: batch array}; kept in
    memory under key, so that a program built again at the next cadence is not traced again."""
    key = (*key, *names)
    if key not in memory:
        single = len(names) == 1      # a single result is not a tuple for Runner.compile
        memory[key] = build((lambda *a: program(*a)[0]) if single else program,
                            ("batch",) * len(names))
    compiled = memory[key]

    def run(*values):
        out = compiled(*values)
        return dict(zip(names, out if len(names) > 1 else (out,), strict=True))

    return run


def rows_of(runner, out, count):
    return {name: hosts.all_rows(runner, a)[:count] for name, a in out.items()}


def image_features(runner, extractor, memory):
    """-> features(images uint8 [B,H,W,C], on the devices) -> {name: batch array}."""
    def program(weights, images):
        return extractor.apply(weights, images.astype(jnp.float32))

    def build(program, results):
        return runner.compile(program, ("replicated", "batch"), results)

    compiled = _named(build, program, extractor.names, memory, ("images",))
    placed = runner.put("replicated", extractor.params)
    return lambda images: compiled(placed, images)


def model_draws(exp, chain, params, seed, batch, *, images_kept, memory):
    """Sampling, quantisation and features over all devices: no image leaves them
    unless 'images' is among the extractor's parts, and then only the first images_kept are kept.
    Image i depends on (seed, i) alone."""
    def draw(extractor, quantise):
        levels = protocols.QUANTISE[quantise]

        def finish(x_0, weights):
            return extractor.apply(weights, levels(x_0))

        def build(finish, results):
            return programs.sample_program(exp, chain, finish, extra=("replicated",),
                                             results=results)

        compiled = _named(build, finish, extractor.names, memory, ("draw", quantise))
        placed = exp.runner.put("replicated", extractor.params)

        def produce(start, count):
            index = hosts.local_indices(exp.runner, start, batch)
            out = compiled(params, np.uint32(seed), index, placed)
            rows = rows_of(exp.runner, out, count)
            if "images" in rows:
                rows["images"] = rows["images"][:max(0, images_kept - start)]
            return rows

        return produce

    return draw


def image_draws(runner, read, batch, *, images_kept=0, memory=None):
    """Features of given images: read(i) -> uint8 [H,W,C]. A process reads only its own rows."""
    memory = {} if memory is None else memory

    def draw(extractor, quantise=None):
        del quantise      # they are integers already
        features = image_features(runner, extractor, memory)
        first, share, _ = hosts.local_slots(runner, batch)

        def produce(start, count):
            # The last batch is filled with its last image; those rows are cut off again.
            mine = [min(start + first + i, start + count - 1) for i in range(share)]
            out = features(runner.put("batch", read_rows(read, mine)))
            rows = rows_of(runner, out, count)
            if "images" in rows:
                rows["images"] = rows["images"][:max(0, images_kept - start)]
            return rows

        return produce

    return draw


def bound_draws(exp, params, source, seed, batch, memory):
    """The variational bound of real images at all t (diffusion_utils_2.py:313-337)."""
    if "bound" not in memory:
        memory["bound"] = programs.bound_program(exp)
    compiled = memory["bound"]
    first, share, _ = hosts.local_slots(exp.runner, batch)

    def produce(start, count):
        mine = [min(start + first + i, start + count - 1) for i in range(share)]
        out = compiled(params, np.uint32(seed),
                       exp.runner.put("batch", read_rows(source.__getitem__, mine)),
                       exp.runner.put("batch", np.array(mine, np.int32)))
        rows = rows_of(exp.runner, out._asdict(), count)
        return {"bpd": rows["total"], "prior": rows["prior"]} | {
            f"sum_{short}": rows[name].astype(np.float64).sum(0)
            for short, name in (("terms", "terms"), ("mse", "mse"), ("eps", "eps_mse"))}

    return produce


def open_splits(name, data_dir, image_shape) -> dict:
    """{split: Source} of 'train' and 'test'; a dataset without a test split has only the first."""
    sources = {}
    for split in ("train", "test"):
        try:
            source = open_source(name, data_dir, split, image_size=image_shape[0],
                                 channels=image_shape[2])
        except UserError:
            if split == "train":
                raise
            continue
        sources[split] = source
    return sources


class Slices:
    """A Source as `neighbours` wants its references: len() and slices, read when asked for."""

    def __init__(self, source, count):
        self._source, self._count = source, count

    def __len__(self):
        return self._count

    def __getitem__(self, item):
        if isinstance(item, slice):
            return read_rows(self._source.__getitem__, range(*item.indices(self._count)))
        return self._source[item]


def get_classifier(sources, folder, say):
    """The training split's stored classifier, the same on all processes; None if unlabelled."""
    train = sources["train"]
    if train.labels is None:
        return None
    stored = None
    if jax.process_index() == 0:
        n = min(len(train), 5 * OFFLINE_REALS)
        images = read_rows(train.__getitem__, range(n))
        stored = small_cnn.train_once(train.name, train.fingerprint, images, train.labels[:n],
                                      folder=folder, progress=_steps(say, train.name))
    if jax.process_count() == 1:
        return stored
    from jax.experimental import multihost_utils
    module = small_cnn.Classifier(int(train.labels.max()) + 1)
    shapes = jax.eval_shape(lambda: module.init(
        jax.random.key(0), small_cnn._scaled(jnp.zeros((1, *train.shape), jnp.uint8))))["params"]
    params = stored.params if stored else jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    accuracy = np.array(stored.accuracy if stored else 0.0, np.float32)
    params, accuracy = multihost_utils.broadcast_one_to_all((params, accuracy))
    params = jax.tree.map(np.asarray, params)
    return small_cnn.Stored(params, float(accuracy), small_cnn.sha256(params))


SAY_EVERY = 30.0     # seconds


def report_progress(say, name, num, unit="images"):
    """-> progress(done) that says every half minute how long it will take."""
    here = None      # (time, done) at the first call: what an earlier try left costs no time
    last = time.monotonic()

    def progress(done):
        nonlocal here, last
        now = time.monotonic()
        here = here or (now, done)
        if now - last >= SAY_EVERY and here[1] < done < num:
            left = (now - here[0]) / (done - here[1]) * (num - done)
            last = now
            say(f"{name}: {done:,} of {num:,} {unit}, about {left / 60:.1f} min left")

    return progress


def _steps(say, name):
    """The same for a classifier's training, once per dataset."""
    progress = None

    def steps(done, total):
        nonlocal progress
        if progress is None:
            say(f"training the small classifier of {name}, once: {total:,} steps")
            progress = report_progress(say, f"classifier of {name}", total, "steps")
        progress(done)

    return steps


def gatherer(folder, stop, protocol, say, memory):
    """Everything that is expensive goes through here: sharded on disk, one folder a request;
    features of real images also stay in memory."""
    def gather(name, draws, num, facts, parts, quantise=None):
        extractor = extract.make(parts, precision=protocol.precision)
        request = facts | {"parts": sorted(extractor.names), "precision": protocol.precision,
                           "quantise": quantise, "weights": _sha(parts)}
        key = f"{name}-{collect.key(request)}"
        if (key, num) in memory:
            return memory[key, num]
        where = folder and files.join(folder, key)
        started = time.monotonic()
        out = collect.collect(
            draws(extractor, quantise), num=num, batch=facts.get("batch", REAL_BATCH),
            folder=where, request=request, stop=stop, what=name,
            progress=report_progress(say, name, num))
        if out is None:
            raise StoppedError
        say(f"{name}: {num} images, {time.monotonic() - started:.1f} s")
        if name.startswith(REAL):
            memory[key, num] = out
        return out

    return gather


def _sha(parts) -> str:
    leaves = [f"{i}:{np.asarray(x).sum(dtype=np.float64)!r}:{np.shape(x)}"
              for i, x in enumerate(jax.tree.leaves(parts))]
    return collect.key({"names": sorted(parts), "leaves": leaves})
