"""The idx files of MNIST and Fashion-MNIST (yann.lecun.com/exdb/mnist)."""

import gzip
import pathlib
import struct
import zlib

import numpy as np

from ddpm_jax.errors import UserError


def read_idx(path) -> np.ndarray:
    """The array of an idx file of unsigned bytes, gzipped or not. UserError: any other file."""
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        zero, kind, rank = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{rank}I", data[4:4 + 4 * rank])
        if (zero, kind) != (0, 8):
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: missing, damaged or not an idx file ({error})") from error
