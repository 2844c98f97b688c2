"""The table of metrics: a metric is one function and one row of METRICS.

The function receives the Context and the features of the samples ({name: rows}, on process 0) and
returns a Result. Its numbers come from `measures`, `scores` and `neighbours`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.datasets import read_rows
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import extract, features, measures, protocols, scores, small_cnn
from ddpm_jax.evaluation.classifier import Stored
from ddpm_jax.evaluation.inception.weights import Weights
from ddpm_jax.evaluation.options import (
    DEFAULT_NUM,
    NN_K,
    NN_QUERIES,
    OFFLINE_REALS,
    REAL_BATCH,
    REPORTED_NUM,
    Options,
)
from ddpm_jax.evaluation.references import Reference
from ddpm_jax.evaluation.session import Session
from ddpm_jax.evaluation.subset import ORDER, permutation, subset
from ddpm_jax.parallel import hosts


class Context(NamedTuple):
    """What the metrics may use. weights, reference: None where no metric at hand needs them."""
    options: Options
    protocol: protocols.Protocol
    subject: features.Subject
    session: Session
    weights: Weights | None = None
    reference: Reference | None = None
    warnings: tuple = ()

    @property
    def classifier(self) -> Stored | None:
        """The data set's, trained on first use; None where the data have no labels."""
        return self.session.classifier(self.options.classifier_dir)


class Result(NamedTuple):
    """values: {name: number, text or list}; pictures: {name: uint8 [h,w,3]}; record: the label of
    a record of its own in evaluation.json, with its provenance ('': that of the samples)."""
    values: dict
    pictures: dict = {}
    record: str = ""
    provenance: dict = {}


class Metric(NamedTuple):
    """compute(context, samples) -> Result.

    parts: of `extract.PARTS`, computed from each sample; "images" from the first NN_QUERIES alone.
    SPACE stands for the best features available; () where no sample is needed. needs: what else
    must be available. num: samples by default; least: the fewest, by protocol. values: names of its
    main values, or what they begin with where it ends in "_" or "@"; along: whether these are shown
    along the chain. implies:
    metrics of a model that belong to it. options: those that no other metric reads.
    """
    compute: Callable
    parts: tuple = ()
    needs: frozenset = frozenset()
    num: int = DEFAULT_NUM
    least: Callable = lambda protocol: 2
    values: tuple = ()
    along: bool = False
    implies: tuple = ()
    options: tuple = ()


# What a metric may need: statistics of real images, their features too, the images, a model.
REFERENCE, FEATURES, REALS, MODEL = "reference", "features", "reals", "model"
CLASSES = "classes"       # of the model
COLLECTIVE = {REALS, MODEL}       # such a metric collects on all processes
SPACE = "space"
SPACES = ("inception", "classifier", "random")
PART_WEIGHTS = {      # None: not to be had here
    "inception": lambda context: context.weights and context.weights.params,
    "classifier": lambda context: context.classifier and context.classifier.params,
    "random": lambda context: small_cnn.random_params(context.subject.image_shape[2]),
    "channels": lambda context: {},
    "images": lambda context: {},
}


# ---- features ----


def make_extractor(context: Context, parts) -> extract.Extractor:
    """The extractor of these parts; without labels there is no "classifier" among them."""
    parts = [next(name for name in SPACES if PART_WEIGHTS[name](context) is not None)
             if name == SPACE else name for name in parts]
    weights = {name: PART_WEIGHTS[name](context) for name in parts}
    return extract.make({name: w for name, w in weights.items() if w is not None},
                        precision=context.protocol.precision)


def collect_features(session, name, producer, extractor, *, num, batch, facts, quantise=None,
                     keep=False) -> dict:
    """Session.collect of features: everything that they depend on goes into the request."""
    request = facts | {"parts": sorted(extractor.names), "precision": extractor.precision,
                       "quantise": quantise, "weights": extract.fingerprint(extractor)}
    return session.collect(name, lambda: producer(extractor, quantise), num=num, batch=batch,
                           request=request, keep=keep)


def _real(context, split, parts, num=None) -> dict:
    """Features of the images of a split, or of ``num`` of them, in the order of `subset`."""
    session, source = context.session, context.session.sources[split]
    rows = subset(len(source), num)
    return collect_features(
        session, f"real-{split}",
        features.of_images(session, lambda i: source[rows[i]], REAL_BATCH),
        make_extractor(context, parts), num=len(rows), batch=REAL_BATCH, keep=True,
        facts={"fingerprint": source.fingerprint, "split": split} | _order(rows, source))


def _order(rows, source) -> dict:
    """What tells a request of some images from one of all, or of the first ones."""
    return {"rows": ORDER} if len(rows) < len(source) else {}


def _held_out(context, parts, num) -> tuple[dict, dict]:
    """(real, held-out) features: train and test, or two halves where there is no test split."""
    real = _real(context, "train", parts, OFFLINE_REALS)
    if "test" in context.session.sources:
        return real, _real(context, "test", parts, num)
    order = permutation(max(1, len(next(iter(real.values()), ()))))
    halves = order[:len(order) // 2], order[len(order) // 2:]
    return tuple({k: v[half] for k, v in real.items()} for half in halves)


class _Rows:
    """Images of a Source as `neighbours` takes references: len() and slices."""

    def __init__(self, source, rows):
        self._source, self._rows = source, rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, item):
        if isinstance(item, slice):
            return read_rows(self._source.__getitem__, self._rows[item])
        return self._source[self._rows[item]]


# ---- one function a metric ----


def fid(context, samples) -> Result:
    return Result(measures.fid(samples["pool_3"], context.reference))


def inception_score(context, samples) -> Result:
    score, _ = scores.INCEPTION_SCORES[context.protocol.inception_score]
    return Result(score(samples["pool_3"], context.weights.params["fc"]))


def kid(context, samples) -> Result:
    return Result(measures.kid(samples["pool_3"], context.reference))


def precision_recall(context, samples) -> Result:
    return Result(measures.precision_recall(samples["pool_3"], context.reference,
                                            given=context.subject.model is None))


_OFFLINE_PARTS = ("random", "channels", "classifier")


def offline(context, samples) -> Result:
    """Distances without downloaded weights; not FID."""
    real, held = _held_out(context, _OFFLINE_PARTS, OFFLINE_REALS)
    if not hosts.is_main_process():
        return Result({})
    stored = context.classifier
    return Result(measures.offline(
        samples, real, held, classifier_key=stored.key if stored else None,
        accuracy=stored.accuracy if stored else None, given=context.subject.model is None))


def nearest_neighbours(context, samples) -> Result:
    """Nearest training images of the first samples, in pixels and in the best features at hand.

    The held-out images beside them are of the test split; without one, training images, which are
    then not among the references.
    """
    sources = context.session.sources
    train, apart = sources["train"], "test" in sources
    every = np.arange(len(train))
    space = make_extractor(context, (SPACE,)).names[0]
    real = _real(context, "train", (SPACE,))
    held = _real(context, "test", (SPACE,), NN_QUERIES) if apart else {}
    if not hosts.is_main_process():
        return Result({})
    of = sources["test"] if apart else train
    rows = subset(len(of), NN_QUERIES if apart else min(NN_QUERIES, len(train) // 2))
    others = every if apart else np.delete(every, rows)
    values, pictures = measures.nearest(
        samples["images"], samples[space], _Rows(train, others), real[space][others],
        _Rows(of, rows)[:], held[space] if apart else real[space][rows], queries=NN_QUERIES,
        k=NN_K, crop=context.options.crop)
    return Result(values | {"nn_space": space},
                  {f"nearest_{name}": picture for name, picture in pictures.items()})


def labels_called(context, samples) -> Result:
    """The share of samples that the small classifier calls by the label they were drawn with."""
    if not hosts.is_main_process():
        return Result({})
    logits = samples["cnn_logits"]
    condition = features.sampling_chain(context.subject.model, context.options).condition
    return Result(measures.called(logits, condition(np.arange(len(logits)))["labels"])
                  | {"labels_classifier_accuracy": context.classifier.accuracy})


def splits_of(options, sources) -> tuple:
    """The splits whose bits/dim are measured. Raises UserError for one that does not exist."""
    for split in options.splits or ():
        if split not in sources:
            raise UserError(f"{options.prefix}splits={','.join(options.splits)}: {sources.name} "
                            f"has no split {split!r}; it has {', '.join(sources)}")
    return options.splits or tuple(s for s in ("train", "test") if s in sources)


def _bound_sums(context, split) -> dict:
    """Sums of the bound's parts over the images of a split, or bpd_num of them."""
    session, options, model = context.session, context.options, context.subject.model
    source = session.sources[split]
    rows = subset(len(source), options.bpd_num)
    batch = min(context.subject.batch, len(rows))
    return session.collect(
        f"bpd-{split}",
        lambda: features.of_bound(session, model, source, options.seed, batch, rows),
        num=len(rows), batch=batch, request=model.facts | {
            "seed": options.seed, "fingerprint": source.fingerprint, "split": split,
            "batch": batch} | _order(rows, source))


def bits_per_dim(context, samples) -> Result:
    """The variational bound of real images, by split."""
    del samples
    options, sources = context.options, context.session.sources
    values, images = {}, {}
    for split in splits_of(options, sources):
        sums = _bound_sums(context, split)
        if not hosts.is_main_process():
            continue
        found = measures.likelihood(sums)
        values |= {name.replace("bpd", f"bpd_{split}", 1) if name.startswith("bpd")
                   else f"{name}_{split}": v for name, v in found.items()}
        images[split] = {"n": found["bpd_n"], "of": len(sources[split]), "order": ORDER,
                         "fingerprint": sources[split].fingerprint}
    every = "all" if options.bpd_num is None else options.bpd_num
    return Result(values, record=f"bound, seed {options.seed}, {every} images", provenance={
        "seed": options.seed, "images": images,
        "bound": "L_vlb, clip_denoised, one noise draw a t"})


METRICS = {
    "bpd": Metric(bits_per_dim, needs=frozenset({REALS, MODEL}), num=0, values=tuple(
        f"{name}_{{split}}" for name in ("bpd", "rate", "distortion", "prior", "rmse")
    ) + ("eps_loss_{split}_",), options=("bpd_num", "splits")),
    "fid": Metric(fid, ("inception",), frozenset({REFERENCE}), REPORTED_NUM, values=("fid",),
                  along=True),
    "is": Metric(inception_score, ("inception",), num=REPORTED_NUM,
                 least=lambda protocol: scores.INCEPTION_SCORES[protocol.inception_score][1],
                 values=("{inception_score}",), along=True),
    "kid": Metric(kid, ("inception",), frozenset({REFERENCE, FEATURES}), values=("kid",)),
    "pr": Metric(precision_recall, ("inception",), frozenset({REFERENCE, FEATURES}),
                 least=lambda protocol: scores.NEIGHBOURS + 1, values=("precision", "recall")),
    "nn": Metric(nearest_neighbours, ("images", SPACE), frozenset({REALS}), NN_QUERIES,
                 least=lambda protocol: 1, values=("nn_",), options=("crop",)),
    "labels": Metric(labels_called, ("classifier",), frozenset({REALS, MODEL, CLASSES}),
                     values=("labels_called",)),
    "offline": Metric(offline, _OFFLINE_PARTS, frozenset({REALS}), values=("FD-cnn", "FD-rand@"),
                      along=True, implies=("bpd",)),
}


def with_implied(names) -> tuple:
    """These metrics and what they imply of a model."""
    implied = [name for metric in names for name in METRICS[metric].implies]
    return tuple(dict.fromkeys((*names, *implied)))


def options_read(names, *, of_model: bool) -> set:
    """The options, by the names of the flags, that these metrics read of a model or of images."""
    rows = [METRICS[name] for name in (with_implied(names) if of_model else names)]
    needs = frozenset().union(*(row.needs for row in rows))
    parts = {part for row in rows for part in row.parts}
    read = {name for row in rows for name in row.options} | {"batch_size", "protocol", "metrics"}
    for names, used in ((("seed", "step", "ema"), of_model),
                        (("sampler", "steps", "nodes", "guidance", "quantise"), of_model and parts),
                        (("num", "keep_images"), parts),
                        (("inception_weights", "allow_unknown_weights"), "inception" in parts),
                        (("reference", "force"), REFERENCE in needs),
                        (("classifier_dir",), parts & {"classifier", SPACE}),
                        (("dataset",), REALS in needs and not of_model),
                        (("data_dir",), REALS in needs)):
        read |= set(names) if used else set()
    return read


def value_prefixes() -> tuple:
    """What the names of the main values of all metrics begin with, under any protocol."""
    return tuple(dict.fromkeys(
        value.partition("{split}")[0].format(inception_score=protocol.inception_score)
        for row in METRICS.values() for value in row.values
        for protocol in protocols.PROTOCOLS.values()))


def value_names(names, protocol, splits=("",)) -> tuple:
    """The metrics' main values, as in Metric.values."""
    return tuple(dict.fromkeys(
        value.format(split=split, inception_score=protocol.inception_score)
        for name in names for split in splits for value in METRICS[name].values))


def default_num(names) -> int:
    """Samples that these metrics take by default; 0 where none is needed."""
    return max((METRICS[name].num for name in names), default=0)
