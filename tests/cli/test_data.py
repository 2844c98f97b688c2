import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


def ddpm(*args):
    return subprocess.run([sys.executable, "-m", "ddpm_jax", "data", *args], text=True,
                          capture_output=True, timeout=120)


@pytest.fixture
def pictures(tmp_path):
    for name in ("train/a", "train/b", "test/a"):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((12, 9, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_prepare_then_info(tmp_path, pictures):
    args = ("--name=folder", f"--dir={tmp_path / 'd'}")
    done = ddpm("prepare", *args, f"--from={pictures}", "--image_size=8")
    assert done.returncode == 0, done.stderr
    for text in ("train: 4 images 8x8x3", "test: 2 images 8x8x3", "2 classes: a, b",
                 f"in {tmp_path / 'd/folder'}", "MB on disk"):
        assert text in done.stdout
    assert "folder train 4/4" in done.stderr  # progress
    info = ddpm("info", *args, "--split=test")
    assert "test: 2 images" in info.stdout and "train:" not in info.stdout
    fingerprint = done.stdout.split("test: 2 images 8x8x3, fingerprint ")[1][:16]
    assert fingerprint in info.stdout
    again = ddpm("prepare", *args, f"--from={pictures}")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_a_dry_listing_writes_nothing(tmp_path, pictures):
    (pictures / "train/a/.DS_Store").write_bytes(b"")
    (pictures / "train/a/x.heic").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    done = ddpm("prepare", "--name=folder", f"--from={pictures}", f"--dir={tmp_path / 'd'}",
                "--list")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "train: 4 images, 2 classes: a 2, b 2", "test: 2 images, 2 classes: a 2, b 0",
        "left out: 1 hidden or system files: train/a/.DS_Store",
        "left out: 1 .heic files (not read: convert them): train/a/x.heic"]
    assert sorted(tmp_path.rglob("*")) == before


def test_flags_that_settle_what_is_ambiguous(tmp_path, pictures):
    (pictures / "test").rename(pictures / "bus")
    args = ("prepare", "--name=folder", f"--from={pictures}", "--image_size=8")
    refused = ddpm(*args, f"--dir={tmp_path / 'd'}")
    assert refused.returncode == 2 and "--nosplit_folders" in refused.stderr
    made = ddpm(*args, f"--dir={tmp_path / 'd'}", "--split_folders")
    assert "train: 4 images" in made.stdout, made.stderr
    assert "left out: 2 images beside the split folders: bus/a/0.png, bus/a/1.png" in made.stdout
    made = ddpm(*args, f"--dir={tmp_path / 'e'}", "--nosplit_folders", "--classes=none")
    assert "train: 6 images" in made.stdout and "classes" not in made.stdout, made.stderr


BAD = [
    (["prepare", "--name=imagenet"], "--name=imagenet is unknown; known: digits,"),
    (["prepare"], "--name=None is unknown"),
    (["unpack", "--name=digits"], "expected prepare or info"),
    (["prepare", "--name=digits"], "digits needs no preparation"),
    (["info", "--name=cifar10", "--dir=nowhere"], "ddpm data prepare --name=cifar10 --dir=nowhere"),
    (["prepare", "--name=folder", "--from=nowhere"], "--from=nowhere: no such file or folder"),
    (["prepare", "--name=folder", "--channels=2"], "channels"),
    (["prepare", "--name=cifar10", "--list"], "--list is not read by ddpm data prepare --name=cif"),
    (["info", "--name=folder", "--classes=none"], "--classes is not read by ddpm data info"),
    (["prepare", "--name=folder", "--image_size=0"], "--image_size=0: must be at least 1"),
]


def test_bad_input_is_one_line_and_exit_2(tmp_path):
    """All in one process, for its start costs seconds."""
    script = """if True:
        import json, sys
        from ddpm_jax.cli.main import main
        for args in json.loads(sys.argv[1]):
            print(main(['data', *args]), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", script, json.dumps([args for args, _ in BAD])],
                          text=True, capture_output=True, timeout=120, cwd=tmp_path)
    said = done.stderr.splitlines()
    assert len(said) == 2 * len(BAD), done.stderr
    for (args, message), error, code in zip(BAD, said[::2], said[1::2], strict=True):
        assert error.startswith("ddpm: error: ") and message in error and code == "2", args
