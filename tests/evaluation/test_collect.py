"""Shards are made once, kept over a stop, and hold exactly N rows."""

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import collect


def producer(made, poison=None):
    def produce(start, count):
        made.append(start)
        rows = np.arange(start, start + count, dtype=np.float64)
        if poison is not None and start <= poison < start + count:
            rows[poison - start] = np.nan
        return {"x": rows, "sum_x": rows.sum(), "images": np.zeros((max(0, 3 - start), 2))}
    return produce


class StopAt:
    def __init__(self, k):
        self.k = k

    def requested(self, k):
        return k >= self.k


@pytest.mark.parametrize("num, batch", [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_exactly_num_rows_whatever_the_batch(num, batch, tmp_path):
    found = collect.collect(producer([]), num=num, batch=batch, folder=tmp_path / "s")
    np.testing.assert_array_equal(found["x"], np.arange(num))
    assert found["sum_x"] == num * (num - 1) / 2 and len(found["images"]) == 3


def test_a_stop_keeps_what_is_done_and_nothing_is_made_twice(tmp_path):
    made, again = [], []
    assert collect.collect(producer(made), num=10, batch=4, folder=tmp_path, stop=StopAt(2)) is None
    (tmp_path / "shard-00001.npz").write_bytes(b"cut short")
    found = collect.collect(producer(again), num=10, batch=4, folder=tmp_path, stop=StopAt(9))
    assert made == [0, 4] and again == [4, 8]
    np.testing.assert_array_equal(found["x"], np.arange(10))


def test_more_images_later_only_add(tmp_path):
    collect.collect(producer([]), num=6, batch=4, folder=tmp_path)
    made = []
    found = collect.collect(producer(made), num=12, batch=4, folder=tmp_path)
    assert made == [4, 8] and len(found["x"]) == 12


def test_nan_names_the_image_and_is_not_kept(tmp_path):
    with pytest.raises(UserError, match="sample 6: x is not finite"):
        collect.collect(producer([], poison=6), num=9, batch=4, folder=tmp_path, what="sample")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard-00000.npz"]


def test_a_request_has_one_key():
    a = collect.key({"seed": 0, "weights": "ema"})
    assert a == collect.key({"weights": "ema", "seed": 0}) != collect.key({"seed": 1})
    here, there = ({"workdir": path, "weights_sha256": "x"} for path in ("/a", "/b"))
    assert collect.key(here) == collect.key(there) != collect.key(here | {"weights_sha256": "y"})
