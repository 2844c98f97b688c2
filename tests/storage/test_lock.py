"""One command a folder, whatever became of the former one."""

import json
import subprocess
import sys
import threading
import time

import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.storage import files
from ddpm_jax.storage.lock import Lock

HOLD = ("import sys, time\nfrom ddpm_jax.storage.lock import Lock\n"
        "lock = Lock(sys.argv[-1], '--workdir')\nprint('held', flush=True)\ntime.sleep(60)\n")


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("BEAT_S", 0.2), ("GRACE_S", 0.5), ("PATIENCE_S", 1.0)):
        monkeypatch.setattr(f"ddpm_jax.storage.lock.{name}", seconds)


def test_a_live_command_is_named_and_a_killed_one_is_not_waited_for(tmp_path, quick):
    with holder(tmp_path) as process:
        with pytest.raises(UserError, match=f"--workdir=.* in use by process {process.pid} on"):
            Lock(tmp_path, "--workdir")
        process.kill()
        process.wait()
        started = time.monotonic()
        Lock(tmp_path, "--workdir").release()
        assert time.monotonic() - started < 5
    assert files.listing(tmp_path) == []


def test_a_folder_that_stays_empty_is_removed_and_a_file_is_refused(tmp_path):
    new, full = tmp_path / "new", tmp_path / "full"
    for folder in (new, full, tmp_path):
        lock = Lock(folder, "--out")
        if folder == full:
            (full / "x").touch()
        lock.release()
    assert files.listing(tmp_path) == ["full"] and files.listing(full) == ["x"]
    with pytest.raises(UserError, match="--out=.*x is a file; name a folder"):
        Lock(full / "x", "--out")


def test_the_process_number_may_belong_to_another_by_now(tmp_path):
    lock = Lock(tmp_path, "--out")
    file = tmp_path / "lock.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"started": "1", "token": "x"}))
    Lock(tmp_path, "--out").release()
    lock.release()


def test_a_command_that_ends_within_the_grace_is_waited_for(tmp_path):
    with holder(tmp_path) as process:
        timer = threading.Timer(1.5, process.kill)
        timer.start()
        said = []
        Lock(tmp_path, "--workdir", said.append).release()
        assert "waiting up to 10 s" in said[0]


def elsewhere(folder):
    """Makes the lock in ``folder`` one of another machine."""
    file = folder / "lock.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "node7 pid:[1]"}))


def test_another_machine_is_known_by_its_heartbeat(tmp_path, quick):
    Lock(tmp_path, "--workdir")._stopped.set()
    time.sleep(0.3)
    elsewhere(tmp_path)
    said, content = [], json.loads((tmp_path / "lock.json").read_text())
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            content["beat"] += 1
            files.write_json(tmp_path / "lock.json", content)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="on node7"):
        Lock(tmp_path, "--workdir", said.append)
    stop.set()
    thread.join()
    time.sleep(0.5)
    assert "held by process" in said[0] and "node7" in said[0]
    Lock(tmp_path, "--workdir").release()  # its heart has stopped
    assert files.listing(tmp_path) == []


def test_a_lock_that_was_taken_ends_the_former_holder(tmp_path, quick):
    lock = Lock(tmp_path, "--workdir")
    lock.check()
    elsewhere(tmp_path)
    taken = json.loads((tmp_path / "lock.json").read_text())
    files.write_json(tmp_path / "lock.json", taken | {"token": "another"})
    time.sleep(0.5)
    with pytest.raises(UserError, match="was taken by process .* on node7"):
        lock.check()
    lock.release()
    assert files.listing(tmp_path) == ["lock.json"]


def test_on_a_bucket(storage, quick):
    lock = Lock(f"{storage}/locked", "--workdir")
    with pytest.raises(UserError, match="in use by"):
        Lock(f"{storage}/locked", "--workdir")
    lock.release()
    Lock(f"{storage}/locked", "--workdir").release()
