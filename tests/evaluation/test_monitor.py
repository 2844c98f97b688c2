"""Evaluation at the cadence of a training run."""

import numpy as np
import pytest

from ddpm_jax.evaluation import classifier
from ddpm_jax.evaluation.monitor import periodic


@pytest.mark.slow
def test_periodic_gives_the_same_numbers_twice_and_compiles_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_epochs", lambda n: 1)
    (exp, params, _), _ = tiny(1, **{"eval.metrics": "offline"})
    evaluate = periodic(classifier_dir=str(tmp_path))
    first = evaluate(exp, params, 10)
    compiled = []
    monkeypatch.setattr(type(exp.runner), "compile", compiled.append, raising=False)
    assert evaluate(exp, params, 20) == first and not compiled
    assert {"bpd_test", "FD-cnn", "FD-rand@0", "rate_test", "eps_loss_test_0"} <= first.keys()
    assert all(np.isfinite(v) for v in first.values())
    assert not any(k.startswith("fid") for k in first)
