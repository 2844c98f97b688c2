"""ddpm train --config=FILE_OR_NAME --workdir=DIR [--config.any.field=value ...]
   ddpm train --workdir=DIR

Train a model. If DIR already holds a run, training resumes from its newest checkpoint, with the
run's own config where --config is left out. SIGTERM, Ctrl-C or a closed terminal saves and exits
with 42; the same command resumes. DIR/index.html shows the run.

  ddpm train --config=digits --workdir=runs/digits
  ddpm train --config=cifar10 --workdir=runs/cifar10 --config.data.dir=/data --dry_run
  ddpm train --workdir=runs/cifar10 --config.train.steps=1000000
  ddpm train --workdir=runs/slower --init_from=runs/cifar10:100000 \\
      --config.optimizer.learning_rate=1e-4
"""

import functools

from ddpm_jax import names
from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import exit_codes


def define_flags(define):
    define.config(of_run=True)
    define.workdir()
    define.path("init_from", None, "RUN or RUN:STEP: a new run starts from that run's weights, "
                "average and step; any field but the network's may differ")
    define.bool("init_optimizer", False, "with --init_from: the optimizer's state too")
    define.bool("dry_run", False, "print the config, the parameters, FLOPs, memory and hours, and "
                "the command that trains; train nothing")
    define.string("wandb", None, "project of Weights & Biases that gets the numbers too; "
                  "WANDB_MODE=offline needs no account")
    define.pod()


def more_help():
    return ["\nfields, with the values of configs/default.py, which other configs change:"] + [
        f"  --config.{field.name}={field.default}" + (field.comment and f"   {field.comment}")
        for field in names.config_fields()]


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
    if values.config is None and values.workdir:
        raise UserError(f"--config is missing, and --workdir={values.workdir} holds no run to "
                        f"resume; packaged: {', '.join(names.packaged_configs())}")
    config = common.required(values, "config")
    if values.dry_run:
        from ddpm_jax import plan

        print(plan.describe(config, values["config"].config_filename, values.workdir))
        return 0
    workdir, source = common.required(values, "workdir"), _init_from(values)
    stop, watchdog = common.join(values, config)
    from ddpm_jax import train, wandb_sink
    from ddpm_jax.evaluation import monitor, run_page

    done = train.train(config, workdir, stop=stop, watchdog=watchdog,
                       evaluate=monitor.periodic(stop=stop), check=monitor.check,
                       init_from=source and train.InitFrom(*source), page=run_page.write,
                       sink=values.wandb and functools.partial(wandb_sink.open_sink, values.wandb))
    return 0 if done else exit_codes.EXIT_RESTART
