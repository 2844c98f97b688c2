"""ddpm evaluate --workdir=DIR [--metrics=bpd,offline] [--num=50000] [...]
   ddpm evaluate --samples=FOLDER_OR_NPZ --reference=FILE [--metrics=fid,is,kid,pr]

Evaluate a run or given images. Writes evaluation.json (keyed by checkpoint step and protocol, with
the provenance of every number) and a page, evaluation.html. After a stop, the same command resumes;
the result does not depend on the number of devices or hosts.

Without any download: bpd (bits/dim of real images), offline (of a run bpd too; distances in the
features of a small classifier, FD-cnn@<hash>, and of a random network, FD-rand@<seed>: not FID), nn
(nearest training images) and, for a model with classes, labels (the share of samples that the
classifier calls by their label). With Inception's weights (ddpm inception): fid, is, kid and pr
(precision and recall); fid, kid and pr also need a --reference (ddpm reference).

  ddpm evaluate --workdir=runs/digits --metrics=bpd,offline,nn --num=1000
  ddpm evaluate --workdir=runs/cifar10 --metrics=fid,is --reference=cifar10_train.npz

--protocol=paper: integers, float32 convolutions, OpenAI's IS over 10 splits (to report).
--protocol=monitor: as the official training program (to watch).
"""

import json

from ddpm_jax import names
from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.options import NN_QUERIES, REAL_BATCH, Options, StoppedError
from ddpm_jax.parallel.exit_codes import EXIT_RESTART
from ddpm_jax.storage import files

OPTIONS = ("protocol", "quantise", "num", "bpd_num", "seed", "batch_size", "sampler", "steps",
           "nodes", "guidance", "reference", "inception_weights", "allow_unknown_weights",
           "classifier_dir", "force", "keep_images", "crop")
NOT_ALWAYS_READ = (*OPTIONS, "splits", "step", "ema", "dataset", "data_dir", "overwrite")


def define_inception_flags(define):
    define.path("inception_weights", None, "converted weights (.npz) or their source")
    define.bool("allow_unknown_weights", False,
                "accept Inception weights whose sha256 is not known")
    define.string("protocol", "paper", "paper (to report) or monitor (to watch)")
    define.bool("overwrite", False, "replace an existing file")


def define_flags(define):
    define.workdir()
    define.weights()
    define_inception_flags(define)
    define.path("samples", None, "evaluate these images instead: a folder of PNG (also of `ddpm "
                "sample`), or an .npz or .npy with uint8 [N,H,W,C]")
    metrics = names.table("evaluation/metrics.py", "METRICS")
    define.list("metrics", ["bpd", "offline"], f"comma list of {', '.join(metrics)}")
    define.integer("num", None, "generated images; default: 50,000 for fid and is, 16 for nn "
                   "alone, else 5,000")
    define.integer("bpd_num", None, "real images for bits/dim; default: all")
    define.list("splits", None, "splits for bits/dim; default: train and test")
    define.string("quantise", None, "round, truncate or none: how the model's output becomes grey "
                  "levels; default: the protocol's")
    define.path("reference", None, "statistics of real images, by `ddpm reference` or another "
                "tool (mu and sigma)")
    define.string("dataset", None, "with --samples: real images for nn and offline")
    define.path("data_dir", None, "where `ddpm data prepare` put the dataset")
    define.path("classifier_dir", None, "where the small classifiers are kept; default: the "
                "user's cache")
    define.integer("seed", 0, "seed of the noise")
    define.integer("batch_size", None, "images at a time, all devices together")
    define.sampler()
    define.integer("crop", None, "nearest neighbours in the middle CROP x CROP pixels")
    define.bool("force", False, "compare with a reference of another protocol or dataset; the "
                "result is marked")
    define.bool("keep_images", False, "write the generated images to samples.npz")
    define.path("out", None, "folder for the results; default: --workdir")
    define.pod()


def _options(values) -> Options:
    return Options(
        metrics=tuple(values.metrics),
        splits=values.splits and tuple(values.splits),
        **{name: getattr(values, name) for name in OPTIONS})


def _refuse_unread(values, options):
    """Raise UserError for a flag that has no effect on these metrics of a run or of images."""
    from ddpm_jax.evaluation.metrics import options_read

    read = options_read(options.metrics, of_model=not values.samples)
    for name in NOT_ALWAYS_READ:
        if values[name].present and name not in read:
            raise UserError(
                f"--{name} has no effect on --metrics={','.join(options.metrics)} of "
                f"{'--samples' if values.samples else '--workdir'}; leave it out")


def _of_samples(values, options, stop):
    """-> (key of the result, the evaluation, folder of the results), as `_of_run`."""
    import jax

    from ddpm_jax.evaluation import features, image_files
    from ddpm_jax.evaluation.evaluate import evaluate
    from ddpm_jax.evaluation.session import Session, Splits
    from ddpm_jax.evaluation.subset import ORDER, subset
    from ddpm_jax.parallel.runners import RUNNERS
    from ddpm_jax.run_log import say

    images = image_files.open_images(values.samples)
    for note in images.notes:
        say(note)
    out = values.out or values.workdir
    session = Session(
        RUNNERS["jit"](jax.devices()), values.dataset and Splits(
            values.dataset, values.data_dir, images.shape),
        folder=out and files.join(out, "evaluation"), stop=stop, say=say)
    rows = subset(images.size, options.num)
    batch = options.batch_size or REAL_BATCH
    kept = images.size if options.keep_images else NN_QUERIES
    subject = features.Subject(
        values.samples, features.of_images(
            session, lambda i: images.read(rows[i]), batch, images_kept=kept),
        {"samples": values.samples, "samples_sha256": images.identity} | (
            {"rows": ORDER} if len(rows) < images.size else {}), images.size, batch, images.shape)
    return f"samples-{images.identity[:8]}", lambda: evaluate(subject, options, session), out


def _of_run(values, options, stop):
    from ddpm_jax.evaluation.evaluate import evaluate_run
    from ddpm_jax.evaluation.features import Model
    from ddpm_jax.evaluation.session import session_of
    from ddpm_jax.run_log import say
    from ddpm_jax.sample import load_run

    workdir = files.resolve(common.required(values, "workdir"))
    exp, params, step, facts = load_run(workdir, step=values.step, ema=values.ema)
    session = session_of(exp, values.data_dir, folder=f"{workdir}/evaluation/{step}", stop=stop,
                         say=say)
    model = Model(exp, params, facts | {"workdir": str(workdir)})
    return step, lambda: evaluate_run(model, options, session), values.out or str(workdir)


def main(values, words):
    from ddpm_jax.evaluation.evaluate import check_options
    from ddpm_jax.evaluation.records import only_writer, read_records, shown, write_results
    from ddpm_jax.parallel import hosts
    from ddpm_jax.run_log import say

    common.no_words(words)
    if not (values.samples or values.workdir):
        raise UserError("--workdir=DIR (a run) or --samples=FOLDER_OR_NPZ is missing")
    options = _options(values)
    check_options(options, of_model=not values.samples)
    _refuse_unread(values, options)
    out = values.out or values.workdir
    if out:
        read_records(files.join(out, "evaluation.json"))      # damage shows before the work
    elif values.keep_images:
        raise UserError("--keep_images needs --out, the folder of samples.npz")
    stop, _ = common.join(values)
    step, work, out = (_of_samples if values.samples else _of_run)(values, options, stop)
    try:
        with only_writer(out, "--out" if values.out else "--workdir"):
            records, pictures = work()
            if out and hosts.is_main_process():
                write_results(out, step, options.protocol, records, pictures,
                              f"{values.samples or out}, step {step}")
    except StoppedError:
        say("stopped; finished shards are kept: the same command resumes")
        return EXIT_RESTART
    if hosts.is_main_process():
        print(json.dumps(shown(step, options.protocol, records) if out else
                         {label: found for label, found, _ in records}, indent=1))
    return 0
