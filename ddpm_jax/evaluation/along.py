"""Metrics of the x_0 predicted along the chain (Ho et al. 2020, Fig. 10)."""

from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import programs
from ddpm_jax.evaluation.evaluate import check_options, make_context, run_subject
from ddpm_jax.evaluation.features import gatherer, image_features, rows_of
from ddpm_jax.evaluation.metrics import METRICS
from ddpm_jax.evaluation.options import LOOKED_AT, Options
from ddpm_jax.parallel import hosts


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
    context, _ = make_context(
        subject, options, gatherer(folder, stop, protocol, say, memory), memory, say)
    chain = programs.sampling_chain(exp, name=options.sampler, steps=options.steps)
    every = max(1, -(-chain.num_steps // looks))
    program = programs.progressive_program(exp, chain, every)
    parts = {}
    for name in options.metrics:
        parts |= METRICS[name].parts(context)

    def draw(extractor, quantise):
        del quantise      # whole grey levels, as one looks at them
        features = image_features(exp.runner, extractor, memory)

        def produce(start, count):
            looked = program(params, np.uint32(options.seed),
                             hosts.local_indices(exp.runner, start, subject.batch))[1]
            frames = exp.runner.local(looked)
            rows = {f"{name} {k}": row for k in range(frames.shape[1])
                    for name, row in rows_of(exp.runner, features(
                        exp.runner.put("batch", frames[:, k])), count).items()}
            kept = hosts.all_rows(exp.runner, looked)[:count]
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
