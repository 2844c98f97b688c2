"""ddpm sample --workdir=DIR --num=N --out=DIR [--step --seed --batch_size --ema/--noema ...]

Draw images from a trained run. Writes samples.npz (arr_0: uint8 NHWC), grid.png and progressive.png
(the predicted x_0 on the way from noise). A model with classes draws each class in turn, or those
that --label or --labels names; samples.npz then has labels too. Image i depends on --seed, i and
its label alone, whatever the batch, the devices or the hosts. After a stop, the same command
resumes.

  ddpm sample --workdir=runs/digits --num=100 --out=runs/digits/drawn
  ddpm sample --workdir=runs/digits --num=100 --out=runs/digits/fast --sampler=dpmpp_2m --steps=20
"""

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import exit_codes


def define_flags(define):
    define.workdir()
    define.weights()
    define.integer("num", 64, "images to draw")
    define.path("out", None, "folder for the images")
    define.integer("seed", 0, "seed of the noise")
    define.integer("batch_size", None, "images at a time, all devices together; "
                         "default: the run's sampler.batch_size")
    define.string("label", None, "number or name of the class of all images")
    define.list("labels", None, "classes of the images in turn, such as 3,5; all; or none: without "
                "a label; default: all")
    define.sampler()
    define.bool("png", False, "write each image as a PNG too")
    define.pod()


def main(values, words):
    common.no_words(words)
    workdir, out = common.required(values, "workdir"), common.required(values, "out")
    if values.label is not None and values.labels is not None:
        raise UserError(f"--label={values.label} and --labels={','.join(values.labels)}: give one "
                        "of them")
    if values.labels == []:
        raise UserError("--labels is empty; name classes, all or none")
    stop, _ = common.join(values)
    from ddpm_jax import sample

    done = sample.sample(
        workdir, out, num=values.num, step=values.step, seed=values.seed,
        batch_size=values.batch_size, ema=values.ema, sampler=values.sampler, steps=values.steps,
        nodes=values.nodes, guidance=values.guidance, png=values.png, stop=stop,
        labels=values.labels if values.label is None else [values.label])
    return 0 if done else exit_codes.EXIT_RESTART
