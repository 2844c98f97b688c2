"""ddpm sample --workdir=DIR --num=N --out=DIR [--step --seed --batch_size --ema/--noema ...]

Draw images from a trained run: samples.npz (arr_0: uint8 NHWC), grid.png, progressive.png.
Image i depends on --seed and i alone, whatever the batch, the devices or the hosts. A command that
was cut off goes on where it stopped.
"""

from absl import flags

from ddpm_jax.cli import common
from ddpm_jax.parallel import exit_codes, pod

FLAGS = flags.FLAGS


def define_flags():
    common.define_workdir_flag()
    common.define_weights_flags()
    flags.DEFINE_integer("num", 64, "images to draw")
    flags.DEFINE_string("out", None, "folder for the images")
    flags.DEFINE_integer("seed", 0, "seed of the noise")
    flags.DEFINE_integer("batch_size", None, "images at a time, all devices together; "
                         "default: the run's sampler.batch_size")
    flags.DEFINE_string("sampler", None, "ancestral or ddim; default: the run's sampler.name")
    flags.DEFINE_integer("steps", None, "steps of the chain, evenly spaced; default: the run's "
                         "sampler.steps")
    flags.DEFINE_bool("png", False, "write each image as a PNG too")
    pod.define_flags()


def main(argv):
    common.no_positionals(argv)
    workdir, out = common.required("workdir"), common.required("out")
    stop, _ = common.join()
    from ddpm_jax import sample

    done = sample.sample(
        workdir, out, num=FLAGS.num, step=FLAGS.step, seed=FLAGS.seed,
        batch_size=FLAGS.batch_size, ema=FLAGS.ema, sampler=FLAGS.sampler, steps=FLAGS.steps,
        png=FLAGS.png, stop=stop)
    return 0 if done else exit_codes.EXIT_RESTART
