import pytest

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError


def parse(*words):
    define = common.Definer(words)
    define.config()
    define.workdir()
    define.parse()
    return define.values


def test_a_packaged_config_with_changed_fields():
    values = parse("--config=digits", "--config.train.steps=3", "--config.model.ch_mult=(1,3)")
    assert values.config.train.steps == 3 and values.config.model.ch_mult == (1, 3)
    assert common.config_name(values) == "digits"
    assert parse("--config", "cifar10").config.data.name == "cifar10"
    with pytest.raises(UserError, match="no such file"):
        parse("--config=dogs")


def test_fields_may_stand_before_the_config():
    values = parse("--config.train.steps=3", "--workdir=x", "--config.model.ch", "8", "--config",
                   "digits", "--config.seed=4")
    assert (values.config.train.steps, values.config.model.ch, values.config.seed) == (3, 8, 4)
    assert values.config.data.name == "digits" and values.workdir == "x"


def test_without_a_config_a_run_goes_on_with_its_own(tmp_path):
    def of_run(*words):
        define = common.Definer(words)
        define.config(of_run=True)
        define.workdir()
        define.path("init_from", None, "")
        define.parse()
        return define.values.config

    config = parse("--config=digits", "--config.seed=7").config
    (tmp_path / "config.json").write_text(config.to_json())
    assert of_run(f"--workdir={tmp_path}").seed == 7
    assert of_run("--config.train.steps=3", "--workdir", str(tmp_path)).train.steps == 3
    assert of_run(f"--workdir={tmp_path}/new", f"--init_from={tmp_path}:100").seed == 7
    assert of_run("--config=digits", f"--workdir={tmp_path}").seed == 0
    assert of_run(f"--workdir={tmp_path}/new") is None


def test_each_call_has_its_own_values():
    first, second = parse("--config=digits", "--config.train.steps=3"), parse("--config=digits")
    assert first.config.train.steps == 3 != second.config.train.steps


def test_the_home_folder_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from ddpm_jax.configs.digits import get_config\n")
    values = parse("--config=~/mine.py", "--workdir=~/run")
    assert values.workdir == f"{tmp_path}/run" and values.config.data.name == "digits"
    assert parse("--workdir=gs://bucket/run").workdir == "gs://bucket/run"


def test_names_of_configs(tmp_path):
    run, odd = tmp_path / "run", tmp_path / "a:b"
    run.mkdir()
    odd.mkdir()
    config = parse("--config=digits").config
    (run / "config.json").write_text(config.to_json())
    (odd / "mine.py").write_text("from ddpm_jax.configs.digits import get_config\n")
    for value, name in ((f"{run}/config.json", "run"), (f"{odd}/mine.py", "mine"),
                        ("cifar10_table2:mu_fixed_l", "cifar10_table2")):
        assert common.config_name(parse(f"--config={value}")) == name


@pytest.mark.parametrize("word, expected", [
    ("--num=x", "a whole number"), ("--num=", "a whole number"), ("--num=1.5", "a whole number"),
    ("--share=x", "a number"), ("--flag=maybe", "true or false"), ("--kind=c", "one of a, b"),
    ("--config.train.steps=1e3", "a whole number"), ("--config.sampler.eta=x", "a number"),
    ("--config.data.flip=x", "true or false")])
def test_a_value_of_another_kind_is_named_in_words(word, expected):
    define = common.Definer(["--config=digits", word])
    define.config()
    define.integer("num", 1, "")
    define.float("share", 0.5, "")
    define.bool("flag", False, "")
    define.enum("kind", "a", ["a", "b"], "")
    with pytest.raises(UserError) as error:
        define.parse()
    assert str(error.value) == f"{word}: expected {expected}"


def test_no_words():
    common.no_words([])
    with pytest.raises(UserError, match="unexpected argument 'x'"):
        common.no_words(["x"])


@pytest.mark.parametrize("words, value", [
    (["--set=a=1,b=2"], ["a=1", "b=2"]), (["--set=a=1", "--set=b=2,c=3"], ["a=1", "b=2", "c=3"]),
    (["--set=a=[1,2],b=(3,4)", "--set", "c=[]"], ["a=[1,2]", "b=(3,4)", "c=[]"]), ([], ["x"])])
def test_lists_are_joined_and_brackets_stay_whole(words, value):
    define = common.Definer(words)
    define.list("set", ["x"], "")
    define.list("splits", None, "")
    assert define.parse() == [] and define.values.set == value and define.values.splits is None


def test_a_flagfile_is_read(tmp_path):
    from ddpm_jax.cli.main import main
    (tmp_path / "flags").write_text("--config=digits\n--config.train.steps=3\n--topology=v12-8\n")
    assert main(["compile", f"--flagfile={tmp_path}/flags"]) == 2
