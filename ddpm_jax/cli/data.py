"""ddpm data prepare|info: make a dataset ready for training, once, or describe it.

  ddpm data prepare --name=cifar10                           from the network
  ddpm data prepare --name=cifar10 --from=cifar-10-binary.tar.gz
  ddpm data prepare --name=fashion_mnist --from=/usr/share/datasets/fashion-mnist
  ddpm data prepare --name=celeb_a_hq --from=data256x256.tar
  ddpm data prepare --name=lsun_church --from=church_outdoor_train_lmdb
  ddpm data prepare --name=lsun_cat --from=cat-r08.tfrecords
  ddpm data prepare --name=folder --dir=MY_DATA --from=PICTURES --image_size=64
  ddpm data prepare --name=cifar10 --dir=gs://BUCKET/data    made here, then copied there
  ddpm data info --name=cifar10 --split=test

A folder of pictures holds images (PNG, JPEG, WebP), or one folder of images per class, or train/
and test/ with either. With --image_size they are cropped to the centre square and resized
(Lanczos). Train on it with --config.data.name=folder --config.data.dir=MY_DATA.
"""

import pathlib
import tempfile

from absl import flags

from ddpm_jax.data import datasets
from ddpm_jax.data.prepare import INFO, refuse_existing
from ddpm_jax.errors import UserError
from ddpm_jax.storage import remote


def define_flags():
    flags.DEFINE_string("name", None, f"dataset: {', '.join(datasets.DATASETS)}")
    flags.DEFINE_string("dir", "", "where prepared data lies, also gs:// (default: $DDPM_DATA_DIR "
                        "or ~/.cache/ddpm_jax/data)")
    flags.DEFINE_multi_string("from", [], "file or folder to prepare from; may be repeated")
    flags.DEFINE_integer("image_size", None, "folder, lsun_*: centre crop and resize to this")
    flags.DEFINE_enum("channels", None, ["1", "3"], "folder: 3 turns grey into RGB, 1 wants grey")
    flags.DEFINE_string("split", None, "info: only this split")


def _size_on_disk(where) -> str:
    if remote.is_remote(where):
        return f"{sum(size for size, *_ in remote.listing(where).values()) / 1e6:,.1f} MB"
    root = pathlib.Path(where)
    if not root.exists():
        return "inside the package"
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
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
        height, width, channels = source.shape
        lines.append(f"{each}: {len(source):,} images {height}x{width}x{channels}, "
                     f"fingerprint {source.fingerprint}")
    if first.class_names:
        shown = ", ".join(first.class_names[:20]) + (", ..." if first.class_names[20:] else "")
        lines.append(f"{len(first.class_names)} classes: {shown}")
    return "\n".join(lines)


def prepare(name, folder, sources, image_size, channels):
    row = datasets.DATASETS[name]
    if row.prepare is None:
        raise UserError(f"{name} needs no preparation: it is {row.about}")
    if remote.is_remote(folder):
        return _prepare_there(row, name, folder, sources, image_size, channels)
    refuse_existing(folder, name)  # before hours of reading, not after
    row.prepare(name, folder, sources, image_size=image_size, channels=channels)


def _prepare_there(row, name, url, sources, image_size, channels):
    """Made on this machine's disk and copied to the bucket, what readers look for at the end."""
    target = remote.join(url, name)
    marks = {INFO, "dataset_info.json"}
    if marks & {path.split("/")[-1] for path in remote.listing(target)}:
        raise UserError(f"{target} is there already; remove it first, or give another --dir")
    with tempfile.TemporaryDirectory(prefix="ddpm_prepare_") as here:
        row.prepare(name, pathlib.Path(here), sources, image_size=image_size, channels=channels)
        remote.upload(pathlib.Path(here) / name, target, last=marks)


def info(name, folder, sources, image_size, channels):
    """Nothing to do: main describes the dataset after every action."""


ACTIONS = {"prepare": prepare, "info": info}


def main(argv):
    values = flags.FLAGS
    if len(argv) != 2 or argv[1] not in ACTIONS:
        raise UserError(f"ddpm data: say {' or '.join(ACTIONS)}, then flags (not "
                        f"{' '.join(argv[1:])!r}); ddpm data --help explains")
    if values.name not in datasets.DATASETS:
        raise UserError(f"--name={values.name} is unknown; known: {', '.join(datasets.DATASETS)}")
    if values.image_size is not None and values.image_size < 1:
        raise UserError(f"--image_size={values.image_size}: must be at least 1")
    folder = datasets.data_folder(values.dir)
    channels = values.channels and int(values.channels)
    ACTIONS[argv[1]](values.name, folder, values["from"].value, values.image_size, channels)
    print(describe(values.name, folder, values.split, values.image_size, channels))
