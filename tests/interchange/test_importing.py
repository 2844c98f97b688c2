"""From another program's files to a run that samples and trains."""

import json

import jax
import numpy as np
import pytest
import tiny_run
from made_up import SMALL, assert_bit_equal, older_names, random_params, restore, small_config

from ddpm_jax import checkpoints, experiment, sample, train
from ddpm_jax.config import from_json, load_config, to_json
from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy
from ddpm_jax.interchange import importing, official, parameter_names, parity
from ddpm_jax.interchange.diffusers.read import Model
from ddpm_jax.interchange.diffusers.write import write_folder


def lazy(array):
    return Lazy(array.shape, array.dtype, lambda: np.array(array))


@pytest.fixture
def checkpoint(monkeypatch):
    """A made-up official checkpoint of SMALL at step 790: part i is the weights of seed i."""
    parts = {part: {k: lazy(v) for k, v in parameter_names.variables_from_params(
        random_params(SMALL, i), SMALL).items()} for i, part in enumerate(
            ("params", "ema_params", "mu", "nu"))}
    found = official.Checkpoint("/x/model.ckpt-790", 790, **parts, notes=[])
    monkeypatch.setattr(importing, "open_official", lambda path: found)
    return found


def test_official_state_arrives_whole(tmp_path, checkpoint, capsys):
    config = small_config()
    result = importing.import_official("x", config, workdir=tmp_path / "run", verify=False)
    assert result.result == "not compared" and "PASS" not in capsys.readouterr().out
    state = restore(tmp_path / "run", config)
    for i, tree in enumerate((state.params, state.ema_params, state.opt_state[0].mu,
                              state.opt_state[0].nu)):
        assert_bit_equal(tree, random_params(SMALL, i))
    assert state.step == 790
    assert state.opt_state[0].count == 790 and state.opt_state[1].count == 790
    facts = json.loads((tmp_path / "run" / "import.json").read_text())
    assert facts["step"] == 790 and facts["averaged"] and facts["optimizer"]
    assert checkpoints.read_config(tmp_path / "run") == to_json(config)


def test_without_ema_and_adam_it_says_so_and_fills_in(tmp_path, checkpoint, monkeypatch):
    bare = checkpoint._replace(ema_params=checkpoint.params, mu={}, nu={})
    monkeypatch.setattr(importing, "open_official", lambda path: bare)
    config = small_config()
    importing.import_official("x", config, workdir=tmp_path / "run", verify=False)
    state = restore(tmp_path / "run", config)
    assert_bit_equal(state.params, state.ema_params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.opt_state[0].mu))
    assert state.opt_state[0].count == 790
    facts = json.loads((tmp_path / "run" / "import.json").read_text())
    assert not facts["averaged"] and not facts["optimizer"]


def test_a_failed_verdict_leaves_nothing(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(parity, "diffusers_peer",
                        lambda *a, **k: (lambda x, t: np.ones_like(x), "a liar"))
    monkeypatch.setattr(parity, "network_eps",
                        lambda model, params: lambda x, t: np.zeros_like(x))
    with pytest.raises(UserError, match="parity: FAIL.*a liar.*nothing was written"):
        importing.import_official("x", small_config(), workdir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_diffusers_cannot_express_is_imported_but_not_compared(tmp_path, monkeypatch):
    arch = SMALL.clone(space_to_depth=2)
    weights = {k: lazy(v) for k, v in parameter_names.variables_from_params(
        random_params(arch), arch).items()}
    found = official.Checkpoint("/x/model.ckpt-1", 1, weights, weights, {}, {}, notes=[])
    monkeypatch.setattr(importing, "open_official", lambda path: found)
    config = small_config(model={"space_to_depth": 2})
    result = importing.import_official("x", config, workdir=tmp_path / "run")
    assert result.result == "not compared" and "space_to_depth=2" in str(result)
    assert_bit_equal(restore(tmp_path / "run", config).ema_params, random_params(arch))


def test_another_architecture_is_refused_before_anything_is_written(tmp_path, checkpoint):
    config = small_config(model={"num_res_blocks": 2})
    with pytest.raises(UserError, match="do not fit the model of this config"):
        importing.import_official("x", config, workdir=tmp_path / "run", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_attention_that_no_level_has_is_refused(tmp_path):
    config = small_config(model={"attn_resolutions": (8, 32)})
    with pytest.raises(UserError, match="sides of 16, 8, 4 pixels"):
        importing.import_official("no such checkpoint", config, workdir=tmp_path / "run")


def test_a_folder_that_holds_something_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        importing.import_official("no such checkpoint", small_config(), workdir=tmp_path)


def write_diffusers(folder, config):
    exp = experiment.build_model(config, jax.devices()[:1])
    write_folder(folder, random_params(SMALL), exp, to_json(config), step=5, weights="averaged",
                 version="0")
    return folder


@pytest.mark.slow
def test_diffusers_config_is_derived_from_the_json(tmp_path, capsys):
    folder = write_diffusers(tmp_path / "ddpm-anything", small_config())
    importing.import_diffusers(str(folder), workdir=tmp_path / "run", verify=False)
    stored = checkpoints.read_config(tmp_path / "run")
    ours = to_json(small_config())
    for section in ("model", "diffusion", "data"):
        assert stored[section] == ours[section]
    state = restore(tmp_path / "run", from_json(stored))
    assert_bit_equal(state.params, random_params(SMALL))
    assert_bit_equal(state.ema_params, random_params(SMALL))
    assert state.step == 0
    said = capsys.readouterr().out
    assert "data and training fields are those of --config=default" in said


@pytest.mark.parametrize("folder, base", [
    ("google/ddpm-cifar10-32", "cifar10"), ("google/ddpm-ema-celebahq-256", "celebahq256"),
    ("hf://google/ddpm-church-256", "lsun_church"), ("x/ddpm-bedroom-256/", "lsun_bedroom"),
    ("ddpm-cat-256", "lsun_cat"), ("ddpm-location-256", "default"), ("ddpm-cat-64", "default"),
    ("my-cifar10-church", "cifar10"),
])
def test_base_config_by_the_folders_name(folder, base):
    size = 32 if "cifar10" in folder else 64 if folder.endswith("64") else 256
    name, config = importing.base_config(folder, {"image_size": size, "channels": 3})
    assert name == base
    assert config.data.name == {"default": "folder"}.get(
        name, load_config(base).data.name)


def test_given_config_keeps_what_the_json_does_not_say(tmp_path):
    folder = write_diffusers(tmp_path / "f", small_config())
    config = small_config(train={"steps": 77}, model={"ch": 64, "dropout": 0.3})
    importing.import_diffusers(str(folder), config, workdir=tmp_path / "run", verify=False)
    stored = checkpoints.read_config(tmp_path / "run")
    assert stored["train"]["steps"] == 77 and stored["model"]["ch"] == 32
    assert config.model.ch == 64  # the caller's own is not touched


@pytest.mark.parametrize("ending, reads_itself", [(".safetensors", True), (".bin", False)])
def test_a_pickle_is_never_handed_to_another_loader(monkeypatch, ending, reads_itself):
    seen = {}
    monkeypatch.setattr(parity, "diffusers_peer",
                        lambda config, state=None, folder=None: seen.update(f=folder, s=state))
    state = older_names({k: lazy(v) for k, v in parameter_names.state_dict_from_params(
        random_params(SMALL), SMALL).items()})
    model = Model(f"/x/diffusion_pytorch_model{ending}", state, {}, {}, "/x", [])
    parity.peer_of_file(model)
    assert (seen["f"] == "/x") == reads_itself and (seen["s"] is None) == reads_itself
    assert reads_itself or "mid_block.attentions.0.to_q.weight" in seen["s"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_imported_runs_sample_and_train_on(tmp_path, checkpoint, monkeypatch):
    config = tiny_run.config(**{"train.steps": 792, "train.log_every": 1})
    arch = experiment.network(config)
    parts = {part: {k: lazy(v) for k, v in parameter_names.variables_from_params(
        random_params(arch, i), arch).items()} for i, part in enumerate(("params", "ema_params"))}
    small = {k: lazy(1e-3 * np.abs(v.read())) for k, v in parts["params"].items()}
    whole = checkpoint._replace(**parts, mu=small, nu=small)
    monkeypatch.setattr(importing, "open_official", lambda path: whole)
    importing.import_official("x", config, workdir=tmp_path / "run", verify=False)
    assert sample.sample(tmp_path / "run", tmp_path / "images", num=8, batch_size=8)
    with np.load(tmp_path / "images" / "samples.npz") as images:
        assert images["arr_0"].shape == (8, 8, 8, 1)
    assert train.train(config, tmp_path / "run", stop=tiny_run.Stop(),
                       watchdog=tiny_run.Watchdog())
    state = restore(tmp_path / "run", config)
    assert state.step == 792 and state.opt_state[0].count == 792
    start = random_params(arch, 1)["conv_in"]["kernel"]
    moved = np.abs(state.ema_params["conv_in"]["kernel"] - start).max()
    assert 0 < moved < 0.1
