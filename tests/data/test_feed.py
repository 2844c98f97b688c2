import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_jax.data import feed
from ddpm_jax.errors import UserError


class Counting:
    """A source whose image i is filled with i (as two bytes)."""

    shape = (1, 2, 1)

    def __init__(self, n, bad=None):
        self.n, self.bad, self.threads = n, bad, set()

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == self.bad:
            raise UserError(f"record {i} is corrupt")
        self.threads.add(threading.get_ident())
        return np.array([i // 256, i % 256], np.uint8).reshape(self.shape)


def numbers(batch):
    return batch.reshape(-1, 2).astype(int) @ [256, 1]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64), st.integers(0, 50))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    index = feed.shuffled_index(seed, epoch * n + np.arange(n), n)
    assert index.dtype == np.int32
    np.testing.assert_array_equal(np.sort(index), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**31), st.integers(1, 97))
def test_batches_of_any_size_visit_each_example_once_an_epoch(n, seed, batch):
    epochs = 3
    steps = -(-epochs * n // batch)
    order = np.concatenate([feed.batch_indices(seed, s, batch, n) for s in range(steps)])
    for e in range(epochs):
        np.testing.assert_array_equal(np.sort(order[e * n:(e + 1) * n]), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 127, 128, 129, 50_000, 3_033_042])
def test_numpy_and_jit_agree(n):
    positions = np.random.default_rng(0).integers(0, 2**32, (4, 25), dtype=np.uint32)
    device = jax.jit(lambda p: feed.shuffled_index(7, p, n, jnp))(positions)
    assert device.dtype == jnp.int32
    np.testing.assert_array_equal(device, feed.shuffled_index(7, positions, n))
    step = jax.jit(lambda seed, s: feed.batch_indices(seed, s, 48, n, jnp))
    for s in (0, 3, 80_000_000):
        np.testing.assert_array_equal(step(jnp.uint32(11), jnp.int32(s)),
                                      feed.batch_indices(11, s, 48, n))


def test_a_scalar_position_and_the_last_one():
    assert feed.shuffled_index(0, 2**32 - 1, 10).shape == ()
    assert 0 <= feed.shuffled_index(0, 2**32 - 1, 10) < 10
    with pytest.raises(ValueError, match="num_examples"):
        feed.shuffled_index(0, 0, 0)


def test_epochs_and_seeds_differ():
    n = 1000
    orders = [feed.shuffled_index(s, e * n + np.arange(n), n) for s in range(4) for e in range(4)]
    orders.append(np.arange(n))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.02  # 0.001 expected
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.16  # 5 deviations


@pytest.mark.parametrize("n", [5, 10, 37])
def test_every_place_is_equally_likely(n):
    epochs = 4000
    order = feed.shuffled_index(3, np.arange(epochs * n), n).reshape(epochs, n)
    for pair in (order[:, :1], order[:, -1:], (order[:, :1] - order[:, 1:2]) % n):
        seen = np.bincount(pair.ravel(), minlength=n)[-n + 1 if pair.min() else 0:]
        expected = epochs / len(seen)
        chi2 = ((seen - expected) ** 2 / expected).sum()
        assert chi2 < len(seen) + 6 * np.sqrt(2 * len(seen))


def test_golden_order():
    """Pinned: changing the order silently would break the resume of every old run."""
    golden = [7, 2, 3, 6, 5, 1, 0, 4, 6, 5, 7, 2]
    assert feed.shuffled_index(0, np.arange(12), 8).tolist() == golden


@pytest.mark.parametrize("start", [0, 5, 1_000_003])
def test_stream_is_the_formula_at_any_host_count_and_start(start):
    source, batch, steps = Counting(70), 12, 4
    expected = [feed.batch_indices(9, start + s, batch, 70) for s in range(steps)]
    for hosts in (1, 2, 3):
        share = batch // hosts
        parts = []
        for h in range(hosts):
            batches = feed.stream(source, seed=9, start_step=start, batch_size=batch,
                                  slots=range(h * share, (h + 1) * share), threads=3,
                                  labels=np.arange(70, dtype=np.int32) % 7)
            pairs = [next(batches) for _ in range(steps)]
            parts.append([numbers(images) for images, _ in pairs])
            for images, labels in pairs:
                np.testing.assert_array_equal(labels, numbers(images) % 7)
        for s in range(steps):
            np.testing.assert_array_equal(np.concatenate([p[s] for p in parts]), expected[s])


def test_stream_reads_in_worker_threads_and_passes_their_errors_on():
    source = Counting(40)
    batch, labels = next(feed.stream(source, seed=0, start_step=0, batch_size=8, slots=range(8)))
    assert labels is None
    assert batch.shape == (8, 1, 2, 1) and batch.dtype == np.uint8
    assert source.threads and threading.get_ident() not in source.threads
    broken = feed.stream(Counting(40, bad=17), seed=0, start_step=0, batch_size=8, slots=range(8))
    with pytest.raises(UserError, match="record 17 is corrupt"):
        for _ in range(5):
            next(broken)


def test_is_small():
    class Size:
        shape = (32, 32, 3)

        def __len__(self):
            return 50_000

    assert feed.is_small(Size())
    Size.shape = (256, 256, 3)
    assert not feed.is_small(Size())
