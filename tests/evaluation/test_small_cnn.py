"""The small classifier learns digits, sees faults, and is the same when loaded again."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddpm_jax.evaluation import small_cnn


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = np.rint(data.images * 255 / 16).astype(np.uint8)[..., None]
    return images, data.target


@pytest.fixture(scope="module")
def trained(digits):
    return small_cnn.train_classifier(digits[0][:1400], digits[1][:1400], 0, epochs=12)


def test_held_out_accuracy(trained, digits):
    params, accuracy = trained
    assert accuracy > 0.95
    p = small_cnn.probabilities(params, digits[0][1400:])
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    assert np.mean(p.argmax(1) == digits[1][1400:]) > 0.9


def faults(images):
    rng = np.random.default_rng(0)
    yield "noise", np.clip(images + rng.normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    yield "mirrored", images[:, :, ::-1]
    yield "one image", np.repeat(images[:1], len(images), axis=0)
    yield "dim", images // 2


def test_distances_order_real_images_before_faults(trained, digits):
    params, _ = trained
    base, other = digits[0][:900], digits[0][900:]
    a, b = small_cnn.features(params, base), small_cnn.features(params, other)
    floor = small_cnn.distance(b, a)
    random_floor = small_cnn.distance(small_cnn.random_features(other),
                                      small_cnn.random_features(base))
    for name, bad in faults(other):
        assert small_cnn.distance(small_cnn.features(params, bad), a) > 3 * floor, name
        if name in ("one image", "dim"):
            assert small_cnn.distance(small_cnn.random_features(bad),
                                      small_cnn.random_features(base)) > 3 * random_floor, name
    assert abs(small_cnn.distance(a, a)) < 1e-6


def test_report_puts_reals_beside_samples(trained, digits):
    images = digits[0]
    good = small_cnn.class_report(trained[0], images[:600], images[600:])
    assert good["n"] == 598 and abs(sum(good["classes_reals"]) - 1) < 1e-9
    assert good["frechet_samples"] < 3 * good["frechet_reals"]
    ones = images[:600][digits[1][:600] == 1]
    bad = small_cnn.class_report(trained[0], np.concatenate([ones] * 10), images[600:])
    assert bad["classes_samples"][1] > 0.9 and bad["frechet_samples"] > 3 * bad["frechet_reals"]
    noise = np.random.default_rng(1).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    vague = small_cnn.class_report(trained[0], noise, images[600:])
    assert vague["confident_samples"] < 0.7 < 0.8 < vague["confident_reals"]


def test_padding_of_the_last_batch_does_not_show(trained, digits):
    all_ = small_cnn.features(trained[0], digits[0][:300])
    np.testing.assert_allclose(small_cnn.features(trained[0], digits[0][:3]), all_[:3], atol=1e-4)
    assert all_.shape == (300, 128)


def test_stored_once_under_the_data_and_named_by_its_weights(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(small_cnn, "default_epochs", lambda images: 1)
    images, labels = digits[0][:200], digits[1][:200]
    first = small_cnn.train_once("digits", "print-a", images, labels, folder=tmp_path)
    files = list(tmp_path.iterdir())
    again = small_cnn.train_once("digits", "print-a", images[:0], labels[:0], folder=tmp_path)
    assert first.sha256 == again.sha256 and first.key == f"FD-cnn@{first.sha256[:8]}"
    np.testing.assert_array_equal(small_cnn.features(first.params, images),
                                  small_cnn.features(again.params, images))
    other = small_cnn.train_once("digits", "print-b", images[:150], labels[:150], folder=tmp_path)
    assert other.sha256 != first.sha256 and len(files) == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (256, 256, 3)])
def test_other_sizes_have_the_same_features(shape):
    module = small_cnn.Classifier(5)
    x = np.zeros((2, *shape), np.uint8)
    params = jax.eval_shape(module.init, jax.random.key(0), small_cnn._scaled(x))["params"]
    out = jax.eval_shape(small_cnn.apply, params, x)
    assert out.features.shape == (2, 128) and out.logits.shape == (2, 5)
    random = jax.eval_shape(lambda x: small_cnn.random_apply(
        small_cnn.random_params(shape[-1]), x), x)
    assert random.shape == (2, 224)
