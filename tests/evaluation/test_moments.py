"""Two ways to the same mean and covariance: numpy's two passes, and our sums."""

import numpy as np
import pytest

from ddpm_jax.evaluation import moments


def skewed_features(n=3000, d=12, seed=0):
    """Far from zero compared with their spread, as pool_3 is."""
    rng = np.random.default_rng(seed)
    return (100 + rng.standard_normal((n, d)) @ rng.standard_normal((d, d))).astype(np.float32)


def expected(x):
    return x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)


def assert_same(found, x, rtol=1e-10):
    mean, cov = expected(x)
    np.testing.assert_allclose(found[0], mean, rtol=1e-13)
    np.testing.assert_allclose(found[1], cov, rtol=rtol, atol=rtol * np.abs(cov).max())


def test_matches_numpy_in_two_passes():
    x = skewed_features()
    assert_same(moments.mean_and_cov(x), x)


@pytest.mark.parametrize("cuts", [[1], [1024], [7, 1500, 2999]])
def test_any_cut_and_any_shift_add_up_to_the_same(cuts):
    x = skewed_features()
    for shift in (None, x[-1], 90 * np.ones(12)):
        sums = moments.empty(12, x[0] if shift is None else shift)
        for part in np.split(x, cuts):
            sums = moments.add(sums, part)
        assert sums.n == len(x)
        assert_same(moments.finish(sums), x, rtol=1e-9)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="2 features"):
        moments.finish(moments.of(np.ones((1, 3))))
