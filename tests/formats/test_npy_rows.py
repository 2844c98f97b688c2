"""Rows of .npy and .npz files, read when they are needed."""

import contextlib
import gc
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats import npy_rows

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)


def opened(path, choose=lambda names: "arr_0"):
    with open(path, "rb") as file:
        return (npy_rows.open_npz(file, choose) if path.suffix == ".npz"
                else npy_rows.open_npy(file))


@pytest.mark.parametrize("name, save", [
    ("x.npy", np.save), ("x.npz", np.savez), ("y.npz", np.savez_compressed),
    ("z.npz", lambda path, array: np.savez(path, other=np.arange(3), arr_0=array))])
def test_rows_from_any_thread(tmp_path, name, save):
    save(tmp_path / name, IMAGES)
    rows = opened(tmp_path / name)
    assert rows.shape == IMAGES.shape and rows.dtype == np.uint8
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(lambda i: rows.read(i, 1), range(50))):
            np.testing.assert_array_equal(found, IMAGES[i:i + 1])
    np.testing.assert_array_equal(rows.read(10, 40), IMAGES[10:])


def test_the_file_is_closed_with_the_reader(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)

    def is_open():
        found = set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                found.add(os.readlink(f"/proc/self/fd/{name}"))
        return str(tmp_path / "x.npy") in found

    rows = opened(tmp_path / "x.npy")
    assert is_open()
    del rows
    gc.collect()
    assert not is_open()


@pytest.mark.parametrize("array, message", [
    (np.array([{}, {}], object), "holds Python objects"),
    (np.asfortranarray(np.arange(6.0).reshape(2, 3)), "Fortran order"),
    (np.float32(1), "cut short or damaged")])
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "x.npy")


def test_an_array_that_is_not_there(tmp_path):
    np.savez(tmp_path / "x.npz", a=IMAGES)
    with pytest.raises(UserError, match="not a readable .npz"):
        opened(tmp_path / "x.npz")
    assert opened(tmp_path / "x.npz", lambda names: names[0]).shape == IMAGES.shape
    (tmp_path / "y.npz").write_bytes(b"")
    with pytest.raises(UserError, match="not a readable .npz"):
        opened(tmp_path / "y.npz")
