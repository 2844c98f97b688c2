"""Bundles: a tiny committed one, real TensorFlow's where installed, and every kind of bad file."""

import pathlib
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_jax.errors import UserError
from ddpm_jax.formats.tf_checkpoint import find_prefix, open_bundle
from ddpm_jax.formats.tfrecord import masked_crc32c

# tiny.* were written by TensorFlow 2.21 (tf.compat.v1.train.Saver): W float32 [3,4] = arange / 8,
# its .../ExponentialMovingAverage = -W, half float16 [2] = (0.5, -2), global_step int64 = 790000.
GOLDEN = pathlib.Path(__file__).parent / "golden"
W = np.arange(12, dtype=np.float32).reshape(3, 4) / 8
EXPECTED = {"model/a/W": W, "model/a/W/ExponentialMovingAverage": -W,
            "half": np.float16([0.5, -2.0]), "global_step": np.int64(790000)}


@pytest.fixture
def tiny(tmp_path):
    for file in GOLDEN.glob("tiny.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "tiny"


def test_golden_bundle(tiny):
    bundle = open_bundle(tiny)
    assert bundle.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        assert bundle[name].shape == expected.shape and bundle[name].dtype == expected.dtype
        np.testing.assert_array_equal(bundle[name].read(), expected)


def test_prefix_from_what_a_user_may_name(tiny):
    assert find_prefix(tiny) == str(tiny)
    assert find_prefix(f"{tiny}.index") == str(tiny)
    assert find_prefix(f"{tiny}.data-00000-of-00001") == str(tiny)
    with pytest.raises(UserError, match=r"name one of its prefixes \(tiny\)"):
        find_prefix(tiny.parent)
    # The text file as TensorFlow writes it, naming the folder where it was trained.
    (tiny.parent / "checkpoint").write_text('model_checkpoint_path: "/bucket/run/tiny"\n'
                                            'all_model_checkpoint_paths: "/bucket/run/tiny"\n')
    assert find_prefix(tiny.parent) == str(tiny)
    with pytest.raises(UserError, match="no file .*nothing.index"):
        find_prefix(tiny.parent / "nothing")


def test_v1_checkpoints_and_other_single_files_are_named(tmp_path):
    path = tmp_path / "old.ckpt"
    path.write_bytes(b"anything")
    with pytest.raises(UserError, match="a V1 checkpoint"):
        find_prefix(path)


def test_missing_data_file(tiny):
    pathlib.Path(f"{tiny}.data-00000-of-00001").unlink()
    with pytest.raises(UserError, match=r"needs .*tiny\.data-00000-of-00001, not found"):
        open_bundle(tiny)


def test_truncated_data_file(tiny):
    data = pathlib.Path(f"{tiny}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated: variable"):
        open_bundle(tiny)


def test_damaged_data_is_found_when_read(tiny):
    data = pathlib.Path(f"{tiny}.data-00000-of-00001")
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    bundle = open_bundle(tiny)
    with pytest.raises(UserError, match="ExponentialMovingAverage fails its checksum"):
        for lazy in bundle.values():
            lazy.read()


@pytest.mark.parametrize("size", [0, 7, 47, 100, -1])
def test_truncated_index(tiny, size):
    index = pathlib.Path(f"{tiny}.index")
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(UserError, match=r"tiny\.index: not the index"):
        open_bundle(tiny)


def test_foreign_index(tiny):
    index = pathlib.Path(f"{tiny}.index")
    index.write_bytes(b"\x89PNG\r\n" * 20)
    with pytest.raises(UserError, match="not the index of a TensorFlow checkpoint"):
        open_bundle(tiny)
    index.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        open_bundle(tiny)


def block(pairs, kind=0):
    """A table block without prefix sharing, with its trailer."""
    body = b"".join(bytes([0, len(k), len(v)]) + k + v for k, v in pairs)
    body += struct.pack("<II", 0, 1)
    return body + bytes([kind]) + struct.pack("<I", masked_crc32c(body + bytes([kind])))


def table(pairs, kind=0):
    data = block(pairs, kind)
    meta, index = block([]), block([(b"z", bytes([0, len(data) - 5]))])
    footer = bytes([len(data), len(meta) - 5, len(data) + len(meta), len(index) - 5])
    return data + meta + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


HEADER = (b"", b"\x08\x01")  # one data file


@pytest.mark.parametrize("pairs, kind, message", [
    ([(b"not-a-header", b"\x08\x01")], 0, "table without a bundle header"),
    ([HEADER], 1, "block compressed"),
    ([(b"", b"\x08\x01\x10\x01")], 0, "big-endian"),
    ([HEADER, (b"w", b"\x08\x01\x3a\x02\x0a\x00")], 0, "w is partitioned"),
    ([HEADER, (b"w", b"\x08\x01\x12\x04\x12\x02\x08\x03\x18\x02")], 0, "lies in data file 2 of 1"),
    ([HEADER, (b"w", b"\x08\x01\x12\x04\x12\x02\x08\x03\x28\x08")], 0, "is not 8 bytes"),
    ([HEADER, (b"w", b"\x08")], 0, "cannot be decoded"),
])
def test_tables_that_are_no_plain_bundle(tmp_path, pairs, kind, message):
    (tmp_path / "x.index").write_bytes(table(pairs, kind))
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(64))
    with pytest.raises(UserError, match=message):
        open_bundle(tmp_path / "x")


def test_types_that_are_no_numbers_are_listed_but_not_read(tmp_path):
    (tmp_path / "x.index").write_bytes(table([HEADER, (b"graph", b"\x08\x07\x28\x05")]))
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(64))
    with pytest.raises(UserError, match="graph has TensorFlow type 7"):
        open_bundle(tmp_path / "x")["graph"].read()


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_one_changed_byte_of_the_index_is_always_noticed(tmp_path_factory, at, byte):
    folder = tmp_path_factory.mktemp("bundle")
    for file in GOLDEN.glob("tiny.*"):
        shutil.copy(file, folder)
    index = folder / "tiny.index"
    raw = bytearray(index.read_bytes())
    same = raw[at % len(raw)] == byte
    raw[at % len(raw)] = byte
    index.write_bytes(raw)
    try:
        found = {name: lazy.read() for name, lazy in open_bundle(folder / "tiny").items()}
    except UserError:
        assert not same
    else:  # only padding of the footer and the metaindex's address are not covered
        assert all((found[k] == v).all() for k, v in EXPECTED.items())


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_many_blocks_and_several_data_files_of_real_tensorflow(tmp_path):
    tf = pytest.importorskip("tensorflow")
    # 9,000 long names fill several 256 KiB blocks of the index.
    names = [f"model/a_scope_with_a_long_name_{i:05d}/" + "x" * 60 for i in range(9000)]
    values = np.random.default_rng(0).standard_normal((9000, 2)).astype(np.float32)
    tf.raw_ops.SaveV2(prefix=str(tmp_path / "many"), tensor_names=names,
                      shape_and_slices=[""] * len(names), tensors=list(map(tf.constant, values)))
    bundle = open_bundle(tmp_path / "many")
    assert len(bundle) == 9000 and (tmp_path / "many.index").stat().st_size > 600_000
    for i in range(0, 9000, 97):
        np.testing.assert_array_equal(bundle[names[i]].read(), values[i])

    parts = [str(tmp_path / f"part{i}") for i in range(3)]
    arrays = {"f8": np.linspace(0, 1, 7), "i4": np.int32([[1, -2]]), "flag": np.bool_([1, 0]),
              "none": np.zeros((0, 5), np.float32), "big": values, "name": np.array([b"text"])}
    for part, keys in zip(parts, (["f8", "name"], ["i4", "flag"], ["none", "big"]), strict=True):
        tf.raw_ops.SaveV2(prefix=part, tensor_names=keys, shape_and_slices=[""] * len(keys),
                          tensors=[tf.constant(arrays[k]) for k in keys])
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts,
                                  destination_prefix=str(tmp_path / "merged"))
    assert (tmp_path / "merged.data-00002-of-00003").exists()
    bundle = open_bundle(tmp_path / "merged")
    with pytest.raises(UserError, match="TensorFlow type 7"):
        bundle["name"].read()
    for name in arrays.keys() - {"name"}:
        assert bundle[name].dtype == arrays[name].dtype
        np.testing.assert_array_equal(bundle[name].read(), arrays[name])


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_v1_format_of_real_tensorflow_is_refused_by_name(tmp_path):
    tf = pytest.importorskip("tensorflow")
    tf1 = tf.compat.v1
    with tf1.Graph().as_default(), tf1.Session() as session:
        tf1.get_variable("w", shape=[3])
        session.run(tf1.global_variables_initializer())
        saver = tf1.train.Saver(write_version=tf1.train.SaverDef.V1)
        path = saver.save(session, str(tmp_path / "old.ckpt"), write_meta_graph=False)
    with pytest.raises(UserError, match="V1 checkpoint"):
        find_prefix(path)
    pathlib.Path(path).rename(tmp_path / "renamed.index")
    with pytest.raises(UserError, match="V1"):
        open_bundle(tmp_path / "renamed")
