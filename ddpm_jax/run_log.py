"""Run logging: metrics.jsonl, TensorBoard, image grids, the loss curve, progress lines.

Inside functions: tensorboardX, matplotlib and tqdm, which are slow to import.
"""

import functools
import importlib
import json
import logging
import math
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.storage import files, pictures

log = logging.getLogger(__name__)

FORGOTTEN_AFTER = 30.0  # seconds, by which a rate remembers e times less


def say(text: str) -> None:
    """A line on stderr, from the main process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


@functools.cache
def _tensorboard(name: str):
    """A module of tensorboardX, whose import takes two seconds more where PyTorch is installed: it
    imports it for a type that is not used here."""
    without = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(without)
    try:
        return importlib.import_module(f"tensorboardX.{name}")
    finally:
        for blocked in without:
            del sys.modules[blocked]


class Writer:
    """Records a run in the local ``folder``: metrics.jsonl, TensorBoard's events in tb/, grids of
    images in a folder each, loss.png. Does nothing where ``folder`` is None.

    A failed write does not end the run: one warning names the reason, and numbers stay in memory
    until a later call can write them. ``uploads()`` is called at the end. sink: gets the same
    numbers and grids by scalars(step, {name: number}), images(step, name, picture), close(); or
    None.
    """

    def __init__(self, folder: pathlib.Path | None, *, config_text=None, uploads=lambda: None,
                 sink=None):
        self.folder, self._sink = folder, sink
        self._config_text, self._uploads = config_text, uploads
        self._lines, self._events = [], []  # not written yet
        self._written = None  # bytes of metrics.jsonl before a write that failed
        self._board = self._purge_step = None
        self._warned = set()

    def scalars(self, step: int, values: dict) -> None:
        """Numbers of a step; nan and inf, which JSON lacks, are null in metrics.jsonl."""
        if self.folder is None:
            return
        summary = _tensorboard("summary")
        numbers = {name: float(value) for name, value in values.items()}
        record = {"step": int(step), **{
            name: value if math.isfinite(value) else None for name, value in numbers.items()}}
        self._lines.append(json.dumps(record, allow_nan=False) + "\n")
        for name, value in numbers.items():
            self._event(step, summary=summary.scalar(name, value))
        self._flush()
        if self._sink is not None:
            self._attempt(self._sink.scalars, step, numbers, errors=Exception)

    def images(self, step: int, name: str, images) -> None:
        """A grid of uint8 [N,H,W,C] as NAME/STEP.png and in TensorBoard."""
        if self.folder is None:
            return
        summary = _tensorboard("summary")
        grid = pictures.tile(images)
        self._attempt(pictures.write_png, self.folder / name / f"{step:08d}.png", grid)
        self._event(step, summary=summary.image(name, grid, dataformats="HWC"))
        self._flush()
        if self._sink is not None:
            self._attempt(self._sink.images, step, name, grid, errors=Exception)

    def page(self, write: Callable, workdir: str, config: dict) -> None:
        """write(folder, workdir, config) makes a page of what the run left so far."""
        if self.folder is not None:
            self._attempt(write, self.folder, workdir, config, errors=Exception)

    def truncate_after(self, step: int) -> None:
        """Forget the lines and events of later steps. Where none are left, as without a checkpoint
        to resume from, the old metrics.jsonl is kept under another name."""
        if self.folder is None:
            return
        self._close_board()
        self._lines, self._events, self._purge_step = [], [], int(step) + 1
        lines = self.folder / "metrics.jsonl"
        if not lines.exists():
            return
        kept = [r for r in read_metrics(lines) if r["step"] <= step]
        if kept:
            self._attempt(files.write_bytes, lines,
                          "".join(json.dumps(r) + "\n" for r in kept).encode())
        elif lines.stat().st_size:
            self._attempt(lines.rename, lines.with_name(
                time.strftime("metrics-until-%Y%m%d-%H%M%S.jsonl")))

    def close(self) -> list[str]:
        """Write what is left, draw the loss, upload. -> the names of what there is; [] if called
        again."""
        if self.folder is None:
            return []
        self._flush()
        self._close_board()
        if (self.folder / "metrics.jsonl").exists():
            self._attempt(plot_loss, self.folder / "metrics.jsonl", self.folder / "loss.png")
        if self._sink is not None:
            self._attempt(self._sink.close, errors=Exception)
        names = [name for name in ("metrics.jsonl", "loss.png", "samples", "index.html")
                 if (self.folder / name).exists()]
        self._uploads()
        self.folder = None
        return names

    def _attempt(self, function, *args, errors=(OSError, UserError)) -> bool:
        try:
            function(*args)
        except errors as error:
            if function not in self._warned:  # once, until it succeeds
                self._warned.add(function)
                log.warning("%s; the run continues", error)
            return False
        self._warned.discard(function)
        return True

    def _flush(self):
        self._attempt(self._write_lines)
        if not self._attempt(self._write_events):
            self._close_board()  # its file may end in half an event: the next try takes another

    def _write_lines(self):
        if not self._lines:
            return
        path = self.folder / "metrics.jsonl"
        with files.storage_errors(path, "write", ""), open(path, "ab") as file:
            if self._written is not None:
                file.seek(file.truncate(self._written))
            self._written = file.tell()
            file.write("".join(self._lines).encode())
        self._lines, self._written = [], None

    def _event(self, step, **content):
        event = _tensorboard("proto.event_pb2").Event
        self._events.append(event(wall_time=time.time(), step=int(step), **content))

    def _write_events(self):
        """Without SummaryWriter, whose thread dies of a full disk and then blocks the caller."""
        if not self._events:
            return
        writer = _tensorboard("event_file_writer").EventsWriter
        tb = self.folder / "tb"
        with files.storage_errors(tb, "write", ""):
            events = self._events
            if self._board is None:
                tb.mkdir(parents=True, exist_ok=True)
                self._board = writer(str(tb / "events"), f".{time.time_ns()}")
                events = self._header() + events
            for event in events:
                self._board.write_event(event)
            self._board.flush()
        self._events = []

    def _header(self):
        """What a file of events begins with: the step from which earlier files count no more, and
        the config."""
        summary, proto = _tensorboard("summary"), _tensorboard("proto.event_pb2")
        events, step = [], self._purge_step or 0
        if self._purge_step is not None:
            events.append(proto.Event(step=step, session_log=proto.SessionLog(
                status=proto.SessionLog.START)))
        if self._config_text:
            text = f"```\n{self._config_text}\n```"
            events.append(proto.Event(step=step, summary=summary.text("config", text)))
        return events

    def _close_board(self):
        if self._board is not None:
            self._attempt(self._board.close)
            self._board = None


def upload(path, target: str) -> None:
    """Copy a local file to an address."""
    files.write_bytes(target, pathlib.Path(path).read_bytes())


def download(target: str) -> bytes | None:
    """The bytes at an address, None where there is no file."""
    return files.read_bytes(target) if files.exists(target) else None


def _mirror(folder, workdir, every, put):
    """Uploads what changed below `folder` every `every` seconds -> stop(), which does it finally
    and then removes the folder.

    A failed upload is logged and tried again: losing sight of a run must not end it. After the last
    one the folder stays.
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
            return False
        return True

    def loop():
        while not stopped.wait(every):
            attempt()

    thread = threading.Thread(target=loop, name="upload-metrics", daemon=True)
    thread.start()

    def stop():
        stopped.set()
        thread.join()
        if attempt():
            shutil.rmtree(folder, ignore_errors=True)

    return stop


def open_writer(workdir, *, enabled=True, config_text=None, sink=None, upload_every=60.0,
                put=upload, get=download) -> Writer:
    """The writer of the run in ``workdir``.

    workdir: a folder, or an address such as gs://bucket/run: then files are written to a local
    temporary folder and uploaded every `upload_every` seconds and at close(). config_text is shown
    in TensorBoard; sink: see Writer. enabled=False (every process but the main one) gives a writer
    that does nothing.
    metrics.jsonl has one object a line, {"step": 100, "loss": 0.03}; null stands for nan and inf.
    """
    if not enabled:
        return Writer(None)
    if not files.is_remote(workdir):
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        return Writer(folder, config_text=config_text, sink=sink)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ddpm_metrics_"))
    if (earlier := get(files.join(workdir, "metrics.jsonl"))) is not None:
        (folder / "metrics.jsonl").write_bytes(earlier)
    return Writer(folder, config_text=config_text, sink=sink,
                  uploads=_mirror(folder, str(workdir), upload_every, put))


def read_metrics(path) -> list[dict]:
    """The lines of a metrics.jsonl, here or on a bucket; a last line cut short by a kill is left
    out, and with a warning others that are damaged (by a loss of power, say)."""
    records, lines = [], files.read_bytes(path).splitlines()
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
            records.append(record | {"step": record["step"]})
        except (KeyError, TypeError, ValueError):
            if i + 1 < len(lines):
                log.warning("%s: line %d is damaged and left out", path, i + 1)
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
    with files.whole_file(png) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


class Progress(NamedTuple):
    """update(step, seconds=None, **shown): numbers such as loss=0.03 are shown beside the rate;
    seconds: what the steps since the last update took, where that is not the time since then."""

    update: Callable
    close: Callable


class _Rate:
    """Steps a second, earlier ones counting less as seconds go by."""

    def __init__(self):
        self._steps = self._seconds = 0.0

    def add(self, steps, seconds):
        kept = math.exp(-seconds / FORGOTTEN_AFTER)
        self._steps = kept * self._steps + steps
        self._seconds = kept * self._seconds + seconds

    def texts(self, images_per_step, steps_left) -> dict[str, str]:
        if not self._steps or not self._seconds:
            return {}
        rate = self._steps / self._seconds
        left = int(steps_left / rate)
        return {"img/s": f"{rate * images_per_step:,.1f}",
                "left": f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"}


def progress(total, initial=0, *, images_per_step=1, name="train", every=30.0,
             stream=None) -> Progress:
    """A bar with images/s, the numbers given to update and the time left, on stderr.

    On a terminal a tqdm bar; elsewhere (a log file) one plain line every `every` seconds. The time
    before the first update, which holds start and compilation, is not counted.
    """
    stream, rate = stream or sys.stderr, _Rate()
    last = {"step": initial, "time": None, "line": time.monotonic()}
    on_terminal = stream.isatty()
    if on_terminal:
        from tqdm import tqdm
        bar = tqdm(total=total, initial=initial, file=stream, desc=name, dynamic_ncols=True,
                   bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")

    def update(step, seconds=None, **shown):
        now = time.monotonic()
        if seconds is None and last["time"] is not None:
            seconds = now - last["time"]
        if seconds is not None:
            rate.add(step - last["step"], seconds)
        last.update(step=step, time=now)
        shown = {k: f"{v:.4g}" for k, v in shown.items()}
        if on_terminal:
            bar.set_postfix({**rate.texts(images_per_step, total - step), **shown}, refresh=False)
            bar.update(step - bar.n)
        elif now - last["line"] >= every or step >= total:
            last["line"] = now
            texts = rate.texts(images_per_step, total - step)
            speed = [f"{texts['img/s']} img/s"] if texts else []
            left = [f"left {texts['left']}"] if texts else []
            print("  ".join([f"{name} {step:,}/{total:,}", *speed,
                             *(f"{k} {v}" for k, v in shown.items()), *left]),
                  file=stream, flush=True)

    return Progress(update, bar.close if on_terminal else lambda: None)
