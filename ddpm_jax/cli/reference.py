"""ddpm reference --dataset=cifar10 --split=train --out=cifar10_train.npz [--protocol=paper]

Statistics of a dataset's real images, made once, for `ddpm evaluate --reference`. The file carries
the protocol (resize, scale, precision), the weights' sha256, the number and identity of the images,
and the features of --features images for KID, precision and recall. Without --num and --image_size
it is made of all images of the split as they are; none is mirrored.

  ddpm reference --dataset=folder --data_dir=PICTURES --out=pictures.npz
"""

from ddpm_jax.cli import common
from ddpm_jax.cli.evaluate import define_inception_flags
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.options import Options, StoppedError
from ddpm_jax.parallel.exit_codes import EXIT_RESTART
from ddpm_jax.storage import files


def define_flags(define):
    define_inception_flags(define)
    define.string("dataset", None, "a dataset of `ddpm data`")
    define.path("data_dir", None, "where `ddpm data prepare` put the dataset")
    define.string("split", "train", "a split of the dataset")
    define.integer("image_size", None, "side of the images: a folder is cropped and resized to "
                   "it, digits and mnist are padded; default: as they are")
    define.integer("num", None, "images of the split, in a fixed random order; default: all")
    define.integer("features", 10_000, "images whose features are kept, for kid and pr")
    define.integer("batch_size", None, "images at a time, all devices together")
    define.path("out", None, "the .npz to write")
    define.pod()


def main(values, words):
    import jax

    from ddpm_jax.data.datasets import open_source
    from ddpm_jax.evaluation.evaluate import check_options
    from ddpm_jax.evaluation.make_reference import make_reference
    from ddpm_jax.evaluation.session import Session
    from ddpm_jax.parallel.runners import RUNNERS
    from ddpm_jax.run_log import say

    common.no_words(words)
    name, out = common.required(values, "dataset"), common.required(values, "out")
    if not out.endswith(".npz"):
        raise UserError(f"--out={out}: a reference must end in .npz")
    if files.exists(out) and not values.overwrite:
        raise UserError(f"--out={out} exists; name another file or add --overwrite")
    if values.features < 0:
        raise UserError(f"--features={values.features} must be at least 0")
    options = Options(
        metrics=("is",), protocol=values.protocol, num=values.num, batch_size=values.batch_size,
        inception_weights=values.inception_weights,
        allow_unknown_weights=values.allow_unknown_weights)
    check_options(options)
    source = open_source(name, values.data_dir, values.split, image_size=values.image_size)
    stop, _ = common.join(values)
    session = Session(RUNNERS["jit"](jax.devices()), stop=stop, say=say)
    try:
        make_reference(source, options, out, session, num_features=values.features,
                       overwrite=values.overwrite)
    except StoppedError:
        say("stopped; finished shards are kept: the same command resumes")
        return EXIT_RESTART
    say(f"wrote {out}")
    return 0
