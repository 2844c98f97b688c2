"""The table of metrics: what a row needs, and the path from the command to its function."""

import sys

import jax
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import checkpoints, experiment
from ddpm_jax.config import to_json
from ddpm_jax.evaluation import classifier, extract, html_report, metrics
from ddpm_jax.evaluation.evaluate import evaluate_run
from ddpm_jax.evaluation.options import Options
from ddpm_jax.parallel import hosts

ROOT = ddpm_jax.__path__[0]


def test_every_row_names_parts_and_needs_that_exist():
    for name, row in metrics.METRICS.items():
        assert set(row.parts) <= {*extract.PARTS, metrics.SPACE}, name
        assert row.needs <= {metrics.REFERENCE, metrics.FEATURES, metrics.REALS,
                             metrics.MODEL, metrics.CLASSES}, name
        assert set(row.implies) <= metrics.METRICS.keys() and (row.parts or not row.num), name


def test_a_metric_is_one_function_and_one_row(tiny, monkeypatch):
    def brightness(context, samples):
        return metrics.Result({"brightness": float(samples["channels"][:, 0].mean())})

    monkeypatch.setitem(metrics.METRICS, "brightness", metrics.Metric(brightness, ("channels",)))
    ((label, values, facts),), _ = evaluate_run(*_with(tiny, metrics=("brightness",), num=8))
    assert 0 < values["brightness"] < 255 and facts["num"] == 8 and "8 images" in label


def test_the_rows_are_in_the_help(capsys):
    from ddpm_jax.cli import main
    assert main.main(["evaluate", "--help"]) == 0
    assert f"comma list of {', '.join(metrics.METRICS)} (" in capsys.readouterr().out


def test_the_values_of_a_row_are_among_the_curves(monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "brightness", metrics.Metric(
        lambda context, samples: None, values=("light_{split}",)))
    values = {"light_test": 1.0, "is_tfgan1": 2.0, "eps_loss_test_0": 1.0, "eps_loss_test_1": 2.0,
              "bpd_test": 1.0, "bpd_test_std_error": 1.0, "grad_norm": 1.0}
    sections = html_report.curve_sections([{"step": 1, **values}])
    titles = [section.partition("</h2>")[0].rpartition(">")[2] for section in sections]
    assert titles == ["bpd_test", "eps_loss_test", "is_tfgan1", "light_test"]


class Splitless:
    """As data.datasets.Source, of a data set with one split and no labels."""
    name, split, fingerprint, labels, shape = "made-up", "train", "f", None, (8, 8, 1)

    def __init__(self, images):
        self._images = images

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return self._images[i]


def test_without_a_test_split_the_held_out_images_are_no_references(tiny, monkeypatch):
    """They would be their own nearest neighbours, at distance 0."""
    model, session = tiny()
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    monkeypatch.setattr(session, "sources", {"train": Splitless(images)})
    ((_, values, _),), _ = evaluate_run(model, Options(metrics=("nn",)), session)
    assert values["nn_pixels_median_distance_held_out"] > 0
    assert values["nn_features_median_distance_held_out"] > 0


def _with(tiny, **options):
    model, session = tiny()
    return model, Options(**options), session


@pytest.fixture
def workdir(tiny, tmp_path):
    """A run whose checkpoint of step 1 holds the tiny model."""
    (exp, params, _), _ = tiny(len(jax.devices()))
    checkpoints.claim(tmp_path / "run", to_json(exp.config))
    state = experiment.new_state(experiment.build_training(exp))._replace(
        params=params, ema_params=params)
    store = checkpoints.Checkpoints(tmp_path / "run")
    store.save(1, state, to_json(exp.config))
    store.wait()
    store.close()
    return tmp_path / "run"


def project_files():
    """Files of this package on the stack, innermost first, each run of frames once."""
    found, frame = [], sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and found[-1:] != [name]:
            found.append(name)
        frame = frame.f_back
    return found


@pytest.mark.slow
@pytest.mark.parametrize("names, words", [
    (("offline", "nn"), ("--bpd_num=8", "--classifier_dir={tmp}")),
    pytest.param(("fid",), ("--inception_weights={weights}", "--allow_unknown_weights",
                            "--reference={tmp}/reference.npz", "--force"),
                 marks=pytest.mark.slow)])
@pytest.mark.usefixtures("one_blas_thread")
def test_no_file_is_entered_twice_on_the_way_to_a_number(
        names, words, workdir, seeded_weights, tmp_path, monkeypatch):
    """Walks the stack where a metric's function runs, and where rows come from the devices."""
    from ddpm_jax.cli import common, main
    monkeypatch.setattr(classifier, "default_epochs", lambda n: 1)
    monkeypatch.setattr(common, "join", lambda values, config=None: (None, None))
    seen = {}

    def watched(name, function):
        def run(*args):
            seen.setdefault(name, []).append(project_files())
            return function(*args)

        return run

    for name in (*names, "bpd"):
        row = metrics.METRICS[name]
        monkeypatch.setitem(metrics.METRICS, name, row._replace(
            compute=watched(name, row.compute)))
    monkeypatch.setattr(hosts, "all_rows", watched("rows", hosts.all_rows))
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert main.main([
        "evaluate", f"--workdir={workdir}", f"--metrics={','.join(names)}", "--num=8",
        "--batch_size=8",
        *(w.format(tmp=tmp_path, weights=seeded_weights) for w in words)]) == 0
    assert {*names, "rows"} <= seen.keys()
    for name, stacks in seen.items():
        for files in stacks:
            short = [file.removeprefix(ROOT) for file in files]
            assert short[-1] == "/cli/main.py" and "/cli/evaluate.py" in short, name
            assert len(set(short)) == len(short), f"{name}: {' <- '.join(short)}"
