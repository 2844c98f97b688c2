"""Files and folders that appear whole or not at all, on disk and in a bucket."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.storage import files


def test_round_trips(tmp_path):
    files.write_npz(tmp_path / "a/b.npz", {"x": np.arange(3)})
    np.testing.assert_array_equal(files.read_npz(tmp_path / "a/b.npz")["x"], [0, 1, 2])
    files.write_json(tmp_path / "c.json", {"b": 1, "a": [0.5]})
    assert files.read_json(tmp_path / "c.json") == {"a": [0.5], "b": 1}
    assert files.listing(tmp_path) == ["a", "c.json"]
    assert files.listing(tmp_path / "absent") == []


def test_a_disk_that_is_full_leaves_the_old_file_and_no_other(tmp_path):
    files.write_bytes(tmp_path / "x", b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*x: File too large; free space or name"):
            files.write_bytes(tmp_path / "x", bytes(1001))
        with pytest.raises(UserError, match="cannot write .*y.npz: File too large"):
            files.write_npz(tmp_path / "y.npz", {"a": np.zeros(1000)})
        with (pytest.raises(UserError, match="cannot write .*z: File too large"),
              files.whole_file(tmp_path / "z") as file):       # as a library that needs a name
            os.truncate(file.name, 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert files.listing(tmp_path) == ["x"] and files.read_bytes(tmp_path / "x") == b"old"


def test_a_process_that_is_killed_leaves_the_old_file(tmp_path):
    files.write_bytes(tmp_path / "x", b"old")
    code = ("import os, signal, sys\n"
            "from ddpm_jax.storage import files\n"
            "with files.whole_file(sys.argv[1]) as file:\n"
            "    file.write(bytes(10**6)); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], timeout=60)
    assert done.returncode == -signal.SIGKILL and files.read_bytes(tmp_path / "x") == b"old"
    [left] = [name for name in files.listing(tmp_path) if name != "x"]
    assert left.startswith(".x.") and left.endswith(files.PARTIAL)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(
        ("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(
        ("replace", os.path.basename(a))) or replace(a, b))
    files.write_bytes(tmp_path / "folder/x", b"new")
    (_, temporary), replaced, folder = calls
    assert replaced == ("replace", temporary) and temporary.endswith(files.PARTIAL)
    assert folder == ("fsync", "folder")
    calls.clear()
    with files.new_folder(tmp_path / "folder/new") as staging:
        (staging / "inner").mkdir()
        (staging / "inner/y").write_bytes(b"new")
    *inside, replaced, folder = calls
    assert {name for _, name in inside} == {"inner", "y", staging.name}
    assert replaced == ("replace", staging.name) and folder == ("fsync", "folder")


def test_a_disk_that_fails_to_flush_is_an_error_one_that_cannot_flush_is_not(tmp_path, monkeypatch):
    for code in (errno.EINVAL, errno.EIO):
        def fsync(descriptor, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)  # no file system here does either
        with (contextlib.nullcontext() if code == errno.EINVAL
              else pytest.raises(UserError, match="Input/output error")):
            files.write_bytes(tmp_path / str(code), b"x")
    assert files.listing(tmp_path) == [str(errno.EINVAL)]


def test_a_name_as_long_as_names_may_be(tmp_path):
    for name in ("x" * 255, "\u00e4" * 127):
        files.write_bytes(tmp_path / name, b"x")
        assert files.read_bytes(tmp_path / name) == b"x"


def test_an_error_of_the_caller_leaves_nothing_and_keeps_its_type(tmp_path):
    for wrong in (KeyError("x"), KeyboardInterrupt(), ConnectionResetError("by the peer"),
                  FileNotFoundError(errno.ENOENT, "absent", "another file")):
        with pytest.raises(type(wrong)), files.whole_file(tmp_path / "x") as file:
            file.write(b"half")
            raise wrong
    assert files.listing(tmp_path) == []


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot read .*absent: No such file or directory$"):
        files.read_bytes(tmp_path / "absent")
    with pytest.raises(UserError, match=r"write .*file/x: File exists \(.*file\); free space or"):
        files.write_bytes(tmp_path / "file/x", b"")
    with pytest.raises(UserError, match="not a readable .npz"):
        files.read_npz(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot read .*folder: Is a directory$"):
        files.read_bytes(tmp_path / "folder")
    with pytest.raises(UserError, match="cannot write .*folder: Is a directory; free space or"):
        files.write_bytes(tmp_path / "folder", b"")


def test_remove(tmp_path):
    for name in ("kept/file", "gone/inner/file", "file"):
        files.write_bytes(tmp_path / name, b"x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for name in ("gone", "file", "link", "broken", "absent", "absent/too"):
        files.remove(tmp_path / name)
    assert files.listing(tmp_path) == ["kept"] and files.exists(tmp_path / "kept/file")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # gcsfs leaves its session open
def test_a_bucket_holds_the_same(storage):
    url = f"{storage}/files"
    files.write_json(f"{url}/a/b.json", {"x": 1})
    files.write_npz(f"{url}/c.npz", {"x": np.arange(3)})
    assert files.read_json(f"{url}/a/b.json") == {"x": 1}
    np.testing.assert_array_equal(files.read_npz(f"{url}/c.npz")["x"], [0, 1, 2])
    assert files.listing(url) == ["a", "c.npz"] and files.exists(f"{url}/c.npz")
    with pytest.raises(KeyError), files.whole_file(f"{url}/d") as file:
        file.write(b"half")
        raise KeyError("x")
    with pytest.raises(UserError, match="a is not|files exists and is not an empty folder"):
        with files.new_folder(url):
            raise AssertionError("entered")
    files.remove(f"{url}/c.npz")
    files.remove(f"{url}/a")
    assert files.listing(url) == [] and not files.exists(f"{url}/d")
    with pytest.raises(KeyError), files.new_folder(f"{url}/new") as staging:
        (staging / "file").write_text("x")
        raise KeyError("x")
    assert files.listing(f"{url}/new") == []
    with files.new_folder(f"{url}/new") as staging:
        (staging / "file").write_text("x")
    assert files.listing(f"{url}/new") == ["file"]
    with pytest.raises(UserError, match="cannot read gs://absent/x: nothing there, or no bucket"):
        files.read_bytes("gs://absent/x")
    with pytest.raises(UserError, match="cannot write gs://absent/x: "):
        files.write_bytes("gs://absent/x", b"")


def test_a_user_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.delenv("HOME")
    with pytest.raises(UserError, match="no home"):
        files.resolve("~/runs")
    assert str(files.resolve(tmp_path)) == str(tmp_path)


def test_a_result_is_never_nan(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"fid": float("nan")})
    assert files.listing(tmp_path) == []


def test_what_is_not_json_is_said(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        files.read_json(tmp_path / "x.json")


def test_a_folder_appears_at_the_end_with_an_ordinary_mode(tmp_path):
    out = tmp_path / "a" / "out"
    with files.new_folder(out) as staging:
        (staging / "file").write_text("x")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["file"] and os.listdir(tmp_path / "a") == ["out"]
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_is_left_of_a_folder_that_failed(tmp_path):
    with pytest.raises(KeyError), files.new_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
        raise KeyError("x")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="No space left"), files.new_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_may_be_there_anything_else_not(tmp_path):
    (tmp_path / "out").mkdir()
    with files.new_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
    for name in ("out", "out/file"):
        with pytest.raises(UserError, match="is not an empty folder"):
            with files.new_folder(tmp_path / name):
                raise AssertionError("entered")
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_too_many_open_files_is_no_reason_to_take_another_folder(tmp_path):
    with pytest.raises(UserError, match="Too many open files; raise the limit with ulimit -n"):
        with files.new_folder(tmp_path / "x", "give another --dir"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
