"""Exact neighbours, whatever the blocks; the picture's layout."""

import numpy as np

from ddpm_jax.evaluation import neighbours


def pictures(n, seed, size=6):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_neighbours_are_the_brute_force_ones(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    queries, references = pictures(5, 0), pictures(40, 1)
    found = neighbours.nearest(queries, references, 3)
    for q, indices, distances in zip(queries, found.indices, found.distances, strict=True):
        d = np.sqrt(((references.astype(float) - q) ** 2).sum((1, 2, 3)))
        np.testing.assert_array_equal(indices, np.argsort(d, kind="stable")[:3])
        np.testing.assert_allclose(distances, np.sort(d)[:3])


def test_a_copy_is_found_at_distance_zero():
    references = pictures(30, 2)
    held_out = neighbours.nearest(pictures(4, 3), references, 1)
    found = neighbours.nearest(references[[11, 4]], references, 2)
    assert list(found.indices[:, 0]) == [11, 4] and np.all(found.distances[:, 0] == 0)
    summary = neighbours.summary(found, held_out)
    assert summary["exact_copies"] == 2
    assert summary["median_distance"] < summary["median_distance_held_out"]


def test_the_picture_shows_query_and_neighbours():
    references = pictures(9, 4)
    queries = references[[5]]
    found = neighbours.nearest(queries, references, 2)
    shown = neighbours.picture(queries, references, found, gap=2)
    for left, index in ((0, 5), (36, 5), (68, found.indices[0, 1])):      # 6 pixels are 5 times 6
        large = references[index].repeat(5, axis=0).repeat(5, axis=1)
        np.testing.assert_array_equal(shown[:30, left:left + 30], large)
    alone = neighbours.picture(pictures(1, 0, 40), pictures(9, 4, 40), found)
    np.testing.assert_array_equal(alone[:40, :40], pictures(1, 0, 40)[0])


def test_crop_takes_the_middle():
    images = pictures(2, 5, size=8)
    np.testing.assert_array_equal(neighbours.centre_crop(images, 4), images[:, 2:6, 2:6])
    assert neighbours.centre_crop(images, None) is images
