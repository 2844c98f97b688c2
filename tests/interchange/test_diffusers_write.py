"""Exported folders: their files, and real diffusers loading them."""

import jax
import numpy as np
import pytest
from made_up import SMALL, assert_bit_equal, random_params, small_config

from ddpm_jax import experiment
from ddpm_jax.config import to_json
from ddpm_jax.diffusion.guidance import guided
from ddpm_jax.diffusion.prediction import VARIANCES
from ddpm_jax.errors import UserError
from ddpm_jax.formats.safetensors import open_safetensors
from ddpm_jax.interchange import parameter_names
from ddpm_jax.interchange.diffusers.read import open_diffusers
from ddpm_jax.interchange.diffusers.write import write_folder


def small():
    config = small_config()
    return experiment.build_model(config, jax.devices()[:1]), to_json(config)


def test_exported_folder(tmp_path):
    exp, config = small()
    params = random_params(SMALL)
    out = tmp_path / "out"
    write_folder(out, params, exp, config, step=1234, weights="averaged", version="9.9",
                 origin="somewhere else")
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == ["README.md", "model_index.json", "scheduler/scheduler_config.json",
                     "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    card = (out / "README.md").read_text()
    for word in ("1,234 steps", "somewhere else", "averaged", "DDPMPipeline", "9.9",
                 '"num_timesteps": 50', "num_inference_steps=50"):
        assert word in card
    model = open_diffusers(out)
    assert_bit_equal(params, parameter_names.params_from_state_dict(model.state_dict, SMALL))
    _, metadata = open_safetensors(model.weights)
    assert metadata == {"format": "pt"}
    with pytest.raises(UserError, match="not an empty folder"):
        write_folder(out, params, exp, config, step=1, weights="averaged", version="9.9")
    assert "1,234" in (out / "README.md").read_text()


def test_classes_and_a_learned_variance_come_back(tmp_path):
    config = small_config(model={"num_classes": 3, "label_dropout": 0.2},
                          diffusion={"variance": "learned_range", "loss": "hybrid"})
    exp = experiment.build_model(config, jax.devices()[:1])
    params = random_params(exp.model)
    write_folder(tmp_path / "out", params, exp, to_json(config), step=1, weights="raw", version="0")
    found = open_diffusers(tmp_path / "out")
    assert found.config["num_class_embeds"] == 4 and found.config["out_channels"] == 6
    stored = to_json(config)
    for section, values in found.fields.items():
        for field, value in values.items():
            value = list(value) if isinstance(value, tuple) else value
            assert stored[section][field] == value, field
    assert_bit_equal(params, parameter_names.params_from_state_dict(found.state_dict, exp.model))
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert "class_labels=labels" in code and "full_like(labels, 3)" in code
    path = tmp_path / "out" / "unet" / "config.json"
    path.write_text(path.read_text().replace('"out_channels": 6', '"out_channels": 3'))
    with pytest.raises(UserError, match="out_channels=3, but .* variance_type needs 6"):
        open_diffusers(tmp_path / "out")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_a_cosine_chain_with_classes_goes_through_real_diffusers_and_back(tmp_path, monkeypatch):
    """The digits' kind of model; the card's loop is guided as our samplers are."""
    lib = pytest.importorskip("diffusers")
    import torch

    config = small_config(
        model={"num_classes": 3, "label_dropout": 0.2},
        diffusion={"num_timesteps": 4, "variance": "learned_range", "loss": "hybrid"})
    config.diffusion.schedule = {"name": "cosine", "offset": 0.0, "max_beta": 0.5}
    exp = experiment.build_model(config, jax.devices()[:1])
    params, folder = random_params(exp.model), tmp_path / "out"
    write_folder(folder, params, exp, to_json(config), step=1, weights="raw", version="0")
    found = open_diffusers(folder).fields["diffusion"]
    assert found["schedule"] == {"name": "cosine", "offset": 0.0, "max_beta": 0.5}

    pipeline = lib.DDPMPipeline.from_pretrained(folder, local_files_only=True)
    np.testing.assert_allclose(pipeline.scheduler.betas.numpy(), exp.betas, rtol=1e-6)
    pipeline.save_pretrained(tmp_path / "theirs")
    assert open_diffusers(tmp_path / "theirs").fields["diffusion"] == found

    inputs = []
    step = lib.DDPMScheduler.step

    def watched(self, output, t, x, **keywords):
        inputs.append((output.clone(), int(t), x.clone()))
        return step(self, output, t, x, **keywords)

    monkeypatch.setattr(lib.DDPMScheduler, "step", watched)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/this/folder", str(folder))
    exec(code.replace("guidance = 1.0", "guidance = 2.5"), {})
    assert [t for _, t, _ in inputs] == [3, 2, 1, 0]
    output, t, x = (np.moveaxis(a.numpy(), 1, -1) if torch.is_tensor(a) else a for a in inputs[1])
    ours = jax.jit(guided(experiment.denoise_fn(exp, params), 2.5, exp.model.no_label,
                          VARIANCES["learned_range"]))
    with jax.default_matmul_precision("highest"):
        wanted = ours(x, np.full(3, t), labels=np.arange(3))
    np.testing.assert_allclose(output, wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_real_pipeline_loads_and_runs_an_exported_folder(tmp_path):
    lib = pytest.importorskip("diffusers")
    exp, config = small()
    write_folder(tmp_path / "out", random_params(SMALL), exp, config, step=1,
                 weights="averaged", version="0")
    pipeline = lib.DDPMPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    assert pipeline.scheduler.config.variance_type == "fixed_large"
