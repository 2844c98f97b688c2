"""The real `ddpm train` and `ddpm sample` as pods: equal on any shape, and back after any death."""

import io
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import FLAGS
from xla_flags import xla_flags

LOCAL = pathlib.Path(__file__).parents[2] / "launch" / "local.py"
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def train_command(workdir, *, steps, every=1000, extra=()):
    return [sys.executable, "-m", "ddpm_jax", "train", *FLAGS, f"--workdir={workdir}",
            "--config.train.log_every=1", f"--config.train.steps={steps}",
            f"--config.checkpoint.every={every}", *extra]


STARTED = []


@pytest.fixture(autouse=True)
def nothing_left_over():
    yield
    while STARTED:
        end(STARTED.pop())


def end(process):
    if process.poll() is None:
        for pid in children(process):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def start(logs, processes, devices, command):
    STARTED.append(subprocess.Popen(
        [sys.executable, LOCAL, f"--processes={processes}", f"--devices={devices}",
         f"--logdir={logs}", "--grace=20", "--", *command],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return STARTED[-1]


def run(logs, processes, devices, command, code=0):
    process = start(logs, processes, devices, command)
    try:
        assert process.wait(400) == code, texts(logs)
    finally:
        end(process)
    return texts(logs)


def texts(logs):
    return "\n".join(f"--- {p}\n{p.read_text(errors='replace')[-20_000:]}"
                     for p in sorted(pathlib.Path(logs).glob("process_*.log")))


def losses(workdir):
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    lines = text[:text.rfind("\n") + 1].splitlines()  # a kill may cut the last one
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in map(json.loads, lines) if "loss" in r}


def wait_for_step(process, workdir, step):
    """Until metrics.jsonl has a line of this step."""
    file = pathlib.Path(workdir) / "metrics.jsonl"
    deadline = time.time() + 150
    while not (file.exists() and max(losses(workdir), default=0) >= step):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)


def wait_for_text(process, logs, words):
    deadline = time.time() + 150
    while words not in texts(logs):
        assert process.poll() is None and time.time() < deadline, texts(logs)
        time.sleep(0.05)


def wait_for_save(process, workdir, step, logs):
    """Until a checkpoint of this step, or of a later one, is begun or complete; leftovers of
    former kills do not count."""
    folder = pathlib.Path(workdir) / "checkpoints"
    before = {None} | {inode(p) for p in folder.glob("[0-9]*")}
    deadline = time.time() + 150
    while not any(int(p.name.split(".")[0]) >= step for p in folder.glob("[0-9]*")
                  if inode(p) not in before):
        assert process.poll() is None and time.time() < deadline, texts(logs)
        time.sleep(0.01)


def inode(path):
    """None where it has just been renamed or removed."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def children(process):
    """Processes that a local.py started, in order."""
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def assert_same(a, b, steps):
    assert sorted(a) == sorted(b) == list(steps)
    for step in a:
        np.testing.assert_allclose(a[step], b[step], rtol=2e-5, err_msg=f"step {step}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """12 steps, 2 processes x 4 devices: what interrupted runs must equal."""
    d = tmp_path_factory.mktemp("uninterrupted")
    run(d / "logs", 2, 4, train_command(d / "run", steps=12))
    return d


@pytest.mark.soak
def test_same_run_on_any_shape_and_host_count_changed_at_restart(tmp_path, uninterrupted):
    """1x2 and 2x1 agree; a run that starts as one and goes on as the other does too."""
    alone, changed = tmp_path / "alone", tmp_path / "changed"
    run(tmp_path / "a", 1, 2, train_command(alone, steps=12))
    assert_same(losses(alone), losses(uninterrupted / "run"), range(1, 13))
    run(tmp_path / "b", 1, 2, train_command(changed, steps=6))
    text = run(tmp_path / "c", 2, 1, train_command(changed, steps=12))
    assert "from step 6" in text
    assert_same(losses(changed), losses(alone), range(1, 13))
    assert_same_parameters(alone, changed)


# A second a step: the processes hear of a signal within some seconds, and the run that they are
# compared with has 12 steps.
SLOW = """
import time
from ddpm_jax.cli.main import run
from ddpm_jax.parallel.stop import Stop
requested = Stop.requested
def slowly(self, step):
    time.sleep(step >= 2)
    return requested(self, step)
Stop.requested = slowly
run()
"""


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_sigterm_to_one_process_and_exact_continuation(tmp_path, uninterrupted, who):
    work = tmp_path / "run"
    _, _, _, *words = train_command(work, steps=100_000)
    process = start(tmp_path / "logs", 2, 4, [sys.executable, "-c", SLOW, *words])
    wait_for_step(process, work, 2)
    os.kill(children(process)[who], signal.SIGTERM)
    assert process.wait(150) == 42, texts(tmp_path / "logs")
    stopped = [int(x) for x in re.findall(r"stopping at step (\d+)", texts(tmp_path / "logs"))]
    assert len(stopped) == 2 and stopped[0] == stopped[1] < 12
    assert [p.name for p in (work / "checkpoints").iterdir()] == [str(stopped[0])]
    text = run(tmp_path / "again", 2, 4, train_command(work, steps=12))
    assert f"from step {stopped[0]}" in text
    got, expected = losses(work), losses(uninterrupted / "run")
    assert sorted(got) == list(range(1, 13))  # nothing twice, nothing left out
    for step in expected:
        np.testing.assert_allclose(got[step], expected[step], rtol=1e-6, err_msg=f"step {step}")


@pytest.mark.soak
def test_single_process_stops_and_continues(tmp_path):
    work = tmp_path / "run"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}
    process = subprocess.Popen(train_command(work, steps=100_000), env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(process, work, 3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a second one leaves the save alone
    assert process.wait(150) == 42
    [saved] = [int(p.name) for p in (work / "checkpoints").iterdir()]
    done = subprocess.run(train_command(work, steps=saved + 2), env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"from step {saved}" in done.stderr
    assert sorted(losses(work)) == list(range(1, saved + 3))


@pytest.mark.soak
def test_sigterm_during_an_evaluation(tmp_path):
    """The step it belongs to is saved before; the restart evaluates it first."""
    work = tmp_path / "run"
    command = train_command(work, steps=8, every=4, extra=[
        "--config.diffusion.num_timesteps=20", "--config.eval.every=4",
        "--config.eval.metrics=bpd", "--config.eval.bpd_num=300",
        "--config.sampler.batch_size=2"])
    process = start(tmp_path / "logs", 2, 1, command)
    deadline = time.time() + 200
    while not (work / "checkpoints" / "4").exists():
        assert process.poll() is None and time.time() < deadline, texts(tmp_path / "logs")
        time.sleep(0.01)
    os.kill(children(process)[1], signal.SIGTERM)
    assert process.wait(150) == 42, texts(tmp_path / "logs")
    text = run(tmp_path / "again", 2, 1, command)
    assert "from step 4" in text
    lines = [json.loads(x) for x in (work / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "bpd_test" in x] == [4, 8]
    assert sorted(losses(work)) == list(range(1, 9))


def test_sigterm_during_the_compilation(tmp_path):
    """A program that no cache holds; no Python handler can run in the meantime."""
    work = tmp_path / "run"
    command = train_command(work, steps=100, extra=[
        "--config.model.ch=16", "--config.model.num_res_blocks=4"])
    env_cache = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    try:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "cache")
        process = start(tmp_path / "logs", 2, 1, command)
    finally:
        if env_cache is not None:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = env_cache
    # The line before the first state, beside which the step is compiled.
    wait_for_text(process, tmp_path / "logs", "warning: config.diffusion")
    time.sleep(1)
    os.kill(children(process)[1], signal.SIGTERM)
    assert process.wait(150) == 42, texts(tmp_path / "logs")
    assert "nothing unsaved" in texts(tmp_path / "logs")


KILLS = int(os.environ.get("DDPM_TEST_KILLS", 4))  # more of them find what is rarer


@pytest.mark.soak
def test_kills_leave_no_bad_checkpoint(tmp_path, uninterrupted):
    """kill -9 of worker or coordinator at random moments, saves at every second step."""
    work, rng, reached = tmp_path / "run", random.Random(0), 0
    command = train_command(work, steps=100_000, every=2, extra=["--heartbeat=10"])
    for attempt in range(KILLS):
        logs = tmp_path / f"logs{attempt}"
        process = start(logs, 2, 4, command)
        # Saves follow each other without a pause, so this is in the middle of one, as a rule.
        wait_for_save(process, work, reached + rng.choice([2, 4]), logs)
        time.sleep(rng.random() * 0.4)
        os.kill(children(process)[rng.randrange(2)], signal.SIGKILL)
        assert process.wait(150) >= 128, texts(logs)
        complete = [int(p.name) for p in (work / "checkpoints").iterdir() if p.name.isdigit()]
        newest = max(complete, default=0)
        assert newest >= reached  # never behind what was complete before
        # The restart took up the newest complete checkpoint.
        assert f"steps {reached} to" in texts(logs).replace(",", ""), texts(logs)
        reached = newest
    assert reached >= 4
    steps = max(12, reached + 1)
    text = run(tmp_path / "end", 2, 4, train_command(work, steps=steps, every=2))
    assert f"from step {reached}" in text
    got, expected = losses(work), losses(uninterrupted / "run")
    assert sorted(got) == list(range(1, steps + 1))
    for step in expected:
        np.testing.assert_allclose(got[step], expected[step], rtol=1e-6)


def test_samples_do_not_depend_on_the_hosts_and_resume_by_shard(tmp_path, uninterrupted):
    def command(out):
        return [sys.executable, "-m", "ddpm_jax", "sample", f"--workdir={uninterrupted}/run",
                "--num=20", "--batch_size=2", f"--out={out}"]

    run(tmp_path / "a", 1, 2, command(tmp_path / "one"))
    process = start(tmp_path / "b", 2, 1, command(tmp_path / "two"))
    shards = tmp_path / "two" / "shards"
    deadline = time.time() + 100
    while not list(shards.glob("shard-*.npz")):
        assert process.poll() is None and time.time() < deadline, texts(tmp_path / "b")
        time.sleep(0.01)
    os.kill(children(process)[1], signal.SIGTERM)
    code = process.wait(150)
    assert code in (0, 42), texts(tmp_path / "b")  # 0: it was quicker
    before = {p.name: p.stat().st_mtime_ns for p in shards.glob("shard-*.npz")}
    if code == 42:
        # The signal may come after the last shard: then all is done, and the restart finds it so.
        assert before or (tmp_path / "two" / "samples.npz").exists()
        process = start(tmp_path / "c", 2, 1, command(tmp_path / "two"))
        assert process.wait(150) == 0, texts(tmp_path / "c")
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two")]
    assert images[0].shape == (20, 8, 8, 1)
    assert np.abs(images[0].astype(int) - images[1].astype(int)).max() <= 1


def eight_devices(folder, processes, steps=12, runner="shard_map"):
    """The run of `train_command` on eight devices, one image each. -> its folder, its logs"""
    work = folder / "run"
    return work, run(folder / f"logs{steps}", processes, 8 // processes, train_command(
        work, steps=steps, extra=[f"--config.parallel.runner={runner}"]))


def assert_same_run(work, straight):
    """straight: it logged means of two steps."""
    each = losses(work)
    assert_same({step: np.mean([each[step - 1], each[step]], axis=0) for step in range(2, 13, 2)},
                losses(straight), range(2, 13, 2))
    assert_same_parameters(work, straight)


def assert_same_parameters(a, b):
    """To float32 rounding: far below what the steps move them (their learning rates, 8e-4)."""
    import jax

    from ddpm_jax import sample
    for ema in (True, False):
        one, two = (sample.load_run(path, ema=ema)[1] for path in (a, b))
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=2e-6)


def test_eight_devices_as_one_and_two_processes(uninterrupted, straight):
    """One: the process of this test."""
    assert_same_run(uninterrupted / "run", straight)


@pytest.mark.soak
def test_eight_devices_as_four_processes(tmp_path, straight):
    assert_same_run(eight_devices(tmp_path, 4)[0], straight)


@pytest.mark.soak
def test_pmap_in_two_processes_trains_saves_and_resumes(tmp_path, straight):
    eight_devices(tmp_path, 2, steps=6, runner="pmap")
    work, text = eight_devices(tmp_path, 2, steps=12, runner="pmap")
    assert "from step 6" in text and "(pmap)" in text
    assert_same_run(work, straight)


def test_run_on_a_bucket(tmp_path, storage):
    """Two hosts train, continue and sample on gs://; metrics are uploaded by the first."""
    import gcsfs
    for steps in (4, 8):
        text = run(tmp_path / f"to{steps}", 2, 4, train_command("gs://ddpm/run", steps=steps))
        assert f"done: step {steps}" in text
    run(tmp_path / "sample", 2, 1, [
        sys.executable, "-m", "ddpm_jax", "sample", "--workdir=gs://ddpm/run", "--num=4",
        "--batch_size=2", "--out=gs://ddpm/samples"])
    bucket = gcsfs.GCSFileSystem(use_listings_cache=False)
    lines = bucket.cat("ddpm/run/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    images = np.load(io.BytesIO(bucket.cat("ddpm/samples/samples.npz")))["arr_0"]
    assert images.shape == (4, 8, 8, 1)
    assert sorted(int(path.split("/")[-1]) for path in bucket.ls("ddpm/run/checkpoints")) == [4, 8]


@pytest.mark.soak
def test_evaluation_of_a_run_on_a_bucket(tmp_path, storage):
    """Two hosts; what a cut-off evaluation left on the bucket is not made again."""
    import gcsfs
    bucket = gcsfs.GCSFileSystem(use_listings_cache=False)
    run(tmp_path / "train", 2, 1, train_command("gs://ddpm/judged", steps=4))

    def evaluate(name):
        """-> all values"""
        run(tmp_path / name, 2, 1, [
            sys.executable, "-m", "ddpm_jax", "evaluate", "--workdir=gs://ddpm/judged",
            "--metrics=offline,nn", "--num=40", "--bpd_num=12", "--batch_size=8",
            f"--classifier_dir={storage}/classifiers"])
        records = json.loads(bucket.cat("ddpm/judged/evaluation.json"))["4"]["paper"]
        return {k: v for r in records.values() for k, v in r["values"].items()}

    def shard(k):
        return f"{samples}/shard-{k:05d}.npz"

    def read(k):
        return dict(np.load(io.BytesIO(bucket.cat(shard(k)))))

    values = evaluate("first")
    [samples] = [p for p in bucket.ls("ddpm/judged/evaluation/4") if "/samples-" in p]
    assert sorted(bucket.ls(samples)) == [f"{samples}/request.json", *map(shard, range(5))]
    assert values["offline_n"] == 40 and np.isfinite(values["bpd_test"])
    assert bucket.cat("ddpm/judged/nearest_pixels.png").startswith(b"\x89PNG")
    page = bucket.cat("ddpm/judged/evaluation.html").decode()
    assert "<h2>Loss</h2>" in page and "data:image/png;base64" in page
    assert len(bucket.ls("ddpm/classifiers")) == 1

    # One shard lost, one cut short: those two are made again; another, changed here, is read.
    first = read(1)
    bucket.rm(shard(1))
    bucket.pipe(shard(3), bucket.cat(shard(3))[:100])
    marked = read(2)
    marked["random"] = marked["random"] + 1
    file = io.BytesIO()
    np.savez(file, **marked)
    bucket.pipe(shard(2), file.getvalue())
    again = evaluate("again")
    np.testing.assert_allclose(read(1)["random"], first["random"], rtol=1e-5, atol=1e-5)
    assert len(read(3)["random"]) == 8
    np.testing.assert_array_equal(read(2)["random"], marked["random"])
    assert again["bpd_test"] == values["bpd_test"] and again["FD-rand@0"] != values["FD-rand@0"]


FASHION = ["--config.data.name=fashion_mnist", "--config.data.image_size=28",
           "--config.data.resident=False"]


@pytest.fixture
def fashion(tmp_path, storage, monkeypatch):
    """40 random images as Fashion-MNIST in a bucket, with a copy in tmp_path/data; -> its URL."""
    import gzip

    from ddpm_jax.data import prepare_tfds
    from ddpm_jax.storage import remote
    rng = np.random.default_rng(0)
    for stem, n in (("train", 40), ("t10k", 4)):
        for kind, array in (("images-idx3", rng.integers(0, 256, (n, 28, 28), np.uint8)),
                            ("labels-idx1", np.zeros(n, np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(head
                                                                             + array.tobytes()))
    prepare_tfds.idx_digits("fashion_mnist", tmp_path / "data", [str(tmp_path)])
    url = f"{storage}/{tmp_path.name}"
    remote.upload(tmp_path / "data", url, last={"dataset_info.json"})
    monkeypatch.setenv("DDPM_STAGE_DIR", str(tmp_path / "stages"))
    return url


@pytest.mark.soak
def test_data_on_a_bucket_is_staged_by_one_process_of_the_host(tmp_path, fashion):
    """At the restart nothing is downloaded."""
    from ddpm_jax.data.datasets import open_source
    texts = [run(tmp_path / f"to{steps}", 2, 1, train_command(
        tmp_path / "run", steps=steps, extra=[*FASHION, f"--config.data.dir={fashion}"]))
        for steps in (1, 2)]
    assert [text.count("staging gs://") for text in texts] == [1, 0]
    fingerprint = open_source("fashion_mnist", tmp_path / "data", "train").fingerprint
    assert all(f"(40 images, {fingerprint})" in text for text in texts)
    assert "from step 1" in texts[1] and sorted(losses(tmp_path / "run")) == [1, 2]


def test_sigterm_while_data_is_staged(tmp_path, fashion):
    """It asks for a restart, and that downloads what is missing."""
    _, _, _, *flags = train_command(tmp_path / "run", steps=1, extra=[
        *FASHION, f"--config.data.dir={fashion}"])
    stuck = ("import sys, time\n"
             "from ddpm_jax.storage import remote\n"
             "fs, _ = remote.open_at('gs://ddpm')\n"
             "get = fs.get_file\n"
             "def slow(path, to):\n"
             "    open(to, 'wb').write(b'half'); time.sleep(600)\n"
             "fs.get_file = lambda *a: slow(*a) if 'info' not in a[0] else get(*a)\n"
             f"sys.argv = {['ddpm', *flags]!r}\n"
             "from ddpm_jax.cli.main import run\n"
             "run()\n")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}
    process = subprocess.Popen([sys.executable, "-c", stuck], env=env, stderr=subprocess.PIPE,
                               text=True)
    deadline = time.time() + 60
    while not list((tmp_path / "stages").rglob(".*array_record*.partial")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 42, error
    done = subprocess.run([sys.executable, "-m", "ddpm_jax", *flags], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0 and " there already) in " in done.stderr, done.stderr
    assert sorted(losses(tmp_path / "run")) == [1]


def test_hosts_with_different_data_are_named(tmp_path):
    from ddpm_jax.data import prepare
    for process in (0, 1):
        pixels = np.random.default_rng(process).integers(0, 256, (16, 8, 8, 1), np.uint8)
        prepare.write_store(tmp_path / f"data{process}", "folder", {
            "train": (16, range(16), [0] * 16, pixels.__getitem__)}, (8, 8, 1))
    command = train_command(tmp_path / "run", steps=2, extra=["--config.data.name=folder"])
    own = f"DDPM_DATA_DIR={tmp_path}/data$DDPM_PROC exec \"$@\""
    text = run(tmp_path, 2, 1, ["sh", "-c", own, "sh", *command], code=2)
    facts = r'\{"train": "\w+"\}'
    assert re.search(rf"hosts differ: process 1 on \S+: data={facts} \(process 0 has {facts}\)",
                     text), text
    assert not list((tmp_path / "run").glob("checkpoints/*"))
