"""PyTorch files: handmade ones for the quick suite, real ones where PyTorch is installed."""

import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats.torch_pickle import open_torch


class Global:
    """Pickles as a bare reference to module.name, without that module being imported."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return (self.function, self.args)


def dumps(value, protocol=2):
    """Pickles ``value``; Global becomes a GLOBAL opcode, a tuple ('storage', ...) a BINPERSID."""
    file = io.BytesIO()

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            is_storage = isinstance(obj, tuple) and obj[:1] == ("storage",)
            return obj if is_storage else None

        def save(self, obj, save_persistent_id=True):
            if isinstance(obj, Global):
                self.write(f"c{obj.module}\n{obj.name}\n".encode())
            elif isinstance(obj, Call):
                self.save(obj.function)
                self.save(obj.args)
                self.write(b"R")
            else:
                super().save(obj, save_persistent_id)

    Pickler(file, protocol).dump(value)
    return file.getvalue()


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def tensor(key, kind, count, offset, shape, stride):
    storage = ("storage", Global("torch", kind), key, "cpu", count)
    return Call(REBUILD, storage, offset, shape, stride, False,
                Call(Global("collections", "OrderedDict")))


def write_zip(path, value, storages, **extra):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("name/data.pkl", dumps(value))
        archive.writestr("name/byteorder", extra.get("byteorder", "little"))
        for key, data in storages.items():
            archive.writestr(f"name/data/{key}", data)
    return path


NUMBERS = np.arange(12, dtype="<f4")


def test_views_of_a_storage(tmp_path):
    path = write_zip(tmp_path / "x.bin", {
        "whole": tensor("0", "FloatStorage", 12, 0, (3, 4), (4, 1)),
        "transposed": tensor("0", "FloatStorage", 12, 0, (4, 3), (1, 4)),
        "part": tensor("0", "FloatStorage", 12, 5, (2, 2), (4, 1)),
        "scalar": tensor("0", "FloatStorage", 12, 11, (), ()),
        "empty": tensor("0", "FloatStorage", 12, 0, (0, 3), (3, 1)),
        "brain": tensor("1", "BFloat16Storage", 2, 0, (2,), (1,)),
    }, {"0": NUMBERS.tobytes(), "1": struct.pack("<HH", 0x3FC0, 0xC000)})
    found = open_torch(path)
    whole = NUMBERS.reshape(3, 4)
    np.testing.assert_array_equal(found["whole"].read(), whole)
    np.testing.assert_array_equal(found["transposed"].read(), whole.T)
    np.testing.assert_array_equal(found["part"].read(), [[5, 6], [9, 10]])
    assert found["scalar"].read() == 11 and found["scalar"].shape == ()
    assert found["empty"].read().shape == (0, 3)
    np.testing.assert_array_equal(found["brain"].read(), np.float32([1.5, -2.0]))


@pytest.mark.parametrize("module, name", [("os", "system"), ("builtins", "eval"),
                                          ("torch", "load"), ("numpy", "load"),
                                          ("torch._utils", "_rebuild_tensor_v3")])
def test_nothing_else_can_be_called(tmp_path, module, name):
    marker = tmp_path / "was_run"
    value = {"w": Call(Global(module, name), f"touch {marker}")}
    for path in (write_zip(tmp_path / "x.bin", value, {}),
                 tmp_path / "y.bin"):
        if not path.exists():
            path.write_bytes(dumps(value))
        with pytest.raises(UserError, match=f"it asks for {module}.{name}"):
            open_torch(path)
    assert not marker.exists()


def test_real_exploit_pickle_is_refused(tmp_path):
    marker = tmp_path / "was_run"

    class Exploit:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    path = tmp_path / "x.bin"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"w": Exploit()}, protocol))
        with pytest.raises(UserError, match="posix.system"):
            open_torch(path)
    assert not marker.exists()


@pytest.mark.parametrize("bad, message", [
    (tensor("0", "FloatStorage", 12, 0, (3, 5), (4, 1)), "reaches item 12"),
    (tensor("0", "FloatStorage", 12, -1, (3,), (1,)), "proper storage"),
    (tensor("0", "FloatStorage", 12, 0, (3,), (-1,)), "proper storage"),
    (tensor("0", "FloatStorage", 12, 0, (3, 1), (1,)), "proper storage"),
    (tensor("0", "FloatStorage", 13, 0, (13,), (1,)), "truncated: storage 0"),
    (tensor("9", "FloatStorage", 12, 0, (3,), (1,)), "storage 9 is missing"),
    (tensor("0", "QInt8Storage", 12, 0, (3,), (1,)), "torch.QInt8Storage"),
])
def test_tensors_that_reach_outside_their_storage(tmp_path, bad, message):
    path = write_zip(tmp_path / "x.bin", {"w": bad}, {"0": NUMBERS.tobytes()})
    with pytest.raises(UserError, match=message):
        open_torch(path)


@pytest.mark.parametrize("value", [[1, 2], {}, {"epoch": 3}, {1: 2}])
def test_only_a_state_dict(tmp_path, value):
    with pytest.raises(UserError, match="not a state dict"):
        open_torch(write_zip(tmp_path / "x.bin", value, {}))


def test_foreign_files(tmp_path):
    path = tmp_path / "x.bin"
    with pytest.raises(UserError, match="cannot be read"):
        open_torch(path)
    for data in (b"", b"\x08\x01\x12\x00" * 20, b"PK\x03\x04 not really a zip"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a"):
            open_torch(path)
    write_zip(path, {"w": 1}, {}, byteorder="big")
    with pytest.raises(UserError, match="big-endian"):
        open_torch(path)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_real_pytorch(tmp_path, new_format):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 5).half())
    shared = torch.randn(4, 6)
    state = collections.OrderedDict(net.state_dict())
    state["brain"] = torch.randn(3, 4).bfloat16()
    state["transposed"] = shared.t()
    state["row"] = shared[1, ::2]
    state["parameter"] = torch.nn.Parameter(shared)
    state["long"] = torch.arange(3)
    path = tmp_path / "x.bin"
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    found = open_torch(path)
    assert list(found) == list(state)
    for name, expected in state.items():
        expected = expected.detach()
        expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
        assert found[name].shape == expected.shape and found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name].read(), expected)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError):
        open_torch(path)
