"""Weights files of the real names and shapes, written by hand, by PyTorch and by TensorFlow."""

import functools
import importlib.util
import io
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.inception import network, weights

GENERATOR = pathlib.Path(__file__).parents[2] / "golden" / "make_inception.py"


@functools.cache
def state():
    spec = importlib.util.spec_from_file_location("make_inception", GENERATOR)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    return {name: make.seeded(name, shape) for name, shape in network.state_shapes().items()}


def text(s):
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def integer(i):
    return b"J" + struct.pack("<i", i)


def integers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(key, array):
    """Opcodes of one float tensor as torch.save writes it."""
    strides = [int(np.prod(array.shape[i + 1:])) for i in range(array.ndim)]
    pid = (b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
           + integer(array.size) + b"tQ")
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + integer(0) + integers(array.shape)
            + integers(strides) + b"\x89ccollections\nOrderedDict\n)RtR")


def state_pickle(arrays):
    items = b"".join(text(name) + tensor(str(i), a) for i, (name, a) in enumerate(arrays.items()))
    return b"\x80\x02}(" + items + b"u."


def zip_file(arrays):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", state_pickle(arrays))
        for i, a in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", a.tobytes())
    return buffer.getvalue()


def legacy_file(arrays, sys_info=None):
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001))
    head += pickle.dumps({"little_endian": True}, 2) if sys_info is None else sys_info
    keys = pickle.dumps([str(i) for i in range(len(arrays))], 2)
    body = b"".join(struct.pack("<q", a.size) + a.tobytes() for a in arrays.values())
    return head + state_pickle(arrays) + keys + body


def varint(n):
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def const(name, array):
    dims = b"".join(field(2, b"\x08" + varint(n)) for n in array.shape)
    proto = b"\x08\x01" + field(2, dims) + field(4, array.astype("<f4").tobytes())
    value = field(5, field(1, b"value") + field(2, field(8, proto)))
    return field(1, field(1, name.encode()) + field(2, b"Const") + value)


def graph_tensors(arrays):
    """The 2015 graph's constants for torchvision-named arrays, by the names written out here."""
    parts = {"bn.weight": "gamma", "bn.bias": "beta", "bn.running_mean": "moving_mean",
             "bn.running_var": "moving_variance"}
    scopes = weights.graph_names()
    for name, array in arrays.items():
        if name.startswith("fc"):
            yield ("softmax/weights", array.T) if name == "fc.weight" else ("softmax/biases", array)
        elif name.endswith("conv.weight"):
            scope = scopes[name.removesuffix(".conv.weight")]
            yield f"{scope}/conv2d_params", array.transpose(2, 3, 1, 0)
        else:
            scope, part = name.rsplit(".bn.", 1)
            yield f"{scopes[scope]}/batchnorm/{parts['bn.' + part]}", array


def norm_node(name, *, scaled, epsilon=0.001):
    def attribute(key, value):
        return field(5, field(1, key.encode()) + field(2, value))
    return field(1, field(1, name.encode()) + field(2, b"BatchNormWithGlobalNormalization")
                 + attribute("scale_after_normalization", b"\x28" + bytes([scaled]))
                 + attribute("variance_epsilon", b"\x25" + struct.pack("<f", epsilon)))


def graph_file(arrays):
    return b"".join(const(n, np.ascontiguousarray(a)) for n, a in graph_tensors(arrays))


def tgz_file(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=0) as archive:
        for name, data in (("LICENSE", b"x"), ("classify_image_graph_def.pb", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


FORMATS = {"zip": zip_file, "legacy": legacy_file, "pb": graph_file,
           "tgz": lambda arrays: tgz_file(graph_file(arrays))}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_bits(kind):
    found = weights.read_state(FORMATS[kind](state()))
    assert list(found) == list(network.state_shapes())
    for name, array in state().items():
        np.testing.assert_array_equal(found[name], array)


def test_graph_names_are_the_published_ones():
    names = weights.graph_names()
    assert len(set(names.values())) == 94
    # as listed by public dumps of classify_image_graph_def.pb
    for ours, theirs in {
            "Conv2d_1a_3x3": "conv", "Conv2d_4a_3x3": "conv_4", "Mixed_5b.branch1x1": "mixed/conv",
            "Mixed_5b.branch5x5_2": "mixed/tower/conv_1",
            "Mixed_5d.branch_pool": "mixed_2/tower_2/conv", "Mixed_6a.branch3x3": "mixed_3/conv",
            "Mixed_6a.branch3x3dbl_3": "mixed_3/tower/conv_2",
            "Mixed_6d.branch1x1": "mixed_6/conv",
            "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
            "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
            "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
            "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
            "Mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
            "Mixed_7c.branch_pool": "mixed_10/tower_2/conv"}.items():
        assert names[ours] == theirs


def test_a_gamma_that_the_graph_does_not_apply_is_one():
    content = graph_file(state()) + norm_node("mixed/conv/batchnorm", scaled=0)
    found = weights.read_state(content)
    assert np.all(found["Mixed_5b.branch1x1.bn.weight"] == 1)
    content = graph_file(state()) + norm_node("mixed/conv/batchnorm", scaled=1)
    name = "Mixed_5b.branch1x1.bn.weight"
    np.testing.assert_array_equal(weights.read_state(content)[name], state()[name])


def test_another_epsilon_is_refused():
    with pytest.raises(UserError, match="epsilon"):
        weights.read_state(graph_file(state()) + norm_node("x/batchnorm", scaled=1, epsilon=1e-5))


class Malicious:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("kind", ["zip", "legacy", "sys_info"])
@pytest.mark.parametrize("payload", [Malicious(os.system, "touch EXECUTED"),
                                     Malicious(eval, "open('EXECUTED', 'w')"),
                                     Malicious(getattr, os, "system")])
def test_code_in_a_pickle_is_refused_and_not_run(kind, payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        bad = pickle.dumps(payload, 2)
    except TypeError:      # a module as an argument: name it
        bad = b"\x80\x02cos\nsystem\n(X\x0e\x00\x00\x00touch EXECUTEDtR."
    arrays = {"x": np.zeros(1, np.float32)}
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", bad)
        content = buffer.getvalue()
    elif kind == "legacy":
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        content = head + b"\x80\x02}." + bad
    else:
        content = legacy_file(arrays, sys_info=bad)
    with pytest.raises(UserError, match="refused"):
        weights.read_state(content)
    assert not list(tmp_path.iterdir())


def test_a_tensor_outside_its_storage_is_refused():
    arrays = {"x": np.zeros(4, np.float32)}
    content = state_pickle(arrays).replace(integers([4]), integers([9]), 1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(UserError, match="outside its storage"):
        weights.read_state(buffer.getvalue())


@pytest.mark.parametrize("content, message", [
    (b"", "neither"), (b"hello world", "neither"), (b"PK\x03\x04junk", "damaged"),
    (b"\x1f\x8bjunk", "tar archive"), (b"\x80\x02junk", "damaged|neither"),
    (b"\x0a\xff\x01abc", "GraphDef"), (tgz_file(b"")[:200], "tar archive")])
def test_damaged_files_say_so(content, message):
    with pytest.raises(UserError, match=message):
        weights.read_state(content)


def test_truncated_real_file_says_so():
    with pytest.raises(UserError, match="damaged|truncated|outside"):
        weights.read_state(legacy_file(state())[:-1000])


@pytest.mark.parametrize("change, message", [
    (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, "1 tensors missing"),
    (lambda s: s | {"AuxLogits.fc.bias": np.zeros(3, np.float32)}, "1 not known"),
    (lambda s: s | {"fc.bias": np.zeros(1000, np.float32)}, r"fc.bias: shape \(1000,\)"),
    (lambda s: s | {"fc.bias": np.full(1008, np.nan, np.float32)}, "not finite")])
def test_wrong_tensors_are_named(change, message):
    with pytest.raises(UserError, match=message):
        weights.read_state(zip_file(change(state())))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    path.write_bytes(legacy_file(state()))
    return path


@pytest.fixture
def two_fingerprint_images(monkeypatch):
    """Of the eight: half a second each."""
    images = weights.fingerprint_images()[:2]
    monkeypatch.setattr(weights, "fingerprint_images", lambda: images)


@pytest.fixture(scope="module")
def converted(source):
    path = source.with_name("w.npz")
    with pytest.MonkeyPatch.context() as patch:
        two_fingerprint_images.__wrapped__(patch)
        weights.convert(source, path, allow_unknown=True)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("two_fingerprint_images")
def test_convert_then_load_gives_the_same_network(source, converted):
    direct, loaded = weights.load(source, allow_unknown=True), weights.load(converted)
    assert direct.state_sha256 == loaded.state_sha256
    assert direct.source_sha256 == loaded.source_sha256
    for name in direct.params:
        np.testing.assert_array_equal(direct.params[name]["kernel"], loaded.params[name]["kernel"])
    assert weights.fingerprint_error(loaded) < 1e-6
    assert weights.fingerprint_error(loaded._replace(fingerprint=loaded.fingerprint * 1.01)) > 5e-3


def test_convert_refuses_unknown_hash_and_existing_target(source, converted, tmp_path):
    with pytest.raises(UserError, match="sha256 .* is not a known source.*allow_unknown_weights"):
        weights.convert(source, tmp_path / "out.npz")
    with pytest.raises(UserError, match="exists"):
        weights.convert(source, converted, allow_unknown=True)
    with pytest.raises(UserError, match="must end in .npz"):
        weights.convert(source, tmp_path / "out.bin", allow_unknown=True)
    with pytest.raises(UserError, match="cannot read"):
        weights.convert(tmp_path / "absent.pth", tmp_path / "out.npz")
    assert not list(tmp_path.iterdir())


def test_a_changed_npz_is_refused(converted, tmp_path):
    arrays = dict(np.load(converted))
    arrays["fc.bias"] = arrays["fc.bias"] + 1
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(UserError, match="damaged"):
        weights.load(tmp_path / "changed.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="was not written by"):
        weights.load(tmp_path / "other.npz")


def test_search_order_and_the_message_without_weights(tmp_path):
    environ = {"HOME": str(tmp_path), weights.ENVIRONMENT: str(tmp_path / "mine.npz")}
    places = [path for _, path in weights.candidates(environ=environ)]
    assert places[0] == str(tmp_path / "mine.npz")
    assert places[1] == str(tmp_path / ".cache/ddpm_jax/inception-2015-12-05.npz")
    assert places[2].endswith("torch/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth")
    message = weights.missing_message(weights.candidates(environ=environ))
    for part in (*places, *weights.URLS, weights.PTH_SHA256, "95628359", "ddpm inception convert",
                 "--metrics=bpd,offline"):
        assert part in message
    with pytest.raises(UserError, match="are not here"):
        weights.find(tmp_path / "absent")
    pathlib.Path(places[1]).parent.mkdir(parents=True)
    pathlib.Path(places[1]).write_bytes(b"")
    assert weights.find(environ=environ) == places[1]


@pytest.mark.peer
@pytest.mark.parametrize("zipped", [False, True])
def test_files_written_by_pytorch(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.from_numpy(v) for k, v in state().items()}
    tensors |= {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.zeros((), dtype=torch.long)}
    tensors["fc.weight"] = tensors["fc.weight"].T.contiguous().T      # strided, as some files are
    torch.save(torch.nn.Module().state_dict() | tensors, tmp_path / "w.pth",
               _use_new_zipfile_serialization=zipped)
    found = weights.read_state((tmp_path / "w.pth").read_bytes())
    for name, array in state().items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.peer
def test_a_graph_written_by_tensorflow():
    tf = pytest.importorskip("tensorflow")
    graph = tf.compat.v1.GraphDef()
    for name, array in graph_tensors(state()):
        node = graph.node.add(name=name, op="Const")
        node.attr["dtype"].type = 1
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.ascontiguousarray(array)))
    node = graph.node.add(name="mixed_10/conv/batchnorm", op="BatchNormWithGlobalNormalization")
    node.attr["variance_epsilon"].f = 0.001
    node.attr["scale_after_normalization"].b = False
    found = weights.read_state(graph.SerializeToString())
    for name, array in state().items():
        expected = np.ones_like(array) if name == "Mixed_7c.branch1x1.bn.weight" else array
        np.testing.assert_array_equal(found[name], expected)
