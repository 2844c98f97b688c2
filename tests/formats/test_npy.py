"""Numpy's .npy files: arrays, dicts of arrays of every protocol, and pickles with code."""

import io
import os
import pickle

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats.npy import read_npy

VALUES = {"mu": np.arange(5.0), "sigma": np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
          "n": np.int64(7), "empty": np.zeros((0, 2)), "name": "train", "steps": 3,
          "nested": {"x": np.array([True, False])}}


def saved(value, protocol=None):
    file = io.BytesIO()
    if protocol is None:
        np.save(file, value, allow_pickle=True)
        return file.getvalue()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    array = np.empty((), object)
    array[()] = value
    return file.getvalue() + pickle.dumps(array, protocol)


def check(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            check(found[key], value)
        else:
            np.testing.assert_array_equal(found[key], value)
            assert np.asarray(found[key]).dtype == np.asarray(value).dtype


@pytest.mark.parametrize("protocol", [None, 2, 3, 4])
def test_a_dict_of_arrays(protocol):
    check(read_npy(saved(VALUES, protocol), "x.npy"), VALUES)


def test_names_of_older_numpy():
    content = saved(VALUES, 3).replace(b"numpy._core", b"numpy.core")
    check(read_npy(content, "x.npy"), VALUES)


def test_arrays():
    np.testing.assert_array_equal(read_npy(saved(VALUES["sigma"]), "x.npy"), VALUES["sigma"])


@pytest.mark.parametrize("value", [os.system, np.load, object(), eval, os.path.join])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)

    class Exploit:
        def __reduce__(self):
            return (value if callable(value) else eval), ("touch EXECUTED",)

    with pytest.raises(UserError, match="x.npy: refused: it asks for"):
        read_npy(saved({"mu": Exploit()}), "x.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [
    b"", b"\x93NUMPY", saved(np.array([1, {}], object)), saved(np.array([{}, {}], object)),
    saved(VALUES)[:-20], saved({"t": np.array(["2020-01-01"], "datetime64[D]")}),
    saved(VALUES["mu"])[:-1]])
def test_other_files(content):
    with pytest.raises(UserError, match="x.npy: "):
        read_npy(content, "x.npy")


def test_damage_is_one_line():
    whole = saved(VALUES)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        try:
            read_npy(bytes(data), "x.npy")
        except UserError as error:
            assert str(error).startswith("x.npy: ")
