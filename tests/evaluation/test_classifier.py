"""The small classifier learns digits, sees faults, and is the same when loaded again."""

import resource

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddpm_jax.evaluation import classifier, measures, scores, small_cnn


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = np.rint(data.images * 255 / 16).astype(np.uint8)[..., None]
    return images, data.target


@pytest.fixture(scope="module")
def trained(digits):
    return classifier.train_classifier(digits[0][:1400], digits[1][:1400], 0, epochs=12)


def features(params, images):
    return small_cnn.outputs(params, images).features


@jax.jit
def random_features(images):
    return small_cnn.random_apply(small_cnn.random_params(1), images)


@pytest.mark.slow
def test_held_out_accuracy(trained, digits):
    params, accuracy = trained
    assert accuracy > 0.95
    p = scores.softmax(small_cnn.outputs(params, digits[0][1400:]).logits)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    assert np.mean(p.argmax(1) == digits[1][1400:]) > 0.9


def faults(images):
    rng = np.random.default_rng(0)
    yield "noise", np.clip(images + rng.normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    yield "mirrored", images[:, :, ::-1]
    yield "one image", np.repeat(images[:1], len(images), axis=0)
    yield "dim", images // 2


@pytest.mark.slow
def test_distances_order_real_images_before_faults(trained, digits):
    params, _ = trained
    base, other = digits[0][:900], digits[0][900:]
    a, b = features(params, base), features(params, other)
    floor = small_cnn.distance(b, a)
    random_floor = small_cnn.distance(random_features(other),
                                      random_features(base))
    for name, bad in faults(other):
        assert small_cnn.distance(features(params, bad), a) > 3 * floor, name
        if name in ("one image", "dim"):
            assert small_cnn.distance(random_features(bad),
                                      random_features(base)) > 3 * random_floor, name
    assert abs(small_cnn.distance(a, a)) < 1e-6


def collected(params, images):
    """What `measures.offline` takes of images."""
    found = small_cnn.outputs(params, images)
    x = images.astype(np.float64)
    return {"cnn": found.features, "cnn_logits": found.logits, "random": random_features(images),
            "channels": np.concatenate([x.mean((1, 2)), (x ** 2).mean((1, 2))], axis=1)}


@pytest.mark.slow
def test_offline_puts_reals_beside_samples(trained, digits):
    params, images = trained[0], digits[0]

    def report(samples):
        real, held = collected(params, images[1200:]), collected(params, images[600:1200])
        return measures.offline(collected(params, samples), real, held, classifier_key="FD-cnn",
                                accuracy=trained[1])

    good = report(images[:600])
    assert good["offline_equal_n"] == 600 and abs(sum(good["cnn_classes_reals"]) - 1) < 1e-9
    assert good["FD-cnn_equal_n"] < 3 * good["FD-cnn_real_vs_real"]
    ones = images[:600][digits[1][:600] == 1]
    bad = report(np.concatenate([ones] * 10))
    assert bad["cnn_classes_samples"][1] > 0.9
    assert bad["FD-cnn_equal_n"] > 3 * bad["FD-cnn_real_vs_real"]
    noise = np.random.default_rng(1).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    vague = report(noise)
    assert vague["cnn_confident_samples"] < 0.7 < 0.8 < vague["cnn_confident_reals"]


def test_stored_once_under_the_data_and_named_by_its_weights(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_epochs", lambda images: 1)
    images, labels = digits[0][:200], digits[1][:200]
    first = classifier.train_once("digits", "print-a", images, labels, folder=tmp_path)
    files = list(tmp_path.iterdir())
    again = classifier.train_once("digits", "print-a", images[:0], labels[:0], folder=tmp_path)
    assert first.sha256 == again.sha256 and first.key == f"FD-cnn@{first.sha256[:8]}"
    np.testing.assert_array_equal(features(first.params, images),
                                  features(again.params, images))
    other = classifier.train_once("digits", "print-b", images[:150], labels[:150], folder=tmp_path)
    assert other.sha256 != first.sha256 and len(files) == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("folder", ["home", "full", "file"])
def test_a_classifier_that_cannot_be_stored_is_kept_in_memory(
        folder, digits, tmp_path, monkeypatch):
    """No home; a disk that takes nothing; a file where the folder belongs."""
    monkeypatch.setattr(classifier, "default_epochs", lambda images: 1)
    images, labels = digits
    said = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if folder == "home":
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
        monkeypatch.delenv("HOME")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if folder == "full":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        stored = classifier.train_once(
            "digits", "a", images[:60], labels[:60], say=said.append,
            folder=None if folder == "home" else str(tmp_path / folder))
    finally:
        if folder == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stored.sha256 and "is not kept" in said[-1] and "--classifier_dir" in said[-1]
    assert not (tmp_path / "~").exists()
