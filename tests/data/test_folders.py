import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import folders
from ddpm_jax.errors import UserError


def fill(root, names):
    """Images (by their ending), other files, each of other content."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in Image.registered_extensions() and not name.startswith("._"):
            Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(path)
        else:
            path.write_bytes(b"\0")
    return root


def found(tree):
    """{split: {class or '': names}}"""
    out = {}
    for split, (items, labels) in tree.splits.items():
        groups = out.setdefault(split, {})
        for i, item in enumerate(items):
            groups.setdefault("" if labels is None else tree.class_names[labels[i]], []).append(
                item.name)
    return out


SPLITS = ["a.png", "b.png"]
LAYOUTS = {
    "flat": (["b.png", "a.JPG", "c.bmp", "d.tif", "e.gif", "f.webp", "g.jfif"], {}, {"train": {
        "": ["a.JPG", "b.png", "c.bmp", "d.tif", "e.gif", "f.webp", "g.jfif"]}}, []),
    "classes": (["dog/b.png", "dog/deep/a.png", "cat/c.png"], {}, {"train": {
        "cat": ["cat/c.png"], "dog": ["dog/b.png", "dog/deep/a.png"]}}, []),
    "splits and classes": (["train/a/1.png", "train/b/2.png", "val/b/3.png"], {}, {
        "train": {"a": ["train/a/1.png"], "b": ["train/b/2.png"]},
        "validation": {"b": ["val/b/3.png"]}}, []),
    "names of splits": (["Training/a.png", "Testing/b.png", "DEV/c.png"], {}, {
        "train": {"": ["Training/a.png"]}, "test": {"": ["Testing/b.png"]},
        "validation": {"": ["DEV/c.png"]}}, []),
    "endings of splits": (["training_set/training_set/x/a.png", "training_set/training_set/y/b.png",
                           "test_set/test_set/x/c.png"], {}, {
        "train": {"x": ["training_set/training_set/x/a.png"],
                  "y": ["training_set/training_set/y/b.png"]},
        "test": {"x": ["test_set/test_set/x/c.png"]}}, []),
    "COCO": (["train2017/a.png", "val2017/b.png", "annotations/instances.json"], {}, {
        "train": {"": ["train2017/a.png"]}, "validation": {"": ["val2017/b.png"]}},
        ["1 other files: annotations/instances.json"]),
    "a wrapping folder": (["pictures/train/a.png", "pictures/test/b.png"], {}, {
        "train": {"": ["pictures/train/a.png"]}, "test": {"": ["pictures/test/b.png"]}}, []),
    "hidden files and litter": (
        ["a/1.png", "a/.ipynb_checkpoints/1-checkpoint.png", "b/2.png", "b/._2.png", "b/Thumbs.db",
         "__MACOSX/a/1.png", "@eaDir/x.png", ".DS_Store", ".git/logo.png"], {},
        {"train": {"a": ["a/1.png"], "b": ["b/2.png"]}}, [
            "7 hidden or system files: .DS_Store, .git/logo.png, @eaDir/x.png, ..."]),
    "formats that are not read": (
        ["a/1.png", "a/2.heic", "b/3.avif", "b/4.heic", "labels.csv"], {"classes": "folders"},
        {"train": {"a": ["a/1.png"]}}, [
            "2 .heic files (not read: convert them): a/2.heic, b/4.heic",
            "1 .avif files (not read: convert them): b/3.avif", "1 other files: labels.csv"]),
    "shards of FFHQ": (["00000/00000.png", "00000/00007.png", "01000/01000.png"], {}, {
        "train": {"": ["00000/00000.png", "00000/00007.png", "01000/01000.png"]}}, []),
    "shards of EDM": (["00000/img00000000.png", "00001/img00001000.png"], {}, {
        "train": {"": ["00000/img00000000.png", "00001/img00001000.png"]}}, []),
    "named shards": (["part1/a.png", "part2/a.png"], {}, {
        "train": {"": ["part1/a.png", "part2/a.png"]}}, []),
    "digits are classes": (["0/a.png", "1/a.png"], {}, {
        "train": {"0": ["0/a.png"], "1": ["1/a.png"]}}, []),
    "beside two splits": (["train/a.png", "test/b.png", "extra/c.png", "preview.png"], {}, {
        "train": {"": ["train/a.png"]}, "test": {"": ["test/b.png"]}}, [
            "2 images beside the split folders: extra/c.png, preview.png"]),
    "a class called train": (["train/a.png", "bus/b.png"], {"split_folders": False}, {
        "train": {"bus": ["bus/b.png"], "train": ["train/a.png"]}}, []),
    "a class called train in a split": (["train/train/a.png", "train/bus/b.png"], {}, {
        "train": {"bus": ["train/bus/b.png"], "train": ["train/train/a.png"]}}, []),
    "only train is a split": (["train/a.png", "bus/b.png"], {"split_folders": True}, {
        "train": {"": ["train/a.png"]}}, ["1 images beside the split folders: bus/b.png"]),
    "test beside classes": (["test/cat/a.png", "cat/b.png", "dog/c.png"],
                            {"split_folders": True}, {
        "train": {"cat": ["cat/b.png"], "dog": ["dog/c.png"]},
        "test": {"cat": ["test/cat/a.png"]}}, []),
    "no classes": (["train/a/1.png", "train/b/2.png", "test/3.png"], {"classes": "none"}, {
        "train": {"": ["train/a/1.png", "train/b/2.png"]}, "test": {"": ["test/3.png"]}}, []),
    "images beside classes": (["a/1.png", "2.png"], {"classes": "folders"}, {
        "train": {"a": ["a/1.png"]}}, ["1 images beside class folders: 2.png"]),
    "numbered classes": (["000/1.png", "001/1.png"], {"classes": "folders"}, {
        "train": {"000": ["000/1.png"], "001": ["001/1.png"]}}, []),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(tmp_path, case):
    names, options, splits, left_out = LAYOUTS[case]
    tree = folders.image_tree(fill(tmp_path, names), **options)
    assert found(tree) == splits
    assert list(tree.left_out) == [f"left out: {line}" for line in left_out]
    counted = sum(int(line.split()[2]) for line in tree.left_out)
    assert counted + sum(len(items) for items, _ in tree.splits.values()) == len(names)


REFUSED = {
    "a class or a split called train": (
        ["train/a.png", "car/b.png"], {},
        r"is train/ \(1\) a split or a class\? Beside it: car/ \(1\); pass --split_folders: a "
        "split, and the rest is left out, or --nosplit_folders"),
    "images beside train": (["train/a.png", "b.png"], {}, r"Beside it: 1 images; pass --split_fol"),
    "test beside classes": (["test/a.png", "x/b.png"], {}, "and the rest is the train split"),
    "no train": (["test/a.png", "val/b.png"], {}, r"but no train/; .* --nosplit_folders"),
    "an empty train": (["train/a.txt", "test/a.png"], {}, "but no train/"),
    "one split twice": (["train/a.png", "val/b.png", "validation/c.png"], {},
                        r"val/ \(1\), validation/ \(1\) are the same split; merge or rename"),
    "two cases": (["Train/a.png", "train/b.png"], {"split_folders": True}, "are the same split"),
    "splits in classes": (["cat/train/a.png", "cat/test/b.png", "dog/train/c.png"], {},
                          r"cat/test/b.png: a split folder inside another folder.*--nosplit"),
    "splits in a split": (["train/train/a.png", "train/test/b.png"], {}, "split folders inside a"),
    "images beside class folders": (["a/1.png", "2.png"], {}, "holds both images and folders of "
                                    r"images: 1 images, a/ \(1\); pass --classes=none"),
    "numbered folders": (["00000/00000_00000.png", "00001/00000_00000.png"], {},
                         "pass --classes=folders if they are, --classes=none if not"),
    "flat test, classes in train": (
        ["train/a/1.png", "train/b/1.png", "test/1.png"], {},
        r"test: its classes \(none\) are not those of the train split \(a, b\); --classes=none"),
    "another class in test": (["train/a/1.png", "train/b/1.png", "test/c/1.png", "test/a/1.png"],
                              {}, r"test: its classes \(a, c\) are not those"),
    "no class folders": (["a.png"], {"classes": "folders"}, "but no folders with images"),
    "nothing that is read": (["a.heic", "b/c.svg", ".x/d.png"], {},
                             r"no images in it \(.png.*left out: 1 hidden or system files: .x/d."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_folders_are_refused(tmp_path, case):
    names, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        folders.image_tree(fill(tmp_path, names), **options)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_and_wrong_roots(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        folders.image_tree(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images in it"):
        folders.image_tree(tmp_path)
    fill(tmp_path, ["a.png"])
    with pytest.raises(UserError, match="a.png: damaged, or no folder, .zip or .tar"):
        folders.image_tree(tmp_path / "a.png")


def archive(folder, path):
    kind = {".zip": "zip", ".tar": "tar", ".gz": "gztar", ".bz2": "bztar", ".xz": "xztar"}
    made = shutil.make_archive(str(path.parent / "made"), kind[path.suffix], folder)
    os.replace(made, path)


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz"])
def test_an_archive_is_read_like_its_folder(tmp_path, name):
    fill(tmp_path / "in/pictures", ["train/a/1.png", "train/b/2.png", "test/a/3.png", "._x",
                                    "note.txt"])
    archive(tmp_path / "in", tmp_path / name)
    folder, packed = (folders.image_tree(tmp_path / n) for n in ("in", name))
    assert found(folder) == found(packed) and folder.left_out == packed.left_out
    for split, (items, _) in folder.splits.items():
        assert [i.read() for i in items] == [i.read() for i in packed.splits[split][0]]
    assert packed.splits["test"][0][0].where == f"{tmp_path / name}, pictures/test/a/3.png"


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_damaged_archives(tmp_path, name):
    fill(tmp_path / "in", [f"{i}.png" for i in range(40)])
    archive(tmp_path / "in", tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:len(data) // 3])
    with pytest.raises(UserError, match=f"{name}: damaged"):
        folders.image_tree(tmp_path / name)


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_mutated_archives_end_in_one_line(tmp_path, name):
    fill(tmp_path / "in", [f"{c}/{i}.png" for c in "ab" for i in range(3)])
    archive(tmp_path / "in", tmp_path / name)
    whole, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(120):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] ^= 1 << rng.integers(8)
        (tmp_path / name).write_bytes(data[:rng.choice([len(data), rng.integers(len(data))])])
        try:
            for items, _labels in folders.image_tree(tmp_path / name).splits.values():
                for item in items:
                    item.read()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and name in str(error)
    assert refused > 40


def test_a_damaged_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a.png", b"pixels" * 50)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[100] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    (items, _), = folders.image_tree(tmp_path / "x.zip").splits.values()
    with pytest.raises(UserError, match="x.zip, a.png: cannot be unpacked .*CRC"):
        items[0].read()


def test_links(tmp_path):
    fill(tmp_path / "real", ["a/1.png"])
    root = fill(tmp_path / "root", ["b/2.png"])
    (root / "a").symlink_to(tmp_path / "real/a")
    (root / "b/loop").symlink_to(root)
    (root / "b/gone.png").symlink_to(tmp_path / "nowhere.png")
    tree = folders.image_tree(root)
    assert found(tree) == {"train": {"a": ["a/1.png"], "b": ["b/2.png"]}}
    assert tree.left_out == ("left out: 1 other files: b/gone.png (no file: a broken link?)",)


def test_a_class_name_that_is_not_utf8(tmp_path):
    fill(tmp_path, ["dog/b.png"])
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copy(tmp_path / "dog/b.png", os.fsencode(tmp_path) + b"/caf\xe9/a.png")
    with pytest.raises(UserError, match=r"'caf\\udce9' has a name that is not UTF-8"):
        folders.image_tree(tmp_path)


def test_a_hard_link_in_a_tar_is_not_read_as_an_empty_image(tmp_path):
    fill(tmp_path, ["in/1.png"])
    os.link(tmp_path / "in/1.png", tmp_path / "in/2.png")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.add(tmp_path / "in", "in")
    (items, _), = folders.image_tree(tmp_path / "x.tar").splits.values()
    assert len({item.read() for item in items}) == 1 and len(items[0].read()) > 50


def test_the_lines_of_a_tree(tmp_path):
    tree = folders.image_tree(fill(tmp_path, ["train/a/1.png", "train/b/2.png", "train/b/3.png",
                                              "val/a/3.png", "x.txt"]))
    assert folders.tree_lines(tree) == [
        "train: 3 images, 2 classes: a 1, b 2", "validation: 1 images, 2 classes: a 1, b 0",
        "left out: 1 other files: x.txt"]


def test_class_names_do_not_depend_on_the_locale(tmp_path):
    root = fill(tmp_path / "in", ["caf\u00e9/1.png", "\u732b/2.png"])
    script = ("import sys; from ddpm_jax.data import folders\n"
              "sys.stdout.buffer.write(repr(folders.image_tree(sys.argv[1]).class_names)"
              ".encode())")
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, timeout=120,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0",
                               "PYTHONCOERCECLOCALE": "0"})
    assert done.stdout.decode() == repr(("caf\u00e9", "\u732b")), done.stderr
