"""`ddpm train --dry_run`: figures of the paper, and a command that means the same."""

import re
import shlex

import pytest
from tiny_run import config

from ddpm_jax import checkpoints, plan
from ddpm_jax.cli.common import Definer
from ddpm_jax.cli.main import main
from ddpm_jax.config import load_config, to_json
from ddpm_jax.errors import UserError


def test_hours_of_the_paper(tmp_path):
    """Appendix B: 10.6 hours for 800k steps on a TPU v3-8."""
    stored = to_json(load_config("cifar10"))
    paper, card = plan._hours(stored, 35_746_307, None)
    assert paper.startswith("10.6 on a TPU v3-8")
    hours = 800_000 * 128 / 2748 / 3600  # docs/h100.md: float32, the per-replica clip
    assert card == f"{hours:.3g} on one H100, docs/h100.md (2,748 images/s)"
    stored["model"]["dtype"], stored["train"]["clip_scope"] = "bfloat16", "global"
    assert "(7,887 images/s)" in plan._hours(stored, 35_746_307, None)[1]  # not XLA's 6,791
    assert "not measured" in plan._hours(stored, 1, tmp_path)[0]
    (tmp_path / "metrics.jsonl").write_text('{"step": 100, "images_per_second": 128000.0}\n')
    assert plan._hours(stored, 1, tmp_path) == [
        "0.222 as this run was measured so far (128,000 images/s)"]


def test_a_dry_run_prints_a_command_that_means_the_same_and_writes_nothing(tmp_path, capsys):
    words = ["--config=digits", "--config.model.ch=8", "--config.model.ch_mult=(1,2,2)",
             "--config.model.num_groups=4", "--config.diffusion.schedule.name=cosine",
             "--config.parallel.cut=params"]
    assert main(["train", "--dry_run", *words, f"--workdir={tmp_path}/a run"]) == 0
    text = capsys.readouterr().out
    command = shlex.split(re.search("^command +(.*)$", text, re.M)[1])
    assert command[:2] == ["ddpm", "train"] and f"--workdir={tmp_path}/a run" in command

    def meant(words):
        define = Definer(words)
        define.config()
        define.workdir()
        define.parse()
        return to_json(define.values.config)

    assert meant(command[2:]) == meant(words)
    assert re.search("^warning +config.parallel.cut=params .* with parallel.shards=1$", text, re.M)
    assert "* model.ch = 8" in text and re.search("^parameters  [0-9,]+$", text, re.M)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_training_would(tmp_path):
    with pytest.raises(UserError, match="train.batch_size=7 is not divisible"):
        plan.describe(config(**{"train.batch_size": 7}), "digits")
    checkpoints.claim(tmp_path, to_json(config()))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match="another config: seed: 0 -> 1"):
        plan.describe(config(seed=1), "digits", tmp_path)
