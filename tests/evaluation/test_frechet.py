"""Closed forms, invariances, degenerate covariances."""

import numpy as np
import pytest

from ddpm_jax.evaluation.frechet import frechet_distance


def random_covariance(rng, d, rank=None):
    a = rng.standard_normal((d, rank or 2 * d))
    return a @ a.T / a.shape[1]


def test_commuting_gaussians_have_the_closed_form():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    s1, s2 = rng.random(40) + 0.1, rng.random(40) + 0.1
    mu1, mu2 = rng.standard_normal(40), rng.standard_normal(40)
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(s1) - np.sqrt(s2)) ** 2)
    ours = frechet_distance(mu1, q * s1 @ q.T, mu2, q * s2 @ q.T)
    assert ours == pytest.approx(expected, rel=1e-12)


def test_two_by_two_has_the_closed_form():
    # tr sqrt(M) of a 2x2 M with positive eigenvalues is sqrt(tr M + 2 sqrt(det M)).
    rng = np.random.default_rng(1)
    a, b = random_covariance(rng, 2), random_covariance(rng, 2)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    ours = frechet_distance([0, 1], a, [2, 0], b)
    assert ours == pytest.approx(5 + np.trace(a + b) - 2 * root, rel=1e-12)


def test_agrees_with_eigenvalues_of_the_product():
    rng = np.random.default_rng(2)
    a, b = random_covariance(rng, 60), random_covariance(rng, 60)
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    ours = frechet_distance(np.zeros(60), a, np.zeros(60), b)
    assert ours == pytest.approx(np.trace(a + b) - 2 * root, rel=1e-9)
    assert ours == pytest.approx(frechet_distance(np.zeros(60), b, np.zeros(60), a), rel=1e-9)


@pytest.mark.parametrize("rank", [None, 5, 1])
def test_distance_to_itself_is_zero_within_rounding(rank):
    s = random_covariance(np.random.default_rng(3), 50, rank)
    assert abs(frechet_distance(np.ones(50), s, np.ones(50), s)) < 1e-11 * np.trace(s)


@pytest.mark.parametrize("swap", [False, True])
def test_one_rank_deficient_side_keeps_its_digits(swap):
    rng = np.random.default_rng(4)
    v = rng.standard_normal(50)
    full, thin = np.eye(50), np.outer(v, v)      # tr sqrt(I vv') = |v|
    pair = (thin, full) if swap else (full, thin)
    expected = 50 + v @ v - 2 * np.linalg.norm(v)
    ours = frechet_distance(np.zeros(50), pair[0], np.zeros(50), pair[1])
    assert ours == pytest.approx(expected, rel=1e-12)


def test_zero_covariance_leaves_the_means():
    zero = np.zeros((3, 3))
    assert frechet_distance([1, 2, 3], zero, [1, 2, 5], zero) == 4


def test_bad_shapes_and_values_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance([np.nan], np.eye(1), [0], np.eye(1))
