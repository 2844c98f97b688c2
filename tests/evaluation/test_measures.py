"""Metrics on made-up features."""

import numpy as np
import pytest

from ddpm_jax.evaluation import measures
from ddpm_jax.evaluation.references import Reference


def reference(n=50_000, features=None):
    return Reference(np.zeros(6), np.eye(6), n=n, features=features, path="r.npz")


def test_fid_of_shifted_gaussian_is_the_shift():
    x = np.random.default_rng(0).standard_normal((40_000, 6)) + np.array([1, 0, 0, 0, 0, 2.0])
    found = measures.fid(x, reference())
    assert found["fid"] == pytest.approx(5, rel=0.02) and found["fid_n"] == 40_000
    assert "fid_warning" not in found
    assert "1000 samples cannot" in measures.fid(x[:1000], reference())["fid_warning"]
    assert "2048 reference images" in measures.fid(x, reference(2048))["fid_warning"]


def test_kid_and_precision_of_stored_features():
    real = np.random.default_rng(1).standard_normal((50, 6))
    assert measures.precision_recall(real, reference(features=real))["precision"] == 1
    assert measures.kid(real, reference(features=real))["kid_subset_size"] == 50


def test_shares_of_images_that_are_called_by_their_label():
    logits = np.eye(4)[[0, 1, 1, 2]]
    found = measures.called(logits, [0, 1, 2, 2])
    assert found == {"labels_called": 0.75, "labels_called_by_class": [1.0, 1.0, 0.5, None],
                     "labels_n": 4}


def test_rate_distortion_by_hand():
    rate, rmse = measures.rate_distortion([4.0, 2.0, 1.0], 0.5, [0.0, 0.25, 1.0])
    np.testing.assert_allclose(rate, [0.5, 1.5, 3.5])       # the decoder's 4 is not rate
    np.testing.assert_allclose(rmse, [127.5, 63.75, 0])


def test_likelihood_is_the_mean_over_images():
    sums = {"bpd": np.array([3.0, 5.0]), "prior": np.array([0.5, 0.5]),
            "sum_terms": np.array([2.0, 4.0, 1.0]), "sum_mse": np.array([2.0, 2.0, 2.0]),
            "sum_eps": np.array([1.0, 2.0, 3.0])}
    found = measures.likelihood(sums)
    assert (found["bpd"], found["bpd_n"], found["distortion"], found["rate"]) == (4, 2, 1, 2.5)
    assert found["rmse"] == 127.5 and found["eps_loss"] == [0.5, 1.0, 1.5]


def test_offline_never_says_fid_and_puts_reals_beside():
    rng = np.random.default_rng(2)

    def features(n, shift=0.0):
        return {"random": rng.standard_normal((n, 5)) + shift,
                "cnn": rng.standard_normal((n, 4)) + shift,
                "cnn_logits": np.eye(3)[np.arange(n) % 3],
                "channels": np.tile([100.0, 100.0 ** 2 + 9], (n, 1))}
    found = measures.offline(features(300, 1.0), features(400), features(200),
                             classifier_key="FD-cnn@ab", accuracy=0.9)
    assert found["FD-cnn@ab"] == pytest.approx(4, rel=0.2)
    assert found["FD-cnn@ab_real_vs_real"] < 0.3 and found["offline_equal_n"] == 200
    assert found["channel_std_samples"] == [3.0]
    assert found["cnn_classes_samples"] == pytest.approx([1 / 3] * 3, abs=0.01)
    assert not [k for k in found if k.upper().startswith("FID")]
    without = measures.offline(features(9), features(9), features(9), classifier_key=None,
                               accuracy=None)
    assert "FD-rand@0" in without and not [k for k in without if "cnn" in k]


def test_nearest_shows_both_spaces():
    rng = np.random.default_rng(3)
    real = rng.integers(0, 256, (20, 4, 4, 1), dtype=np.uint8)
    values, pictures = measures.nearest(real[:3], real[:3, 0, 0], real, real[:, 0, 0],
                                        255 - real[:5], 255.0 - real[:5, 0, 0], queries=3, k=2)
    assert values["nn_pixels_exact_copies"] == 3 and values["nn_pixels_median_distance"] == 0
    assert values["nn_pixels_median_distance_held_out"] > 0
    assert set(pictures) == {"pixels", "features"}
