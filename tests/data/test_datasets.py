import threading

import numpy as np
import pytest

from ddpm_jax.data import datasets
from ddpm_jax.data.datasets import open_source
from ddpm_jax.errors import UserError


def test_digits():
    train, test = (open_source("digits", "", s) for s in ("train", "test"))
    assert (len(train), len(test)) == (1442, 355) and train.shape == (8, 8, 1)
    assert train.array().dtype == np.uint8 and train.array().max() == 255
    together = np.concatenate([np.bincount(s.labels) for s in (train, test)]).reshape(2, 10)
    assert (abs(together[1] / together.sum(0) - 0.2) < 0.01).all()  # stratified
    from sklearn.datasets import load_digits
    raw = load_digits()
    both = sorted(i.tobytes() for s in (train, test) for i in s.array())
    assert both == sorted(np.round(i * 255 / 16).astype(np.uint8).tobytes() for i in raw.images)
    first = np.flatnonzero(raw.target == train.labels[0])[0]
    np.testing.assert_array_equal(train[0][..., 0], np.round(raw.images[first] * 255 / 16))


def test_padding_is_black_and_centred():
    small, large = (open_source("digits", "", "test", image_size=s) for s in (8, 13))
    assert large.shape == (13, 13, 1)
    np.testing.assert_array_equal(large[5][2:10, 2:10], small[5])
    assert large[5].sum(dtype=int) == small[5].sum(dtype=int)
    np.testing.assert_array_equal(large.array()[5], large[5])
    assert large.labels is not None and large.fingerprint != small.fingerprint


def test_fingerprints_tell_data_apart():
    a, b = (open_source("digits", "", "train") for _ in range(2))
    assert a.fingerprint == b.fingerprint and len(a.fingerprint) == 16
    changed = a.array().copy()
    changed[0, 0, 0, 0] ^= 1
    from dataclasses import replace
    assert replace(a, read=changed.__getitem__).fingerprint != a.fingerprint


def test_out_of_range():
    source = open_source("digits", "", "test")
    for i in (-1, 355):
        with pytest.raises(IndexError):
            source[i]


@pytest.mark.parametrize("name, kwargs, message", [
    ("imagenet", {}, "data.name 'imagenet' is unknown; known: digits, cifar10"),
    ("digits", {"split": "val"}, "digits has no split 'val'; it has train, test"),
    ("digits", {"channels": 3}, r"digits has 1 channel\(s\), not 3"),
    ("digits", {"image_size": 4}, "digits is 8x8"),
    ("cifar10", {}, r"run: ddpm data prepare --name=cifar10 --dir=\S+$"),
    ("fashion_mnist", {}, r"run: ddpm data prepare --name=fashion_mnist --dir=\S+$"),
    ("celeb_a_hq", {}, r"prepare --name=celeb_a_hq --dir=\S+ --from=data256x256.tar$"),
    ("lsun_bedroom", {}, r"prepare --name=lsun_bedroom --dir=\S+ --from=LMDB_FOLDER_OR"),
    ("folder", {}, r"ddpm data prepare --name=folder --dir=\S+ --from=FOLDER_OF_IMAGES"),
])
def test_bad_requests(tmp_path, name, kwargs, message):
    with pytest.raises(UserError, match=message):
        open_source(name, tmp_path, kwargs.pop("split", "train"), **kwargs)


def test_a_damaged_store(tmp_path):
    from ddpm_jax.data.prepare import write_store
    pixels = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    write_store(tmp_path, "lsun_cat", {"train": (2, [0, 1], None, pixels.__getitem__)}, (4, 4, 3))
    np.testing.assert_array_equal(open_source("lsun_cat", tmp_path, "train").array(), pixels)
    path = tmp_path / "lsun_cat/train_images.npy"
    whole = path.read_bytes()
    for part in (whole[:-5], whole[:20], b""):
        path.write_bytes(part)
        with pytest.raises(UserError, match="lsun_cat: damaged .*prepare it again"):
            open_source("lsun_cat", tmp_path, "train")
    np.save(path, pixels[:1])
    with pytest.raises(UserError, match="does not fit info.json"):
        open_source("lsun_cat", tmp_path, "train")
    (tmp_path / "lsun_cat/info.json").write_text("{")
    with pytest.raises(UserError, match="lsun_cat: damaged .*prepare it again"):
        open_source("lsun_cat", tmp_path, "train")


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_DATA_DIR", str(tmp_path))
    assert datasets.data_folder("") == tmp_path == datasets.data_folder(None)
    monkeypatch.delenv("DDPM_DATA_DIR")
    assert datasets.data_folder("").parts[-3:] == (".cache", "ddpm_jax", "data")


def test_real_photographs(real_images):
    source = open_source("folder", real_images, "train")
    assert source.shape == (32, 32, 3) and len(source.class_names) == 10
    assert np.ptp(source[len(source) // 2]) > 50
    assert (np.bincount(source.labels) == len(source) / 10).all()


def test_rows_are_read_in_order_and_side_by_side():
    together = threading.Barrier(4, timeout=20)

    def read(i):
        together.wait()
        return np.full((1, 2, 3), i, np.uint8)

    rows = datasets.read_rows(read, [5, 0, 7, 7])
    assert rows.shape == (4, 1, 2, 3) and rows[:, 0, 0, 0].tolist() == [5, 0, 7, 7]

    def broken(i):
        raise UserError(f"image {i} is corrupt")

    with pytest.raises(UserError, match="image 3 is corrupt"):
        datasets.read_rows(broken, [3])
