"""The third job: measure a run, or anybody's images. What is compiled, read, written and when.

The numbers themselves are in `evaluation/`; a metric is a row of METRICS.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import checkpoints, experiment
from ddpm_jax.data.datasets import open_source, read_rows
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import (
    collect,
    extract,
    measures,
    moments,
    protocols,
    references,
    scores,
    small_cnn,
)
from ddpm_jax.evaluation.inception import weights
from ddpm_jax.parallel import distributed
from ddpm_jax.parallel.runners import RUNNERS
from ddpm_jax.storage import files

OFFLINE_REALS = 10_000
DEFAULT_NUM = 5_000
REPORTED_NUM = 50_000
LOOKED_AT = 1_000      # images whose way is measured
NN_QUERIES, NN_K = 16, 8
DRAWN = {"fid": REPORTED_NUM, "is": REPORTED_NUM, "nn": NN_QUERIES}
REAL_BATCH = 256


class Options(NamedTuple):
    """What a user can choose; None takes the default of the run or the metric."""
    metrics: tuple = ("bpd", "offline")
    protocol: str = "paper"
    quantise: str | None = None
    num: int | None = None
    bpd_num: int | None = None
    splits: tuple = ("train", "test")
    seed: int = 0
    batch_size: int | None = None
    sampler: str | None = None
    steps: int | None = None
    ema: bool = True
    reference: str | None = None
    inception_weights: str | None = None
    allow_unknown_weights: bool = False
    classifier_dir: str | None = None
    force: bool = False
    keep_images: bool = False
    crop: int | None = None


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


# --- programs --------------------------------------------------------------------------------

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


def _rows_of(runner, out, count):
    return {name: collect.shared_rows(runner, a)[:count] for name, a in out.items()}


def _features(runner, extractor, memory):
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
            return experiment.sample_program(exp, chain, finish, extra=("replicated",),
                                             results=results)

        compiled = _named(build, finish, extractor.names, memory, ("draw", quantise))
        placed = exp.runner.put("replicated", extractor.params)

        def produce(start, count):
            index = collect.my_indices(exp.runner, start, batch)
            out = compiled(params, np.uint32(seed), index, placed)
            rows = _rows_of(exp.runner, out, count)
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
        features = _features(runner, extractor, memory)
        first, share, _ = collect.my_slots(runner, batch)

        def produce(start, count):
            # The last batch is filled with its last image; those rows are cut off again.
            mine = [min(start + first + i, start + count - 1) for i in range(share)]
            out = features(runner.put("batch", read_rows(read, mine)))
            rows = _rows_of(runner, out, count)
            if "images" in rows:
                rows["images"] = rows["images"][:max(0, images_kept - start)]
            return rows

        return produce

    return draw


def bound_draws(exp, params, source, seed, batch, memory):
    """The variational bound of real images at all t (diffusion_utils_2.py:313-337)."""
    if "bound" not in memory:
        memory["bound"] = experiment.bound_program(exp)
    compiled = memory["bound"]
    first, share, _ = collect.my_slots(exp.runner, batch)

    def produce(start, count):
        mine = [min(start + first + i, start + count - 1) for i in range(share)]
        out = compiled(params, np.uint32(seed),
                       exp.runner.put("batch", read_rows(source.__getitem__, mine)),
                       exp.runner.put("batch", np.array(mine, np.int32)))
        rows = _rows_of(exp.runner, out._asdict(), count)
        return {"bpd": rows["total"], "prior": rows["prior"]} | {
            f"sum_{short}": rows[name].astype(np.float64).sum(0)
            for short, name in (("terms", "terms"), ("mse", "mse"), ("eps", "eps_mse"))}

    return produce


# --- real images -----------------------------------------------------------------------------

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


class _Slices:
    """A Source as `neighbours` wants its references: len() and slices, read when asked for."""

    def __init__(self, source, count):
        self._source, self._count = source, count

    def __len__(self):
        return self._count

    def __getitem__(self, item):
        if isinstance(item, slice):
            return read_rows(self._source.__getitem__, range(*item.indices(self._count)))
        return self._source[item]


def _classifier(sources, folder, say):
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


# --- one evaluation --------------------------------------------------------------------------

class Context(NamedTuple):
    """Everything that the rows of METRICS may need. collected: features of the images at hand."""
    options: Options
    protocol: protocols.Protocol
    subject: Subject
    weights: weights.Weights | None
    classifier: small_cnn.Stored | None
    reference: references.Reference | None
    gather: Callable      # (name, draws, num, facts, parts, quantise) -> {name: rows}
    memory: dict          # compiled programs and features of real images, for the next time


SAY_EVERY = 30.0     # seconds


def _progress(say, name, num, unit="images"):
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
            progress = _progress(say, f"classifier of {name}", total, "steps")
        progress(done)

    return steps


class StoppedError(Exception):
    """A signal asked to leave; what is done is on disk."""


def _real(context, split, parts, num=None):
    """Features of the first images of a split, made once and kept like everything else."""
    source = context.subject.sources[split]
    num = min(len(source), num or len(source))
    return context.gather(f"{REAL}{split}", image_draws(
        context.subject.runner, source.__getitem__, REAL_BATCH, memory=context.memory), num,
        {"fingerprint": source.fingerprint, "split": split}, parts)


def _held_out(context, parts, num):
    """(real, held-out) features: train and test, or two halves where there is no test split."""
    real = _real(context, "train", parts, OFFLINE_REALS)
    if "test" in context.subject.sources:
        return real, _real(context, "test", parts, num)
    half = len(next(iter(real.values()), ())) // 2
    return {k: v[:half] for k, v in real.items()}, {k: v[half:] for k, v in real.items()}


def _fid(context, fake):
    return measures.fid(fake["pool_3"], context.reference), {}


def _is(context, fake):
    score = scores.INCEPTION_SCORES[context.protocol.inception_score]
    try:
        return score(fake["pool_3"], context.weights.params["fc"]), {}
    except ValueError as error:
        raise UserError(f"--num: {error}") from error


def _kid(context, fake):
    return measures.kid(fake["pool_3"], context.reference), {}


def _pr(context, fake):
    try:
        return measures.precision_recall(fake["pool_3"], context.reference), {}
    except ValueError as error:
        raise UserError(f"--num: {error}") from error


def _parts_offline(context):
    found = {"random": small_cnn.random_params(context.subject.image_shape[2]), "channels": {}}
    return found | ({"classifier": context.classifier.params} if context.classifier else {})


def _offline(context, fake):
    real, held = _held_out(context, _parts_offline(context), OFFLINE_REALS)
    if jax.process_index():
        return {}, {}
    stored = context.classifier
    return measures.offline(fake, real, held, classifier_key=stored.key if stored else None,
                            accuracy=stored.accuracy if stored else None), {}


def _parts_nn(context):
    found = {"images": {}}
    if context.weights is not None:
        return found | {"inception": context.weights.params}
    if context.classifier is not None:
        return found | {"classifier": context.classifier.params}
    return found | {"random": small_cnn.random_params(context.subject.image_shape[2])}


def _nn(context, fake):
    parts = {k: v for k, v in _parts_nn(context).items() if k != "images"}
    space = extract.PARTS[next(iter(parts))][0][0]
    real = _real(context, "train", parts)
    held_split = "test" if "test" in context.subject.sources else "train"
    held = _real(context, held_split, parts, NN_QUERIES)
    if jax.process_index():
        return {}, {}
    train, other = (context.subject.sources[s] for s in ("train", held_split))
    values, pictures = measures.nearest(
        fake["images"], fake[space], _Slices(train, len(train)), real[space],
        _Slices(other, len(other))[:NN_QUERIES], held[space], queries=NN_QUERIES, k=NN_K,
        crop=context.options.crop)
    return values | {"nn_space": space}, {f"nearest_{k}": v for k, v in pictures.items()}


class Metric(NamedTuple):
    """compute(context, collected) -> ({name: value}, {picture name: uint8 [h,w,3]}). parts(context)
    -> parts of `extract.PARTS` wanted of the images; needs: what must be there."""
    compute: Callable
    parts: Callable
    needs: frozenset


def _parts_inception(context):
    return {"inception": context.weights.params}


METRICS = {
    "fid": Metric(_fid, _parts_inception, frozenset({"weights", "reference"})),
    "is": Metric(_is, _parts_inception, frozenset({"weights"})),
    "kid": Metric(_kid, _parts_inception, frozenset({"weights", "reference"})),
    "pr": Metric(_pr, _parts_inception, frozenset({"weights", "reference"})),
    "nn": Metric(_nn, _parts_nn, frozenset({"reals"})),
    "offline": Metric(_offline, _parts_offline, frozenset({"reals"})),
}
REAL = "real-"
BOUND = "bpd"      # of real images, not of samples


def check_options(options: Options) -> protocols.Protocol:
    """The protocol meant. UserError for a name or number that cannot work."""
    known = (*METRICS, BOUND)
    for name in options.metrics:
        if name not in known:
            raise UserError(f"--metrics={name} is not known; known: {', '.join(known)}")
    if not options.metrics:
        raise UserError(f"--metrics is empty; known: {', '.join(known)}")
    if options.protocol not in protocols.PROTOCOLS:
        raise UserError(f"--protocol={options.protocol} is not known; known: "
                        f"{', '.join(protocols.PROTOCOLS)}")
    if options.quantise not in (None, *protocols.QUANTISE):
        raise UserError(f"--quantise={options.quantise} is not known; known: "
                        f"{', '.join(protocols.QUANTISE)}")
    for name in ("num", "bpd_num", "batch_size", "steps", "crop"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed={options.seed} must be in 0 ... 2**32-1")
    protocol = protocols.PROTOCOLS[options.protocol]
    return protocol._replace(quantise=options.quantise or protocol.quantise)


def load_weights(options: Options) -> weights.Weights:
    found = weights.load(weights.find(options.inception_weights),
                         allow_unknown=options.allow_unknown_weights)
    if found.source_sha256 not in weights.KNOWN_SOURCES and jax.process_index() == 0:
        print(f"Inception's weights {found.path} come from a source whose sha256 is not known")
    return found


def _load_reference(options, protocol, subject, inception) -> tuple:
    if not options.reference:
        raise UserError("--reference=FILE is missing: fid, kid and pr compare with statistics of "
                        "real images; make them once with `ddpm reference --dataset=NAME "
                        "--split=train --out=FILE`")
    reference = references.load(options.reference)
    names = {s.name for s in subject.sources.values()}
    return reference, references.check(
        reference, force=options.force, protocol=protocols.describe(protocol),
        weights_sha256=inception.state_sha256, image_shape=subject.image_shape,
        dataset=next(iter(names)) if names else None,
        n=len(subject.sources[reference.split]) if reference.split in subject.sources else None)


def _context(subject, options, gather, memory, say) -> tuple[Context, list]:
    protocol = check_options(options)
    needs = frozenset().union(*(METRICS[m].needs for m in options.metrics if m != BOUND))
    if "reals" in needs and not subject.sources:
        raise UserError(f"--metrics={','.join(options.metrics)}: nn and offline compare with real "
                        "images; add --dataset=NAME")
    inception = reference = classifier = None
    warnings = []
    if "weights" in needs:
        inception = load_weights(options)
    if "reference" in needs:
        reference, warnings = _load_reference(options, protocol, subject, inception)
    if "reals" in needs:
        if "classifier" not in memory:
            memory["classifier"] = _classifier(subject.sources, options.classifier_dir, say)
        classifier = memory["classifier"]
    return Context(options, protocol, subject, inception, classifier, reference, gather,
                   memory), warnings


def _gatherer(folder, stop, protocol, say, memory):
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
            progress=_progress(say, name, num))
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


def evaluate_images(subject: Subject, options: Options, *, folder=None, stop=None,
                    say=lambda text: None, memory=None) -> tuple[dict, dict, dict]:
    """All metrics of samples. -> (values, pictures, provenance); values only on process 0.

    Raises StoppedError where a signal asked to leave, UserError before any image is drawn where
    something that a metric needs is missing.
    """
    protocol = check_options(options)
    names = [m for m in options.metrics if m != BOUND]
    if not names:
        return {}, {}, {}
    memory = {} if memory is None else memory
    context, warnings = _context(
        subject, options, _gatherer(folder, stop, protocol, say, memory), memory, say)
    for text in warnings:
        say(f"warning: {text}")
    wanted = max(DRAWN.get(name, DEFAULT_NUM) for name in names)
    num = options.num or (subject.num if subject.num is not None else wanted)
    if subject.num is not None and num > subject.num:
        raise UserError(f"--num={num}: there are only {subject.num} images")
    parts = {}
    for name in names:
        parts |= METRICS[name].parts(context)
    if options.keep_images:
        parts |= {"images": {}}
    fake = context.gather("samples", subject.draw, num, subject.facts | {"batch": subject.batch},
                          parts, protocol.quantise)
    values, pictures = {}, {}
    for name in names:
        needs_all = METRICS[name].needs & {"reals"}      # its own collection runs on all processes
        if jax.process_index() == 0 or needs_all:
            found, drawn = METRICS[name].compute(context, fake)
            values |= found
            pictures |= drawn
    if options.keep_images:
        pictures["samples"] = fake.get("images")
    provenance = subject.facts | {
        "num": num, "protocol": protocol.name, "quantise": protocol.quantise,
        "resize": protocol.resize, "scale": protocol.scale, "precision": protocol.precision,
        "warnings": warnings}
    if context.weights is not None:
        provenance |= {"inception_sha256": context.weights.state_sha256,
                       "inception_source_sha256": context.weights.source_sha256}
    if context.reference is not None:
        r = context.reference
        provenance["reference"] = {
            "sha256": references.identity(r), "n": r.n, "dataset": r.dataset, "split": r.split,
            "protocol": r.protocol or "unknown", "path": r.path}
    if context.classifier is not None:
        provenance["classifier_sha256"] = context.classifier.sha256
    return values, pictures, provenance


def evaluate_bound(exp, params, sources, options: Options, *, facts, batch, folder=None, stop=None,
                   say=lambda text: None, memory=None) -> tuple[dict, dict]:
    """Bits/dim of real images, by split. -> ({'bpd_test': ..., ...}, provenance)."""
    values, sizes, memory = {}, {}, {} if memory is None else memory
    for split in options.splits:
        if split not in sources:
            say(f"bpd: the dataset has no split {split!r}")
            continue
        source = sources[split]
        num = min(len(source), options.bpd_num or len(source))
        size = min(batch, num)
        request = facts | {"fingerprint": source.fingerprint, "split": split, "batch": size}
        where = folder and files.join(folder, f"bpd-{split}-{collect.key(request)}")
        started = time.monotonic()
        sums = collect.collect(
            bound_draws(exp, params, source, options.seed, size, memory), num=num, batch=size,
            folder=where, request=request, stop=stop, what=f"{split} image",
            progress=_progress(say, f"bpd {split}", num))
        if sums is None:
            raise StoppedError
        say(f"bpd {split}: {num} images, {time.monotonic() - started:.1f} s")
        if jax.process_index() == 0:
            found = measures.likelihood(sums)
            values |= {name.replace("bpd", f"bpd_{split}", 1) if name.startswith("bpd")
                       else f"{name}_{split}": v for name, v in found.items()}
            sizes[split] = {"n": num, "of": len(source), "fingerprint": source.fingerprint}
    if not sizes and jax.process_index() == 0:
        raise UserError(f"--splits={','.join(options.splits)}: the dataset has "
                        f"{', '.join(sources)}")
    return values, facts | {"images": sizes, "bound": "L_vlb, clip_denoised, one noise draw a t"}


# --- of a run, of files ----------------------------------------------------------------------

def run_subject(exp, params, options: Options, facts: dict, memory: dict) -> Subject:
    """The images that a run's model draws."""
    config = exp.config
    chain = experiment.sampling_chain(exp, name=options.sampler, steps=options.steps)
    batch = options.batch_size or config.sampler.batch_size
    batch = min(batch, options.num or batch)
    facts = facts | {"sampler": options.sampler or config.sampler.name,
                     "sampler_steps": chain.num_steps, "seed": options.seed,
                     "clip_denoised": config.sampler.clip_denoised}
    if "sources" not in memory:
        memory["sources"] = open_splits(config.data.name, config.data.dir, exp.image_shape)
    draws = model_draws(exp, chain, params, options.seed, batch, memory=memory,
                        images_kept=options.num or 1 << 31 if options.keep_images else NN_QUERIES)
    return Subject(draws, facts, None, batch, exp.image_shape, memory["sources"], exp.runner)


def evaluate_run(exp, params, options: Options, *, facts, folder=None, stop=None,
                 say=lambda text: None, memory=None) -> tuple[list, dict]:
    """-> ([(label, values, provenance)], pictures): one record of samples, one of the bound."""
    check_options(options)
    memory = {} if memory is None else memory
    subject = run_subject(exp, params, options, facts, memory)
    records, pictures = [], {}
    values, drawn, provenance = evaluate_images(
        subject, options, folder=folder, stop=stop, say=say, memory=memory)
    if provenance:
        label = (f"{facts['weights']}, {provenance['sampler']} {provenance['sampler_steps']} steps,"
                 f" seed {options.seed}, {provenance['num']} images")
        if options.quantise:
            label += f", quantise {options.quantise}"
        if "reference" in provenance:
            r = provenance["reference"]
            label += f", against {r['dataset'] or 'foreign'} {r['split'] or r['path']}"
        records.append((label, values, provenance))
        pictures |= drawn
    if {BOUND, "offline"} & set(options.metrics):      # offline: all that needs no download
        values, provenance = evaluate_bound(
            exp, params, subject.sources, options, facts=facts | {"seed": options.seed},
            batch=subject.batch, folder=folder, stop=stop, say=say, memory=memory)
        every = "all" if options.bpd_num is None else options.bpd_num
        records.append((f"{facts['weights']}, bound, seed {options.seed}, {every} images", values,
                        provenance))
    return records, pictures


class Along(NamedTuple):
    """What the predicted x_0 are worth on the way: steps: reverse steps done at each look; scores:
    [{metric: number}], one a look; frames uint8 [shown,looks,H,W,C]."""
    steps: list
    scores: list
    frames: np.ndarray


AT_EQUAL_N = ("_equal_n", "_real_vs_real", "_std")
ALONG = ("fid", "is_openai10", "is_tfgan1", "FD-")


def evaluate_along(exp, params, options: Options, *, facts, looks, shown, folder=None, stop=None,
                   say=lambda text: None, memory=None) -> Along | None:
    """options.metrics (not bpd, not nn) of the x_0 predicted at about ``looks`` places of the
    chain (paper, Fig. 10). -> None on all processes but the first."""
    memory = {} if memory is None else memory
    subject = run_subject(exp, params, options, facts, memory)
    protocol = check_options(options)
    context, _ = _context(subject, options, _gatherer(folder, stop, protocol, say, memory), memory,
                          say)
    chain = experiment.sampling_chain(exp, name=options.sampler, steps=options.steps)
    every = max(1, -(-chain.num_steps // looks))
    program = experiment.progressive_program(exp, chain, every)
    parts = {}
    for name in options.metrics:
        parts |= METRICS[name].parts(context)

    def draw(extractor, quantise):
        del quantise      # whole grey levels, as one looks at them
        features = _features(exp.runner, extractor, memory)

        def produce(start, count):
            looked = program(params, np.uint32(options.seed),
                             collect.my_indices(exp.runner, start, subject.batch))[1]
            frames = exp.runner.local(looked)
            rows = {f"{name} {k}": row for k in range(frames.shape[1])
                    for name, row in _rows_of(exp.runner, features(
                        exp.runner.put("batch", frames[:, k])), count).items()}
            kept = collect.shared_rows(exp.runner, looked)[:count]
            return rows | {"frames": kept[:max(0, shown - start)]}

        return produce

    num = options.num or LOOKED_AT
    found = context.gather("along", draw, num, subject.facts | {
        "batch": min(subject.batch, num), "every": every, "shown": shown}, parts)
    count = -(-chain.num_steps // every)
    scores = []
    for k in range(count):
        fake = {name.rpartition(" ")[0]: rows for name, rows in found.items()
                if name.endswith(f" {k}")}
        values = {}
        for name in options.metrics:
            if jax.process_index() == 0 or METRICS[name].needs & {"reals"}:
                values |= METRICS[name].compute(context, fake)[0]
        scores.append({name: v for name, v in values.items() if name.startswith(ALONG)
                       and isinstance(v, float) and not name.endswith(AT_EQUAL_N)})
    if jax.process_index():
        return None
    return Along([chain.num_steps - (count - 1 - k) * every for k in range(count)], scores,
                 found["frames"])


def versions() -> dict:
    device = jax.devices()[0]
    return distributed.versions() | {"device": device.device_kind, "devices": jax.device_count()}


def results_path(workdir) -> str:
    return files.join(checkpoints.resolve(workdir), "evaluation.json")


def write_records(path, step, protocol: str, records) -> dict:
    """Adds to evaluation.json: {step: {protocol: {label: {values, provenance}}}}. -> all of it."""
    document = files.read_json(path) if files.exists(path) else {}
    at = document.setdefault(str(step), {}).setdefault(protocol, {})
    for label, values, provenance in records:
        old = at.get(label, {}).get("values", {})
        at[label] = {"values": old | values, "provenance": provenance | {"versions": versions()}}
    files.write_json(path, document)
    return document


def periodic(options: Options | None = None, *, classifier_dir=None, stop=None):
    """-> evaluate(experiment, params, step) -> {metric: number}, for the training loop's cadence;
    None where ``stop`` asked to leave, which is polled between batches.

    Options default to config.eval (metrics, num, bpd_num). Opens data and trains or loads the
    classifier once. All processes call it; all get the numbers.
    """
    memory = {}

    def evaluate(exp, params, step):
        config = exp.config
        chosen = options or Options(
            metrics=tuple(m.strip() for m in config.eval.metrics.split(",")), protocol="monitor",
            num=config.eval.num, bpd_num=config.eval.bpd_num, classifier_dir=classifier_dir)
        if "sources" not in memory:
            memory["sources"] = open_splits(config.data.name, config.data.dir, exp.image_shape)
        # The bound of one split is enough for a monitor: test where there is one.
        chosen = chosen._replace(splits=(max(memory["sources"], key=lambda s: s == "test"),))
        try:
            records, _ = evaluate_run(
                exp, params, chosen, memory=memory, facts={"step": step, "weights": "ema"},
                stop=stop and _At(stop, step))
        except StoppedError:
            return None
        numbers = {name: float(v) for _, values, _ in records for name, v in values.items()
                   if isinstance(v, int | float) and not name.endswith("_n")}
        numbers |= {f"{name}_{i}": b for _, values, _ in records for name, v in values.items()
                    if name.startswith("eps_loss") for i, b in enumerate(v)}
        if "classifier" in memory and memory["classifier"] and jax.process_index() == 0:
            numbers["FD-cnn"] = numbers[memory["classifier"].key]      # a name known beforehand
        return same_everywhere(numbers)

    return evaluate


class _At(NamedTuple):
    """A stop whose log names the training step, not the batch of the evaluation."""
    stop: Any
    step: int

    def requested(self, batch):
        del batch
        return self.stop.requested(self.step)


def same_everywhere(numbers: dict) -> dict:
    """What the first process has, as JSON carries it, on all; none goes on before it has come."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils
    raw = np.frombuffer(json.dumps(numbers).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(raw), np.int32)))
    buffer = np.zeros(size, np.uint8)
    buffer[:min(size, len(raw))] = raw[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


# --- reference statistics --------------------------------------------------------------------

def make_reference(source, options: Options, out, *, features: int, overwrite=False, stop=None,
                   say=lambda text: None) -> None:
    """Statistics of the first images (default: all) of a split, written to ``out``.

    Shards are kept beside ``out`` until it is written. Raises StoppedError, UserError.
    """
    protocol = check_options(options)
    inception = load_weights(options)
    runner = RUNNERS["jit"](jax.devices())
    num = min(len(source), options.num or len(source))
    if num < 2:
        raise UserError(f"--num={num}: statistics need 2 images or more")
    folder = f"{out}.shards"
    batch = options.batch_size or REAL_BATCH
    gather = _gatherer(folder, stop, protocol, say, {})
    found = gather("real", image_draws(runner, source.__getitem__, batch), num,
                   {"fingerprint": source.fingerprint, "batch": batch},
                   {"inception": inception.params})
    if jax.process_index() == 0:
        _write_reference(source, found["pool_3"], protocol, inception, out, features, overwrite)
        files.remove(folder)
        if num <= measures.DIMENSIONS:
            say(f"warning: {num} images cannot fill a {measures.DIMENSIONS}-dimensional "
                "covariance: FID against this file means little (use kid)")
    same_everywhere({})      # the file is there for every process that reads it next


def _write_reference(source, pool_3, protocol, inception, out, features, overwrite):
    mu, sigma = moments.mean_and_cov(pool_3)
    references.save(out, references.Reference(
        mu, sigma, len(pool_3), source.name, source.split, protocols.describe(protocol),
        inception.state_sha256, source.fingerprint, tuple(source.shape),
        pool_3[:features] if features else None,
        json.dumps(versions(), sort_keys=True), str(out)), overwrite=overwrite)
