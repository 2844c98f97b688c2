"""Sampling from a run: the files, resuming, refusals."""

import os
import shutil

import numpy as np
import pytest
from tiny_run import Stop, config, train

from ddpm_jax import checkpoints
from ddpm_jax import sample as sampling
from ddpm_jax.config import to_json
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files
from ddpm_jax.storage.lock import Lock


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


@pytest.mark.slow
def test_a_moved_run_goes_on_and_another_run_does_not(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert sample(straight, tmp_path / "a", stop=Stop(at=1)) is False
    assert sample(tmp_path / "link", tmp_path / "a", stop=Stop(at=1)) is False
    assert sample(tmp_path / "moved", tmp_path / "a") is True
    sample(straight, tmp_path / "b")
    np.testing.assert_array_equal(*(np.load(tmp_path / name / "samples.npz")["arr_0"]
                                    for name in "ab"))
    train(tmp_path / "other", seed=1, **{"checkpoint.every": 100})
    with pytest.raises(UserError, match="another request .weights_sha256: "):
        sample(tmp_path / "other", tmp_path / "a")


def test_two_commands_do_not_share_a_folder(straight, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_jax.storage.lock.GRACE_S", 0.0)
    lock = Lock(tmp_path / "a", "--out")
    with pytest.raises(UserError, match=f"--out=.*a is in use by process {os.getpid()} on"):
        sample(straight, tmp_path / "a")
    lock.release()
    assert sample(straight, tmp_path / "a")
    assert not (tmp_path / "a" / "lock.json").exists()


@pytest.mark.slow
def test_an_average_that_still_holds_the_start_is_named(straight, tmp_path, capsys):
    sampling.load_run(straight)
    assert "94 % of the random start (ema.decay=0.995): use --noema" in capsys.readouterr().err
    sampling.load_run(straight, ema=False)
    shutil.copytree(straight, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"decay": 0.995', '"decay": 0.5'))
    sampling.load_run(tmp_path / "run")
    assert "random start" not in capsys.readouterr().err


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


def test_a_damaged_shard_of_an_older_version_is_drawn_again(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    for k in range(2):
        np.save(tmp_path / f"{k:05d}.npy", images)
    (tmp_path / "00001.npy").write_bytes((tmp_path / "00001.npy").read_bytes()[:-1])
    sampling._adopt_older_shards(files.resolve(tmp_path))
    [shard] = tmp_path.iterdir()
    with np.load(shard) as archive:
        np.testing.assert_array_equal(archive["images"], images)
