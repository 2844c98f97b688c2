import pathlib
import re

import pytest

from ddpm_jax.config import RESUME_MAY_CHANGE, config_path, load_config
from ddpm_jax.errors import UserError


def test_the_papers_numbers_are_in_the_config():
    c = load_config("cifar10")
    assert (c.train.batch_size, c.optimizer.learning_rate, c.ema.decay) == (128, 2e-4, 0.9999)
    assert (c.train.clip_scope, c.train.clip_replicas, c.train.clip_norm) == ("per_replica", 8, 1.0)
    assert (c.optimizer.warmup_steps, c.optimizer.eps_rule) == (5000, "tensorflow")
    for name, steps in [("celebahq256", 500_000), ("lsun_bedroom", 2_400_000),
                        ("lsun_cat", 1_800_000), ("lsun_church", 1_200_000),
                        ("lsun_bedroom_large", 1_150_000)]:
        c = load_config(name)
        assert (c.train.steps, c.train.batch_size, c.optimizer.learning_rate, c.model.dropout,
                c.diffusion.variance) == (steps, 64, 2e-5, 0.0, "fixed_small")


def test_the_readme_lists_what_a_resume_may_change():
    text = " ".join((pathlib.Path(__file__).parent.parent / "README.md").read_text().split())
    listed = re.search(r"A resume may change (.*?); anything else is refused", text).group(1)
    assert sorted(re.findall(r"`([^`*]+)\*?`", listed)) == sorted(RESUME_MAY_CHANGE)


def test_config_names(tmp_path):
    assert config_path("cifar10").endswith("configs/cifar10.py")
    assert config_path("cifar10_table2:mu_fixed_l").endswith("cifar10_table2.py:mu_fixed_l")
    own = tmp_path / "mine.py"
    own.write_text("")
    assert config_path(str(own)) == str(own)
    with pytest.raises(UserError, match="packaged: celebahq256, cifar10"):
        config_path("cifar11")


@pytest.mark.parametrize("text, message", [
    ("def get_config():\n    return {\n", "SyntaxError: .*line 2"),
    ("import nosuch_module\n", "mine.py, line 1: ModuleNotFoundError: No module"),
    ("def get_config():\n    x = 1\n    return y\n", "mine.py, line 3: NameError"),
    ("x = 1\n", "no attribute 'get_config'"),
    ("def get_config():\n    return None\n", "returns NoneType, not a ConfigDict"),
    ("from ddpm_jax.configs import digits\ndef get_config():\n    c = digits.get_config()\n"
     "    c.train.stepz = 3\n    return c\n", "no field 'train.stepz' .did you mean train.steps"),
])
def test_a_mistake_in_a_config_file_is_one_line(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=f"--config=.*mine.py: .*{message}") as caught:
        load_config(str(tmp_path / "mine.py"))
    assert "\n" not in str(caught.value)
