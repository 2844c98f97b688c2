"""The paper's figures from a trained run: pictures, and the numbers drawn beside them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import experiment, programs
from ddpm_jax.data.datasets import read_rows
from ddpm_jax.diffusion.sampling import interpolate
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import html_report as html
from ddpm_jax.evaluation import measures
from ddpm_jax.parallel import hosts
from ddpm_jax.reproduction.paper_results import TABLE_4, rate_verdict
from ddpm_jax.storage import pictures
from ddpm_jax.training import rng

ROWS = 4
COLUMNS = 8
FRAMES = 20


class Run(NamedTuple):
    """What a figure is drawn from. values: all of the run's evaluation; along(looks, shown) ->
    evaluation.along.Along or None. All processes draw together."""
    exp: experiment.Experiment
    params: Any
    sources: dict
    values: dict
    along: Callable | None = None
    seed: int = 0


class Drawn(NamedTuple):
    """pictures: {name: uint8 [h,w,C]}; sections: parts of the page; numbers: what was measured."""
    pictures: dict
    sections: list
    numbers: dict


def _grid(rows) -> np.ndarray:
    """uint8 [R,C,H,W,c] -> one picture of R rows with white lines between the images."""
    return pictures.tile(rows.reshape(-1, *rows.shape[2:]), rows.shape[1], scale=1, gap=1, grey=255)


def _drawn(run, chain, count) -> np.ndarray:
    """uint8 [count,H,W,C] of the images 0 ... count-1, whole on every process."""
    exp = run.exp
    program = programs.sample_program(exp, chain)
    images = program(run.params, np.uint32(run.seed), hosts.local_indices(exp.runner, 0, count))
    return hosts.all_rows(exp.runner, images)[:count]


def shared_latents(run) -> Drawn:
    """Fig. 7: one x_t, decoded several times. Rows: t at 1, 3/4, 1/2, 1/4 of the chain, from noise
    alone to nearly decided."""
    exp = run.exp
    chain = programs.sampling_chain(exp)
    stops = [chain.num_steps * k // ROWS for k in range(ROWS, 0, -1)]

    def noise(key, index, t, shape):
        """One image's down to the fork of the row, then each its own."""
        fork = jnp.asarray(stops)[index // COLUMNS % ROWS]
        return rng.image_noise(key, jnp.where(t < fork, 1 + index % COLUMNS, 0), t, shape)

    def start(key, index, shape):
        return rng.image_noise(key, jnp.zeros_like(index), jnp.int32(-1), shape)

    drawn = _drawn(run, chain._replace(
        noise=noise, start=start, condition=lambda index: chain.condition(index // COLUMNS)),
        ROWS * COLUMNS)
    rows = drawn.reshape(ROWS, COLUMNS, *exp.image_shape)
    picture = _grid(rows)
    spread = {f"spread_t{stop}": float(r.astype(np.float64).std(axis=0).mean())
              for stop, r in zip(stops, rows, strict=True)}
    text = (f"One latent x_t a row, decoded {COLUMNS} times; t = {', '.join(map(str, stops))}. "
            "The later the fork, the more is shared.")
    sections = [
        html.section("Samples that share a latent", html.note(text),
                     html.image(picture, "fig. 7")),
        html.section("Spread between the samples of a row, grey levels",
                     html.table(list(spread.items()), ("row", "standard deviation")))]
    return Drawn({"shared_latents": picture}, sections, spread)


def interpolation(run) -> Drawn:
    """Fig. 8: rows of pairs of test images, mixed at half of the chain and decoded. Of fewer than
    2 ROWS images there are fewer rows. Raises UserError where there is no pair."""
    exp = run.exp
    source = run.sources.get("test") or run.sources["train"]
    chain = programs.sampling_chain(exp)
    middle, pairs = max(0, chain.num_steps // 2 - 1), min(ROWS, len(source) // 2)
    if not pairs:
        raise UserError(f"fig. 8 mixes pairs of images; {source.name}, split {source.split}, has "
                        f"{len(source)}")
    ends = read_rows(source.__getitem__, range(2 * pairs))
    columns = COLUMNS + 1
    weights = np.linspace(0, 1, columns, dtype=np.float32)

    def noise(key, index, t, shape):
        """One a row: only the mixture differs."""
        return rng.image_noise(key, 2 * (index // columns % pairs), t, shape)

    def start(key, index, shape):
        first = 2 * (index // columns % pairs)
        x = jnp.asarray(ends) / 127.5 - 1.0
        noises = [rng.image_noise(key, first + k, jnp.int32(-1), shape) for k in (0, 1)]
        mix = jax.vmap(lambda one, two, weight, a, b: interpolate(
            chain.schedule, one, two, middle, weight, a, b)[0])
        return mix(x[first], x[first + 1], jnp.asarray(weights)[index % columns][:, None], *noises)

    lower = programs.sampling_chain(exp, below=int(chain.schedule.timesteps[middle]) + 1)
    mixed = _drawn(run, lower._replace(
        noise=noise, start=start, condition=lambda index: chain.condition(index // columns)),
        pairs * columns)
    mixed = mixed.reshape(pairs, columns, *exp.image_shape)
    ends = ends.reshape(pairs, 2, 1, *exp.image_shape)
    picture = _grid(np.concatenate([ends[:, 0], mixed, ends[:, 1]], axis=1))
    text = (f"First and last column: test images. Between: mixtures at t = {middle + 1} of "
            f"{chain.num_steps}, decoded with the same noise.")
    return Drawn({"interpolation": picture}, [html.section(
        "Interpolation", html.note(text), html.image(picture, "fig. 8"))], {})


def progressive(run) -> Drawn:
    """Fig. 6 and 10: the x_0 predicted along the way, to move through, and its scores against the
    reverse steps done."""
    along = run.along(FRAMES, ROWS * COLUMNS)
    if along is None:
        return Drawn({}, [], {})
    shown = along.frames[:len(along.frames) // COLUMNS * COLUMNS or None]      # whole rows
    frames = [_grid(shown[:, k].reshape(-1, min(COLUMNS, len(shown)), *run.exp.image_shape))
              for k in range(shown.shape[1])]
    total = along.steps[-1]
    labels = [f"after {s} of {total} reverse steps" for s in along.steps]
    picture = _grid(along.frames[:COLUMNS, ::max(1, len(frames) // 10)])
    sections = [html.section("Predicted x_0 along the way", html.scrubber(frames, labels))]
    for name in sorted(along.scores[0]):
        note = html.note("This is not FID; compare it only with values from the same classifier "
                         "and sample count. Fig. 10 of the paper has IS and FID.")
        points = [(s, v[name]) for s, v in zip(along.steps, along.scores, strict=True)]
        sections.append(html.section(
            f"{name} of the predicted x_0", note if name.startswith("FD-") else "",
            html.curve({name: points}, x_label="reverse steps", y_label=name)))
    return Drawn({"progressive": picture}, sections, {
        f"{name} after {s}": v[name] for s, v in zip(along.steps, along.scores, strict=True)
        for name in v})


def rate(run) -> Drawn:
    """Table 4 and Fig. 5 from an evaluation's bound of the test set."""
    exp, values = run.exp, run.values
    split = "test" if "test" in run.sources else "train"
    if f"terms_{split}" not in values:
        return Drawn({}, [html.note(f"no bound of the {split} set in evaluation.json")], {})
    rates, rmse = measures.rate_distortion(values[f"terms_{split}"], values[f"prior_{split}"],
                                           values[f"mse_{split}"])
    total, is_paper = len(rates), exp.config.data.name == "cifar10" and len(rates) == 1000
    rows, numbers = [], {}
    for steps, paper_rate, paper_rmse in TABLE_4:
        k = max(1, round(steps * total / 1000))
        row = [k, float(rates[k - 1]), float(rmse[k - 1])]
        if is_paper:
            row += [paper_rate, paper_rmse, rate_verdict(*row[1:], paper_rate, paper_rmse)]
        rows.append(row)
        numbers[f"after {k}"] = row[1:3]
    header = ["reverse steps", "rate, bits/dim", "RMSE [0,255]"]
    header += ["paper's rate", "paper's RMSE", "verdict"] if is_paper else []
    done = np.arange(1, total + 1)
    pick = np.unique(np.linspace(0, total - 1, 200).astype(int))
    curves = [html.curve({name: [(done[i], y[i]) for i in pick]}, x_label="reverse steps",
                         y_label=unit)
              for name, y, unit in (("RMSE", rmse, "RMSE"), ("rate", rates, "bits/dim"))]
    sections = [html.section(f"Rate and distortion, {split} set", html.table(rows, header)),
                html.section("Fig. 5", *curves, html.rate_curve(values, split))]
    return Drawn({}, sections, numbers)


class Figure(NamedTuple):
    """draw(Run) -> Drawn; images: how many it draws, None: --num or ALONG_NUM."""
    draw: Callable
    images: int | None


FIGURES = {"shared": Figure(shared_latents, ROWS * COLUMNS),
           "interpolation": Figure(interpolation, ROWS * (COLUMNS + 1)),
           "progressive": Figure(progressive, None), "rate": Figure(rate, 0)}
