"""Grey levels: which number a model output becomes."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.evaluation import protocols, scores
from ddpm_jax.evaluation.inception import network
from ddpm_jax.training.steps import to_uint8

LEVELS = np.arange(256)


@pytest.mark.parametrize("name", protocols.QUANTISE)
def test_integers_survive_every_rule(name):
    x = jnp.asarray(LEVELS / 127.5 - 1, jnp.float32)
    found = np.asarray(protocols.QUANTISE[name](x + (1e-6 if name == "truncate" else 0)))
    np.testing.assert_allclose(found, LEVELS, atol=1e-3)


def test_rules_differ_between_integers():
    x = jnp.asarray((LEVELS[:-1] + 0.6) / 127.5 - 1, jnp.float32)
    np.testing.assert_array_equal(protocols.QUANTISE["round"](x), LEVELS[1:])
    np.testing.assert_array_equal(protocols.QUANTISE["truncate"](x), LEVELS[:-1])
    np.testing.assert_allclose(protocols.QUANTISE["none"](x), LEVELS[:-1] + 0.6, atol=1e-4)


def test_rounding_is_that_of_the_samples_that_are_written():
    """Beside the middle between two levels too, where two formulas round to different ones."""
    middle = ((LEVELS[:-1] + 0.5) / 127.5 - 1).astype(np.float32)
    x = np.concatenate([np.nextafter(middle, np.float32(k), dtype=np.float32) for k in (-2, 2)]
                       + [middle])
    np.testing.assert_array_equal(protocols.QUANTISE["round"](x), to_uint8(x))
    assert np.isnan(protocols.QUANTISE["round"](jnp.nan))       # of a model that diverged


@pytest.mark.parametrize("name", protocols.QUANTISE)
def test_values_outside_are_clipped(name):
    found = protocols.QUANTISE[name](jnp.asarray([-1.5, 1.5]))
    np.testing.assert_array_equal(found, [0, 255])


def test_every_row_names_things_that_exist():
    for protocol in protocols.PROTOCOLS.values():
        assert protocol.quantise in protocols.QUANTISE
        assert protocol.precision in network.PRECISIONS
        assert protocol.inception_score in scores.INCEPTION_SCORES
    texts = {protocols.describe(p) for p in protocols.PROTOCOLS.values()}
    assert len(texts) == len(protocols.PROTOCOLS)
