"""`ddpm export`: what leaves, from which checkpoint, and what is refused."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "interchange"))

from made_up import SMALL, assert_bit_equal, flat, random_params, small_config  # noqa: E402

from ddpm_jax import experiment  # noqa: E402
from ddpm_jax.cli import export  # noqa: E402
from ddpm_jax.errors import UserError  # noqa: E402
from ddpm_jax.formats.safetensors import open_safetensors  # noqa: E402
from ddpm_jax.interchange import parameter_names  # noqa: E402
from ddpm_jax.interchange.diffusers.read import open_diffusers  # noqa: E402
from ddpm_jax.interchange.workdir import training_state, write_run  # noqa: E402


@pytest.fixture
def make_run(tmp_path):
    def make(facts, **sections):
        config = small_config(**sections)
        exp = experiment.build_model(config, jax.devices()[:1])
        state = training_state(exp, 41, random_params(exp.model), random_params(exp.model, 1))
        write_run(tmp_path / "run", exp, state, facts)
        return tmp_path / "run"

    return make


def test_diffusers_folder_holds_the_averaged_or_the_raw_weights(tmp_path, make_run):
    folder = make_run({"origin": "a friend", "step": 41, "averaged": True})
    assert export.export_diffusers(folder, tmp_path / "ema") == 41
    assert export.export_diffusers(folder, tmp_path / "raw", step=41, ema=False) == 41
    for name, seed, word in (("ema", 1, "moving average"), ("raw", 0, "raw, not averaged")):
        model = open_diffusers(tmp_path / name)
        assert_bit_equal(parameter_names.params_from_state_dict(model.state_dict, SMALL),
                         random_params(SMALL, seed))
        card = (tmp_path / name / "README.md").read_text()
        assert word in card and "41 steps" in card and "a friend" in card


def test_card_of_weights_that_came_as_one_set(tmp_path, make_run):
    folder = make_run({"origin": "hf://a/b", "step": 41, "averaged": False})
    export.export_diffusers(folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "as they were imported (one set" in card and "Weights imported from hf://a/b." in card


def test_safetensors_file_carries_our_names_and_the_config(tmp_path, make_run):
    out = tmp_path / "x.safetensors"
    assert export.export_safetensors(make_run({}), out) == 41
    arrays, metadata = open_safetensors(out)
    expected = flat(random_params(SMALL, 1))
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name].read(), array)
    assert metadata["step"] == "41" and metadata["weights"] == "averaged"
    assert json.loads(metadata["config"])["model"]["ch"] == 32
    with pytest.raises(UserError, match="exists"):
        export.export_safetensors(tmp_path / "run", out)


def test_what_cannot_be_exported_leaves_nothing(tmp_path, make_run):
    folder = make_run({}, diffusion={"predict": "x_prev"})
    with pytest.raises(UserError, match="predict=x_prev"):
        export.export_diffusers(folder, tmp_path / "out")
    with pytest.raises(UserError, match="no such checkpoint.*there are 41"):
        export.export_diffusers(folder, tmp_path / "out", step=7)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_no_run_there(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        export.export_diffusers(tmp_path, tmp_path / "out")


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_real_pipeline_draws_what_ddpm_sample_draws(tmp_path, make_run, monkeypatch):
    """One workdir, two programs, the same noise: at most one level of 255 apart."""
    lib = pytest.importorskip("diffusers")
    import diffusers.pipelines.ddpm.pipeline_ddpm as pipeline_module
    import diffusers.schedulers.scheduling_ddpm as scheduler_module
    import jax.numpy as jnp
    import torch

    from ddpm_jax.sample import sample
    from ddpm_jax.training import rng

    steps, seed, count = 10, 3, 8
    folder = make_run({}, diffusion={"num_timesteps": steps})
    export.export_diffusers(folder, tmp_path / "out")
    assert sample(folder, tmp_path / "images", num=count, seed=seed)
    with np.load(tmp_path / "images" / "samples.npz") as images:
        ours = images["arr_0"].astype(np.int16)

    def noise(t):
        x = rng.image_noise(rng.run_key(np.uint32(seed)), jnp.arange(count), jnp.int32(t),
                            (SMALL.image_size, SMALL.image_size, 3))
        return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())

    waiting = iter([noise(-1), *(noise(t) for t in range(steps - 1, 0, -1))])
    for module in (pipeline_module, scheduler_module):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(waiting))
    pipeline = lib.DDPMPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=count, num_inference_steps=steps, output_type="np").images
    difference = np.abs(ours - np.round(theirs * 255).astype(np.int16))
    assert next(waiting, None) is None and ours.std() > 20
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
