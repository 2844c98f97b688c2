"""ddpm evaluate --workdir=DIR [--metrics=bpd,fid,is,kid,pr,nn,offline] [--num=50000] [...]
   ddpm evaluate --samples=FOLDER_OR_NPZ --reference=FILE [--metrics=fid,is,kid,pr]

Measures a run, or anybody's images, and writes evaluation.json (keyed by checkpoint step and
protocol, with the provenance of every number) and a page to look at, evaluation.html.

Without any download: bpd (bits/dim of real images) and offline (bpd, the eps-loss by timestep, and
distances in the features of a small classifier: FD-cnn@<hash>, FD-rand@<seed>; not FID). With
Inception's weights: fid, is, kid, pr. A command that was cut off goes on where it stopped; the
result does not depend on the number of devices or hosts.

--protocol=paper: integers, float32 convolutions, OpenAI's IS over 10 splits (to report).
--protocol=monitor: as the official training program (to watch).
"""

import json
import sys

import jax

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import exit_codes
from ddpm_jax.storage import files


def define_inception_flags(define):
    define.path("inception_weights", None, "converted weights (.npz) or their source")
    define.bool("allow_unknown_weights", False,
           "accept Inception weights whose sha256 is not known")
    define.string("protocol", "paper", "paper (to report) or monitor (to watch)")
    define.bool("overwrite", False, "replace a file that is there")


def define_flags(define):
    define.workdir()
    define.weights()
    define_inception_flags(define)
    define.path("samples", None, "judge these images instead: a folder of PNG, or an .npz "
           "with arr_0 uint8 [N,H,W,C]")
    define.string("metrics", "bpd,offline", "comma list of bpd, fid, is, kid, pr, nn, offline")
    define.integer("num", None, "generated images; default: 50,000 for fid and is, "
           "16 for nn alone, else 5,000")
    define.integer("bpd_num", None, "real images for bits/dim; default: all")
    define.list("splits", ["train", "test"], "splits for bits/dim")
    define.string("quantise", None, "round, truncate or none: what makes grey levels of the "
           "model's output; default: the protocol's")
    define.path("reference", None, "statistics of real images, by `ddpm reference`")
    define.string("dataset", None, "with --samples: real images for nn and offline")
    define.path("data_dir", None, "where `ddpm data prepare` put the dataset")
    define.path("classifier_dir", None, "where the small classifiers are kept; default: the "
           "user's cache")
    define.integer("seed", 0, "seed of the noise")
    define.integer("batch_size", None, "images at a time, all devices together")
    define.string("sampler", None, "ancestral or ddim; default: the run's")
    define.integer("steps", None, "steps of the chain; default: the run's")
    define.integer("crop", None, "nearest neighbours in the middle CROP x CROP pixels")
    define.bool("force", False, "compare with a reference of another protocol or dataset")
    define.bool("keep_images", False, "write the generated images to samples.npz")
    define.path("out", None, "folder for the results; default: --workdir")
    define.pod()


def say(text):
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def options(values):
    from ddpm_jax.evaluation.options import Options
    return Options(
        metrics=tuple(m.strip() for m in values.metrics.split(",") if m.strip()),
        splits=tuple(values.splits), **{name: getattr(values, name) for name in (
            "protocol", "quantise", "num", "bpd_num", "seed", "batch_size", "sampler", "steps",
            "ema", "reference", "inception_weights", "allow_unknown_weights", "classifier_dir",
            "force", "keep_images", "crop")})


def write_results(out, step, protocol, records, pictures, title, *, show=True):
    """evaluation.json, pictures and evaluation.html in the folder ``out``; numbers on stdout."""
    from ddpm_jax import run_log
    from ddpm_jax.evaluation import html_report
    from ddpm_jax.evaluation.records import write_records
    from ddpm_jax.storage.pictures import write_png
    document = write_records(files.join(out, "evaluation.json"), step, protocol, records)
    if "samples" in pictures:
        files.write_npz(files.join(out, "samples.npz"), {"arr_0": pictures.pop("samples")})
    for name, picture in pictures.items():
        write_png(files.join(out, f"{name}.png"), picture)
    lines = files.join(out, "metrics.jsonl")
    history = run_log.read_metrics(lines) if files.exists(lines) else []
    page = html_report.page(title, [*html_report.evaluation_sections(document),
                               *html_report.curve_sections(history),
                               *html_report.picture_sections(pictures)])
    files.write_bytes(files.join(out, "evaluation.html"), page.encode())
    if not show:
        return
    shown = {label: {k: v for k, v in values.items() if not isinstance(v, list) or len(v) < 20}
             for label, values, _ in records}
    print(json.dumps({str(step): {protocol: shown}}, indent=1))


def of_samples(values, chosen, stop):
    from ddpm_jax.evaluation import files
    from ddpm_jax.evaluation.evaluate import check_options, evaluate_images
    from ddpm_jax.evaluation.features import Subject, image_draws, open_splits
    from ddpm_jax.evaluation.options import BOUND, NN_QUERIES, REAL_BATCH
    from ddpm_jax.parallel.runners import RUNNERS
    check_options(chosen)
    if BOUND in chosen.metrics:
        raise UserError("--samples: bits/dim is of a model, not of images; leave bpd out of "
                        "--metrics")
    images = files.open_images(values.samples)
    sources = {}
    if values.dataset:
        sources = open_splits(values.dataset, values.data_dir, images.shape)
    runner = RUNNERS["jit"](jax.devices())
    batch = values.batch_size or REAL_BATCH
    memory = {}
    kept = images.size if chosen.keep_images else NN_QUERIES
    subject = Subject(
        image_draws(runner, images.read, batch, images_kept=kept, memory=memory),
        {"samples": str(values.samples), "samples_sha256": images.identity}, images.size, batch,
        images.shape, sources, runner)
    out = values.out or values.workdir
    folder = out and f"{out}/evaluation"
    scores, pictures, provenance = evaluate_images(
        subject, chosen, folder=folder, stop=stop, say=say, memory=memory)
    label = f"{values.samples}, {provenance['num']} images"
    return f"samples-{images.identity[:8]}", [(label, scores, provenance)], pictures, out


def of_run(values, chosen, stop):
    from ddpm_jax import sample
    from ddpm_jax.evaluation.evaluate import check_options, evaluate_run
    check_options(chosen)
    workdir = files.resolve(common.required(values, "workdir"))
    exp, params, step = sample.load_run(workdir, step=values.step, ema=values.ema)
    facts = {"workdir": str(workdir), "step": step, "weights": "ema" if values.ema else "raw"}
    records, pictures = evaluate_run(
        exp, params, chosen, facts=facts, folder=f"{workdir}/evaluation/{step}", stop=stop, say=say)
    return step, records, pictures, values.out or str(workdir)


def main(values, words):
    common.no_words(words)
    if not (values.samples or values.workdir):
        raise UserError("--workdir=DIR (a run) or --samples=FOLDER_OR_NPZ is missing")
    chosen = options(values)
    stop, _ = common.join(values)
    from ddpm_jax.evaluation.options import StoppedError
    try:
        measure = of_samples if values.samples else of_run
        step, records, pictures, out = measure(values, chosen, stop)
    except StoppedError:
        say("stopped; what is done is kept: the same command goes on")
        return exit_codes.EXIT_RESTART
    if jax.process_index() == 0:
        if out:
            write_results(out, step, chosen.protocol, records, pictures,
                          f"{values.samples or out}, step {step}")
        else:
            print(json.dumps({label: scores for label, scores, _ in records}, indent=1))
    return 0
