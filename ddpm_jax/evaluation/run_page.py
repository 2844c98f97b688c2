"""index.html in a run's folder: samples, denoising, numbers and what they mean, what to do next.

It shows what the commands left in the folder (`ddpm train`: metrics.jsonl, samples/STEP.png) and in
the folders in it (`ddpm sample`: grid.png, progressive.png; `ddpm evaluate`: evaluation.json,
nearest_*.png), and computes nothing.
"""

import html
import math
import re
import shlex

import numpy as np

from ddpm_jax import run_log
from ddpm_jax.evaluation import html_report, small_cnn
from ddpm_jax.storage import files, pictures

NAME = "index.html"
MOST_BYTES = 6 << 20    # of the grids of one training, the newest not counted
MOST_GRIDS = 12
WIDTH = 480             # pixels, at least, of a grid

# What a number means, by a pattern of its name; the first that fits counts.
MEANINGS = tuple((re.compile(pattern), text) for pattern, text in (
    (r"bpd_\w+_(n|std_error)$", ""),
    (r"bpd_(train|test)$", "bits per dimension of the \\1 images, a bound on their negative "
     "log-likelihood: lower is better; 8 is a uniform guess of 256 grey levels"),
    (r"rate_\w+$", "of these, the bits/dim of all steps but the last"),
    (r"distortion_\w+$", "of these, the bits/dim of the last step"),
    (r"rmse_\w+$", "error of the last prediction, in grey levels of 0 to 255"),
    (r"prior_\w+$", "of these, the bits/dim of the chain's end; near 0 where nothing of the image "
     "is left there"),
    (r"FD-cnn\S*_real_vs_real$", "FD-cnn of the held-out real images: the value of equal_n that a "
     "perfect model has"),
    (r"FD-cnn\S*_equal_n$", "FD-cnn of as many samples as there are held-out images"),
    (r"FD-cnn", "Fréchet distance of the samples to the training images in the features of a small "
     "classifier (not FID): lower is better"),
    (r"FD-rand\S*", ""),
    (r"cnn_accuracy$", "share of held-out real images that this classifier gets right"),
    (r"cnn_confident_samples$", "share of the samples to whose class this classifier gives "
     f"more than {small_cnn.CONFIDENT:.0%}"),
    (r"cnn_confident_reals$", "the same of the held-out real images"),
    (r"fid$", "Fréchet Inception distance to the reference: lower is better"),
    (r"is_\w*std$", ""),
    (r"is_", "Inception score: higher is better"),
    (r"kid(_\w+)?$", "kernel Inception distance to the reference: lower is better"),
    (r"precision$", "share of the samples that look like real images"),
    (r"recall$", "share of the real images that the samples come near"),
    (r"nn_(pixels|features)_median_distance$", "median distance of a sample to its nearest "
     "training image, in \\1"),
    (r"nn_(pixels|features)_median_distance_held_out$", "the same of real images that were not "
     "trained on: samples much nearer than that are copies"),
    (r"nn_\w+_exact_copies$", "samples that are training images, pixel by pixel"),
    (r"loss$", "training loss, a mean over the last train.log_every steps"),
    (r"images_per_second$", "speed of training, without compilation, checkpoints, samples and "
     "evaluations"),
))


def write(folder, workdir=None, stored=None) -> str:
    """Write index.html of the run whose files are in ``folder``; -> its path.

    workdir: the run's name in commands, where that is another than ``folder``; stored: its config,
    where config.json is not there. Raises UserError where a file of the run is damaged or the page
    cannot be written.
    """
    workdir = str(workdir or folder)
    stored = stored or files.read_json(files.join(folder, "config.json"))
    lines = files.join(folder, "metrics.jsonl")
    history = run_log.read_metrics(lines) if files.exists(lines) else []
    places = [str(folder), *(files.join(folder, name) for name in files.listing(folder)
                             if name not in ("checkpoints", "samples", "tb"))]
    step, last = max((h["step"] for h in history), default=0), stored["train"]["steps"]
    documents = _documents(places)
    chain, nearest = _chain(places, stored), _nearest(places)
    content = [
        f"<p>{_about(stored)} Trained for {step:,} of {last:,} steps.</p>",
        *_samples(folder, places), *chain, *_numbers(history, documents),
        *html_report.curve_sections(history), *nearest,
        html_report.section("Next", _next(workdir, stored, step < last, chain, documents, nearest)),
        *(html_report.section("All numbers", *_folded(documents)) for _ in documents[:1])]
    path = files.join(folder, NAME)
    title = f"{workdir.rstrip('/').rpartition('/')[2] or workdir}, step {step:,}"
    files.write_bytes(path, html_report.page(title, content).encode())
    return path


def _about(stored) -> str:
    data, diffusion = stored["data"], stored["diffusion"]
    size = "x".join(str(data[k]) for k in ("image_size", "image_size", "channels"))
    return html.escape(f"{data['name']}, {size}; {diffusion['num_timesteps']} timesteps, predicts "
                       f"{diffusion['predict']}, variance {diffusion['variance']}.")


def _named(places, name):
    """The paths of that name in the folders, the newest first."""
    found = [files.resolve(files.join(place, name)) for place in places]
    return sorted([path for path in found if path.exists()], key=lambda path: -path.stat().mtime)


def _samples(folder, places) -> list[str]:
    names = [n for n in files.listing(files.join(folder, "samples")) if n.endswith(".png")]
    grids = _some([files.join(folder, "samples", name) for name in names])
    out = []
    if grids:
        labels = [f"step {int(p.rpartition('/')[2].partition('.')[0]):,}" for p, _ in grids]
        shown = [data for _, data in grids]
        out.append(html_report.section(
            "Samples while training", html_report.note("The same noise at each step."),
            html_report.scrubber(shown, labels, least_width=WIDTH) if len(shown) > 1 else
            html_report.image(shown[0], labels[0], least_width=WIDTH)))
    for path in _named(places, "grid.png")[:1]:
        out.append(html_report.section("Samples", html_report.note(f"Not selected: {path}"),
                                       html_report.image(path.read_bytes(), least_width=WIDTH)))
    return out


def _some(paths) -> list[tuple]:
    """(path, bytes) of the newest and of others, spread evenly, that a page has room for."""
    if not paths:
        return []
    *before, newest = paths
    last = files.read_bytes(newest)
    most = min(MOST_GRIDS - 1, MOST_BYTES // len(last), len(before))
    chosen = np.unique(np.linspace(0, len(before) - 1, most).astype(int)) if most > 0 else []
    return [(before[i], files.read_bytes(before[i])) for i in chosen] + [(newest, last)]


def _chain(places, stored) -> list[str]:
    """The x_0 predicted along the chain, from the newest progressive.png of `ddpm sample`: a row is
    an image, a column a time."""
    data = stored["data"]
    shape = (data["image_size"], data["image_size"], data["channels"])
    for path in _named(places, "progressive.png")[:1]:
        cells = pictures.untile(pictures.decode_png(path.read_bytes()), shape)
        request = path.parent / "request.json"
        if cells is None or not request.exists():
            break
        steps, count = files.read_json(request)["steps"], cells.shape[1]
        every = -(-steps // count)
        frames = [pictures.tile(cells[:, k], math.ceil(len(cells) / 2)) for k in range(count)]
        labels = [f"after {max(0, steps - (count - 1 - k) * every):,} of {steps:,} steps"
                  for k in range(count)]
        return [html_report.section(
            "Denoising", html_report.note("The image that the network predicts on the way from "
                                          "noise; move the slider."),
            html_report.scrubber(frames, labels, least_width=WIDTH))]
    return []


def _nearest(places) -> list[str]:
    out = []
    for space in ("pixels", "features"):
        for path in _named(places, f"nearest_{space}.png")[:1]:
            out.append(html_report.section(
                f"Nearest training images, in {space}",
                html_report.note("Left of the gap a sample, right of it the training images that "
                                 "are nearest to it."),
                html_report.image(path.read_bytes(), least_width=WIDTH)))
    return out


def _documents(places) -> list[dict]:
    """What the files evaluation.json hold, the oldest first."""
    return [files.read_json(path) for path in reversed(_named(places, "evaluation.json"))]


def _numbers(history, documents) -> list[str]:
    values = {}
    for line in history:
        values |= {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
    for document in documents:
        for step in sorted(document, key=lambda s: int(s) if s.isdigit() else -1):
            for records in document[step].values():
                for record in records.values():
                    values |= record["values"]
    rows = []
    for pattern, text in MEANINGS:
        for name in [n for n in values if pattern.match(n)]:
            value, match = values.pop(name), pattern.match(name)
            if text and isinstance(value, int | float):
                rows.append((name, value, match.expand(text)))
    return [html_report.section("Numbers", html_report.table(
        rows, ("number", "value", "meaning")))] if rows else []


def _folded(documents) -> list[str]:
    return [f"<details><summary>evaluation {i + 1}</summary>"
            f"{''.join(html_report.evaluation_sections(document))}</details>"
            for i, document in enumerate(documents)]


def _next(workdir, stored, unfinished, chain, documents, nearest) -> str:
    """Three commands, with what they are for: what is missing first."""
    def command(name, *flags):
        return shlex.join(["ddpm", *name.split(), f"--workdir={workdir}", *flags])

    steps, decay = stored["train"]["steps"], stored["optimizer"].get("decay_steps", 0)
    ideas = [
        (unfinished, command("train"), "resume, up to the last step"),
        (not chain, command("sample", "--num=64", f"--out={files.join(workdir, 'drawn')}"),
         "draw images, and see them come out of noise"),
        (not documents, command("evaluate"), "bits/dim, and how far samples are from real images"),
        (not nearest, command("evaluate", "--metrics=nn"),
         "nearest training images: are the samples copies?"),
        (True, command("sample", "--sampler=dpmpp_2m", "--steps=20", "--num=64",
                       f"--out={files.join(workdir, 'fast')}"), "draw with 20 network calls"),
        (not unfinished and not decay, command("train", f"--config.train.steps={2 * steps}"),
         "train longer"),
        (not unfinished and decay, shlex.join([
            "ddpm", "train", f"--config={files.join(workdir, 'config.json')}",
            f"--workdir={workdir.rstrip('/')}-longer", f"--config.train.steps={2 * steps}",
            f"--config.optimizer.decay_steps={2 * decay}"]),
         "a longer run of this config, whose learning rate has decayed to 0"),
        (True, command("export diffusers", f"--out={files.join(workdir, 'diffusers')}"),
         "use the model elsewhere")]
    rows = [f"<p>{html.escape(why)}</p><pre>{html.escape(line)}</pre>"
            for wanted, line, why in ideas if wanted]
    again = command("report")
    return "".join(rows[:3]) + html_report.note(f"This page is written again by: {again}")
