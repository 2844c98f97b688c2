"""ddpm reproduce TARGET --workdir=FOLDER [--dry_run] [--config=NAME] [--inception_weights=FILE]

TARGET: table1, table2, improved, fast, table4, fig5, fig7, fig8, fig10 or nearest.
For each model of the target: the config, what it costs (FLOPs, hours on the paper's TPU v3-8 and on
this machine), the paper's value and, where a run is in FOLDER/<model>, ours with PASS or FAIL.
Without --dry_run it trains, samples and evaluates what is missing, resuming an interrupted command,
and writes FOLDER/<target>.html, one file that opens without a network.

A run that `ddpm import` made in FOLDER/<model> is not trained on, so that `fast` evaluates the
paper's own weights where they are imported into FOLDER/eps_fixed_simple. It has to be that model:
one with other data, network or chain is refused.

  ddpm reproduce table1 --dry_run
  ddpm reproduce fig10 --config=digits --workdir=runs/digits-figures

--config puts another dataset's config under the same cells: then there is no value of the paper to
compare with, and no verdict.
"""

from ddpm_jax.cli import common
from ddpm_jax.cli.evaluate import define_inception_flags
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.options import Options, StoppedError
from ddpm_jax.parallel import exit_codes


def define_flags(define):
    define.workdir()
    define_inception_flags(define)
    define.bool("dry_run", False, "print configs, costs, the paper's values and the values there "
                "are; run nothing")
    define.path("config", None, "another config under the same cells, such as digits")
    define.list("set", [], "config fields for every cell: --set=train.steps=100,seed=1")
    define.integer("num", None, "generated images; default: 50,000 for tables, 1,000 for fig10")
    define.integer("bpd_num", None, "real images for bits/dim; default: all")
    define.path("classifier_dir", None, "folder of the small classifiers")
    define.pod()


def print_table(rows, header):
    from ddpm_jax.evaluation.html_report import number

    texts = [[number(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(r[i]) for r in texts) for i in range(len(header))]
    for row in texts:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def main(values, words):
    from ddpm_jax.parallel import hosts
    from ddpm_jax.reproduction import cells, costs, targets
    from ddpm_jax.run_log import say

    if len(words) != 1 or words[0] not in targets.TARGETS:
        raise UserError(f"reproduce {' '.join(words)}: expected one of "
                        f"{', '.join(targets.TARGETS)}")
    options = Options(
        protocol=values.protocol, num=values.num, bpd_num=values.bpd_num,
        inception_weights=values.inception_weights,
        allow_unknown_weights=values.allow_unknown_weights, classifier_dir=values.classifier_dir)
    request = targets.Request(targets.TARGETS[words[0]], values.workdir, values.config,
                              tuple(values.set), options)
    if values.dry_run:
        cells.check(request)
        rows, how = costs.cost_rows(request)
        print(f"{request.target.text}\n")
        print_table(rows, costs.HEADER)
        print(f"\nhours here: {how}\n")
        print_table(targets.table_rows(request), targets.HEADER)
        return 0
    common.required(values, "workdir")
    stop, watchdog = common.join(values)
    try:
        rows = cells.reproduce(request, words[0], stop=stop, watchdog=watchdog)
    except StoppedError:
        say("stopped; finished shards are kept: the same command resumes")
        return exit_codes.EXIT_RESTART
    if rows and hosts.is_main_process():
        print_table(rows, targets.HEADER)
    return 0
