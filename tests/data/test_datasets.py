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
    ("mnist", {}, r"run: ddpm data prepare --name=mnist --dir=\S+$"),
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


def store(folder, pixels, **splits):
    from ddpm_jax.data.prepare import write_store
    write_store(folder, "lsun_cat", {name: (count, range(count), None, pixels.__getitem__)
                                     for name, count in (splits or {"train": len(pixels)}).items()},
                pixels.shape[1:])
    return folder / "lsun_cat"


def test_every_listed_split_opens(tmp_path):
    pixels = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    store(tmp_path, pixels, train=2, validation=1, test=1)
    for split in open_source("lsun_cat", tmp_path, "train").splits:
        source = open_source("lsun_cat", tmp_path, split)
        assert source.split == split and source.array().shape[1:] == (4, 4, 3)
    assert source.splits == ("train", "validation", "test")


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path, make):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    a, b = (store(tmp_path / name, pixels) for name in "ab")
    c = store(tmp_path / "c", pixels[::-1])
    prints = [open_source("lsun_cat", x.parent, "train").fingerprint for x in (a, b, c)]
    assert prints[0] == prints[1] != prints[2]
    for i, image in enumerate(pixels):
        make.save(tmp_path / f"live/pictures/{i}.png", image)
    live = open_source("folder", tmp_path / "live", "train").fingerprint
    moved = (tmp_path / "live").rename(tmp_path / "moved")
    (moved / "pictures/0.png").touch()
    assert open_source("folder", moved, "train").fingerprint == live == prints[0]
    make.save(moved / "pictures/0.png", pixels[1])
    assert open_source("folder", moved, "train").fingerprint != live


def test_a_store_that_is_away_for_a_moment_is_read(tmp_path, monkeypatch):
    """A memory map would end the process with SIGBUS, or go on with the old file."""
    from ddpm_jax.data import images
    monkeypatch.setattr(images, "RETRY_WAITS", (0.05, 0.1, 0.2, 0.4, 0.8))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    path = store(tmp_path, pixels) / "train_images.npy"
    source = open_source("lsun_cat", tmp_path, "train")
    away = path.rename(tmp_path / "away")
    thread = threading.Timer(0.3, away.rename, (path,))
    thread.start()
    np.testing.assert_array_equal(source[4], pixels[4])
    thread.join()
    path.rename(away)
    monkeypatch.setattr(images, "RETRY_WAITS", (0.01, 0.02))
    with pytest.raises(UserError, match="cannot read .*train_images.npy: No such file"):
        source[4]
    path.write_bytes(away.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut short at image 5"):
        source[5]


def test_what_a_live_folder_leaves_out_is_logged(tmp_path, make, caplog):
    make.save(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "b.heic").write_bytes(b"")
    source = open_source("folder", tmp_path, "train")
    assert source.left_out == ("left out: 1 .heic files (not read: convert them): b.heic",)
    assert f"{tmp_path}: {source.left_out[0]}" in caplog.text
