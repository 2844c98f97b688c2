import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.diffusion.nodes import NODES, place
from ddpm_jax.diffusion.schedule import cosine, linear

BAR = np.cumprod(1 - linear(1000))


@given(st.sampled_from(sorted(NODES)), st.integers(2, 300), st.data())
def test_nodes_rise_within_the_chain(name, total, data):
    steps = data.draw(st.integers(2, total))
    for betas in (linear(total, 1e-4, 0.1), cosine(total)):
        nodes = place(name, np.cumprod(1 - betas), steps)
        assert nodes[0] >= 0 and nodes[-1] < total and (np.diff(nodes) > 0).all()
        assert len(nodes) == steps or name == "quad" and len(nodes) < steps


def test_published_chains():
    # ermongroup/ddim, runners/diffusion.py:343-353, and the two spacings diffusers names like that
    np.testing.assert_array_equal(place("leading", BAR, 10), np.arange(0, 1000, 100))
    quad = place("quad", BAR, 10)
    np.testing.assert_array_equal(quad, (np.linspace(0, 800**0.5, 10) ** 2).astype(int))
    assert len(place("quad", BAR, 50)) == 49
    np.testing.assert_array_equal(place("trailing", BAR, 10), np.arange(99, 1000, 100))


def test_logsnr_is_even_in_lambda():
    nodes = place("logsnr", BAR, 12)
    lam = 0.5 * np.log(BAR / (1 - BAR))[nodes]
    assert nodes[0] == 0 and nodes[-1] == 999
    steps = -np.diff(lam)
    assert np.abs(steps / steps.mean() - 1).max() < 0.35  # timesteps are integers
    assert np.abs(steps[2:] / steps.mean() - 1).max() < 0.05


def test_lists_and_bad_nodes():
    for listed in ([999, 0, 5], "0,5, 999"):
        np.testing.assert_array_equal(place(listed, BAR, 0), [0, 5, 999])
    for bad in ([], [0, 0], [-1, 4], [1000], "3,3", "0," + 30 * "9"):
        with pytest.raises(ValueError, match="distinct timesteps of 0 ... 999"):
            place(bad, BAR, 0)
    for bad in ("linear", "0,,3", "0 3", "0,1.5", ",", "\u00b2", [0, 1.5], ["a"], "[0,3]"):
        with pytest.raises(ValueError, match="known: even, quad, logsnr.* such as 0,20,99"):
            place(bad, BAR, 5)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="not in 1 ... 1000"):
            place("even", BAR, steps)
