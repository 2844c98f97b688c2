"""ddpm report --workdir=RUN [--open]

Write the page of a run, RUN/index.html, again: one file that opens without a network, with samples,
denoising, the numbers and their meaning, the loss, nearest training images and the next commands.
It shows the files that `ddpm train`, `ddpm sample --out=RUN/drawn` and `ddpm evaluate` wrote into
RUN and the folders in it, and computes nothing. `ddpm train` writes it at each checkpoint.
"""

import os
import sys
import webbrowser

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files


def define_flags(define):
    define.workdir()
    define.bool("open", False, "show it in a browser, where there is a desktop")


def main(values, words):
    common.no_words(words)
    workdir = common.required(values, "workdir")
    if not files.exists(files.join(workdir, "config.json")):
        raise UserError(f"--workdir={workdir}: no run here (no config.json); train first")
    from ddpm_jax.evaluation import run_page

    path = run_page.write(workdir)
    print(path)
    desktop = sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    if values.open and desktop and not files.is_remote(path):
        webbrowser.open(files.resolve(path).as_uri())
    return 0
