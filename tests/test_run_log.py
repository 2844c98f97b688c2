import io
import json
import resource
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import run_log

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scalars_are_lines(tmp_path):
    writer = run_log.open_writer(tmp_path / "run", config_text="seed: 0")
    writer.scalars(np.int32(1), {"loss": np.float32(0.5), "grad_norm": 2})
    assert lines(tmp_path / "run") == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}]  # flushed
    writer.scalars(2, {"loss": float("nan"), "grad_norm": float("inf")})
    writer.close()
    assert lines(tmp_path / "run")[1] == {"step": 2, "loss": None, "grad_norm": None}


def events(folder):
    """(step, tag) of the scalars in a folder of TensorBoard events, decoded with tensorboardX."""
    from tensorboardX.proto.event_pb2 import Event
    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at + 12 < len(data):
            size = int.from_bytes(data[at:at + 8], "little")
            if at + 16 + size > len(data):
                break  # cut short by a full disk
            event = Event.FromString(data[at + 12:at + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.session_log.status:
                found.append((event.step, "purge", None))
            at += size + 16
    return found


def test_tensorboard_gets_scalars_and_images(tmp_path):
    writer = run_log.open_writer(tmp_path)
    writer.scalars(3, {"loss": 0.25})
    writer.images(3, "samples", np.zeros((4, 8, 8, 1), np.uint8))
    writer.close()
    assert (3, "loss", 0.25) in events(tmp_path / "tb")
    assert (3, "samples") in [e[:2] for e in events(tmp_path / "tb")]


@pytest.fixture
def full_disk():
    """Files may not grow past 4 KiB; calling what it yields lifts that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    def lift():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield lift
    lift()


def test_a_full_disk_ends_nothing_and_numbers_are_written_later(tmp_path, full_disk, caplog):
    writer = run_log.open_writer(tmp_path, config_text="x" * 2000)
    writer.images(0, "samples", np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8))
    for step in range(200):
        writer.scalars(step, {"loss": step, "grad_norm": 1.0})
    assert len(caplog.records) == 3 and "File too large" in caplog.text
    assert (tmp_path / "metrics.jsonl").stat().st_size <= 4096
    full_disk()
    writer.scalars(200, {"loss": 200, "grad_norm": 1.0})
    writer.close()
    assert [r["step"] for r in lines(tmp_path)] == list(range(201))
    assert {e[0] for e in events(tmp_path / "tb") if e[1] == "loss"} == set(range(201))


def test_a_folder_where_a_file_belongs_ends_nothing(tmp_path, caplog):
    (tmp_path / "samples").write_text("")
    (tmp_path / "loss.png").mkdir()
    writer = run_log.open_writer(tmp_path)
    writer.scalars(1, {"loss": 1.0})
    writer.images(1, "samples", np.zeros((1, 4, 4, 3), np.uint8))
    assert writer.close() == ["metrics.jsonl", "loss.png", "samples"] and writer.close() == []
    assert len(lines(tmp_path)) == 1 and len(caplog.records) == 2


def test_a_resume_leaves_no_duplicates(tmp_path):
    writer = run_log.open_writer(tmp_path)
    for step in range(1, 8):
        writer.scalars(step, {"loss": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    writer = run_log.open_writer(tmp_path)
    writer.truncate_after(5)
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3, 4, 5]
    writer.scalars(6, {"loss": 66})
    writer.truncate_after(5)
    writer.scalars(6, {"loss": 67})
    writer.close()
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)][4:] == [(5, 5), (6, 67)]
    assert (6, "purge", None) in events(tmp_path / "tb")
    run_log.open_writer(tmp_path / "new").truncate_after(0)


def test_a_log_is_never_emptied(tmp_path):
    writer = run_log.open_writer(tmp_path)
    writer.scalars(1, {"loss": 1})
    content = (tmp_path / "metrics.jsonl").read_bytes()
    writer.truncate_after(0)
    writer.scalars(1, {"loss": 2})
    writer.close()
    old, = tmp_path.glob("metrics-until-*.jsonl")
    assert old.read_bytes() == content and lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_disabled_writer_does_nothing(tmp_path):
    writer = run_log.open_writer(tmp_path / "run", enabled=False)
    writer.scalars(1, {"loss": 1})
    writer.images(1, "x", np.zeros((1, 2, 2, 3), np.uint8))
    writer.truncate_after(0)
    writer.close()
    assert writer.folder is None and not (tmp_path / "run").exists()


def store(failing=()):
    """A bucket in memory: its files, put and get."""
    files, failing = {}, list(failing)

    def put(path, target):
        if failing:
            raise failing.pop()
        files[target] = path.read_bytes()

    return files, put, files.get


def test_a_bucket_gets_everything_and_a_resume_continues_it():
    files, put, get = store()
    for steps in ([1, 2], [3]):
        writer = run_log.open_writer("gs://b/run/", put=put, get=get)
        for step in steps:
            writer.scalars(step, {"loss": step})
        writer.images(step, "samples", np.zeros((2, 4, 4, 3), np.uint8))
        folder = writer.folder
        assert "metrics.jsonl" in writer.close() and not folder.exists()
    text = files["gs://b/run/metrics.jsonl"].decode()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3]
    assert "gs://b/run/samples/00000002.png" in files
    assert len([f for f in files if f.startswith("gs://b/run/tb/events")]) >= 1


def test_uploads_happen_at_a_cadence_and_survive_an_outage(caplog):
    files, put, get = store([OSError("bucket is away")])
    writer = run_log.open_writer("gs://b/run", put=put, get=get, upload_every=0.02)
    writer.scalars(1, {"loss": 1})
    deadline = time.monotonic() + 20
    while "gs://b/run/metrics.jsonl" not in files and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b'"step": 1' in files["gs://b/run/metrics.jsonl"]  # before close()
    assert "bucket is away" in caplog.text and str(writer.folder) in caplog.text
    writer.close()


def test_what_could_not_be_uploaded_stays():
    files, put, get = store([OSError("bucket is away")] * 2)
    writer = run_log.open_writer("gs://b/run", put=put, get=get)
    writer.scalars(1, {"loss": 1})
    folder = writer.folder
    writer.close()
    assert not files and (folder / "metrics.jsonl").exists()
    shutil.rmtree(folder)


def test_upload_through_epath(tmp_path):
    (tmp_path / "a").write_text("x")
    run_log.upload(tmp_path / "a", str(tmp_path / "far/away/a"))
    assert run_log.download(str(tmp_path / "far/away/a")) == b"x"
    assert run_log.download(str(tmp_path / "far/b")) is None


def test_loss_curve(tmp_path):
    records = [{"step": s, "loss": 1 / s, "eval_loss": None if s % 50 else 2 / s, "lr": 0.1}
               for s in range(1, 301)]
    (tmp_path / "m").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert run_log.plot_loss(tmp_path / "m", tmp_path / "loss.png")
    image = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).reshape(-1, 3)
    assert len(image) > 100_000 and len(np.unique(image, axis=0)) > 20
    (tmp_path / "m").write_text('{"step": 0, "loss": null}\n')
    assert not run_log.plot_loss(tmp_path / "m", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_damage_before_the_last_line_is_named_and_ends_no_run(tmp_path, caplog):
    for damaged in (b'{"ste', bytes(40), b"\xff\xfe", b"[1]", b"7", b'{"loss": 1}'):
        (tmp_path / "m").write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n{"st')
        caplog.clear()
        assert run_log.read_metrics(tmp_path / "m") == [{"step": 1}, {"step": 3}]
        assert [r.getMessage() for r in caplog.records] == [
            f"{tmp_path}/m: line 2 is damaged and left out"]


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_log_file(monkeypatch):
    clock = iter([0.0, 10.0, 40.0, 41.0])
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    bar = run_log.progress(1000, 100, images_per_step=4, stream=out)
    bar.update(120, loss=0.5)  # too early for a line; what is before it is start and compilation
    bar.update(180, loss=0.25)
    bar.update(1000, loss=0.125)  # the end always has its line
    bar.close()
    first, last = out.getvalue().splitlines()
    assert first == "train 180/1,000  8.0 img/s  loss 0.25  left 0:06:50"
    assert last.startswith("train 1,000/1,000  ") and last.endswith("loss 0.125  left 0:00:00")


def test_progress_counts_the_seconds_it_is_given(monkeypatch):
    """Not those of the clock, which hold a checkpoint of 960 s here; and a rate that changes is
    followed."""
    now = [0.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    bar = run_log.progress(100_000, images_per_step=2, stream=out)
    for step, clock, seconds in [(10, 75, None), (20, 1000, 40), (3020, 1300, 300)]:
        now[0] = clock
        bar.update(step, seconds)
    none, slow, fast = out.getvalue().splitlines()
    assert none == "train 10/100,000"
    assert slow == "train 20/100,000  0.5 img/s  left 111:05:20"
    assert " 20.0 img/s " in fast


def test_progress_on_a_terminal():
    out = Screen()
    bar = run_log.progress(10, 4, images_per_step=2, stream=out)
    for step in range(5, 11):
        time.sleep(0.03)
        bar.update(step, loss=0.25)
    bar.close()
    assert "10/10" in out.getvalue() and "loss=0.25" in out.getvalue() and "img/s" in out.getvalue()


def test_a_page_or_a_sink_that_fails_does_not_end_the_run(tmp_path, caplog):
    class Gone:
        def scalars(self, step, values):
            raise ConnectionError("the server is gone")

        images = close = scalars

    def page(folder, workdir, config):
        raise ZeroDivisionError("a page of nothing")

    writer = run_log.open_writer(tmp_path, sink=Gone())
    for step in (1, 2):
        writer.scalars(step, {"loss": 0.5})
        writer.page(page, str(tmp_path), {})
    assert "metrics.jsonl" in writer.close()
    assert len(lines(tmp_path)) == 2
    for text in ("the server is gone; the run continues", "a page of nothing; the run continues"):
        assert caplog.text.count(text) == 1
