"""Where an evaluation takes fewer images than there are, a split sorted by class is still whole."""

import jax
import numpy as np
import pytest

from ddpm_jax.evaluation import classifier, features, measures, metrics, protocols
from ddpm_jax.evaluation.features import Subject
from ddpm_jax.evaluation.options import Options
from ddpm_jax.evaluation.references import Reference
from ddpm_jax.evaluation.subset import permutation, subset

CLASSES, EACH = 4, 30
SIZE = CLASSES * EACH


def test_all_are_taken_in_order_and_few_from_everywhere():
    np.testing.assert_array_equal(subset(7), np.arange(7))
    np.testing.assert_array_equal(subset(7, 9), np.arange(7))
    np.testing.assert_array_equal(np.sort(permutation(1000)), np.arange(1000))
    np.testing.assert_array_equal(subset(1000, 30), subset(1000, 200)[:30])
    for labels in (np.arange(1000) // 100, np.arange(1000) % 10):       # sorted; one after another
        counts = np.bincount(labels[subset(1000, 200)], minlength=10)
        assert counts.min() >= 10 and counts.max() <= 32, counts


class Sorted:
    """As data.datasets.Source: class c is grey level 60 c."""
    name, split, fingerprint, shape = "sorted", "train", "f", (8, 8, 1)
    labels = np.repeat(np.arange(CLASSES), EACH)

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        return np.full(self.shape, 60 * self.labels[i], np.uint8)


@pytest.fixture
def context(one_device):
    subject = Subject("x", None, {}, 8, 8, (8, 8, 1))
    return metrics.Context(Options(), protocols.PROTOCOLS["paper"], subject,
                           one_device(sources={"train": Sorted()}))


def classes(found):
    return np.bincount((found["channels"][:, 0] / 60).astype(int), minlength=CLASSES)


def test_features_of_real_images_are_of_every_class(context):
    assert classes(metrics._real(context, "train", ("channels",), 40)).min() >= 5
    np.testing.assert_array_equal(
        metrics._real(context, "train", ("channels",))["channels"][:, 0],
        60.0 * Sorted.labels)
    for half in metrics._held_out(context, ("channels",), None):
        assert classes(half).min() >= 10 and len(half["channels"]) == SIZE // 2


def test_the_bound_of_some_images_has_their_own_noise(tiny):
    model, session = tiny()
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    every = features.of_bound(session, model, images, 0, 4)
    some = features.of_bound(session, model, images, 0, 4, subset(12, 4))(0, 4)
    want = np.concatenate([every(start, 4)["bpd"] for start in (0, 4, 8)])
    np.testing.assert_allclose(some["bpd"], want[subset(12, 4)], rtol=1e-6)


def test_equal_numbers_of_sorted_images_are_of_every_class():
    levels = np.repeat(np.arange(10.0), 50)[:, None] + np.linspace(0, 1, 8)
    reference = Reference(None, None, features=levels)
    found = measures.precision_recall(levels[::5], reference)
    assert found["precision"] == 1 and found["recall"] > 0.9
    found = measures.precision_recall(levels, reference._replace(features=levels[::5]), given=True)
    assert found["precision"] == 1 and found["recall"] > 0.9


def test_the_classifier_is_of_all_classes_of_the_split(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_epochs", lambda images: 1)
    monkeypatch.setattr(classifier, "TRAINING_IMAGES", 20)
    seen = []
    train = classifier.train_classifier

    def watched(images, labels, *args, **options):
        seen.append(np.unique(labels))
        return train(images, labels, *args, **options)

    monkeypatch.setattr(classifier, "train_classifier", watched)
    source = Sorted()
    source.labels = source.labels.copy()
    last, = np.setdiff1d(np.arange(SIZE), subset(SIZE, SIZE - 1))      # of a class of its own
    source.labels[last] = CLASSES
    stored = classifier.shared(source, folder=str(tmp_path))
    np.testing.assert_array_equal(seen[0], np.arange(CLASSES))
    assert stored.params["logits"]["bias"].shape == (CLASSES + 1,)
    assert jax.tree.leaves(stored.params)
