"""Samples of a run by several samplers, each evaluated once, in one evaluation.json; imported runs.
"""

import json

import jax
import numpy as np
import pytest
from tiny_run import config

from ddpm_jax import experiment
from ddpm_jax.cli.main import main
from ddpm_jax.config import load_config, override, to_json
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import classifier
from ddpm_jax.evaluation.features import Model
from ddpm_jax.evaluation.options import Options
from ddpm_jax.evaluation.session import Session, Splits
from ddpm_jax.interchange.diffusers.write import write_folder
from ddpm_jax.reproduction import cells
from ddpm_jax.reproduction.paper_results import Chain
from ddpm_jax.reproduction.targets import TARGETS, Request, cell_config, existing


@pytest.mark.slow
def test_each_sampler_is_evaluated_once(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_epochs", lambda n: 1)
    chains = (Chain("noisy", {"name": "ddim", "eta": 1.0}, {4: (), 99: ()}, {}),
              Chain("free", {"name": "ddim", "nodes": "even", "clip_denoised": False}, {4: ()}, {}))
    target = TARGETS["fast"]._replace(chains=chains, metrics=("offline",))
    request = Request(target, options=Options(
        num=40, bpd_num=8, classifier_dir=str(tmp_path / "c")))
    exp = experiment.build_model(config(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32),
                          exp.abstract_params)
    model = Model(exp, params, {"step": 1, "weights": "ema", "workdir": str(tmp_path)})
    sessions = []

    def new_session():
        sessions.append(Session(exp.runner, Splits("digits", "", exp.image_shape),
                                folder=str(tmp_path / "parts")))
        return sessions[-1]

    cells._evaluate_chains(request, model, 1, new_session)
    records = existing(tmp_path)["1"]["paper"].values()
    distances = {record["provenance"]["chain"]: record["values"]["FD-rand@0"]
                 for record in records if "chain" in record["provenance"]}
    assert distances.keys() == {f"{name}, 4 network calls" for name in ("noisy", "free")}
    assert len(set(distances.values())) == 2
    assert exp.config.sampler.name == "ancestral" and len(sessions) == 2
    cells._evaluate_chains(request, model, 1, new_session)
    assert len(sessions) == 2


SETTINGS = ("model.ch=4", "model.ch_mult=[1]", "model.num_res_blocks=1",
            "model.attn_resolutions=[]", "model.num_groups=2", "diffusion.num_timesteps=4")


@pytest.mark.slow
def test_an_imported_run_is_evaluated_and_never_trained(tmp_path, monkeypatch, capsys):
    """By the cell's sampler: 2 steps, where the imported config has all 4. None of those that
    ``fast`` compares is as short as this model's chain."""
    monkeypatch.setattr(classifier, "default_epochs", lambda n: 1)
    config = cell_config(Request(TARGETS["nearest"], config="digits", settings=SETTINGS),
                         "eps_fixed_simple")
    exp = experiment.build_model(config, jax.devices()[:1])
    rng = np.random.default_rng(0)
    write_folder(tmp_path / "theirs", jax.tree.map(
        lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32), exp.abstract_params),
        exp, to_json(config), step=0, weights="", version="0")
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    run = tmp_path / "eps_fixed_simple"
    assert main(["import", "diffusers", f"--path={tmp_path}/theirs", f"--workdir={run}",
                 f"--config={tmp_path}/config.json", "--noverify"]) == 0
    words = ["--config=digits", f"--workdir={tmp_path}", f"--classifier_dir={tmp_path}/c",
             f"--set={','.join(SETTINGS)},sampler.steps=2,sampler.batch_size=16"]
    for target, first in (("nearest", True), ("nearest", False), ("fast", False)):
        assert main(["reproduce", target, *words]) == 0
        said = capsys.readouterr()
        assert "was imported: its weights are taken as they are" in said.err
        assert "no verdict" in (tmp_path / f"{target}.html").read_text()
        if target == "nearest":
            assert "nn_pixels_exact_copies  " in said.out and ("16 images," in said.err) == first
    record, = existing(run)["0"]["paper"].values()
    assert record["provenance"]["sampler_steps"] == 2
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["0"]
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("target, cell, fields, message", [
    ("table1", "eps_fixed_l", {}, r"eps_fixed_l .*\(diffusion.loss: 'mse' -> 'kl'\); import it "
     "with --config=cifar10_table2:eps_fixed_l,"),
    ("table1", "eps_fixed_simple", {"data.name": "celebahq256", "model.dropout": 0.0},
     r"another model than that cell's \(data.name: 'celebahq256' -> 'cifar10'\); "),
    ("improved", "linear1000", {}, r"\(model.attn_resolutions: .*model.num_res_blocks: 2 -> 3\)"),
    ("fast", "eps_fixed_simple", {"diffusion.num_timesteps": 50}, "num_timesteps: 50 -> 1000"),
    ("fast", "eps_fixed_simple", {"model.dropout": 0.0, "sampler.steps": 50, "data.dir": "x"},
     None)])
def test_an_imported_run_has_to_be_the_cells_model(tmp_path, target, cell, fields, message):
    stored = load_config("cifar10")
    override(stored, fields)
    for name, value in (("import.json", {}), ("config.json", to_json(stored))):
        (tmp_path / cell).mkdir(exist_ok=True)
        (tmp_path / cell / name).write_text(json.dumps(value))
    request = Request(TARGETS[target], str(tmp_path))
    if message is None:
        return cells.check(request)
    with pytest.raises(UserError, match=message) as error:
        cells.check(request)
    assert "\n" not in str(error.value)
