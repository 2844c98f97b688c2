"""ddpm data prepare|info: convert a dataset for training, once, or describe it.

  ddpm data prepare --name=cifar10                           from the network
  ddpm data prepare --name=cifar10 --from=cifar-10-binary.tar.gz
  ddpm data prepare --name=mnist --from=FOLDER               four idx files
  ddpm data prepare --name=fashion_mnist --from=/usr/share/datasets/fashion-mnist
  ddpm data prepare --name=celeb_a_hq --from=data256x256.tar
  ddpm data prepare --name=lsun_church --from=church_outdoor_train_lmdb
  ddpm data prepare --name=lsun_cat --from=cat-r08.tfrecords
  ddpm data prepare --name=folder --dir=MY_DATA --from=PICTURES --image_size=64
  ddpm data prepare --name=folder --from=PICTURES --list     show, write nothing
  ddpm data prepare --name=cifar10 --dir=gs://BUCKET/data    made here, then uploaded
  ddpm data info --name=cifar10 --split=test

A folder (or .zip, .tar) of pictures holds images, or a folder for each class, or folders train,
test, val with either; docs/images.md has the whole rule, and --list shows what it makes of a
folder. With --image_size they are cropped to the centre square and resized (Lanczos). Train on it
with --config.data.name=folder --config.data.dir=MY_DATA.
"""

import pathlib
import sys

from ddpm_jax.data import datasets, folders, prepare
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files, remote


def define_flags(define):
    define.string("name", None, f"the dataset: {', '.join(datasets.DATASETS)}")
    define.path("dir", "", "folder of prepared data, also gs:// (default: $DDPM_DATA_DIR "
                        "or ~/.cache/ddpm_jax/data)")
    define.multi_path("from", "file or folder to read")
    define.integer("image_size", None, "folder, lsun_*: crop to the centre square and resize to "
                   "this side")
    define.enum("channels", None, ["1", "3"], "folder: 3 makes grey RGB, 1 requires grey")
    define.string("split", None, "info: only this split")
    define.bool("split_folders", None, "folder: whether folders called train, test, val ... are "
                "splits (default: by the rule in docs/images.md)")
    define.enum("classes", None, sorted(filter(None, folders.CLASSES)),
                "folder: whether folders are classes (default: by that rule)")
    define.float("max_unreadable", None, "folder, lsun_*: share of a split's images that may be "
                 f"damaged and are left out (default: 0, for lsun_* {prepare.MAX_UNREADABLE})",
                 0.0, 1.0)
    define.bool("list", False, "folder: print splits, classes and what is left out; write nothing")


def _size_on_disk(where) -> str:
    if files.is_remote(where):
        return f"{sum(size for size, *_ in remote.listing(where).values()) / 1e6:,.1f} MB"
    root = pathlib.Path(where)
    if not root.exists():
        return "inside the package"
    size = sum(p.stat().st_size for p in (root, *root.rglob("*")) if p.is_file())
    return f"{size / 1e6:,.1f} MB on disk"


def describe(name, folder, split, image_size=None, channels=None) -> str:
    """What `ddpm data info` prints."""
    def opened(split):
        return datasets.open_source(name, folder, split, image_size=image_size, channels=channels)
    first = opened(split or "train")
    lines = [f"{name}: {datasets.DATASETS[name].about}",
             f"in {first.where} ({_size_on_disk(first.where)})"]
    for each in [split] if split else first.splits:
        source = first if each == first.split else opened(each)
        lines.append(f"{each}: {len(source):,} images {'x'.join(map(str, source.shape))}, "
                     f"fingerprint {source.fingerprint}")
    lines += first.left_out
    if first.class_names:
        shown = ", ".join(first.class_names[:20]) + (", ..." if first.class_names[20:] else "")
        lines.append(f"{len(first.class_names)} classes: {shown}")
    return "\n".join(lines)


def _print(text):
    """Names of folders may have characters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _refuse_unread(values, reads, what):
    for flag in ("from", "max_unreadable", "split_folders", "classes", "list"):
        if values[flag].present and flag not in reads:
            raise UserError(f"--{flag} is not read by ddpm data {what}; leave it out")


def main(values, words):
    if len(words) != 1 or words[0] not in ("prepare", "info"):
        raise UserError("ddpm data: expected prepare or info, then flags (not "
                        f"{' '.join(words)!r}); see ddpm data --help")
    from ddpm_jax import run_log

    name, size = values.name, values.image_size
    if name not in datasets.DATASETS:
        raise UserError(f"--name={name} is unknown; known: {', '.join(datasets.DATASETS)}")
    if size is not None and size < 1:
        raise UserError(f"--image_size={size}: must be at least 1")
    row, sources = datasets.DATASETS[name], values["from"].value
    folder = datasets.data_folder(values.dir)
    channels = values.channels and int(values.channels)
    preparing = words[0] == "prepare"
    _refuse_unread(values, row.flags if preparing else (), f"{words[0]} --name={name}")
    if preparing:
        options = prepare.Options(size, channels, values.split_folders, values.classes,
                                  values.max_unreadable, run_log.progress)
        if values.list:
            return _print("\n".join(folders.tree_lines(prepare.folder_tree(sources, options))))
        prepare.prepare(row, name, folder, sources, options)
    _print(describe(name, folder, values.split, size, channels))
