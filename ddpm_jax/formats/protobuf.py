"""Reads protocol buffers without their schema (protobuf.dev/programming-guides/encoding)."""


class ProtobufError(ValueError):
    """A message that ends in the middle of a field, or holds a field of another type."""


def varint(data, at) -> tuple[int, int]:
    """(unsigned number at byte ``at``, position behind it)."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ProtobufError("a number runs past the end of its message")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def fields(message):
    """(number, value) of each field, in order: an int where it is a varint, else its raw bytes."""
    message = memoryview(content(message))
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        if tag & 7 == 0:
            value, at = varint(message, at)
        elif tag & 7 in (1, 2, 5):
            size, at = varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value = message[at:at + size]
            at += size
            if at > len(message):
                raise ProtobufError("a field runs past the end of its message")
        else:
            raise ProtobufError(f"wire type {tag & 7} is not supported")
        yield tag >> 3, value


def content(value):
    """A value that has to be bytes: a message, text, or numbers of fixed size."""
    if isinstance(value, int):
        raise ProtobufError("a number where bytes are expected")
    return value


def text(value) -> str:
    return bytes(content(value)).decode()


def signed(value) -> int:
    """A value that has to be a varint, as an int64."""
    if not isinstance(value, int):
        raise ProtobufError("bytes where a number is expected")
    return value - (1 << 64) if value >> 63 else value


def signed_items(value) -> list[int]:
    """A repeated int64: one number, or many of them packed in bytes."""
    if isinstance(value, int):
        return [signed(value)]
    at, items = 0, []
    while at < len(value):
        number, at = varint(value, at)
        items.append(signed(number))
    return items
