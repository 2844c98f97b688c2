"""CRC-32C (Castagnoli) of large arrays with numpy alone, and TensorFlow's masked form of it.

A byte at a time in Python takes minutes for a model. The register without its initial and final
complement is linear over GF(2) and leading zero bytes leave it at zero, so a buffer is laid out as
many equal rows (zeros in front), all rows advance together two bytes at a time, and neighbours
are joined pairwise: register(a + b) = advance(register(a), len(b)) ^ register(b).
"""

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # reflected form of 0x1EDC6F41, RFC 3720 B.4
_MASK_DELTA = 0xA282EAD8  # tensorflow/core/lib/hash/crc32c.h
_ROW = 1024  # bytes a row, even
_PIECE = 1 << 24  # bytes laid out at a time


@functools.cache
def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


@functools.cache
def _pair_table() -> np.ndarray:
    """uint32 [65536]: a register's low 16 bits advanced by two bytes."""
    table = _byte_table()
    low = np.arange(65536, dtype=np.uint32)
    once = table[low & 0xFF] ^ (low >> 8)
    return table[once & 0xFF] ^ (once >> 8)


@functools.cache
def _advance_table(length: int) -> np.ndarray:
    """uint32 [4, 256]: what ``length`` zero bytes make of each byte of a register."""
    if length == 1:
        registers = np.arange(256, dtype=np.uint32)[None] << (8 * np.arange(4, dtype=np.uint32))[
            :, None
        ]
        return _byte_table()[registers & 0xFF] ^ (registers >> 8)
    half = _advance_table(length // 2)
    table = _advance(half, half)
    return table if length % 2 == 0 else _advance(_advance_table(1), table)


def _advance(table, register):
    return (
        table[0][register & 0xFF]
        ^ table[1][(register >> 8) & 0xFF]
        ^ table[2][(register >> 16) & 0xFF]
        ^ table[3][register >> 24]
    )


def _register(data: np.ndarray) -> np.ndarray:
    """The raw register, started from zero, after the bytes of ``data`` (uint8)."""
    rows = 1 << max(0, (len(data) - 1) // _ROW).bit_length()
    padded = np.zeros(rows * _ROW, np.uint8)
    padded[len(padded) - len(data) :] = data
    columns = np.ascontiguousarray(padded.view("<u2").reshape(rows, _ROW // 2).T)
    register = np.zeros(rows, np.uint32)
    table = _pair_table()
    for column in columns:
        register = table[(register & 0xFFFF) ^ column] ^ (register >> 16)
    length = _ROW
    while len(register) > 1:
        register = _advance(_advance_table(length), register[0::2]) ^ register[1::2]
        length *= 2
    return register[0]


def crc32c(data) -> int:
    """CRC-32C of bytes or of an array's bytes in memory order, as an int."""
    if isinstance(data, np.ndarray):
        buffer = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    else:
        buffer = np.frombuffer(data, np.uint8)
    register = np.uint32(0xFFFFFFFF)
    if len(buffer) < 64:
        table = _byte_table()
        for byte in buffer:
            register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
        return int(register) ^ 0xFFFFFFFF
    for start in range(0, len(buffer), _PIECE):
        piece = buffer[start : start + _PIECE]
        register = _advance(_advance_table(len(piece)), register) ^ _register(piece)
    return int(register) ^ 0xFFFFFFFF


def masked_crc32c(data) -> int:
    """The form in which TensorFlow and LevelDB store a checksum beside the data it covers."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + _MASK_DELTA) & 0xFFFFFFFF
