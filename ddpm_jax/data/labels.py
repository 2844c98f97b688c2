"""Class labels: those that a model is trained with, and those that a user names."""

import hashlib

import numpy as np

from ddpm_jax.errors import UserError

_SHOWN = 20


def labels_for(source, num_classes):
    """int32 [N]: the labels of a Source for a model of num_classes; None where that is 0. Raises
    UserError where the data has none, or another number of classes."""
    if not num_classes:
        return None
    if source.labels is None:
        raise UserError(f"config.model.num_classes={num_classes}: {source.name}, split "
                        f"{source.split}, has no labels ({source.where}); set it to 0, or take "
                        "images in class folders")
    if len(source.class_names) != num_classes:
        raise UserError(f"config.model.num_classes={num_classes}: {source.name} has "
                        f"{len(source.class_names)} classes: {_listed(source.class_names)}; set it "
                        "to their number")
    return source.labels


def data_facts(source, num_classes) -> dict:
    """What identifies the training data of a run: 'train', the fingerprint of its images, and for a
    model with classes 'labels', the fingerprint of theirs, and 'classes', the names."""
    labels = labels_for(source, num_classes)
    if labels is None:
        return {"train": source.fingerprint}
    return {"train": source.fingerprint,
            "labels": hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()[:16],
            "classes": list(source.class_names)}


def chosen_labels(words, names, num_classes, no_label) -> tuple | None:
    """The labels that ``words`` mean: names or numbers of classes; ('none',): no label; ('all',) or
    None: None, each class in turn.

    names: of the classes, () where they are not known. Raises UserError for a word that is none,
    with the classes.
    """
    if words and not num_classes:
        raise UserError(f"label {_quoted(words[0])}: this model has no classes "
                        "(model.num_classes=0); leave labels out")
    if not words or list(words) == ["all"]:
        return None
    if list(words) == ["none"]:
        if no_label is None:
            raise UserError("no label: this model is not trained without labels "
                            "(model.label_dropout=0); name a class")
        return (no_label,)
    names = tuple(names) or tuple(map(str, range(num_classes)))
    return tuple(_label(word, names) for word in words)


def _label(word, names):
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise UserError(f"label {_quoted(word)} is not a class of this model; its {len(names)} "
                    f"classes: {_listed(names)}")


def _quoted(word) -> str:
    return word or "''"


def _listed(names) -> str:
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)


def by_class(labels, columns=10) -> tuple[list[int], int]:
    """Which of the images with these labels [N] to show, at most columns**2, in a grid whose rows
    have one class each: (their positions, images a row)."""
    labels = np.asarray(labels)
    classes = np.unique(labels)[:columns**2]
    rows = [np.flatnonzero(labels == c) for c in classes]
    each = min(columns**2 // len(classes), *(len(row) for row in rows), len(labels))
    each = each // columns * columns or each  # whole rows
    return [int(i) for row in rows for i in row[:each]], min(each, columns)
