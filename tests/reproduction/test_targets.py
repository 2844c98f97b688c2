"""The rows of the table of targets hang together; --set changes a cell's config."""

import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.metrics import METRICS
from ddpm_jax.reproduction import figures, paper_results, targets


def test_rows_name_cells_metrics_and_figures_that_exist():
    rows = targets.TARGETS.values()
    for target in rows:
        assert set(target.cells) <= set(paper_results.CELLS)
        assert set(target.metrics) <= set(METRICS)
    assert {t.figure for t in rows if t.figure} == set(figures.FIGURES)


def test_settings_change_the_config_of_a_cell():
    request = targets.Request(targets.TARGETS["table1"], config="digits",
                              settings=("train.steps=7", "model.ch_mult=[1,3]", "train.random=x"))
    config = targets.cell_config(request, "eps_fixed_l")
    assert config.train.steps == 7 and config.model.ch_mult == (1, 3) and config.train.random == "x"
    assert config.diffusion.loss == "kl" and config.data.name == "digits"
    assert not request.is_paper and targets.Request(request.target).is_paper
    for text in ("train.stepz=3", "train.steps", "train.steps=many"):
        with pytest.raises(UserError, match=f"--set={text}"):
            targets.cell_config(request._replace(settings=(text,)), "eps_fixed_l")
