"""What a person looks at: metrics.jsonl, TensorBoard, pictures, the loss curve, a progress bar."""

import json
import logging
import math
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax.storage import files, pictures

log = logging.getLogger(__name__)


class Writer(NamedTuple):
    """Functions that record a run. `folder` is local: files put there are uploaded for gs://."""

    scalars: Callable  # (step, {name: number}) -> None
    images: Callable  # (step, name, uint8 [N, H, W, C]) -> None
    truncate_after: Callable  # (step) -> None: forget lines and events of later steps
    close: Callable  # () -> None
    folder: pathlib.Path | None


def say(text: str) -> None:
    """A line on stderr, from the main process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def upload(path, target: str):
    """Copy a local file to a gs:// (or other etils.epath) address."""
    from etils import epath
    target = epath.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(pathlib.Path(path).read_bytes())


def download(target: str) -> bytes | None:
    """The bytes at an address, None where there is no file."""
    from etils import epath
    target = epath.Path(target)
    return target.read_bytes() if target.exists() else None


def _number(value):
    value = float(value)
    return value if math.isfinite(value) else None  # JSON has no nan


def _mirror(folder, workdir, every, put):
    """Uploads what changed below `folder` every `every` seconds -> stop(), which does it finally.

    A failed upload is logged and tried again: losing sight of a run must not end it.
    """
    done, stopped = {}, threading.Event()

    def sync():
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if path.name.startswith(".") and path.name.endswith(files.PARTIAL):
                continue
            stamp = (path.stat().st_mtime_ns, path.stat().st_size)
            if done.get(path) != stamp:
                put(path, f"{workdir.rstrip('/')}/{path.relative_to(folder).as_posix()}")
                done[path] = stamp

    def attempt():
        try:
            sync()
        except Exception as error:  # every storage library has its own
            log.warning("cannot upload metrics to %s (%s); they are in %s", workdir, error, folder)

    def loop():
        while not stopped.wait(every):
            attempt()

    thread = threading.Thread(target=loop, name="upload-metrics", daemon=True)
    thread.start()

    def stop():
        stopped.set()
        thread.join()
        attempt()

    return stop


def open_writer(workdir, *, enabled=True, config_text=None, upload_every=60.0, put=upload,
                get=download) -> Writer:
    """Record scalars to WORKDIR/metrics.jsonl and, with images, to WORKDIR/tb.

    workdir: a folder, or an address such as gs://bucket/run: then files are written to a local
    temporary folder and uploaded every `upload_every` seconds and at close(). config_text is shown
    in TensorBoard. enabled=False (every process but the first) gives a writer that does nothing.
    metrics.jsonl has one object a line, {"step": 100, "loss": 0.03}; null stands for nan and inf.
    """
    if not enabled:
        return Writer(*(lambda *a: None,) * 4, None)
    remote = "://" in str(workdir)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ddpm_metrics_") if remote else workdir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "metrics.jsonl"
    if remote and (earlier := get(f"{str(workdir).rstrip('/')}/metrics.jsonl")) is not None:
        lines.write_bytes(earlier)
    stop = _mirror(folder, str(workdir), upload_every, put) if remote else lambda: None
    opened = {}
    purge_step = None

    def board():
        if "board" not in opened:
            from tensorboardX import SummaryWriter
            opened["board"] = SummaryWriter(str(folder / "tb"), purge_step=purge_step)
            if config_text:
                opened["board"].add_text("config", f"```\n{config_text}\n```", purge_step or 0)
        return opened["board"]

    def scalars(step, values):
        if "lines" not in opened:
            opened["lines"] = open(lines, "a", encoding="utf-8")
        record = {"step": int(step), **{k: _number(v) for k, v in values.items()}}
        opened["lines"].write(json.dumps(record, allow_nan=False) + "\n")
        opened["lines"].flush()
        for name, value in values.items():
            board().add_scalar(name, float(value), int(step))
        board().flush()

    def images(step, name, grid):
        board().add_image(name, pictures.tile(grid), int(step), dataformats="HWC")
        board().flush()

    def shut():
        for handle in opened.values():
            handle.close()
        opened.clear()

    def truncate_after(step):
        nonlocal purge_step
        shut()
        purge_step = int(step) + 1
        if lines.exists():
            kept = [r for r in read_metrics(lines) if r["step"] <= step]
            files.write_bytes(lines, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def close():
        shut()
        stop()

    return Writer(scalars, images, truncate_after, close, folder)


def read_metrics(path) -> list[dict]:
    """The lines of a metrics.jsonl, here or on a bucket; a last line cut short by a kill is left
    out."""
    records = []
    from etils import epath
    lines = epath.Path(path).read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise
    return records


def plot_loss(jsonl, png) -> bool:
    """Draw the loss against the step (both logarithmic) from metrics.jsonl; False if it has none.

    Every key that ends in "loss" is drawn: those with many points smoothed over the raw values.
    """
    records = read_metrics(jsonl)
    curves = {}
    for record in records:
        for key, value in record.items():
            if key.endswith("loss") and value is not None and value > 0 and record["step"] > 0:
                curves.setdefault(key, []).append((record["step"], value))
    if not curves:
        return False
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, points in sorted(curves.items()):
        steps, values = np.array(points).T
        window = len(values) // 50
        if window > 1:
            raw, = axes.plot(steps, values, alpha=0.25, linewidth=0.8)
            ends = np.arange(window, len(values) + 1)
            sums = np.concatenate([[0], np.cumsum(values)])
            axes.plot(steps[ends - 1], (sums[ends] - sums[ends - window]) / window,
                      color=raw.get_color(), label=f"{key} (mean of {window})")
        else:
            axes.plot(steps, values, marker="." if len(values) < 50 else None, label=key)
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="loss")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    data = BytesIO()
    figure.savefig(data, format="png", dpi=120)
    files.write_bytes(png, data.getvalue())
    return True


class Progress(NamedTuple):
    """update(step, **shown): numbers such as loss=0.03 are shown beside the rate."""

    update: Callable
    close: Callable


def progress(total, initial=0, *, images_per_step=1, name="train", every=30.0,
             stream=None) -> Progress:
    """A bar with images/s, the numbers given to update and the time left, on stderr.

    On a terminal a tqdm bar; elsewhere (a log file) one plain line every `every` seconds.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        from tqdm import tqdm
        bar = tqdm(total=total, initial=initial, file=stream, desc=name, unit="step",
                   dynamic_ncols=True)

        def update(step, **shown):
            rate = bar.format_dict["rate"]
            texts = {"img/s": f"{rate * images_per_step:,.0f}"} if rate else {}
            bar.set_postfix({**texts, **{k: f"{v:.4g}" for k, v in shown.items()}}, refresh=False)
            bar.update(step - bar.n)

        return Progress(update, bar.close)

    last = {"step": initial, "time": time.monotonic()}

    def line(step, **shown):
        now = time.monotonic()
        if now - last["time"] < every and step < total:
            return
        rate = (step - last["step"]) / max(now - last["time"], 1e-9)
        last.update(step=step, time=now)
        texts = [f"{name} {step:,}/{total:,}", f"{rate * images_per_step:,.1f} img/s"]
        texts += [f"{k} {v:.4g}" for k, v in shown.items()]
        if rate > 0:
            left = int((total - step) / rate)
            texts.append(f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
        print("  ".join(texts), file=stream, flush=True)

    return Progress(line, lambda: None)
