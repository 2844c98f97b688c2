import functools
import inspect
import json
import math
import pathlib
import re

import jax
import pytest
from tiny_run import digits

from ddpm_jax.config import (
    CONFIGS,
    RESUME_MAY_CHANGE,
    config_path,
    differing_fields,
    flatten,
    from_json,
    load_config,
    load_with_fields,
    override,
    packaged_configs,
    to_json,
)
from ddpm_jax.config_checks import (
    IDLE,
    MODEL_RANGES,
    TRAINING_RANGES,
    check_model,
    check_training,
    idle_fields,
)
from ddpm_jax.diffusion.schedule import BETAS
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model


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


def test_the_docs_list_what_a_resume_may_change():
    page = pathlib.Path(__file__).parent.parent / "docs" / "training.md"
    text = " ".join(page.read_text().split())
    listed = re.search(r"A resume may change (.*?); anything else is refused", text).group(1)
    assert sorted(re.findall(r"`([^`*]+)\*?`", listed)) == sorted(RESUME_MAY_CHANGE)


def test_config_names(tmp_path):
    packaged = str(CONFIGS / "cifar10.py")
    assert config_path("cifar10") == (packaged, "")
    assert config_path("configs/digits.py") in (    # the second where the current folder has none
        ("configs/digits.py", ""), (str(CONFIGS / "digits.py"), ""))
    assert config_path("cifar10_table2:mu_fixed_l") == (
        str(CONFIGS / "cifar10_table2.py"), "mu_fixed_l")
    own = tmp_path / "mine.py"
    own.write_text("")
    assert config_path(str(own)) == (str(own), "")
    with pytest.raises(UserError, match="packaged: celebahq256, cifar10"):
        config_path("cifar11")


def test_a_packaged_name_does_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "digits").write_text("no config")
    assert load_config("cifar10").data.name == "cifar10"
    assert load_config("digits").data.name == "digits"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cifar10.py").write_text(OWN)
    assert load_config("configs/cifar10.py").train.steps == 5      # a path means that file


OWN = """from ddpm_jax.configs import default

def get_config(steps="5"):
    config = default.get_config()
    config.train.steps = int(steps)
    return config
"""


@pytest.mark.parametrize("name", ["own.py", "own", "a:b/own.py", "a:b/own:x"])
def test_files_of_any_name_are_configs(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(OWN)
    assert load_config(str(path)).train.steps == 5
    assert load_config(f"{path}:7").train.steps == 7


def test_a_runs_config_is_a_config(tmp_path):
    config = load_config("digits")
    config.train.steps = 77
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(config)))
    assert load_config(str(path)).to_dict() == config.to_dict()
    with pytest.raises(UserError, match="is a folder; a run's config is .*/config.json"):
        load_config(str(tmp_path))


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


@pytest.mark.parametrize("name, text, message", [
    ("c.yaml", "train:\n  steps: 5\n", "SyntaxError: .*a Python file with get_config"),
    ("config.json", '{"train": {"stepz": 5}}', "no field 'train.stepz' .did you mean train.steps"),
])
def test_files_of_other_formats_are_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"--config={tmp_path / name}: .*{message}"):
        load_config(str(tmp_path / name))


@pytest.mark.parametrize("name", BETAS)
def test_a_changed_schedule_takes_its_own_keywords(name):
    from_flags = load_with_fields("cifar10", {"diffusion.schedule.name": name})
    override(from_flags, {"diffusion.schedule.name": name})     # as the flag does
    by_override = load_config("cifar10")
    override(by_override, {"diffusion.schedule.name": name})
    for config in (from_flags, by_override):
        keywords = config.diffusion.schedule.to_dict()
        assert keywords.pop("name") == name
        assert keywords == {k: p.default for k, p in inspect.signature(BETAS[name]).parameters
                            .items() if k != "num_timesteps"}
        if "betas" in keywords:     # a list of them, as long as the chain
            keywords["betas"] = [0.1] * 10
        BETAS[name](num_timesteps=10, **keywords)


def test_the_keywords_of_a_changed_schedule_can_be_set():
    config = load_with_fields("digits", {"diffusion.schedule.name": "cosine",
                                         "diffusion.schedule.offset": "0.01"})
    config.diffusion.schedule.offset = 0.01
    with pytest.raises(UserError, match="no field 'diffusion.schedule.beta_start'"):
        load_with_fields("digits", {"diffusion.schedule.name": "cosine",
                                    "diffusion.schedule.beta_start": "0.01"})


def test_keywords_left_to_the_default_are_no_other_run():
    new = to_json(load_config("digits"))
    old = json.loads(json.dumps(new))
    new["diffusion"]["schedule"] = {"name": "cosine", "offset": 0.008, "max_beta": 0.999}
    old["diffusion"]["schedule"] = {"name": "cosine"}
    assert not differing_fields(old, new)
    old["diffusion"]["schedule"]["offset"] = 0.01
    assert differing_fields(old, new) == ["diffusion.schedule.offset: 0.01 -> 0.008"]


def test_a_field_that_is_newer_than_the_run_has_its_default_there():
    new = to_json(load_config("cifar10"))
    old = json.loads(json.dumps(new))
    del old["optimizer"]["decay_steps"]
    assert not differing_fields(old, new)
    new["optimizer"]["decay_steps"] = 9
    assert differing_fields(old, new) == ["optimizer.decay_steps: 0 -> 9"]


@pytest.mark.parametrize("field, wanted", [
    ("trian.steps", "train.steps"), ("steps", "train.steps"), ("model.attn_resolution",
     "model.attn_resolutions"), ("optimizer.lerning_rate", "optimizer.learning_rate")])
def test_a_misspelt_field_names_a_similar_one(field, wanted):
    with pytest.raises(UserError, match=f"no field .{field}. .did you mean .*--config.{wanted}"):
        load_with_fields("cifar10", {field: "1"})


def numbers(config):
    """{field: value} of every number, and of every tuple of numbers."""
    return {name: value for name, value in flatten(config.to_dict()).items()
            if not isinstance(value, bool | str | None)}


def test_every_number_has_a_range():
    assert set(numbers(load_config("default"))) <= {*MODEL_RANGES, *TRAINING_RANGES}
    for law in BETAS.values():
        own = {f"diffusion.schedule.{name}" for name in inspect.signature(law).parameters}
        assert own - {"diffusion.schedule.num_timesteps"} <= {*MODEL_RANGES}


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configs_are_within_the_ranges(name):
    config = load_config(name)
    check_model(config)
    check_training(config, 1)
    assert idle_fields(config) == []


# What makes other fields idle: a value that does, one that does not.
SWITCHES = {"parallel.shards": (1, 2), "train.clip_scope": ("global", "per_replica"),
            "model.num_classes": (0, 10), "data.resident": (True, False),
            "eval.sample_every": (0, 5), "eval.every": (0, 5)}


@pytest.mark.parametrize("field, value", [
    ("parallel.cut", "params"), ("parallel.clip_kernel", "turned"), ("train.clip_replicas", 4),
    ("model.label_dropout", 0.2), ("data.threads", 2), ("eval.sample_num", 4),
    ("eval.metrics", "bpd"), ("eval.num", 7), ("eval.bpd_num", 7), ("eval.best", "bpd")])
def test_a_field_without_effect_is_named_with_the_one_that_makes_it_so(field, value):
    other = IDLE[field][0]
    off, on = SWITCHES[other]
    config = load_config("default")
    override(config, {other: off})
    assert idle_fields(config) == []
    override(config, {field: value})
    assert idle_fields(config) == [f"config.{field}={value} has no effect with {other}={off}"]
    override(config, {other: on})
    assert idle_fields(config) == []


@pytest.mark.parametrize("field", sorted(numbers(load_config("default"))))
@pytest.mark.parametrize("value", [-1, 0, 10**9, math.nan, math.inf, "1"])
def test_a_number_works_or_is_refused_in_one_line(field, value):
    config = digits()
    section, _, last = field.rpartition(".")
    part = functools.reduce(getattr, section.split(".") if section else [], config)
    old = part[last]
    if isinstance(value, int) and isinstance(old, float):
        value = float(value)
    with config.ignore_type():         # of a file: a flag refuses text and fractions itself
        part[last] = (value,) if isinstance(old, tuple) else value
    allowed = {**MODEL_RANGES, **TRAINING_RANGES}[field]
    if value in (-1, "1") or value != value or value == math.inf:
        with pytest.raises(UserError, match=f"config.{field}=.* must be a"):
            check_model(config)
            check_training(config, 1)
        return
    try:
        check_model(config)
        check_training(config, 1)
    except UserError as error:
        assert field.rpartition(".")[2] in str(error)
        return
    assert allowed.has(value)
    if section in ("data", "model", "diffusion", "diffusion.schedule", ""):
        try:
            build_model(config, jax.devices()[:1])
        except UserError as error:
            assert "config." in str(error)


@pytest.mark.parametrize("stored", [
    [1], "text", {"train": {"clip_norm": []}}, {"model": {"ch": {}}}])
def test_a_stored_config_that_is_none_is_one_line(stored):
    with pytest.raises(UserError, match="the stored config is damaged"):
        from_json(stored)
