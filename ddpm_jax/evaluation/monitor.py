"""Evaluation at the cadence of a training run."""

from typing import Any, NamedTuple

from ddpm_jax.evaluation.evaluate import evaluate_run
from ddpm_jax.evaluation.features import Model
from ddpm_jax.evaluation.options import Options, StoppedError
from ddpm_jax.evaluation.session import session_of
from ddpm_jax.parallel import hosts


class _At(NamedTuple):
    """A stop whose log names the training step, not the batch of the evaluation."""
    stop: Any
    step: int

    def requested(self, batch):
        del batch
        return self.stop.requested(self.step)


def options_of(config) -> Options:
    """The options that config.eval describes."""
    return Options(
        metrics=tuple(m.strip() for m in config.eval.metrics.split(",")), protocol="monitor",
        num=config.eval.num, bpd_num=config.eval.bpd_num)


def periodic(*, classifier_dir=None, stop=None):
    """-> evaluate(experiment, params, step) -> {metric: number}, for the training loop's cadence;
    None where ``stop``, which is polled between batches, ended it.

    The data, the classifier, compiled programs and the features of real images are kept from one
    call to the next. All processes call it and get the numbers.
    """
    session = None

    def evaluate(exp, params, step):
        nonlocal session
        session = session or session_of(exp)
        session.stop = stop and _At(stop, step)
        # The bound of one split is enough for a monitor: test where there is one.
        split = "test" if "test" in session.sources else "train"
        options = options_of(exp.config)._replace(
            classifier_dir=classifier_dir, splits=(split,))
        try:
            records, _ = evaluate_run(
                Model(exp, params, {"step": step, "weights": "ema"}), options, session)
        except StoppedError:
            return None
        values = {name: v for _, values, _ in records for name, v in values.items()}
        return hosts.broadcast_json(_numbers(values, session.classifiers))

    return evaluate


def _numbers(values, classifiers) -> dict:
    """The numbers to log: eps_loss by bucket, the classifier's distance under a fixed name too."""
    numbers = {name: float(v) for name, v in values.items()
               if isinstance(v, int | float) and not name.endswith("_n")}
    numbers |= {f"{name}_{i}": v for name, buckets in values.items()
                if name.startswith("eps_loss") for i, v in enumerate(buckets)}
    for stored in filter(None, classifiers.values()):
        if stored.key in numbers:
            numbers["FD-cnn"] = numbers[stored.key]
    return numbers
