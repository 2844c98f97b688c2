"""Two ways to the same mean and covariance: numpy's two passes, and our sums."""

import jax
import jax.numpy as jnp
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
def test_any_cut_and_any_shift_merge_to_the_same(cuts):
    x = skewed_features()
    parts = [moments.of(p) for p in np.split(x, cuts)]      # each with a shift of its own
    total = parts[0]
    for part in parts[1:]:
        total = moments.merge(total, part)
    assert total.n == len(x)
    assert_same(moments.finish(total), x)


def test_a_masked_row_does_not_count():
    x = skewed_features(100)
    mask = np.arange(100) < 61
    x[61:] = np.nan
    assert_same(moments.finish(moments.add(moments.empty(12, x[0]), x, mask)), x[:61])


def test_on_the_device_the_shift_saves_the_digits():
    x = skewed_features(1000)
    mask = np.arange(1000) < 777
    shift = x[:64].mean(0)
    add = jax.jit(moments.device_add)

    def run(shift):
        sums = moments.device_empty(12)
        for s in range(0, 1000, 250):
            sums = add(sums, jnp.asarray(x[s:s + 250]), jnp.asarray(mask[s:s + 250]), shift)
        return moments.finish(moments.from_device(sums, shift))

    cov = expected(x[:777])[1]
    error = np.abs(run(shift)[1] - cov).max() / np.abs(cov).max()
    unshifted = np.abs(run(np.zeros(12, np.float32))[1] - cov).max() / np.abs(cov).max()
    assert error < 1e-5 < 1e-4 < unshifted


def test_gather_in_one_process_keeps_every_bit():
    x = np.array([1e8 + 0.123, np.pi])
    np.testing.assert_array_equal(moments.gather(x), x[None])
    assert moments.gather(x).dtype == np.float64


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="2 features"):
        moments.finish(moments.of(np.ones((1, 3))))
