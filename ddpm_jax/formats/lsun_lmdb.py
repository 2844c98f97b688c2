"""LSUN's LMDB folders: each value is an encoded image."""

import pathlib

import lmdb

from ddpm_jax.errors import UserError


def lmdb_items(path):
    """LSUN's LMDB folder -> (count, iterator of (where, encoded image bytes) in order of key)."""
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
        count = env.stat()["entries"]
        need = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    except lmdb.Error as error:
        raise UserError(f"{path}: not a readable LMDB folder ({error})") from error
    if (pathlib.Path(path) / "data.mdb").stat().st_size < need:  # reading on would be a SIGBUS
        raise UserError(f"{path}: data.mdb is cut short; unpack the archive again")

    def items():
        try:
            with env, env.begin(buffers=False) as transaction:
                for key, value in transaction.cursor():
                    yield f"{path}, key {key.decode(errors='replace')}", value
        except lmdb.Error as error:
            raise UserError(f"{path}: damaged ({error}); unpack the archive again") from error

    return count, items()
