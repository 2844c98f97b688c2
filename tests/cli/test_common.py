import pytest

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError


def test_names_of_packaged_configs_become_paths():
    argv = common.with_packaged_configs(
        ["--config=digits", "--workdir=x", "--config", "cifar10", "--config.train.steps=3"])
    assert argv[0].startswith("--config=/") and argv[0].endswith("configs/digits.py")
    assert argv[3].endswith("configs/cifar10.py")
    assert argv[1] == "--workdir=x" and argv[4] == "--config.train.steps=3"
    with pytest.raises(UserError, match="no such file"):
        common.with_packaged_configs(["--config=dogs"])


def test_no_positionals():
    common.no_positionals(["ddpm train"])
    with pytest.raises(UserError, match="unexpected argument 'x'"):
        common.no_positionals(["ddpm train", "x"])
