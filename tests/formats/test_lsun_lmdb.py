"""LSUN's LMDB folders."""

import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats import lsun_lmdb


def test_lmdb(tmp_path, make):
    path = make.lmdb(tmp_path / "b_lmdb", {"k2": b"two", "k1": b"one"})
    count, items = lsun_lmdb.lmdb_items(path)
    assert count == 2 and [v for _, v in items] == [b"one", b"two"]
    with pytest.raises(UserError, match="not a readable LMDB"):
        lsun_lmdb.lmdb_items(tmp_path)


def test_a_cut_lmdb_is_an_error_not_a_signal(tmp_path, make):
    path = make.lmdb(tmp_path / "c", {f"{i:03}": bytes(5000) for i in range(50)})
    data = (path / "data.mdb").read_bytes()
    (path / "data.mdb").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="cut short"):
        lsun_lmdb.lmdb_items(path)
