"""ddpm reproduce TARGET --workdir=FOLDER [--dry_run] [--config=NAME] [--inception_weights=FILE]

TARGET: table1, table2, table4, fig5, fig7, fig8, fig10 or nearest.
For each model of the target: the config, what it costs (FLOPs, hours on the paper's TPU v3-8 and on
this machine), the paper's value and, where a run is in FOLDER/<model>, ours with PASS or FAIL.
Without --dry_run it trains, samples and scores what is missing, going on from where it was cut off,
and writes FOLDER/<target>.html, one file that opens without a network.

  ddpm reproduce table1 --dry_run
  ddpm reproduce fig10 --config=digits --workdir=runs/digits-figures

--config puts another dataset's config under the same cells: then there is no value of the paper to
compare with, and no verdict.
"""

import json
import sys
import time

import jax
import numpy as np

from ddpm_jax.cli import common
from ddpm_jax.cli.evaluate import define_inception_flags, say
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import exit_codes, hosts
from ddpm_jax.storage import files

FLAGS = None  # of the call of main
MFU = 0.4       # of a chip's peak, where nothing was measured: an estimate, and called one
CPU_SHARE = 0.5
IMAGES_OF = {"train": 50_000, "test": 10_000}      # CIFAR-10


def define_flags(define):
    define.workdir()
    define_inception_flags(define)
    define.bool("dry_run", False, "print configs, costs, the paper's values and what is there; "
           "run nothing")
    define.path("config", None, "another config under the same cells, such as digits")
    define.list("set", [], "config fields for every cell: --set=train.steps=100,seed=1")
    define.integer("num", None, "generated images; default: 50,000 for tables, 1,000 for fig10")
    define.integer("bpd_num", None, "real images for bits/dim; default: all")
    define.path("classifier_dir", None, "where the small classifiers are kept")
    define.pod()


def cell_config(name: str):
    """The config of one cell, under --config and --set. Raises UserError naming a wrong field."""
    from ddpm_jax.config import flatten, load_config, to_json
    from ddpm_jax.configs.cifar10_table2 import CELLS
    config = load_config(FLAGS.config or "cifar10")
    config.diffusion.update(CELLS[name])
    known = flatten(to_json(config))
    for text in FLAGS.set:
        field, equals, value = text.partition("=")
        if not equals or field not in known:
            raise UserError(f"--set={text}: expected FIELD=VALUE with a field of the config, "
                            "such as train.steps=100")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        try:
            config.update_from_flattened_dict({field: tuple(parsed) if isinstance(parsed, list)
                                               else parsed})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"--set={text}: {error}") from None
    return config


def forward_flops(config) -> float:
    """One image through the network, by hand count."""
    from ddpm_jax.compilation.roofline import unet_work
    from ddpm_jax.experiment import network

    return float(unet_work(network(config)).forward_flops)


def machine_rate() -> tuple[float, str]:
    """(FLOP/s, how it is known) of all devices here."""
    from ddpm_jax.compilation.hardware import chip_of
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    if chip is not None:
        rate = chip.per_device(chip.bf16_flops) * jax.device_count() * MFU
        return rate, f"{jax.device_count()} x {device.device_kind} at {MFU:.0%} of peak, estimated"
    x = jax.device_put(np.ones((1024, 1024), np.float32))
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    started = time.perf_counter()
    for _ in range(5):
        multiply(x).block_until_ready()
    rate = 5 * 2 * 1024 ** 3 / (time.perf_counter() - started)
    return rate * CPU_SHARE, (f"{device.device_kind}, {CPU_SHARE:.0%} of a measured "
                              f"{rate / 1e9:.0f} GFLOP/s, estimated")


def drawn_count(target) -> int:
    """Images that a target draws."""
    from ddpm_jax.evaluation.metrics import default_num
    from ddpm_jax.evaluation.options import ALONG_NUM
    from ddpm_jax.reproduction import figures
    own = {"shared": figures.ROWS * figures.COLUMNS, "rate": 0,
           "interpolation": figures.ROWS * (figures.COLUMNS + 1),
           "progressive": FLAGS.num or ALONG_NUM}
    return own[target.figure] if target.figure else FLAGS.num or default_num(target.metrics)


def costs(config, target, rate) -> list[tuple]:
    """(part, FLOPs, hours on a v3-8 by the paper's speed or None, hours here)."""
    from ddpm_jax.reproduction.paper_results import V3_8
    one = forward_flops(config)
    steps, batch, T = config.train.steps, config.train.batch_size, config.diffusion.num_timesteps
    paper = V3_8.get(config.data.image_size)
    rows = [("train", 3 * one * batch * steps,
             paper and steps * batch / paper["batch"] / paper["steps_per_s"] / 3600)]
    count = drawn_count(target)
    if count:
        rows.append(("sample", one * T * count,
                     paper and count / paper["samples"] * paper["sample_s"] * T / 1000 / 3600))
    if "bpd" in target.metrics:
        splits = wanted_splits(target, IMAGES_OF)
        sizes = IMAGES_OF if config.data.name == "cifar10" else {"train": 1_442, "test": 355}
        count = sum(min(sizes[s], FLAGS.bpd_num or sizes[s]) for s in splits)
        rows.append(("bits/dim", one * T * count,
                     paper and count / paper["samples"] * paper["sample_s"] * T / 1000 / 3600))
    return [(part, flops, hours, flops / rate / 3600) for part, flops, hours in rows]


def existing(folder) -> dict:
    path = files.join(folder, "evaluation.json")
    return files.read_json(path) if files.exists(path) else {}


def missing_metrics(target, values) -> tuple:
    """Metrics of the target that the run has no value of."""
    have = {"is": "is" in values, "fid": "fid_train" in values, "bpd": "bpd_test" in values,
            "nn": "nn_pixels_exact_copies" in values}
    return tuple(m for m in target.metrics if not have[m])


def wanted_splits(target, sources) -> tuple:
    """Splits whose bits/dim the target shows, or what the dataset has."""
    return tuple(s for s in sources if f"bpd_{s}" in target.keys) or tuple(sources)


def references_for(session, folder):
    """Reference statistics of both splits, made once into FOLDER/references."""
    from ddpm_jax.evaluation.make_reference import make_reference
    found = {}
    for split, source in session.sources.items():
        path = files.join(folder, "references", f"{session.sources.name}-{split}.npz")
        if not hosts.broadcast_json(files.exists(path)):
            say(f"reference statistics of {session.sources.name}, {split}")
            make_reference(source, _options(("is",)), path, session, num_features=10_000)
        found[split] = path
    return found


def _options(metrics, reference=None):
    from ddpm_jax.evaluation.options import Options
    return Options(
        metrics=metrics, protocol=FLAGS.protocol, num=FLAGS.num, bpd_num=FLAGS.bpd_num,
        reference=reference, inception_weights=FLAGS.inception_weights,
        allow_unknown_weights=FLAGS.allow_unknown_weights, classifier_dir=FLAGS.classifier_dir)


def _with_weights(metrics) -> tuple:
    """The metrics that can be had here: without Inception's weights, offline stands in for FID."""
    from ddpm_jax.evaluation.evaluate import load_weights
    if not {"fid", "is"} & set(metrics):
        return metrics
    try:
        load_weights(_options(("is",)))
        return metrics
    except UserError as error:
        if FLAGS.inception_weights:
            raise
        # All that was looked for is said by evaluate; here something stands in.
        say(f"no FID and IS here: {str(error).partition(' Looked for')[0]} (`ddpm inception check` "
            "says where they are looked for); FD-cnn and FD-rand stand in")
        return (*(m for m in metrics if m not in ("fid", "is")), "offline")


def run_cell(name, target, root, stop, watchdog):
    """Train, then measure what is missing. -> what figures.Run takes: (experiment, params,
    sources, along)."""
    from ddpm_jax.evaluation.along import evaluate_along
    from ddpm_jax.evaluation.evaluate import evaluate_run
    from ddpm_jax.evaluation.features import Model
    from ddpm_jax.evaluation.options import StoppedError
    from ddpm_jax.evaluation.records import write_results
    from ddpm_jax.evaluation.session import session_of
    from ddpm_jax.reproduction.paper_results import ours
    from ddpm_jax.sample import load_run
    from ddpm_jax.train import train
    folder = str(files.resolve(f"{root}/{name}"))
    config = cell_config(name)
    if not train(config, folder, stop=stop, watchdog=watchdog):
        raise StoppedError
    watchdog.pause()
    exp, params, step = load_run(folder)
    # The first process's folder decides, or processes would wait for each other for ever.
    values = ours(existing(folder), ("is", "fid_train", "bpd_test", "nn_pixels_exact_copies"))
    values = hosts.broadcast_json(values)
    session = session_of(exp, folder=f"{folder}/evaluation/{step}", stop=stop, say=say)
    splits = wanted_splits(target, session.sources)
    metrics = _with_weights(missing_metrics(target, values) if values.get("step") == step
                            else target.metrics)
    model = Model(exp, params, {"workdir": folder, "step": step, "weights": "ema"})
    wanted = [(metrics, None)]
    if "fid" in metrics:
        paths = references_for(session, root)
        wanted = [(metrics, paths["train"])]
        if "test" in paths:
            wanted.append((("fid",), paths["test"]))
    for chosen, reference in wanted:
        if chosen:
            records, pictures = evaluate_run(
                model, _options(chosen, reference)._replace(splits=splits), session)
            if jax.process_index() == 0:
                write_results(folder, step, FLAGS.protocol, records, pictures, f"{name}, {step}")

    def along(looks, shown):
        chosen = _with_weights(("is", "fid"))
        reference = references_for(session, root)["train"] if "fid" in chosen else None
        return evaluate_along(model, _options(chosen, reference), session, looks=looks,
                              shown=shown)

    return exp, params, session.sources, along


def all_values(document) -> dict:
    """Every value of the newest step, for the figures."""
    found = {}
    for step in sorted(document, key=lambda s: int(s) if s.isdigit() else -1):
        for record in document[step].get("paper", {}).values():
            found |= record["values"]
    return found


def table_rows(target, root, is_paper) -> list[list]:
    """model, key, the paper's value, band, ours, verdict."""
    from ddpm_jax.reproduction.paper_results import CELLS, ours, verdict
    rows = []
    for name in target.cells:
        cell = CELLS[name]
        found = ours(existing(f"{root}/{name}"), target.keys) if root else {}
        keys = [k for k in target.keys if k in cell.values or k in found]
        keys = keys or [""] * bool(target.keys)
        for key in keys:
            paper = cell.values.get(key) if is_paper else None
            band = cell.bands.get(key) if is_paper else None
            value = found.get(key)
            rows.append([
                cell.title, key, "unstable" if is_paper and cell.unstable else paper,
                "{:g} to {:g}".format(*band) if band else None, value,
                verdict(key, value, cell) if is_paper else ""])
    return rows


HEADER = ("model", "value", "the paper's", "band", "ours", "verdict")


def print_table(rows, header):
    from ddpm_jax.evaluation.html_report import number
    cells = [[number(c) for c in row] for row in [header, *rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def cost_rows(target) -> tuple[list, str]:
    rate, how = machine_rate()
    rows = []
    for name in target.cells:
        config = cell_config(name)
        for part, flops, hours, here in costs(config, target, rate):
            rows.append([f"{FLAGS.config or 'cifar10'} + {name}", part, config.train.steps
                         if part == "train" else None, f"{flops:.2e}", hours, here])
    return rows, how


COST_HEADER = ("config", "part", "steps", "FLOPs", "hours, v3-8 (paper's speed)", "hours here")


def main(values, words):
    from ddpm_jax.reproduction.paper_results import TARGETS
    global FLAGS
    FLAGS = values
    if len(words) != 1 or words[0] not in TARGETS:
        raise UserError(f"reproduce {' '.join(words)}: expected one of {', '.join(TARGETS)}")
    target, is_paper = TARGETS[words[0]], not FLAGS.config and not FLAGS.set
    if FLAGS.dry_run:
        rows, how = cost_rows(target)
        print(f"{target.text}\n")
        print_table(rows, COST_HEADER)
        print(f"\nhours here: {how}\n")
        print_table(table_rows(target, FLAGS.workdir, is_paper), HEADER)
        return 0
    root = common.required(values, "workdir")
    stop, watchdog = common.join(values)
    from ddpm_jax.evaluation import html_report
    from ddpm_jax.evaluation.options import StoppedError
    from ddpm_jax.reproduction import figures
    from ddpm_jax.storage import pictures
    rows, how = cost_rows(target)
    sections = []
    try:
        for name in target.cells:
            exp, params, sources, along = run_cell(name, target, root, stop, watchdog)
            if target.figure:
                drawn = figures.FIGURES[target.figure](figures.Run(
                    exp, params, sources, all_values(existing(f"{root}/{name}")), along))
                sections += drawn.sections
                if jax.process_index() == 0:
                    for title, picture in drawn.pictures.items():
                        pictures.write_png(
                            f"{root}/{words[0]}-{title}.png",
                            pictures.enlarge(picture, -(-320 // picture.shape[1])))
            lines = f"{root}/{name}/metrics.jsonl"
            if jax.process_index() == 0 and files.exists(lines):
                from ddpm_jax import run_log
                sections += html_report.curve_sections(run_log.read_metrics(lines))
            if jax.process_index() == 0:
                sections += html_report.evaluation_sections(existing(f"{root}/{name}"))
    except StoppedError:
        say("stopped; what is done is kept: the same command goes on")
        return exit_codes.EXIT_RESTART
    if jax.process_index() == 0:
        found = table_rows(target, root, is_paper)
        note = html_report.note(
            "The paper's values are the paper's. Bands are this project's." if is_paper else
            "Another config than the paper's: its values do not apply, so there is no verdict.")
        shown = [note]
        if found:
            shown = [html_report.section("Values", note, html_report.table(found, HEADER))]
        page = html_report.page(target.text, [
            *shown, *sections,
            html_report.section("Cost", html_report.note(f"hours here: {how}"),
                           html_report.table(rows, COST_HEADER))])
        path = f"{root}/{words[0]}.html"
        files.write_bytes(path, page.encode())
        if found:
            print_table(found, HEADER)
        print(f"wrote {path}", file=sys.stderr)
    return 0
