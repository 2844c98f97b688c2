"""Protocol buffers: the encoding guide's examples, and messages that are cut or of another kind."""

import numpy as np
import pytest

from ddpm_jax.formats import protobuf
from ddpm_jax.formats.protobuf import ProtobufError


def test_examples_of_the_encoding_guide():
    assert list(protobuf.fields(b"\x08\x96\x01")) == [(1, 150)]
    [(number, text)] = protobuf.fields(b"\x12\x07testing")
    assert (number, protobuf.text(text)) == (2, "testing")
    [(_, message)] = protobuf.fields(b"\x1a\x03\x08\x96\x01")
    assert dict(protobuf.fields(message)) == {1: 150}
    [(number, packed)] = protobuf.fields(b"\x32\x06\x03\x8e\x02\x9e\xa7\x05")
    assert number == 6 and protobuf.signed_items(packed) == [3, 270, 86942]
    [(_, minus_two)] = protobuf.fields(b"\x08\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01")
    assert protobuf.signed(minus_two) == -2 and protobuf.signed_items(minus_two) == [-2]


def test_numbers_of_fixed_size_are_bytes():
    message = b"\x0d" + np.float32(1.5).tobytes() + b"\x11" + np.float64(-2).tobytes()
    (_, four), (_, eight) = protobuf.fields(message)
    assert np.frombuffer(four, "<f4") == 1.5 and np.frombuffer(eight, "<f8") == -2


@pytest.mark.parametrize("message", [
    b"\x08", b"\x08\x96", b"\x12\x07test", b"\x0d\0\0\0", b"\x11\0\0\0\0\0\0\0", b"\x0b", b"\x0e",
    b"\x08" + b"\xff" * 10 + b"\x01", b"\x12\xff\xff\xff\xff\x0f"])
def test_messages_that_end_in_a_field_or_hold_another_wire_type(message):
    with pytest.raises(ProtobufError):
        list(protobuf.fields(message))


def test_a_value_of_the_other_kind_is_refused():
    for read, value in ((protobuf.text, 5), (protobuf.content, 5), (protobuf.signed, b"5"),
                        (lambda v: list(protobuf.fields(v)), 5)):
        with pytest.raises(ProtobufError):
            read(value)


@pytest.mark.peer
def test_against_the_library():
    example_pb2 = pytest.importorskip("tensorflow").train
    example = example_pb2.Example()
    example.features.feature["n"].int64_list.value.extend([-1, 0, 1 << 40])
    [(_, features)] = protobuf.fields(example.SerializeToString())
    [(_, entry)] = protobuf.fields(features)
    pair = dict(protobuf.fields(entry))
    [(kind, values)] = protobuf.fields(pair[2])
    [(_, packed)] = protobuf.fields(values)
    assert (protobuf.text(pair[1]), kind) == ("n", 3)
    assert protobuf.signed_items(packed) == [-1, 0, 1 << 40]
