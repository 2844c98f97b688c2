"""Scores against closed forms and direct definitions."""

import numpy as np
import pytest

from ddpm_jax.evaluation import scores


def test_inception_score_of_confident_uniform_classes_is_their_number():
    logits = np.where(np.eye(8), 60.0, 0.0)[np.tile(np.arange(8), 50)]
    mean, spread = scores.inception_score(logits, 10)
    assert mean == pytest.approx(8, rel=1e-9) and spread == pytest.approx(0, abs=1e-9)
    assert scores.inception_score(np.zeros((40, 8)), 1)[0] == pytest.approx(1)


def test_inception_score_is_its_definition_per_contiguous_split():
    logits = np.random.default_rng(0).standard_normal((47, 9)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    values = []
    for i in range(4):
        part = p[i * 47 // 4:(i + 1) * 47 // 4]
        values.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(0)), axis=1))))
    mean, spread = scores.inception_score(logits, 4)
    assert mean == pytest.approx(np.mean(values)) and spread == pytest.approx(np.std(values))
    with pytest.raises(ValueError, match="split"):
        scores.inception_score(logits[:3], 4)


def test_the_two_kinds_differ_by_the_bias_and_the_splits():
    rng = np.random.default_rng(1)
    pool_3 = rng.random((2100, 2048)).astype(np.float32)
    fc = {"kernel": (rng.standard_normal((2048, 1008)) * 0.1).astype(np.float32),
          "bias": rng.standard_normal(1008).astype(np.float32) * 3}
    logits = pool_3 @ fc["kernel"]
    mean, spread = scores.inception_score(logits, 10)
    assert scores.is_openai10(pool_3, fc) == {"is_openai10": pytest.approx(mean, rel=1e-5),
                                              "is_openai10_std": pytest.approx(spread, rel=1e-3)}
    biased = scores.inception_score(logits + fc["bias"], 1)[0]
    assert scores.is_tfgan1(pool_3, fc) == {"is_tfgan1": pytest.approx(biased, rel=1e-5)}
    assert abs(biased / mean - 1) > 0.01


def test_kid_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(2)
    values = [scores.kid(rng.standard_normal((300, 8)), rng.standard_normal((300, 8)),
                         subsets=1, size=300)["kid"] for _ in range(60)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(60)
    assert min(values) < 0
    x, y = rng.standard_normal((500, 8)), rng.standard_normal((400, 8)) + 0.5
    found = scores.kid(x, y, subsets=20, size=200)
    assert found["kid"] > 4 * found["kid_std"] / np.sqrt(20) > 0
    assert scores.kid(x, y[:50])["kid_subset_size"] == 50


def test_mmd_is_the_sum_over_pairs():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((4, 3))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3
    same_x = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    same_y = np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    cross = np.mean([k(a, b) for a in x for b in y])
    assert scores.mmd2_unbiased(x, y) == pytest.approx(same_x + same_y - 2 * cross)


def brute_precision(real, fake, k):
    def dist(a, b):
        return np.linalg.norm(a - b)
    radius = [sorted(dist(r, s) for s in real)[k] for r in real]
    return np.mean([any(dist(f, r) <= q for r, q in zip(real, radius, strict=True)) for f in fake])


def test_precision_and_recall_are_their_definition():
    rng = np.random.default_rng(4)
    real, fake = rng.standard_normal((60, 4)), rng.standard_normal((50, 4)) * 0.5 + 0.8
    found = scores.precision_recall(real, fake, k=3)
    assert found["precision"] == brute_precision(real, fake, 3)
    assert found["recall"] == brute_precision(fake, real, 3)
    assert found["precision"] > found["recall"]      # narrow samples: sharp, not covering


def test_blocks_do_not_change_the_radii():
    x = np.random.default_rng(5).standard_normal((37, 4)) + 1000
    centred = x - x.mean(0)
    np.testing.assert_allclose(scores.radii(centred, 3, block=5), scores.radii(centred, 3),
                               rtol=1e-9)
    with pytest.raises(ValueError, match="more than 3"):
        scores.radii(x[:3], 3)
