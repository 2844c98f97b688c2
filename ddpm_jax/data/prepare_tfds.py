"""Write TFDS's own format (array_record), without TensorFlow: `tfds.data_source` reads it too.

tensorflow_datasets and PIL are imported where they are used: slow, and needed here alone.
"""

import contextlib
import io
import logging
import os
import pathlib
import re
import shutil
import sys

from ddpm_jax.data import folders, images
from ddpm_jax.data.prepare import DEFAULTS, new_dataset, one_source
from ddpm_jax.errors import UserError
from ddpm_jax.formats.archives import cifar_batch
from ddpm_jax.formats.idx import read_idx


def _build(name, data_dir, generate, parent, *, config=None):
    """Write `data_dir/name` in TFDS's format: `parent` (a TFDS builder) with another reader.

    generate(builder, download) -> {split: iterable of (key, example)}. Its images are PIL images or
    encoded files, because TFDS encodes numpy arrays with TensorFlow.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered
    with registered.skip_registration():

        class Builder(parent):
            name = parent.name
            url_infos = parent.url_infos
            pkg_dir_path = parent._get_pkg_dir_path()

            def _split_generators(self, dl_manager):
                def download(url):
                    try:
                        return dl_manager.download(url)
                    except Exception as error:  # requests', urllib's, TFDS's own
                        reason = " ".join(str(error).split())[:120] or type(error).__name__
                        raise UserError(f"cannot download {url} ({reason}); fetch it elsewhere "
                                        "and give it with --from=") from error
                return generate(self, download)

            def _generate_examples(self):
                raise NotImplementedError

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # hide its ten retries
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with new_dataset(data_dir, name) as temp:
        inside = temp / "tfds"
        builder = Builder(data_dir=inside, config=config, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # its message names the temporary folder
            builder.download_and_prepare(
                download_dir=temp / "downloads",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        shutil.rmtree(temp / "downloads", ignore_errors=True)
        for child in (inside / name).iterdir():
            os.replace(child, temp / child.name)
        shutil.rmtree(inside)


def cifar10(name, data_dir, sources, options=DEFAULTS):
    """The binary CIFAR-10: cifar-10-binary.tar.gz, or a folder with it or its unpacked files."""
    import tensorflow_datasets as tfds
    from PIL import Image
    given = one_source(sources, "cifar-10-binary.tar.gz") if sources else None

    def generate(builder, download):
        info = builder._cifar_info
        source = pathlib.Path(given or download(info.url))
        if (source / "cifar-10-binary.tar.gz").exists():
            source = source / "cifar-10-binary.tar.gz"
        members = {pathlib.PurePath(item.name).name: item for item in folders.all_items(source)}
        needed = [*info.train_files, *info.test_files, *info.label_files]
        if missing := [n for n in needed if n not in members]:
            raise UserError(f"{source}: {missing[0]} is not in it; give cifar-10-binary.tar.gz")
        names = members[info.label_files[0]].read().decode().split()
        builder.info.features["label"].names = names

        def examples(prefix, batches):
            index = 0
            for file in batches:
                pixels, labels = cifar_batch(members[file].read(), f"{source}, {file}")
                for image, label in zip(pixels, labels, strict=True):
                    yield index, {"id": f"{prefix}_{index:05d}", "label": int(label),
                                  "image": Image.fromarray(image)}
                    index += 1

        return {"train": examples("train", info.train_files),
                "test": examples("test", info.test_files)}

    _build(name, data_dir, generate, tfds.builder_cls("cifar10"))


def idx_digits(name, data_dir, sources, options=DEFAULTS):
    """mnist, fashion_mnist: four idx files, e.g. those of Debian's dataset-fashion-mnist package,
    torchvision's or Kaggle's."""
    import tensorflow_datasets as tfds
    from PIL import Image
    parent = tfds.builder_cls(name)
    given = one_source(sources, "the folder of the four idx files") if sources else None

    def generate(builder, download):
        def load(stem, kind):
            if given is None:
                return read_idx(download(f"{parent.URL}{stem}-{kind}-ubyte.gz"))
            return read_idx(_idx_file(given, stem, kind))

        splits = {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            pixels, labels = load(stem, "images-idx3"), load(stem, "labels-idx1")
            if pixels.shape[1:] != (28, 28) or labels.shape != pixels.shape[:1]:
                raise UserError(f"{stem}-images-idx3-ubyte: {pixels.shape} images for "
                                f"{labels.shape} labels; not {name}")
            splits[split] = ((i, {"image": Image.fromarray(p), "label": int(y)})
                             for i, (p, y) in enumerate(zip(pixels, labels, strict=True)))
        return splits

    _build(name, data_dir, generate, parent)


def _idx_file(given, stem, kind):
    """The file below `given` (or beside it, if it is a file) that is called STEM-KIND-ubyte, with
    any of `-_. ` between its words, .gz or not, `test` for t10k; the one nearest to `given`."""
    folder = given.parent if given.is_file() else given
    names = {f"{s}-{kind}-ubyte" for s in (stem, stem.replace("t10k", "test"))}
    found = sorted((len(p.parts), p) for p in folder.rglob("*") if p.is_file() and re.sub(
        "[-_. ]+", "-", p.name.lower().removesuffix(".gz")) in names)
    if not found:
        raise UserError(f"--from={given}: {stem}-{kind}-ubyte.gz is not in it")
    nearest = [p for depth, p in found if depth == found[0][0]]
    if len({p.parent for p in nearest}) > 1:
        raise UserError(f"--from={given}: {nearest[0]} or {nearest[-1]}? Give the folder of one")
    return nearest[0]


def celeb_a_hq(name, data_dir, sources, options=DEFAULTS):
    """CelebA-HQ at 256x256 from the data256x256.tar that TFDS's builder names, 30,000 images."""
    import tensorflow_datasets as tfds
    path = one_source(sources, "data256x256.tar (how to make it: github.com/tkarras/"
                "progressive_growing_of_gans); a folder of images goes with --name=folder")

    def generate(builder, download):
        def examples():
            for item in folders.all_items(path):
                if folders.why_left_out(item.name):
                    continue
                image = images.decode(item.read(), item.where, channels=3)
                if image.shape != (256, 256, 3):
                    raise UserError(f"{item.where}: {image.shape}, not (256, 256, 3)")
                yield item.name, {"image": io.BytesIO(item.read()), "image/filename": item.name}
        return {"train": examples()}

    _build(name, data_dir, generate, tfds.builder_cls("celeb_a_hq"), config="256")
