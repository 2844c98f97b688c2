"""CRC-32C: published check values and the plain byte-at-a-time definition."""

import numpy as np
import pytest

from ddpm_jax.formats import crc32c as module
from ddpm_jax.formats.crc32c import crc32c, masked_crc32c


@pytest.mark.parametrize("data, expected", [  # RFC 3720 B.4 and the customary check string
    (b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E),
])
def test_published_values(data, expected):
    assert crc32c(data) == expected


def bit_by_bit(data):
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (module.POLYNOMIAL if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1023, 1024, 1025, 2048, 5000])
def test_against_the_definition(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert crc32c(data) == bit_by_bit(data.tolist())


def test_pieces_join(monkeypatch):
    data = np.random.default_rng(0).standard_normal(3000)
    whole = crc32c(data)
    monkeypatch.setattr(module, "_PIECE", 1500)
    assert crc32c(data) == whole == crc32c(data.tobytes())


def test_mask_of_the_checksum_that_tensorflow_masks():
    # LevelDB's own test: mask(crc("foo")) differs from crc and unmasks to it.
    value = crc32c(b"foo")
    masked = masked_crc32c(b"foo")
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == value != masked
