"""What the tests of several subcommands share."""

import os
import sys

import pytest
from xla_flags import xla_flags

TINY = [
    "--config=digits", "--config.model.ch=4", "--config.model.ch_mult=(1,)",
    "--config.model.num_res_blocks=1",
    "--config.model.attn_resolutions=()", "--config.model.num_groups=2",
    "--config.train.batch_size=8", "--config.train.log_every=5", "--config.eval.sample_every=0",
    "--config.checkpoint.every=50",
]


@pytest.fixture
def train_command():
    """(workdir, *flags) -> the command line of a tiny training run."""
    return lambda workdir, *more: [
        sys.executable, "-m", "ddpm_jax", "train", *TINY, f"--workdir={workdir}", *more]


@pytest.fixture
def one_device():
    """The environment of a process that sees one CPU device."""
    return {**os.environ, "XLA_FLAGS": xla_flags(1)}
