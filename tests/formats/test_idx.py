"""idx files, plain and gzipped."""

import gzip

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats import idx

RNG = np.random.default_rng(1)


def test_idx(tmp_path, make):
    array = RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    (tmp_path / "a.gz").write_bytes(gzip.compress(make.idx(array)))
    (tmp_path / "a").write_bytes(make.idx(array))
    np.testing.assert_array_equal(idx.read_idx(tmp_path / "a.gz"), array)
    np.testing.assert_array_equal(idx.read_idx(tmp_path / "a"), array)
    (tmp_path / "b.gz").write_bytes((tmp_path / "a.gz").read_bytes()[:-12])
    (tmp_path / "c").write_bytes(make.idx(array)[:-1])
    for bad in ("b.gz", "c", "missing"):
        with pytest.raises(UserError, match=f"{bad}: missing, damaged"):
            idx.read_idx(tmp_path / bad)
