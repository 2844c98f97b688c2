"""Sampling from a run: the files, resuming, refusals."""

import numpy as np
import pytest
from tiny_run import Stop, config

from ddpm_jax import checkpoints
from ddpm_jax import sample as sampling
from ddpm_jax.config import to_json
from ddpm_jax.errors import UserError


def sample(straight, out, **kwargs):
    return sampling.sample(straight, out, **{"num": 11, "batch_size": 8, **kwargs})


def test_sampling_writes_numbered_images_and_pictures(straight, tmp_path):
    sample(straight, tmp_path / "a", png=True)
    images = np.load(tmp_path / "a" / "samples.npz")["arr_0"]
    assert images.shape == (11, 8, 8, 1) and images.dtype == np.uint8
    for name in ("grid.png", "progressive.png", "png/000010.png"):
        assert (tmp_path / "a" / name).exists()
    sample(straight, tmp_path / "b", num=3, batch_size=16)
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "samples.npz")["arr_0"], images[:3])
    sample(straight, tmp_path / "c", num=3, ema=False, seed=1)
    assert not np.array_equal(np.load(tmp_path / "c" / "samples.npz")["arr_0"], images[:3])


def test_sampling_resumes_without_drawing_twice(straight, tmp_path):
    assert sample(straight, tmp_path / "a", stop=Stop(at=1)) is False
    shard = tmp_path / "a" / "shards" / "shard-00000.npz"
    kept = np.load(shard)["images"]
    np.savez(shard, images=kept * 0 + 7)  # would be overwritten if it were drawn again
    assert sample(straight, tmp_path / "a") is True
    images = np.load(tmp_path / "a" / "samples.npz")["arr_0"]
    assert (images[:8] == 7).all() and (images[8:] != 7).any()
    with pytest.raises(UserError, match="another request .num: 11 -> 12"):
        sample(straight, tmp_path / "a", num=12)


def test_sampling_refuses(straight, tmp_path):
    with pytest.raises(UserError, match="no run here"):
        sample(tmp_path / "nothing", tmp_path / "out")
    checkpoints.claim(tmp_path / "empty", to_json(config()))
    with pytest.raises(UserError, match="no checkpoint in"):
        sample(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="--step=5: no such checkpoint"):
        sample(straight, tmp_path / "out", step=5)
    with pytest.raises(UserError, match="sampler.steps=11 is not in"):
        sample(straight, tmp_path / "out", steps=11)
    with pytest.raises(UserError, match="--num=0"):
        sample(straight, tmp_path / "out", num=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        sample(straight, tmp_path / "full")
