"""Only listed names are used of a pickle, and nothing of it is run."""

import collections
import io
import os
import pickle

import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats import restricted_pickle

NAMES = {("collections", "OrderedDict"): dict}


def load(content, **options):
    return restricted_pickle.load(io.BytesIO(content), NAMES, "use another file", **options)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_listed_names_are_replaced(protocol):
    found = load(pickle.dumps({"a": collections.OrderedDict(x=1), "b": (2, "c")}, protocol))
    assert found == {"a": {"x": 1}, "b": (2, "c")} and type(found["a"]) is dict


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_other_name_is_refused_before_it_is_called(tmp_path, protocol):
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(UserError, match="asks for posix.mkdir, and use another file"):
        load(pickle.dumps({"x": Exploit()}, protocol))
    assert not list(tmp_path.iterdir())


def test_references_to_outside_and_buffers_are_refused():
    with pytest.raises(UserError, match="outside the pickle"):
        load(b"\x80\x02X\x01\x00\x00\x00xQ.")
    assert load(b"\x80\x02X\x01\x00\x00\x00xQ.", persistent_load=str.upper) == "X"
    with pytest.raises(UserError, match="buffers"):
        load(pickle.dumps(bytearray(b"x"), 5))


def test_the_position_behind_the_pickle_is_kept():
    file = io.BytesIO(pickle.dumps(1) + pickle.dumps({"two": 2}) + b"rest")
    assert [restricted_pickle.load(file, {}, "") for _ in range(2)] == [1, {"two": 2}]
    assert file.read() == b"rest"
