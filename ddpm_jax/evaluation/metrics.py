"""The table of metrics: a metric is one function and one row of METRICS."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import extract, measures, protocols, references, scores, small_cnn
from ddpm_jax.evaluation.features import Slices, Subject, image_draws
from ddpm_jax.evaluation.inception import weights
from ddpm_jax.evaluation.options import (
    NN_K,
    NN_QUERIES,
    OFFLINE_REALS,
    REAL,
    REAL_BATCH,
    Options,
)


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
        fake["images"], fake[space], Slices(train, len(train)), real[space],
        Slices(other, len(other))[:NN_QUERIES], held[space], queries=NN_QUERIES, k=NN_K,
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
