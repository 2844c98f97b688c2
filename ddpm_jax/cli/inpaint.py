"""ddpm inpaint --workdir=DIR --image=FILE_OR_FOLDER --mask=FILE_OR_FOLDER --out=DIR [...]

Fill in the white pixels of a mask with a trained model (RePaint); the other pixels stay as they
are. Writes png/NAME.png, samples.npz (arr_0: uint8 NHWC) and comparison.png with before, mask and
after. Results depend on the image, its mask, its place in the folder and --seed alone. After a
stop, the same command resumes.

  ddpm inpaint --workdir=runs/digits --image=picture.png --mask=mask.png --out=filled --num=6
"""

from ddpm_jax.cli import common
from ddpm_jax.parallel import exit_codes


def define_edit_flags(define):
    define.workdir()
    define.weights()
    define.path("image", None, "an image of the model's size, or a folder of them")
    define.path("out", None, "folder for the results")
    define.integer("num", 1, "results for each image")
    define.integer("seed", 0, "seed of the noise")
    define.integer("batch_size", None, "images at a time, all devices together; "
                         "default: the run's sampler.batch_size")
    define.string("label", None, "number or name of the class, of a model with classes; default: "
                  "without a label")
    define.sampler()
    define.pod()


def define_flags(define):
    define_edit_flags(define)
    define.path("mask", None, "an image whose white pixels are filled in, or a folder with one for "
                "each image, by name")
    define.integer("jump_length", 10, "steps that resampling goes back")
    define.integer("resamplings", 10, "how often each stretch is sampled; 1: replacement alone, "
                         "about as many times faster")


def settings(values):
    from ddpm_jax.edit import Settings

    return Settings(**{name: values[name].value for name in Settings._fields})


def main(values, words):
    common.no_words(words)
    workdir, image, mask, out = (common.required(values, name)
                                 for name in ("workdir", "image", "mask", "out"))
    stop, _ = common.join(values)
    from ddpm_jax import edit

    done = edit.inpaint(workdir, image, mask, out, settings(values),
                        jump_length=values.jump_length, resamplings=values.resamplings, stop=stop)
    return 0 if done else exit_codes.EXIT_RESTART
