"""ddpm train --config=FILE_OR_NAME --workdir=DIR [--config.any.field=value ...]

Train a model. If DIR already holds a run, training resumes from its newest checkpoint.
SIGTERM, Ctrl-C or a closed terminal saves and exits with 42; the same command resumes.

  ddpm train --config=digits --workdir=runs/digits
  ddpm train --config=cifar10 --workdir=runs/cifar10 --config.data.dir=/data
  ddpm train --config=cifar10 --workdir=runs/slower --init_from=runs/cifar10:100000 \\
      --config.optimizer.learning_rate=1e-4
"""

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import exit_codes


def define_flags(define):
    define.config()
    define.workdir()
    define.path("init_from", None, "RUN or RUN:STEP: a new run starts from that run's weights, "
                "average and step; any field but the network's may differ")
    define.bool("init_optimizer", False, "with --init_from: the optimizer's state too")
    define.pod()


def _init_from(values):
    run = values["init_from"].value
    if not run:
        if values["init_optimizer"].value:
            raise UserError("--init_optimizer: only with --init_from=RUN")
        return None
    path, _, step = run.rpartition(":")
    workdir, step = (path, int(step)) if path and step.isdigit() else (run, None)
    return workdir, step, values["init_optimizer"].value


def main(values, words):
    common.no_words(words)
    config, workdir = common.required(values, "config"), common.required(values, "workdir")
    source = _init_from(values)
    stop, watchdog = common.join(values, config)
    from ddpm_jax import train
    from ddpm_jax.evaluation import monitor

    done = train.train(config, workdir, stop=stop, watchdog=watchdog,
                       evaluate=monitor.periodic(stop=stop), check=monitor.check,
                       init_from=source and train.InitFrom(*source))
    return 0 if done else exit_codes.EXIT_RESTART
