import numpy as np
import pytest

from ddpm_jax.data.datasets import open_source
from ddpm_jax.data.labels import by_class, chosen_labels, data_facts, labels_for
from ddpm_jax.errors import UserError

NAMES = ("cat", "7", "dog")


@pytest.mark.parametrize("words, want", [
    (None, None), (["all"], None), (["none"], (3,)), (["dog"], (2,)), (["0", "2"], (0, 2)),
    (["7"], (1,))])
def test_words_are_names_before_they_are_numbers(words, want):
    assert chosen_labels(words, NAMES, 3, 3) == want


@pytest.mark.parametrize("words, model, message", [
    (["3"], (NAMES, 3, 3), "label 3 is not a class of this model; its 3 classes: cat, 7, dog$"),
    (["bird"], ((), 3, 3), "label bird is not a class .* its 3 classes: 0, 1, 2$"),
    (["-1"], (NAMES, 3, 3), "label -1 is not"),
    (["none"], (NAMES, 3, None), "not trained without labels .model.label_dropout=0"),
    (["all"], ((), 0, None), "label all: this model has no classes"),
])
def test_bad_words_are_one_line(words, model, message):
    with pytest.raises(UserError, match=message):
        chosen_labels(words, *model)


def test_training_labels_are_those_of_as_many_classes():
    digits = open_source("digits", "", "train")
    assert labels_for(digits, 0) is None
    np.testing.assert_array_equal(labels_for(digits, 10), digits.labels)
    with pytest.raises(UserError, match="num_classes=11: digits has 10 classes: 0, 1, 2"):
        labels_for(digits, 11)
    facts = data_facts(digits, 10)
    assert data_facts(digits, 0) == {"train": facts["train"]}
    assert facts["classes"] == list("0123456789")
    assert facts["labels"] != data_facts(open_source("digits", "", "test"), 10)["labels"]


def test_a_grid_has_a_row_for_each_class():
    labels = np.arange(57) % 3
    shown, columns = by_class(labels, columns=4)
    assert columns == 4 and labels[shown].reshape(-1, 4).tolist() == [[c] * 4 for c in range(3)]
    assert len(set(shown)) == len(shown)
    shown, columns = by_class(np.array([2] * 30), columns=4)
    assert (len(shown), columns) == (16, 4)
    assert by_class(np.array([5, 1]), columns=4) == ([1, 0], 1)
    assert len(by_class(np.arange(1000), columns=4)[0]) == 16
