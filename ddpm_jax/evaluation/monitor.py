"""Evaluation at the cadence of a training run."""

from typing import Any, NamedTuple

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.evaluate import (
    check_options,
    evaluate_run,
    make_context,
    model_subject,
    number_of_samples,
)
from ddpm_jax.evaluation.features import Model
from ddpm_jax.evaluation.metrics import METRICS, REFERENCE, value_names
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


def options_of(exp, sources) -> Options:
    """The options that config.eval describes. The bound of one split is enough for a monitor: test
    where there is one."""
    config = exp.config.eval
    return Options(
        metrics=tuple(m.strip() for m in config.metrics.split(",") if m.strip()),
        protocol="monitor", num=config.num, bpd_num=config.bpd_num, prefix="config.eval.",
        splits=("test" if "test" in sources else "train",))


def check(exp) -> None:
    """Raise UserError, before the first step, for what would end the first evaluation: names,
    numbers, weights, sizes of the data set and config.eval.best."""
    session = session_of(exp)
    options, best = options_of(exp, session.sources), exp.config.eval.best
    protocol = check_options(options)
    compared = [name for name in options.metrics if REFERENCE in METRICS[name].needs]
    if compared:
        raise UserError(f"config.eval.metrics={compared[0]} compares with reference statistics, "
                        "which training does not take; run `ddpm evaluate --reference=FILE` on a "
                        "checkpoint")
    subject = model_subject(Model(exp, None, {"weights": "ema"}), options, session)
    context = make_context(subject, options, session)
    number_of_samples(subject, options, protocol)
    known = value_names(context.options.metrics, protocol, options.splits)
    if session.sources["train"].labels is None:
        known = tuple(name for name in known if name != "FD-cnn")
    open_ended = tuple(name for name in known if name.endswith(("_", "@")))
    if best and best not in known and not best.startswith(open_ended):
        raise UserError(f"config.eval.best={best} is not among the values of config.eval.metrics="
                        f"{exp.config.eval.metrics}; known: {', '.join(known)}")


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
        options = options_of(exp, session.sources)._replace(classifier_dir=classifier_dir)
        try:
            records, _ = evaluate_run(
                Model(exp, params, {"step": step, "weights": "ema"}), options, session)
        except StoppedError:
            return None
        values = {name: v for _, values, _ in records for name, v in values.items()}
        return hosts.broadcast_json(_numbers(values, session.classifiers))

    return evaluate


def _numbers(values, classifiers) -> dict:
    """The numbers to log, without counts of images: eps_loss by bucket, the classifier's distance
    under a fixed name too."""
    numbers = {name: float(v) for name, v in values.items()
               if isinstance(v, float) or isinstance(v, int) and not name.endswith("_n")}
    numbers |= {f"{name}_{i}": v for name, buckets in values.items()
                if name.startswith("eps_loss") for i, v in enumerate(buckets)}
    for stored in filter(None, classifiers.values()):
        if stored.key in numbers:
            numbers["FD-cnn"] = numbers[stored.key]
    return numbers
