"""The sweep that chose the config digits: trains rows of ROWS and measures each.

    python benchmarks/digits_sweep.py RUNS [ROW ...]

Each row is trained in the folder RUNS/ROW (a run that is there resumes) and measured; its line goes
into digits_sweep.jsonl, and the table of all lines into digits_sweep.md. CPU-seconds are those of
the whole training, start, compilation and grids included: unlike the clock they are
nearly the same on a machine that others use. Quality is that of `ddpm evaluate
--metrics=bpd,offline` with the figures of docs/small-runs.md: FD-cnn of the first 355 of 1,000
samples of seed 0, of random sets of 355 of them, and of all.
"""

import json
import pathlib
import sys
import time

import jax
import numpy as np

import ddpm_jax as ddpm
from ddpm_jax.compilation.cache import enable_compilation_cache
from ddpm_jax.data.datasets import open_source
from ddpm_jax.evaluation import classifier, scores, small_cnn

SAMPLES, CALLS, SETS = 1000, 100, 20
BEFORE = {  # the config until this sweep
    "diffusion.num_timesteps": 250, "diffusion.schedule.max_beta": 0.5, "diffusion.predict": "eps",
    "train.steps": 3200, "train.batch_size": 64,
    "train.steps_per_dispatch": 100, "optimizer.learning_rate": 2e-3,
    "optimizer.decay_steps": 3200, "optimizer.warmup_steps": 100, "ema.decay": 0.995,
    "checkpoint.every": 800, "eval.sample_every": 800}
SHORT = BEFORE | {"train.steps": 4800, "train.batch_size": 32, "optimizer.decay_steps": 4800,
                  "optimizer.warmup_steps": 200, "ema.decay": 0.9975,
                  "diffusion.num_timesteps": 500, "diffusion.schedule.max_beta": 0.25,
                  "checkpoint.every": 2400, "eval.sample_every": 0}
ROWS = {
    "before": BEFORE,
    "batch-32": SHORT,
    "v": SHORT | {"diffusion.predict": "v"},
    "v-6000": SHORT | {"diffusion.predict": "v", "train.steps": 6000,
                       "optimizer.decay_steps": 6000},
    "v-6600": SHORT | {"diffusion.predict": "v", "train.steps": 6600,
                       "optimizer.decay_steps": 6600},
}
HERE = pathlib.Path(__file__).parent
LINES, PAGE = HERE / "digits_sweep.jsonl", HERE / "digits_sweep.md"
HEAD = """# The sweep of the config digits

Written by `python benchmarks/digits_sweep.py`; do not edit. One training a row, seed 0, on two
CPU cores that other programs used too; all rows are measured by one classifier. FD-cnn to the
training images: real held-out images have {real:.1f} (355), and {sure:.1%} of them are sure: the
classifier gives their class more than 0.9. A set: mean and standard deviation over {sets}
random sets of 355 of the 1,000 samples of {calls} network calls.

| row | fields that differ from `before` | trained with JAX | CPU-s | FD-cnn, first 355 | a set | \
1,000 | sure | bits/dim, test | of which t = 0 | t = 1 ... 6 |
|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def measured(run, judge, train, test):
    """-> the figures of a Run, a dict of numbers."""
    real = small_cnn.outputs(judge, train.array()).features
    images = run.sample(SAMPLES, seed=0, steps=CALLS)
    found = small_cnn.outputs(judge, images)

    def distance(rows):
        return small_cnn.distance(found.features[rows], real)

    rng, n = np.random.default_rng(0), len(test)
    sets = [distance(rng.permutation(SAMPLES)[:n]) for _ in range(SETS)]
    bound = run.bound(test.array())
    return dict(
        first=distance(np.arange(n)), set=np.mean(sets), set_sd=np.std(sets),
        all=distance(np.arange(SAMPLES)),
        sure=(scores.softmax(found.logits).max(1) > small_cnn.CONFIDENT).mean(),
        bpd=bound.total.mean(), bpd_se=bound.total.std() / n**0.5,
        terms=bound.terms.mean(0)[:7].tolist(), eps=bound.eps_mse.mean(0)[:7].tolist())


def line(name, runs, judge, train, test):
    fields = ROWS[name]
    start = time.process_time()
    run = ddpm.train(ddpm.load_config("digits", fields), pathlib.Path(runs) / name)
    spent = time.process_time() - start
    return dict(row=name, fields=fields, cpu_s=spent, jax=jax.__version__) | {
        k: v if isinstance(v, list) else float(v)
        for k, v in measured(run, judge, train, test).items()}


def page(lines, real, sure):
    rows = []
    for found in lines:
        changed = ", ".join(f"`{k}={v}`" for k, v in found["fields"].items() if v != BEFORE.get(k))
        first, *terms = found["terms"]
        rows.append(
            f"| `{found['row']}` | {changed} | {found['jax']} | {found['cpu_s']:.0f} | "
            f"{found['first']:.1f} | {found['set']:.1f} ± {found['set_sd']:.1f} | "
            f"{found['all']:.1f} | {found['sure']:.1%} | {found['bpd']:.2f} ± "
            f"{found['bpd_se']:.2f} | {first:.2f} | {sum(terms):.2f} |\n")
    return HEAD.format(real=real, sure=sure, sets=SETS, calls=CALLS) + "".join(rows)


def main(runs, *names):
    enable_compilation_cache()
    train, test = (open_source("digits", "", split, image_size=8, channels=1)
                   for split in ("train", "test"))
    judge = classifier.shared(train).params
    real = small_cnn.outputs(judge, train.array()).features
    held = small_cnn.outputs(judge, test.array())
    sure = (scores.softmax(held.logits).max(1) > small_cnn.CONFIDENT).mean()
    lines = {found["row"]: found for found in map(json.loads, LINES.read_text().splitlines())
             } if LINES.exists() else {}
    for name in names:
        lines[name] = line(name, runs, judge, train, test)
        LINES.write_text("".join(json.dumps(one) + "\n" for one in lines.values()))
    rows = [lines[name] for name in ROWS if name in lines]
    PAGE.write_text(page(rows, small_cnn.distance(held.features, real), sure))


if __name__ == "__main__":
    main(*sys.argv[1:])
