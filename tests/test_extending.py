"""docs/extending.md is true: each recipe is carried out in a copy of the package, and its command
runs there."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from xla_flags import xla_flags

import ddpm_jax

PACKAGE = pathlib.Path(ddpm_jax.__file__).parent
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
RECIPES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
# The smallest network and chain, as a config for the commands of the page.
TINY = """
from ddpm_jax.configs import default

def get_config():
    config = default.get_config()
    config.data.update(name="digits", image_size=8, channels=1, flip=False)
    config.model.update(ch=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=2)
    config.diffusion.num_timesteps = 20
    config.train.update(batch_size=4, steps=1, clip_scope="global", steps_per_dispatch=1)
    config.eval.sample_every = 0
    return config
"""


def edit(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has {text.count(old)} times: {old}"
    file.write_text(text.replace(old, new))


def carry_out(recipe, root):
    """Apply the page's code blocks to the package at ``root``."""
    file = None
    for lead, language, block in re.findall(r"(.*?)```(\w+)\n(.*?)```", recipe, re.S):
        named = re.search(r"In `(ddpm_jax/[\w/]+\.py)`", lead)
        file = root / named[1] if named else file
        table = re.search(r"row of\s+`(\w+)`", lead)
        above = re.search(r"above `((?:class )?\w+)`", lead)
        if language == "diff":
            lines = {sign: "\n".join(line[1:] for line in block.splitlines()
                                     if line.startswith(sign)) for sign in "-+"}
            edit(file, lines["-"], lines["+"])
        elif above:
            at = above[1] if above[1].startswith("class ") else f"{above[1]} = {{"
            edit(file, f"\n{at}", f"\n{block}\n\n{at}")
        elif table:
            opening = next(line for line in file.read_text().splitlines()
                           if line.startswith(f"{table[1]} = {{"))
            edit(file, f"{opening}\n", f"{opening}\n{block}")


def run(words, folder, root):
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    return done.stdout + done.stderr


def ddpm(command):
    return [sys.executable, "-m", "ddpm_jax", *command.split()[1:]]


def test_the_page_has_a_recipe_for_each_table():
    assert list(RECIPES) == ["A beta schedule", "A parameterisation", "A sampler", "A metric",
                             "A kind of block", "An accelerator"]


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_works(title, straight, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(PACKAGE, root / "ddpm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    carry_out(RECIPES[title], root)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tiny.py").write_text(TINY)
    command, = re.findall(r"```bash\n(.*?)\n```", RECIPES[title], re.S)
    if command.startswith("python "):
        words = [sys.executable, "-c", re.search(r'"(.*)"', command)[1]]
    else:
        words = ddpm(command.replace("--config=digits", "--config=tiny.py"))
    if "--workdir=trained" in words:  # by the package as it is
        shutil.copytree(straight, tmp_path / "work" / "trained")
    run(words, tmp_path / "work", root)
