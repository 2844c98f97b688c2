"""Evaluation at the cadence of a training run."""

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import classifier
from ddpm_jax.evaluation.monitor import check, periodic


@pytest.mark.slow
def test_periodic_gives_the_same_numbers_twice_and_compiles_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_epochs", lambda n: 1)
    (exp, params, _), _ = tiny(1, **{"eval.metrics": "offline"})
    evaluate = periodic(classifier_dir=str(tmp_path))
    first = evaluate(exp, params, 10)
    compiled = []
    monkeypatch.setattr(type(exp.runner), "compile", compiled.append, raising=False)
    assert evaluate(exp, params, 20) == first and not compiled
    assert {"bpd_test", "FD-cnn", "FD-rand@0", "rate_test", "eps_loss_test_0",
            "FD-rand@0_equal_n"} <= first.keys() and "bpd_test_n" not in first
    assert all(np.isfinite(v) for v in first.values())
    assert not any(k.startswith("fid") for k in first)


@pytest.mark.parametrize("fields, message", [
    ({"eval.metrics": "fdi"}, "config.eval.metrics=fdi is not known; known: bpd"),
    ({"eval.metrics": " "}, "config.eval.metrics is empty"),
    ({"eval.metrics": "fid"}, "config.eval.metrics=fid .* --reference=FILE"),
    ({"eval.metrics": "is"}, "Inception's weights are needed"),
    ({"eval.metrics": "offline", "eval.num": 1}, "config.eval.num=1: offline needs 2 images"),
    ({"eval.metrics": "offline", "eval.num": 0}, "config.eval.num=0 must be at least 1"),
    ({"eval.bpd_num": 0}, "config.eval.bpd_num=0 must be at least 1"),
    ({"eval.best": "nosuch"}, "config.eval.best=nosuch .* bpd_test, rate_test"),
    ({"eval.best": "FD-cnn", "eval.metrics": "bpd"}, "config.eval.best=FD-cnn"),
    ({"eval.best": "bpd_train"}, "config.eval.best=bpd_train"),
    ({"eval.best": "bpd_test_n"}, "config.eval.best=bpd_test_n is not among"),
    ({"eval.best": "FD-cnn_equal_n"}, "config.eval.best=FD-cnn_equal_n is not among"),
    ({"eval.best": "is_openai10", "eval.metrics": "bpd"}, "config.eval.best=is_openai10"),
])
def test_what_would_end_the_first_evaluation_is_refused_before(fields, message, tiny, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/absent")
    (exp, _, _), _ = tiny(**fields)
    with pytest.raises(UserError, match=message):
        check(exp)


@pytest.mark.parametrize("best", ["", "bpd_test", "FD-cnn", "FD-rand@0_equal_n", "eps_loss_test_3"])
def test_values_that_an_evaluation_gives_may_be_the_best(best, tiny):
    check(tiny(**{"eval.best": best, "eval.metrics": "offline"})[0].exp)


def test_a_set_of_one_picture_is_refused_before(tiny, tmp_path):
    from PIL import Image
    for split, count in (("train", 3), ("test", 1)):
        folder = tmp_path / split / "a"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(folder / f"{i}.png")
    fields = {"data.name": "folder", "data.dir": str(tmp_path)}
    with pytest.raises(UserError, match="offline needs 2 real images .* split test, has 1"):
        check(tiny(**fields, **{"eval.metrics": "offline"})[0].exp)
    check(tiny(**fields, **{"eval.metrics": "bpd"})[0].exp)
