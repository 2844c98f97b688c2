"""Costs count the images of the data set at hand."""

import pytest

from ddpm_jax import experiment
from ddpm_jax.compilation.roofline import unet_work
from ddpm_jax.config import load_config
from ddpm_jax.data.datasets import open_source
from ddpm_jax.evaluation.options import ALONG_NUM, Options
from ddpm_jax.reproduction import costs, figures, targets


def request(name, config=None, **options):
    return targets.Request(targets.TARGETS[name], config=config, options=Options(**options))


def test_bits_per_dim_of_the_data_set_at_hand(tmp_path):
    asked = request("table4", "digits")
    images = len(open_source("digits", "", "test", image_size=8, channels=1))
    config = load_config("digits")
    assert costs.bound_count(asked, config) == images
    assert costs.bound_count(request("table4", "digits", bpd_num=10), config) == 10
    assert costs.bound_count(request("table1"), load_config("cifar10")) == 60_000
    config.data.update(name="fashion_mnist", dir=str(tmp_path), image_size=28)
    assert costs.bound_count(asked, config) is None                  # not prepared: not known
    assert ("bits/dim", None, None, None) in costs.costs(asked, config, 1.0)


def test_images_that_are_drawn():
    assert costs.drawn_count(request("table1")) == 50_000
    assert costs.drawn_count(request("table1", num=7)) == 7
    assert costs.drawn_count(request("table4")) == 0
    assert costs.drawn_count(request("fig7", num=7)) == figures.ROWS * figures.COLUMNS
    assert costs.drawn_count(request("fig10")) == ALONG_NUM
    assert costs.drawn_count(request("nearest")) == 16


def test_costs_of_the_papers_model():
    config = load_config("cifar10")
    rows = {part: row for part, *row in costs.costs(request("table1"), config, 1e12)}
    one = unet_work(experiment.network(config)).forward_flops
    flops, hours, here = rows["sample"]
    assert flops == one * 1000 * 50_000 and here == pytest.approx(flops / 1e12 / 3600)
    assert hours == pytest.approx(50_000 / 256 * 17 / 3600)     # 17 s for 256 images (app. B)
    assert rows["train"][0] == 3 * one * 128 * 800_000
