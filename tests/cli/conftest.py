"""What the tests of several subcommands share."""

import os
import sys

import pytest
from xla_flags import xla_flags

from ddpm_jax.data.datasets import open_source
from ddpm_jax.evaluation import classifier

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


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    """A folder with the digits' small classifier after 4 epochs; a command trains it for 40."""
    folder = tmp_path_factory.mktemp("classifiers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "default_epochs", lambda images: 4)
        classifier.shared(open_source("digits", None, "train", image_size=8, channels=1),
                          folder=folder)
    return folder
