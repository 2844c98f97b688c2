"""Evaluation at the cadence of a training run."""

from typing import Any, NamedTuple

import jax

from ddpm_jax.evaluation.evaluate import evaluate_run
from ddpm_jax.evaluation.features import open_splits
from ddpm_jax.evaluation.options import Options, StoppedError
from ddpm_jax.evaluation.records import same_everywhere


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
