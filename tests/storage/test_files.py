"""All or nothing on disk."""

import errno
import os

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


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    files.write_bytes(tmp_path / "x", b"old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        files.write_bytes(tmp_path / "x", b"new")
    assert files.listing(tmp_path) == ["x"] and files.read_bytes(tmp_path / "x") == b"old"


def test_a_result_is_never_nan(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"fid": float("nan")})
    assert files.listing(tmp_path) == []


def test_what_is_not_json_is_said(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        files.read_json(tmp_path / "x.json")
