"""`ddpm inception` from the command line's side."""

import importlib.util
import pathlib

import pytest

from ddpm_jax.cli import main
from ddpm_jax.evaluation.inception import weights

HERE = pathlib.Path(__file__).parents[1]


def handmade(name):
    path = HERE / "evaluation" / "inception" / "test_weights.py"
    spec = importlib.util.spec_from_file_location("weights_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)(module.state())


@pytest.mark.slow
def test_convert_and_check(tmp_path, capsys, monkeypatch):
    images = weights.fingerprint_images()[:2]  # of eight: half a second each
    monkeypatch.setattr(weights, "fingerprint_images", lambda: images)
    source, target = tmp_path / "graph.tgz", tmp_path / "w.npz"
    source.write_bytes(handmade("graph_file"))
    assert main.main(["inception", "convert", str(source), str(target)]) == 2
    assert "--allow_unknown_weights" in capsys.readouterr().err and not target.exists()
    assert main.main(["inception", "convert", str(source), str(target),
                      "--allow_unknown_weights"]) == 0
    assert "94 convolutions" in capsys.readouterr().out
    assert main.main(["inception", "check", str(target)]) == 0
    assert "relative distance" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["convert"], ["convert", "only-one"], ["frobnicate"]])
def test_wrong_use_is_one_line(argv, capsys):
    assert main.main(["inception", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ddpm: error: ") and error.count("\n") == 1 and "usage" in error
