"""ddpm edit --workdir=DIR --image=FILE_OR_FOLDER --out=DIR [--strength=0.5] [--seed ...]

Change images with a trained model: noise them part of the way, then denoise them (SDEdit). Writes
png/NAME.png, samples.npz (arr_0: uint8 NHWC) and comparison.png with before and after. Results
depend on the image, its place in the folder and --seed alone. After a stop, the same command
resumes.

  ddpm edit --workdir=runs/digits --image=picture.png --out=edited --strength=0.25 --num=6
"""

from ddpm_jax.cli import common
from ddpm_jax.cli.inpaint import define_edit_flags, settings
from ddpm_jax.parallel import exit_codes


def define_flags(define):
    define_edit_flags(define)
    define.float("strength", 0.5, "share of the steps that are undone, above 0 and at most 1; the "
                 "larger, the less of the image is kept")


def main(values, words):
    common.no_words(words)
    workdir, image, out = (common.required(values, name) for name in ("workdir", "image", "out"))
    stop, _ = common.join(values)
    from ddpm_jax import edit

    done = edit.edit(workdir, image, out, settings(values), strength=values.strength, stop=stop)
    return 0 if done else exit_codes.EXIT_RESTART
