"""Metrics of the x_0 predicted along the chain (Ho et al. 2020, Fig. 10)."""

from typing import NamedTuple

import numpy as np

from ddpm_jax.evaluation import features
from ddpm_jax.evaluation.evaluate import make_context, model_subject
from ddpm_jax.evaluation.metrics import (
    COLLECTIVE,
    METRICS,
    collect_features,
    make_extractor,
    value_names,
)
from ddpm_jax.evaluation.options import ALONG_NUM, Options
from ddpm_jax.evaluation.session import Session
from ddpm_jax.parallel import hosts

HIDDEN = ("_equal_n", "_real_vs_real", "_std")      # endings of values that are not shown


class Along(NamedTuple):
    """steps: reverse steps done at each look; scores: [{name: number}], one a look; frames uint8
    [shown,looks,H,W,C]: predicted x_0 of the first images."""
    steps: list
    scores: list
    frames: np.ndarray


def evaluate_along(model: features.Model, options: Options, session: Session, *, looks: int,
                   shown: int) -> Along | None:
    """The values that the rows of options.metrics name in ``along``, at about ``looks`` places of
    the chain. -> None on all processes but the first. Raises StoppedError, UserError."""
    subject = model_subject(model, options, session)
    context = make_context(subject, options, session)
    rows = [METRICS[name] for name in options.metrics]
    num_steps = features.sampling_chain(model, options).num_steps
    every = max(1, -(-num_steps // looks))
    num = options.num or ALONG_NUM
    found = collect_features(
        session, "along",
        features.along_chain(session, model, options, subject.batch, every=every, shown=shown),
        make_extractor(context, [part for row in rows for part in row.parts]),
        num=num, batch=min(subject.batch, num), facts=subject.facts | {
            "batch": min(subject.batch, num), "every": every, "shown": shown})
    count = -(-num_steps // every)
    scores = [_scores(context, rows, found, k) for k in range(count)]
    if not hosts.is_main_process():
        return None
    return Along([num_steps - (count - 1 - k) * every for k in range(count)], scores,
                 found["frames"])


def _scores(context, rows, found, look) -> dict:
    samples = {name.rpartition(" ")[0]: values for name, values in found.items()
               if name.endswith(f" {look}")}
    shown = value_names([n for n in context.options.metrics if METRICS[n].along],
                        context.protocol)
    values = {}
    for row in rows:
        if hosts.is_main_process() or row.needs & COLLECTIVE:
            values |= row.compute(context, samples).values
    return {name: v for name, v in values.items() if name.startswith(shown)
            and isinstance(v, float) and not name.endswith(HIDDEN)}
