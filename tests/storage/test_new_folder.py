"""Folders that appear whole or not at all."""

import os

import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import new_folder


def test_appears_at_the_end_with_an_ordinary_mode(tmp_path):
    out = tmp_path / "a" / "out"
    with new_folder(out) as staging:
        (staging / "file").write_text("x")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["file"] and os.listdir(tmp_path / "a") == ["out"]
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
        raise KeyError("x")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="No space left"), new_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_may_be_there_anything_else_not(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
    for name in ("out", "out/file"):
        with pytest.raises(UserError, match="is not an empty folder"):
            with new_folder(tmp_path / name):
                raise AssertionError("entered")
    assert (tmp_path / "out" / "file").read_text() == "x"
