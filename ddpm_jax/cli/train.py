"""ddpm train --config=FILE_OR_NAME --workdir=DIR [--config.any.field=value ...]

Train a model. If DIR holds a run already, it goes on from its newest checkpoint, without asking.
SIGTERM, Ctrl-C or a closed terminal saves and exits with 42; the same command goes on.

  ddpm train --config=digits --workdir=runs/digits
  ddpm train --config=cifar10 --workdir=runs/cifar10 --config.data.dir=/data
"""

from ddpm_jax.cli import common
from ddpm_jax.parallel import exit_codes


def define_flags(define):
    define.config()
    define.workdir()
    define.pod()


def main(values, words):
    common.no_words(words)
    config, workdir = common.required(values, "config"), common.required(values, "workdir")
    stop, watchdog = common.join(values, config)
    from ddpm_jax import train
    from ddpm_jax.evaluation import monitor

    done = train.train(config, workdir, stop=stop, watchdog=watchdog,
                       evaluate=monitor.periodic(stop=stop), check=monitor.check)
    return 0 if done else exit_codes.EXIT_RESTART
