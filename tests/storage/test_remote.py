"""Prepared data in a bucket (a real client against the storage emulator)."""

import gzip
import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ddpm_jax.data import datasets, prepare, prepare_tfds
from ddpm_jax.data.datasets import open_source
from ddpm_jax.errors import UserError
from ddpm_jax.storage import remote

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # gcsfs leaves its session open
RNG = np.random.default_rng(0)


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_STAGE_DIR", str(tmp_path / "stages"))
    return tmp_path / "stages"


def write_store(folder, count=7):
    pixels = {s: RNG.integers(0, 256, (count, 4, 4, 3), np.uint8) for s in ("train", "test")}
    labels = [i % 2 for i in range(count)]
    prepare.write_store(folder, "folder", {
        s: (count, range(count), labels, array.__getitem__) for s, array in pixels.items()},
        (4, 4, 3), class_names=("a", "b"))
    return pixels


def fashion(folder):
    """Fashion-MNIST as `ddpm data prepare` makes it, of six random images."""
    files = folder / "idx"
    files.mkdir(parents=True)
    for stem, n in (("train", 6), ("t10k", 3)):
        for kind, array in (("images-idx3", RNG.integers(0, 256, (n, 28, 28), np.uint8)),
                            ("labels-idx1", np.arange(n, dtype=np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(
                d.to_bytes(4, "big") for d in array.shape)
            (files / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    prepare_tfds.idx_digits("fashion_mnist", folder, [str(files)])
    return folder / "fashion_mnist"


def put(folder, url):
    remote.upload(folder, url, last={prepare.INFO, "dataset_info.json"})
    return url


def child(code, **env):
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **env}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_arrays_are_read_in_place(tmp_path, storage, stages, monkeypatch, kept):
    """Image by image, or, where small, whole; nothing is written to this disk."""
    monkeypatch.setattr(datasets, "_KEPT_BYTES", kept)
    pixels = write_store(tmp_path)
    url = f"{storage}/arrays{kept}"
    put(tmp_path / "folder", f"{url}/folder")
    for split in ("train", "test"):
        here, there = (open_source("folder", d, split, image_size=4) for d in (tmp_path, url))
        np.testing.assert_array_equal([there[i] for i in range(len(there))], pixels[split])
        np.testing.assert_array_equal(there.array(), pixels[split])
        assert there.fingerprint == here.fingerprint and there.class_names == ("a", "b")
        np.testing.assert_array_equal(there.labels, here.labels)
    assert there.where == f"{url}/folder" and not stages.exists()


def test_reads_of_one_image_are_that_small(tmp_path, storage, monkeypatch):
    write_store(tmp_path)
    url = put(tmp_path / "folder", f"{storage}/ranges/folder")
    monkeypatch.setattr(datasets, "_KEPT_BYTES", 0)
    source, sizes, read = open_source("folder", f"{storage}/ranges", "train"), [], remote.read_bytes
    monkeypatch.setattr(remote, "read_bytes",
                        lambda *a: sizes.append(len(read(*a))) or read(*a))
    source[3]
    assert sizes == [48] and url


def test_array_records_are_staged_once_and_again_when_they_change(tmp_path, storage, stages,
                                                                 capfd):
    local = fashion(tmp_path)
    put(local, f"{storage}/staged/fashion_mnist")
    here = open_source("fashion_mnist", tmp_path, "train", image_size=32)
    for again in (False, True):
        there = open_source("fashion_mnist", f"{storage}/staged", "train", image_size=32)
        np.testing.assert_array_equal(there.array(), here.array())
        np.testing.assert_array_equal(there.labels, here.labels)
        assert there.fingerprint == here.fingerprint
        assert there.where.startswith(str(stages))
        assert ("staging gs://ddpm/staged/fashion_mnist" in capfd.readouterr().err) != again
    other = fashion(tmp_path / "other")
    put(other, f"{storage}/staged/fashion_mnist")
    new = open_source("fashion_mnist", f"{storage}/staged", "train", image_size=32)
    assert new.fingerprint != here.fingerprint and new.where != there.where
    np.testing.assert_array_equal(there.array(), here.array())  # who reads the old one still can


def test_a_stage_that_was_cut_off_goes_on(tmp_path, storage, stages, capfd):
    for name in "abc":
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(name.encode() * 1000)
    put(tmp_path / "files", f"{storage}/cut/set")
    whole = remote.stage(f"{storage}/cut", "set")
    part = whole.with_name(f"{whole.name}.partial")
    whole.rename(part)
    (part / "set/b").rename(part / "set/.b.1234.partial")  # half a file, by a process that died
    (part / "set/.b.1234.partial").write_bytes(b"b")
    (part / "set/c").unlink()
    capfd.readouterr()
    assert remote.stage(f"{storage}/cut", "set") == whole and not part.exists()
    assert "(2 files, 0.0 MB, 1 there already)" in capfd.readouterr().err
    assert {p.name: p.read_bytes() for p in (whole / "set").iterdir()} == {
        name: name.encode() * 1000 for name in "abc"}


def test_damage_on_the_way_is_found(tmp_path, storage, stages, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a").write_bytes(b"1234")
    put(tmp_path / "set", f"{storage}/wrong/set")
    fs, _ = remote.open_at(storage)
    monkeypatch.setattr(fs, "get_file", lambda _, to: pathlib.Path(to).write_bytes(b"1235"))
    with pytest.raises(UserError, match="wrong/set/a is not what the bucket announced"):
        remote.stage(f"{storage}/wrong", "set")
    assert not any(p.is_dir() and not p.name.endswith(".partial") for p in stages.iterdir())


def test_an_upload_is_what_was_sent_or_an_error(tmp_path, storage, monkeypatch):
    (tmp_path / "set").mkdir()
    for name, content in (("a", b"1\r\r\n2\r"), ("b", b"\n"), ("c", b""), ("info", b"last")):
        (tmp_path / "set" / name).write_bytes(content)
    remote.upload(tmp_path / "set", f"{storage}/sent/set", {"info"})
    assert remote.read_bytes(f"{storage}/sent/set/a") == b"1\r\r\n2\r"
    fs, _ = remote.open_at(storage)
    put_file = fs.put_file

    def cut(source, to):  # no real service damages a file on demand
        whole = pathlib.Path(source).read_bytes()
        pathlib.Path(source).write_bytes(whole[:-1])
        put_file(source, to)
        pathlib.Path(source).write_bytes(whole)
    monkeypatch.setattr(fs, "put_file", cut)
    with pytest.raises(UserError, match="cut/set/a is not what was sent"):
        remote.upload(tmp_path / "set", f"{storage}/cut/set", {"info"})
    assert "info" not in remote.listing(f"{storage}/cut/set")


STAGE = "from ddpm_jax.storage import remote; print(remote.stage('gs://ddpm/{}', 'set'))"


def test_one_process_downloads_and_the_others_wait(tmp_path, storage, stages):
    (tmp_path / "set").mkdir()
    for i in range(5):
        (tmp_path / f"set/{i}").write_bytes(bytes(100_000))
    put(tmp_path / "set", f"{storage}/once/set")
    done = [p.communicate(timeout=60) for p in [child(STAGE.format("once")) for _ in range(3)]]
    assert len({out for out, _ in done}) == 1 and pathlib.Path(done[0][0].strip(), "set/4").exists()
    assert sum("staging" in err for _, err in done) == 1, done


def test_a_waiting_process_goes_on_where_a_killed_one_was(tmp_path, storage, stages):
    (tmp_path / "set").mkdir()
    for i in range(4):
        (tmp_path / f"set/{i}").write_bytes(os.urandom(1_000_000))
    put(tmp_path / "set", f"{storage}/killed/set")
    # The first one stops after two files, in the middle of the third.
    first = child("import time\n"
                  "from ddpm_jax.storage import remote\n"
                  "fs, _ = remote.open_at('gs://ddpm')\n"
                  "get = fs.get_file\n"
                  "def slow(path, to):\n"
                  "    if path.endswith('2'): open(to, 'wb').write(b'half'); time.sleep(600)\n"
                  "    return get(path, to)\n"
                  "fs.get_file = slow\n" + STAGE.format("killed"))
    deadline = time.time() + 60
    while not list(stages.glob("*.partial/set/.2.*.partial")):
        assert first.poll() is None and time.time() < deadline
        time.sleep(0.02)
    second = child(STAGE.format("killed"))
    assert "waiting for it" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, err = second.communicate(timeout=60)
    assert "2 files, 2.0 MB, 2 there already" in err, err
    for i in range(4):
        assert pathlib.Path(out.strip(), f"set/{i}").read_bytes() == (
            tmp_path / f"set/{i}").read_bytes()


def test_no_bucket_and_nothing_in_it(storage, stages):
    for name in ("fashion_mnist", "folder"):
        with pytest.raises(UserError, match=f"gs://absent/x/{name}: nothing there, or no bucket "
                                            "gs://absent; gcloud storage ls"):
            open_source(name, "gs://absent/x", "train")
        with pytest.raises(UserError, match=f"ddpm data prepare --name={name} "
                                            "--dir=gs://ddpm/nothing"):
            open_source(name, f"{storage}/nothing", "train")


def test_a_damaged_array(tmp_path, storage, monkeypatch):
    write_store(tmp_path)
    url = f"{storage}/damaged"
    put(tmp_path / "folder", f"{url}/folder")
    whole = (tmp_path / "folder/train_images.npy").read_bytes()
    fs, _ = remote.open_at(url)
    fs.pipe_file("ddpm/damaged/folder/train_images.npy", whole[:-20])
    for kept in (0, 1 << 30):
        monkeypatch.setattr(datasets, "_KEPT_BYTES", kept)
        with pytest.raises(UserError, match="train_images.npy: cut short at image 6 of 7"):
            open_source("folder", url, "train")[6]
    fs.pipe_file("ddpm/damaged/folder/train_images.npy", b"nonsense")
    with pytest.raises(UserError, match="train_images.npy: not an array"):
        open_source("folder", url, "train")


class Forbidding(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (b'{"error": {"code": 403, "message": "sa@p.iam.gserviceaccount.com does not have '
                b'storage.objects.list access to the Google Cloud Storage bucket."}}')
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_no_permission_is_one_line_of_the_program():
    """The real client and a real answer 403."""
    pytest.importorskip("gcsfs", reason="gcsfs (the extra [gcs])")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("fashion_mnist", "folder"):
            done = subprocess.run(
                [sys.executable, "-m", "ddpm_jax", "data", "info", f"--name={name}",
                 "--dir=gs://ours/data"], capture_output=True, text=True, timeout=120,
                env={**os.environ,
                     "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.server_port}"})
            assert done.returncode == 2, done.stderr
            [line] = [x for x in done.stderr.splitlines() if x.startswith("ddpm: error")]
            assert "Forbidden" in line and "--role=roles/storage.objectUser" in line
            assert "Traceback" not in done.stderr
        server.shutdown()


def test_no_extra_is_one_line():
    code = ("import sys; sys.modules['gcsfs'] = None\n"
            "from ddpm_jax.cli.main import main\n"
            "sys.exit(main(['data', 'info', '--name=folder', '--dir=gs://ddpm/x']))")
    process = child(code)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "; pip install gcsfs" in err.splitlines()[-1], err


def test_full_disk(tmp_path, storage, stages, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a").write_bytes(b"1234")
    put(tmp_path / "set", f"{storage}/full/set")
    usage = type("usage", (), {"free": 3})
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="set DDPM_STAGE_DIR to a larger disk"):
        remote.stage(f"{storage}/full", "set")


def test_prepare_into_a_bucket(tmp_path, storage, stages):
    from PIL import Image
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path / f"pictures/{i}.png")
    args = [sys.executable, "-m", "ddpm_jax", "data", "prepare", "--name=folder",
            "--dir=gs://ddpm/made", f"--from={tmp_path / 'pictures'}"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "in gs://ddpm/made/folder (0.0 MB)" in done.stdout
    assert "train: 3 images 8x8x3" in done.stdout
    again = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "gs://ddpm/made/folder exists already" in again.stderr
