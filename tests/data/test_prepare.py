import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import images, prepare
from ddpm_jax.data.datasets import DATASETS, open_source
from ddpm_jax.errors import UserError

RNG = np.random.default_rng(2)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def run(name, out, sources, **options):
    prepare.prepare(DATASETS[name], name, out, sources, prepare.Options(**options))


def png(array):
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    return data.getvalue()


def make_tar(path, files):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def nothing_left(folder):
    return not folder.exists() or not list(folder.iterdir())


def class_folders(make, root, shape=(8, 8, 3)):
    made = {}
    for name in ("train/a/0.png", "train/a/1.png", "train/b/0.png", "test/b/0.png"):
        made[name] = pixels(*shape)
        make.save(root / name, made[name])
    return made


def test_folder_with_classes(tmp_path, make):
    made = class_folders(make, tmp_path / "in")
    run("folder", tmp_path / "out", [str(tmp_path / "in")])
    train = open_source("folder", tmp_path / "out", "train", image_size=8, channels=3)
    np.testing.assert_array_equal(train.array(), list(made.values())[:3])
    assert train.labels.tolist() == [0, 0, 1] and train.class_names == ("a", "b")
    test = open_source("folder", tmp_path / "out", "test")
    np.testing.assert_array_equal(test[0], made["test/b/0.png"])
    live = open_source("folder", tmp_path / "in", "train")
    assert live.fingerprint == train.fingerprint != test.fingerprint
    assert live.labels.tolist() == train.labels.tolist()
    with pytest.raises(UserError, match="has no split 'val'; it has train, test"):
        open_source("folder", tmp_path / "out", "val")
    with pytest.raises(UserError, match=r"is 8x8 .*not 16"):
        open_source("folder", tmp_path / "out", "train", image_size=16)
    with pytest.raises(UserError, match="exists already"):
        run("folder", tmp_path / "out", [str(tmp_path / "in")])


def test_folder_crops_and_resizes(tmp_path, make):
    for i, shape in enumerate([(10, 14), (8, 8, 3), (30, 9, 3)]):
        make.save(tmp_path / f"in/{i}.png", pixels(*shape))
    source = [str(tmp_path / "in")]
    with pytest.raises(UserError, match="0.png is 14x10, not square; give an image size"):
        run("folder", tmp_path / "out", source)
    with pytest.raises(UserError, match="1.png: a colour image where grey"):
        run("folder", tmp_path / "out", source, image_size=8)
    assert nothing_left(tmp_path / "out")
    run("folder", tmp_path / "out", source, image_size=8, channels=3)
    assert open_source("folder", tmp_path / "out", "train").array().shape == (3, 8, 8, 3)
    shutil.rmtree(tmp_path / "in")
    make.save(tmp_path / "in/0.png", pixels(8, 8))
    make.save(tmp_path / "in/1.png", pixels(8, 12))
    with pytest.raises(UserError, match="1.png is 12x8, the first image is 8x8"):
        run("folder", tmp_path / "out2", source)


def test_a_truncated_image_leaves_nothing_behind(tmp_path, make):
    class_folders(make, tmp_path / "in", (40, 40, 3))
    broken = tmp_path / "in/train/b/0.png"
    broken.write_bytes(broken.read_bytes()[:-900])
    with pytest.raises(UserError, match=r"train/b/0.png: not a readable image"):
        run("folder", tmp_path / "out", [str(tmp_path / "in")])
    assert nothing_left(tmp_path / "out")
    live = open_source("folder", tmp_path / "in", "train")
    with pytest.raises(UserError, match=r"train/b/0.png: not a readable image"):
        live.array()


def test_sources_given_badly(tmp_path):
    for sources in ([], ["a", "b"]):
        with pytest.raises(UserError, match="give one folder of images"):
            run("folder", tmp_path, sources)
    with pytest.raises(UserError, match="nowhere: no such file"):
        run("folder", tmp_path, [str(tmp_path / "nowhere")])


def test_no_place_to_write(tmp_path, make):
    class_folders(make, tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file.*; give another --dir"):
        run("folder", tmp_path / "file", [str(tmp_path / "in")])
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        return  # root may write anywhere
    with pytest.raises(UserError, match="cannot write .*locked.*; give another --dir"):
        run("folder", tmp_path / "locked", [str(tmp_path / "in")])


@pytest.mark.parametrize("free", [10, 10**9])
def test_a_full_disk(tmp_path, monkeypatch, free, make):
    """Too little room is said before the work; room that vanishes meanwhile, after it."""
    class_folders(make, tmp_path / "in")
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
    if free > 10:
        def full(*args):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(prepare.np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match="GB are free|No space left"):
        run("folder", tmp_path / "out", [str(tmp_path / "in")])
    assert nothing_left(tmp_path / "out")


def test_lsun_from_lmdb(tmp_path, make):
    made = {f"{i:02}": pixels(20 + i, 24, 3) for i in range(3)}
    train = make.lmdb(tmp_path / "church_outdoor_train_lmdb", {k: png(v) for k, v in made.items()})
    val = make.lmdb(tmp_path / "church_outdoor_val_lmdb", {"0": png(made["01"])})
    run("lsun_church", tmp_path / "out", [str(train), str(val)], image_size=16)
    source = open_source("lsun_church", tmp_path / "out", "train", image_size=16)
    assert len(source) == 3 and source.labels is None
    top = (21 - 21) // 2, (24 - 21) // 2
    square = Image.fromarray(made["01"][top[0]:, top[1]:top[1] + 21])
    expected = np.asarray(square.resize((16, 16), Image.LANCZOS))
    np.testing.assert_array_equal(source[1], expected)
    np.testing.assert_array_equal(open_source("lsun_church", tmp_path / "out", "validation")[0],
                                  expected)
    bad = make.lmdb(tmp_path / "bad", {"00": png(made["00"]), "01": png(made["01"])[:-300]})
    with pytest.raises(UserError, match="bad, key 01: not a readable image"):
        run("lsun_church", tmp_path / "out2", [str(bad)])
    with pytest.raises(UserError, match="second source of the train split"):
        run("lsun_church", tmp_path / "out2", [str(train), str(bad)])


def lsun_cat(make, path, number, empty):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {f"{i:04}": pixels(8, 8, 3) for i in range(number)}
    make.lmdb(path, {k: b"" if i in empty else png(v) for i, (k, v) in enumerate(made.items())})
    return np.stack([v for i, v in enumerate(made.values()) if i not in empty])


def test_unreadable_records_are_left_out_counted_and_named(tmp_path, make):
    """LSUN cat's own LMDB has two empty records."""
    made = lsun_cat(make, tmp_path / "cat", 200, empty=(7, 120))
    run("lsun_cat", tmp_path / "out", [str(tmp_path / "cat")], image_size=8)
    source = open_source("lsun_cat", tmp_path / "out", "train")
    assert len(source) == 198
    np.testing.assert_array_equal(source.array(), made)
    np.testing.assert_array_equal(np.stack([source[i] for i in range(198)]), made)
    line, = source.left_out
    assert line.startswith("train: 2 of 200 could not be read") and "key 0007: " in line


def test_more_unreadable_records_than_the_share_are_an_error(tmp_path, make):
    lsun_cat(make, tmp_path / "cat", 200, empty=(7, 70, 120))
    source = [str(tmp_path / "cat")]
    with pytest.raises(UserError, match=r"3 of 200 cannot be read, more than --max_unreadable=0.01"
                                        r"; the last: \S+cat, key 0120: not a readable image"):
        run("lsun_cat", tmp_path / "out", source, image_size=8)
    assert nothing_left(tmp_path / "out")
    with pytest.raises(UserError, match="key 0007: not a readable"):
        run("lsun_cat", tmp_path / "out", source, image_size=8, max_unreadable=0.0)
    run("lsun_cat", tmp_path / "out", source, image_size=8, max_unreadable=0.02)
    assert len(open_source("lsun_cat", tmp_path / "out", "train")) == 197


def test_damaged_images_of_a_folder_are_left_out_only_on_request(tmp_path, make):
    made = class_folders(make, tmp_path / "in")
    (tmp_path / "in/train/a/0.png").write_bytes(b"damaged")
    run("folder", tmp_path / "out", [str(tmp_path / "in")], max_unreadable=0.5)
    source = open_source("folder", tmp_path / "out", "train")
    np.testing.assert_array_equal(source.array(), [made["train/a/1.png"], made["train/b/0.png"]])
    assert source.labels.tolist() == [0, 1] and source.class_names == ("a", "b")
    assert "1 of 3 could not be read" in source.left_out[0]


def test_an_archive_of_images(tmp_path, make):
    class_folders(make, tmp_path / "in")
    path = shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path / "in")
    for name, source in (("a", tmp_path / "in"), ("b", path)):
        run("folder", tmp_path / name, [str(source)])
    live = open_source("folder", path, "train")
    assert live.fingerprint == open_source("folder", tmp_path / "a", "train").fingerprint
    assert live.fingerprint == open_source("folder", tmp_path / "b", "train").fingerprint


@pytest.mark.parametrize("given", ["cat/data.mdb", "cat/lock.mdb", "cat", "."])
def test_lsun_is_found_by_its_file_and_the_folder_above(tmp_path, make, given):
    made = lsun_cat(make, tmp_path / "in/cat", 3, empty=())
    run("lsun_cat", tmp_path / "out", [str(tmp_path / "in" / given)], image_size=8)
    np.testing.assert_array_equal(open_source("lsun_cat", tmp_path / "out", "train").array(), made)


def test_a_killed_preparation_leaves_nothing_after_the_next(tmp_path, make):
    class_folders(make, tmp_path / "in")
    script = ("import os, signal, pathlib\n"
              "from ddpm_jax.data import prepare\n"
              f"with prepare.new_dataset(pathlib.Path({str(tmp_path / 'out')!r}), 'folder') as t:\n"
              "    (t / 'x').write_text('half')\n"
              "    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == -9
    assert len(list((tmp_path / "out").iterdir())) == 1
    with prepare.new_dataset(tmp_path / "out", "folder"):  # clears it
        assert len(list((tmp_path / "out").iterdir())) == 1
        with prepare.new_dataset(tmp_path / "out", "folder") as other:  # leaves one in use
            assert len(list((tmp_path / "out").iterdir())) == 2
        assert not other.exists()
        (tmp_path / "out/folder").rmdir()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["folder"]


def test_lsun_from_tfrecord(tmp_path, make):
    made = pixels(3, 16, 16, 3)
    path = make.tfrecord(tmp_path / "cat-r04.tfrecords", made)
    run("lsun_cat", tmp_path / "out", [str(path)], image_size=16)
    np.testing.assert_array_equal(open_source("lsun_cat", tmp_path / "out", "train").array(), made)
    with pytest.raises(UserError, match=r"record 0: \(16, 16, 3\) where \(256, 256, 3\)"):
        run("lsun_cat", tmp_path / "out2", [str(path)])
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="r04.tfrecords, record 2: wrong checksum of the data"):
        run("lsun_cat", tmp_path / "out2", [str(path)], image_size=16)
    assert nothing_left(tmp_path / "out2")
    with pytest.raises(UserError, match="unpacked LMDB"):
        run("lsun_cat", tmp_path / "out2", [])


def cifar_files(per_file=4):
    made, files = {}, {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        made[name] = pixels(per_file, 32, 32, 3), RNG.integers(0, 10, per_file, dtype=np.uint8)
        files[f"cifar-10-batches-bin/{name}"] = b"".join(
            bytes([label]) + image.transpose(2, 0, 1).tobytes()
            for image, label in zip(*made[name], strict=True))
    files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(
        f"class{i}" for i in range(10)).encode() + b"\n\n"
    return made, files


def test_cifar10_from_its_tarball(tmp_path, monkeypatch):
    made, files = cifar_files()
    path = make_tar(tmp_path / "cifar-10-binary.tar.gz", files)
    run("cifar10", tmp_path / "out", [str(path)])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["cifar10"]
    train = open_source("cifar10", tmp_path / "out", "train")
    expected = {i.tobytes(): int(y) for n, pair in made.items() if n.startswith("data")
                for i, y in zip(*pair, strict=True)}
    assert {i.tobytes(): int(y) for i, y in zip(train.array(), train.labels, strict=True)
            } == expected
    np.testing.assert_array_equal(train.array(), [train[i] for i in range(20)])
    test = open_source("cifar10", tmp_path / "out", "test", image_size=32, channels=3)
    assert len(test) == 4 and test.class_names[3] == "class3"
    with pytest.raises(UserError, match="cifar10 has 3"):
        open_source("cifar10", tmp_path / "out", "train", channels=1)
    monkeypatch.setattr(images, "RETRY_WAITS", (0.01, 0.01))
    damage_pngs(tmp_path / "out/cifar10")
    with pytest.raises(UserError, match="a record of train in .*prepare it again if it is damaged"):
        open_source("cifar10", tmp_path / "out", "train").array()


def test_array_records_that_are_away_for_a_moment_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RETRY_WAITS", (0.05, 0.1, 0.2, 0.4, 0.8, 1.6))
    path = make_tar(tmp_path / "cifar-10-binary.tar.gz", cifar_files()[1])
    run("cifar10", tmp_path / "out", [str(path)])
    source = open_source("cifar10", tmp_path / "out", "train")
    expected = source.array()
    source = open_source("cifar10", tmp_path / "out", "train")
    away = (tmp_path / "out").rename(tmp_path / "away")
    thread = threading.Timer(0.3, away.rename, (tmp_path / "out",))
    thread.start()
    np.testing.assert_array_equal(source[7], expected[7])
    thread.join()


def damage_pngs(folder):
    """Zero a stretch in the middle of every record file."""
    for path in folder.rglob("*.array_record*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 4:len(data) // 4 + 2000] = bytes(2000)
        path.write_bytes(data)


def test_cifar10_with_a_file_missing_or_cut(tmp_path):
    _, files = cifar_files(1)
    whole = dict(files)
    del files["cifar-10-batches-bin/data_batch_3.bin"]
    path = make_tar(tmp_path / "a.tar.gz", files)
    with pytest.raises(UserError, match="data_batch_3.bin is not in it"):
        run("cifar10", tmp_path / "out", [str(path)])
    whole["cifar-10-batches-bin/data_batch_3.bin"] = b"\x01" * 3000
    path = make_tar(tmp_path / "b.tar.gz", whole)
    with pytest.raises(UserError, match="data_batch_3.bin: not a batch"):
        run("cifar10", tmp_path / "out", [str(path)])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="b.tar.gz: damaged"):
        run("cifar10", tmp_path / "out", [str(path)])
    assert nothing_left(tmp_path / "out")


def fashion_files(make, folder):
    folder.mkdir()
    made = {}
    for stem, n in (("train", 6), ("t10k", 3)):
        made[stem] = pixels(n, 28, 28), RNG.integers(0, 10, n, dtype=np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), made[stem], strict=True):
            (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(make.idx(array)))
    return made


def test_fashion_mnist(tmp_path, make):
    made = fashion_files(make, tmp_path / "in")
    run("fashion_mnist", tmp_path / "out", [str(tmp_path / "in")])
    source = open_source("fashion_mnist", tmp_path / "out", "train", image_size=32)
    assert source.shape == (32, 32, 1)
    everything = source.array()
    np.testing.assert_array_equal(everything, [source[i] for i in range(6)])
    inside = everything[:, 2:30, 2:30, 0]
    assert everything.sum(dtype=int) == inside.sum(dtype=int)  # the border is black
    assert {i.tobytes(): y for i, y in zip(inside, source.labels.tolist(), strict=True)} == {
        i.tobytes(): y for i, y in zip(made["train"][0], made["train"][1].tolist(), strict=True)}
    with pytest.raises(UserError, match="not 16"):
        open_source("fashion_mnist", tmp_path / "out", "train", image_size=16)
    (tmp_path / "in/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte.gz is not in it"):
        run("fashion_mnist", tmp_path / "out2", [str(tmp_path / "in")])


IDX_NAMES = {
    "published": "{stem}-{kind}-ubyte.gz",
    "a browser's": "{stem}.{kind}-ubyte",
    "torchvision's": "MNIST/raw/{stem}-{kind}-ubyte",
    "Kaggle's": "{stem}-{kind}-ubyte/{stem}-{kind}-ubyte",
    "others'": "{STEM}_{kind}_ubyte.GZ",
}


@pytest.mark.parametrize("names", IDX_NAMES)
@pytest.mark.parametrize("row", ["mnist", "fashion_mnist"])
def test_mnist_by_any_usual_name(tmp_path, make, names, row):
    made = {}
    for stem, n in (("train", 5), ("t10k", 3)):
        made[stem] = pixels(n, 28, 28), RNG.integers(0, 10, n, dtype=np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), made[stem], strict=True):
            path = tmp_path / "in" / IDX_NAMES[names].format(
                stem=stem, kind=kind, STEM=stem.replace("t10k", "test").upper())
            path.parent.mkdir(parents=True, exist_ok=True)
            data = make.idx(array)
            path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    run(row, tmp_path / "out", [str(tmp_path / "in")])
    for split, stem in (("train", "train"), ("test", "t10k")):
        source = open_source(row, tmp_path / "out", split)
        assert source.shape == (28, 28, 1) and len(source.class_names) == 10
        assert {i.tobytes(): y for i, y in zip(source.array(), source.labels.tolist(), strict=True)
                } == {i.tobytes(): y for i, y in zip(made[stem][0], made[stem][1].tolist(),
                                                     strict=True)}


def test_two_sets_of_idx_files_are_ambiguous(tmp_path, make):
    for name in ("MNIST", "FashionMNIST"):
        (tmp_path / "in" / name / "raw").mkdir(parents=True)
        for stem in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (tmp_path / f"in/{name}/raw/{stem}-{kind}-ubyte").write_bytes(b"")
    with pytest.raises(UserError, match="FashionMNIST.* or .*MNIST.*Give the folder of one"):
        run("mnist", tmp_path / "out", [str(tmp_path / "in")])


def as_tfrecords(folder, make):
    """The same data set in TFDS's older format."""
    import tensorflow_datasets as tfds
    builder = tfds.builder_from_directory(folder)
    for split in ("train", "test"):
        records = [{"image": r["image"], "label": int(r["label"])} for r in
                   builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})]
        for r in records:
            r["image"] = r["image"] if isinstance(r["image"], bytes) else r["image"].read()
        path, = folder.glob(f"*-{split}.array_record-*")
        path.unlink()
        make.examples(folder / path.name.replace("array_record", "tfrecord"), records)
    info = folder / "dataset_info.json"
    text = info.read_text()
    changed = re.sub(r'"fileFormat": "array_record"', '"fileFormat": "tfrecord"', text)
    assert changed != text
    info.write_text(changed)


def test_tfds_in_tfrecord_format_is_read_without_tensorflow(tmp_path, make, monkeypatch):
    fashion_files(make, tmp_path / "in")
    run("fashion_mnist", tmp_path / "out", [str(tmp_path / "in")])
    before = {s: open_source("fashion_mnist", tmp_path / "out", s) for s in ("train", "test")}
    before = {s: (x.array(), x.labels, x.fingerprint) for s, x in before.items()}
    folder, = (tmp_path / "out/fashion_mnist").iterdir()
    as_tfrecords(folder, make)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for split, (pixels_, labels, fingerprint) in before.items():
        source = open_source("fashion_mnist", tmp_path / "out", split)
        np.testing.assert_array_equal(source.array(), pixels_)
        np.testing.assert_array_equal(source.labels, labels)
        assert source.fingerprint == fingerprint and set(source.splits) == {"test", "train"}
    path = next(folder.glob("*-train.tfrecord-*"))
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="record 5 of train: wrong checksum"):
        open_source("fashion_mnist", tmp_path / "out", "train").array()


def test_celeb_a_hq(tmp_path):
    made = {f"data256x256/{i:05}.png": pixels(256, 256, 3) for i in range(2)}
    path = make_tar(tmp_path / "data256x256.tar", {
        **{k: png(v) for k, v in made.items()}, "data256x256/._00000.png": b"litter"})
    run("celeb_a_hq", tmp_path / "out", [str(path)])
    source = open_source("celeb_a_hq", tmp_path / "out", "train", image_size=256)
    assert source.labels is None and source.splits == ("train",)
    assert {i.tobytes() for i in source.array()} == {i.tobytes() for i in made.values()}
    with pytest.raises(UserError, match="has no split 'test'"):
        open_source("celeb_a_hq", tmp_path / "out", "test")
    path = make_tar(tmp_path / "small.tar", {"a.png": png(pixels(8, 8, 3))})
    with pytest.raises(UserError, match=r"small.tar, a.png: \(8, 8, 3\), not"):
        run("celeb_a_hq", tmp_path / "out2", [str(path)])


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def unreachable(self, url):
        raise OSError("no route to host")
    monkeypatch.setattr(tfds.download.DownloadManager, "download", unreachable)
    with pytest.raises(UserError, match=r"cannot download https://\S+cifar-10-binary.tar.gz \(no "
                                        r"route to host\); fetch it elsewhere .* --from="):
        run("cifar10", tmp_path / "out", [])
    assert nothing_left(tmp_path / "out")
