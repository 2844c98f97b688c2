"""safetensors: against the library in both directions, and files that are not what they say."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_jax.errors import UserError
from ddpm_jax.formats.safetensors import open_safetensors, save_safetensors
from ddpm_jax.storage import files


def arrays():
    return {"a": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "b": np.float16([1.5, -2.0]),
            "empty": np.zeros((0, 3), np.float32), "n": np.array(7, np.int64)}


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays(), path, metadata={"format": "pt"})
    found, metadata = open_safetensors(path)
    assert metadata == {"format": "pt"} and found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].read(), array)


def test_library_reads_what_is_written_permuted_views_included(tmp_path):
    path = tmp_path / "x.safetensors"
    view = arrays()["a"].transpose(2, 0, 1)
    save_safetensors({"view": view, "b": arrays()["b"]}, path, {"step": 3})
    found = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(found["view"], view)
    np.testing.assert_array_equal(found["b"], arrays()["b"])
    assert open_safetensors(path)[1] == {"step": "3"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_equal_weights_give_equal_bytes_that_others_may_read(tmp_path):
    facts = {"step": 3, "weights": "ema", "format": "pt", "name \u00e4": 'a "quoted"\nline'}
    for i in range(8):
        save_safetensors(arrays(), tmp_path / f"{i}", facts)
    assert len({(tmp_path / f"{i}").read_bytes() for i in range(8)}) == 1
    assert open_safetensors(tmp_path / "0")[1] == {k: str(v) for k, v in facts.items()}
    (tmp_path / "plain").touch()
    assert (tmp_path / "0").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # gcsfs leaves its session open
def test_a_bucket_gets_the_same_bytes(tmp_path, storage):
    save_safetensors(arrays(), f"{storage}/weights/x.safetensors", {"a": 1, "b": 2})
    save_safetensors(arrays(), tmp_path / "x", {"a": 1, "b": 2})
    assert files.read_bytes(f"{storage}/weights/x.safetensors") == (tmp_path / "x").read_bytes()


def test_bfloat16_reads_as_float32(tmp_path):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<HH", 0x3FC0, 0xC000))
    found = open_safetensors(path)[0]["w"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.read(), [1.5, -2.0])


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the library says of objects
        save_safetensors({"x": np.array([object()])}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_foreign_and_truncated_files(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        open_safetensors(path)
    path.write_bytes(b"\x80\x02}q\x00." * 10)
    with pytest.raises(UserError, match="not a safetensors file"):
        open_safetensors(path)
    safetensors.numpy.save_file(arrays(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cut short"):
        open_safetensors(path)
    path.write_bytes(whole[:20])
    with pytest.raises(UserError, match="cut short"):
        open_safetensors(path)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_one_changed_byte_is_read_or_refused_never_a_crash(tmp_path_factory, at, byte):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    safetensors.numpy.save_file(arrays(), path)
    data = bytearray(path.read_bytes())
    data[min(at, len(data) - 1)] = byte
    path.write_bytes(data)
    try:
        for lazy in open_safetensors(path)[0].values():
            lazy.read()
    except UserError:
        pass
