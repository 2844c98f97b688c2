"""Samples of a run by several samplers, each evaluated once, in one evaluation.json."""

import jax
import numpy as np
from tiny_run import config

from ddpm_jax import experiment
from ddpm_jax.evaluation import classifier
from ddpm_jax.evaluation.features import Model
from ddpm_jax.evaluation.options import Options
from ddpm_jax.evaluation.session import Session, Splits
from ddpm_jax.reproduction import cells
from ddpm_jax.reproduction.paper_results import Chain
from ddpm_jax.reproduction.targets import TARGETS, Request, existing


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
