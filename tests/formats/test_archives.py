"""Tar archives and CIFAR's binary batches."""

import io
import tarfile

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.formats import archives

RNG = np.random.default_rng(1)


def test_cifar_batch():
    images = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    rows = [bytes([label]) + image.transpose(2, 0, 1).tobytes()
            for label, image in zip((9, 0, 4), images, strict=True)]
    pixels, labels = archives.cifar_batch(b"".join(rows), "x")
    np.testing.assert_array_equal(pixels, images)
    assert labels.tolist() == [9, 0, 4]
    for bad in (b"", rows[0][:-1], b"\x0a" + rows[0][1:]):
        with pytest.raises(UserError, match="x: not a batch"):
            archives.cifar_batch(bad, "x")


def test_tar_members(tmp_path):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("d/f")
        member.size = 20_000
        archive.addfile(member, io.BytesIO(RNG.bytes(20_000)))
    assert [(n, len(f.read())) for n, f in archives.tar_members(path)] == [("d/f", 20_000)]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="a.tar.gz: missing, damaged"):
        list(archives.tar_members(path))
