"""Figures of an untrained model: what must hold whatever it has learned."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import digits

from ddpm_jax import experiment
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import classifier
from ddpm_jax.evaluation.along import evaluate_along
from ddpm_jax.evaluation.evaluate import evaluate_run
from ddpm_jax.evaluation.features import Model
from ddpm_jax.evaluation.options import Options
from ddpm_jax.evaluation.session import Session, Splits
from ddpm_jax.reproduction import figures


@pytest.fixture(scope="module")
def run():
    config = digits()
    config.update_from_flattened_dict({
        "model.ch": 8, "model.ch_mult": (1,), "model.num_res_blocks": 1,
        "model.attn_resolutions": (), "diffusion.num_timesteps": 8,
        "diffusion.schedule.beta_end": 0.5, "train.batch_size": 8, "sampler.batch_size": 8})
    exp = experiment.build_model(config, jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32),
                          exp.abstract_params)
    return figures.Run(exp, params, Splits("digits", "", exp.image_shape), {})


def cells(picture, rows):
    """[rows, columns, 8, 8] of a tiled picture of digits."""
    picture = np.pad(picture, ((0, 1), (0, 1), (0, 0)))  # the line that parts the images, last too
    size = picture.shape[0] // rows
    grid = picture.reshape(rows, size, -1, size, 1).swapaxes(1, 2)
    return grid[:, :, :8, :8, 0].astype(float)


def test_a_later_fork_shares_more(run):
    drawn = figures.shared_latents(run)
    rows = cells(drawn.pictures["shared_latents"], figures.ROWS)
    assert rows.shape == (figures.ROWS, figures.COLUMNS, 8, 8)
    spread = [row.std(axis=0).mean() for row in rows]
    assert spread[-1] < spread[0] and spread == pytest.approx(list(drawn.numbers.values()))


def test_interpolation_starts_and_ends_with_the_images(run):
    drawn = figures.interpolation(run)
    rows = cells(drawn.pictures["interpolation"], figures.ROWS)
    source = run.sources["test"]
    assert rows.shape[1] == figures.COLUMNS + 3
    for k in range(figures.ROWS):
        np.testing.assert_array_equal(rows[k, 0], source[2 * k][..., 0])
        np.testing.assert_array_equal(rows[k, -1], source[2 * k + 1][..., 0])
        ends = np.abs(rows[k, 1] - rows[k, -2]).mean()
        neighbours = np.abs(np.diff(rows[k, 1:-1], axis=0)).mean()
        assert neighbours < ends


def test_interpolation_of_fewer_images_and_of_one_step(run):
    exp = run.exp
    config = exp.config.copy_and_resolve_references()
    config.sampler.steps = 1
    few = dataclasses.replace(run.sources["test"], size=3)
    drawn = figures.interpolation(run._replace(
        exp=exp._replace(config=config), sources={"train": few}))
    rows = cells(drawn.pictures["interpolation"], 1)
    np.testing.assert_array_equal(rows[0, [0, -1]], [few[0][..., 0], few[1][..., 0]])
    with pytest.raises(UserError, match="fig. 8 mixes pairs of images; digits, split test, has 1"):
        figures.interpolation(run._replace(sources={"train": dataclasses.replace(few, size=1)}))


@pytest.mark.slow
def test_progressive_has_a_frame_and_scores_a_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_epochs", lambda n: 1)
    options = Options(metrics=("offline",), num=40, classifier_dir=str(tmp_path))
    model = Model(run.exp, run.params, {"step": 1, "weights": "ema"})
    session = Session(run.exp.runner, run.sources)

    def along(looks, shown):
        return evaluate_along(model, options, session, looks=looks, shown=shown)

    drawn = figures.progressive(run._replace(along=along))
    key = next(k for k in drawn.numbers if k.startswith("FD-cnn@")).split()[0]
    assert list(drawn.numbers) == [f"{name} after {s}" for s in range(1, 9)
                                   for name in ("FD-rand@0", key)]
    page = "".join(drawn.sections)
    assert page.count('class="frame"') == 8 and "after 1 of 8 reverse steps" in page
    # The last look is the image itself, and scored like one.
    records, _ = evaluate_run(model, options._replace(bpd_num=1), session)
    values = records[0][1]
    for name in ("FD-rand@0", key):
        assert drawn.numbers[f"{name} after 8"] == pytest.approx(values[name], rel=1e-3)


def test_rate_has_the_rows_of_table_4_and_a_verdict_only_for_the_paper(run):
    exp = run.exp
    values = {"terms_test": [1.0] * 1000, "prior_test": 0.0, "mse_test": [0.25] * 1000}
    drawn = figures.rate(run._replace(values=values))
    assert drawn.numbers["after 1000"] == [999.0, 63.75] and "verdict" not in "".join(
        drawn.sections)
    config = exp.config.copy_and_resolve_references()
    config.data.name = "cifar10"
    drawn = figures.rate(run._replace(exp=exp._replace(config=config), values=values))
    assert "".join(drawn.sections).count(">FAIL<") == 10
    assert "no bound" in "".join(figures.rate(run).sections)
