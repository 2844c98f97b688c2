"""A run of seconds on the embedded digits, for the tests of training and sampling."""

import jax
import numpy as np

from ddpm_jax import train as training
from ddpm_jax.config import load_config, override

# The paper's objective and betas and a batch of 64, whatever the packaged digits have.
PAPERS = {"diffusion.schedule.name": "linear", "diffusion.schedule.beta_end": 0.2,
          "diffusion.num_timesteps": 100, "diffusion.variance": "fixed_small",
          "diffusion.loss": "mse", "diffusion.predict": "eps",
          "model.dropout": 0.05, "optimizer.learning_rate": 1e-3, "optimizer.decay_steps": 0,
          "optimizer.warmup_steps": 100, "ema.decay": 0.995, "train.batch_size": 64}

FIELDS = {
    "data.image_size": 8, "model.ch": 4, "model.ch_mult": (1,), "model.num_res_blocks": 1,
    "model.attn_resolutions": (), "model.num_groups": 2,
    "train.batch_size": 8, "train.clip_replicas": 8, "train.steps": 12, "train.log_every": 2,
    "train.steps_per_dispatch": 5, "checkpoint.every": 4, "diffusion.num_timesteps": 10,
    "eval.sample_every": 0,
}

# The same for a command; on as many devices its programs are those of the tests in this process.
FLAGS = ["--config=digits", *(f"--config.{k}={v}" for k, v in {**PAPERS, **FIELDS}.items())]


def digits(**fields):
    c = load_config("digits")
    override(c, {**PAPERS, **fields})
    return c


def config(**fields):
    c = digits()
    c.update_from_flattened_dict({**FIELDS, **fields})
    return c


def weights(like, seed=0):
    """Made without a program, and of order one, as the initial ones are not: with those the last
    layers' outputs and gradients nearly vanish. like: a tree of parameters' shapes."""
    random = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, p: np.float32(("scale" in jax.tree_util.keystr(path))
                                   + 0.3 * random.standard_normal(p.shape)), like)


class Stop:
    """The stop object of a process that gets its signal after ``at`` steps."""

    def __init__(self, at=None):
        self.at, self.history = at, []

    def requested(self, step):
        return self.at is not None and step >= self.at

    def unsaved(self, value):
        self.history.append(value)


class Watchdog:
    def beat(self, step=None):
        pass

    def pause(self):
        pass


def train(workdir, at=None, **fields):
    return training.train(config(**fields), workdir, stop=Stop(at), watchdog=Watchdog())
