"""Exported folders: their files, and real diffusers loading them."""

import jax
import numpy as np
import pytest
from made_up import SMALL, assert_bit_equal, random_params, small_config

from ddpm_jax import experiment
from ddpm_jax.config import to_json
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
