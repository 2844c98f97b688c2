"""The paper's figures from a trained run: pictures, and the numbers drawn beside them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import experiment
from ddpm_jax.diffusion.sampling import interpolate, sample_loop
from ddpm_jax.evaluation import measures, report, small_cnn
from ddpm_jax.evaluation.paper_results import TABLE_4, rate_verdict
from ddpm_jax.training import rng
from ddpm_jax.training.steps import to_uint8

ROWS = 4
COLUMNS = 8
FRAMES = 20
IMAGES = 200


class Drawn(NamedTuple):
    """pictures: {name: uint8 [h,w,C]}; sections: parts of the page; numbers: what was measured."""
    pictures: dict
    sections: list
    numbers: dict


def tile(rows) -> np.ndarray:
    """uint8 [R,C,H,W,c] -> one picture [R*(H+1), C*(W+1), c], white lines between."""
    r, c, h, w, channels = rows.shape
    framed = np.full((r, c, h + 1, w + 1, channels), 255, np.uint8)
    framed[:, :, :h, :w] = rows
    return framed.swapaxes(1, 2).reshape(r * (h + 1), c * (w + 1), channels)


def _noise_fn(key, index, shape):
    return lambda t: rng.image_noise(key, index, t, shape)


def shared_latents(exp, params, sources, values, seed=0) -> Drawn:
    """Fig. 7: one x_t, decoded several times. Rows: t at 1, 3/4, 1/2, 1/4 of the chain, from noise
    alone to nearly decided."""
    del sources, values
    chain = experiment.sampling_chain(exp)
    key, shape = rng.run_key(seed), exp.image_shape

    def row(params, stop):
        first = jnp.zeros(1, jnp.int32)
        noise = _noise_fn(key, first, shape)
        x_T = noise(jnp.int32(-1))

        def above(x_t, t):
            prediction = chain.predict(params)(x_t, jnp.full(1, t, jnp.int32))
            return jnp.where(t >= stop, chain.step_fn(prediction, x_t, t, noise(t)), x_t), None

        x_t = jax.lax.scan(above, x_T, jnp.arange(chain.num_steps - 1, -1, -1))[0]
        fork = _noise_fn(key, 1 + jnp.arange(COLUMNS), shape)
        copies = jnp.repeat(x_t, COLUMNS, axis=0)

        def below(x, t):
            prediction = chain.predict(params)(x, jnp.full(COLUMNS, t, jnp.int32))
            return jnp.where(t < stop, chain.step_fn(prediction, x, t, fork(t)), x), None

        x_0 = jax.lax.scan(below, copies, jnp.arange(chain.num_steps - 1, -1, -1))[0]
        return to_uint8(x_0)

    run = jax.jit(row)
    stops = [chain.num_steps * k // ROWS for k in range(ROWS, 0, -1)]
    rows = np.stack([np.asarray(run(params, jnp.int32(stop))) for stop in stops])
    picture = tile(rows)
    spread = {f"spread_t{stop}": float(r.astype(np.float64).std(axis=0).mean())
              for stop, r in zip(stops, rows, strict=True)}
    text = (f"One latent x_t a row, decoded {COLUMNS} times; t = {', '.join(map(str, stops))}. "
            "The later the fork, the more is shared.")
    return Drawn({"shared_latents": picture}, [report.section(
        "Samples that share a latent", report.note(text), report.image(picture, "fig. 7")),
        report.section("Spread between the samples of a row, grey levels", report.table(
            list(spread.items()), ("row", "standard deviation")))], spread)


def interpolation(exp, params, sources, values, seed=0) -> Drawn:
    """Fig. 8: rows of pairs of test images, mixed at half of the chain and decoded."""
    del values
    source = sources.get("test") or sources["train"]
    chain = experiment.sampling_chain(exp)
    middle = chain.num_steps // 2 - 1
    key, shape = rng.run_key(seed), exp.image_shape
    weights = np.linspace(0, 1, COLUMNS + 1, dtype=np.float32)

    def row(params, one, two, pair):
        noise = rng.image_noise(key, pair, jnp.int32(-1), shape)
        x_t = interpolate(chain.schedule, one / 127.5 - 1, two / 127.5 - 1, middle,
                          jnp.asarray(weights), noise[0], noise[1])
        same = jnp.repeat(pair[:1], len(weights))      # one noise a row: only the mixture differs
        x_0 = sample_loop(chain.predict(params), chain.step_fn, _noise_fn(key, same, shape), x_t,
                          middle + 1)
        return to_uint8(x_0)

    run, rows = jax.jit(row), []
    for k in range(ROWS):
        one, two = source[2 * k], source[2 * k + 1]
        mixed = np.asarray(run(params, jnp.asarray(one, jnp.float32), jnp.asarray(two, jnp.float32),
                               jnp.array([2 * k, 2 * k + 1])))
        rows.append(np.concatenate([one[None], mixed, two[None]]))
    picture = tile(np.stack(rows))
    text = (f"First and last column: test images. Between: mixtures at t = {middle + 1} of "
            f"{chain.num_steps}, decoded with the same noise.")
    return Drawn({"interpolation": picture}, [report.section(
        "Interpolation", report.note(text), report.image(picture, "fig. 8"))], {})


def progressive(exp, params, sources, values, seed=0) -> Drawn:
    """Fig. 6 and 10: the x_0 predicted along the way, to move through, and its distance from real
    images in random features against the reverse steps done."""
    del values
    chain = experiment.sampling_chain(exp)
    every = max(1, -(-chain.num_steps // FRAMES))
    program = experiment.progressive_program(exp, chain, every)
    batch = -(-IMAGES // exp.runner.num_devices) * exp.runner.num_devices
    index = exp.runner.put("batch", np.arange(batch, dtype=np.int32))
    kept = exp.runner.local(program(params, np.uint32(seed), index)[1])[:IMAGES]
    steps = [chain.num_steps - (kept.shape[1] - 1 - k) * every for k in range(kept.shape[1])]
    shown = ROWS * COLUMNS
    frames = [tile(kept[:shown, k].reshape(ROWS, COLUMNS, *exp.image_shape))
              for k in range(kept.shape[1])]
    source = sources.get("test") or sources["train"]
    real = small_cnn.random_features(np.stack([source[i] for i in range(min(len(source), 2000))]))
    distances = [small_cnn.distance(small_cnn.random_features(kept[:, k]), real)
                 for k in range(kept.shape[1])]
    labels = [f"after {s} of {chain.num_steps} reverse steps" for s in steps]
    picture = tile(np.stack([kept[i, ::max(1, kept.shape[1] // 10)] for i in range(COLUMNS)]))
    sections = [
        report.section("Predicted x_0 along the way", report.scrubber(frames, labels)),
        report.section("Distance of the predicted x_0 from real images", report.note(
            f"FD-rand@0 of {len(kept)} images; not FID. In the paper, Fig. 10 has IS and FID."),
            report.curve({"FD-rand@0": list(zip(steps, distances, strict=True))},
                         x_label="reverse steps", y_label="FD-rand@0"))]
    return Drawn({"progressive": picture}, sections,
                 {f"FD-rand@0 after {s}": d for s, d in zip(steps, distances, strict=True)})


def rate(exp, params, sources, values, seed=0) -> Drawn:
    """Table 4 and Fig. 5 from an evaluation's bound of the test set."""
    del params, seed
    split = "test" if "test" in sources else "train"
    if f"terms_{split}" not in values:
        return Drawn({}, [report.note(f"no bound of the {split} set in evaluation.json")], {})
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
    sections = [
        report.section(f"Rate and distortion, {split} set", report.table(rows, header)),
        report.section("Fig. 5", report.curve({"RMSE": [(done[i], rmse[i]) for i in pick]},
                                              x_label="reverse steps", y_label="RMSE"),
                       report.curve({"rate": [(done[i], rates[i]) for i in pick]},
                                    x_label="reverse steps", y_label="bits/dim"),
                       report.rate_curve(values, split))]
    return Drawn({}, sections, numbers)


FIGURES = {"shared": shared_latents, "interpolation": interpolation, "progressive": progressive,
           "rate": rate}
