"""The image in slot i of step s, and streams of batches.

Slot i of step s is position p = s * batch_size + i of an endless stream. Epoch p // N visits all N
examples once, in its own pseudo-random order, so the example is a pure function of (seed, p): there
is no iterator state to save, and a resume on any number of hosts repeats and skips nothing. (The
official code, hojonathanho/diffusion, repeats before it shuffles, so that epochs blend:
tpu_utils/datasets.py:57-60.) jax and grain are imported where they are used: slow, and the order
alone needs neither.
"""

import functools

import numpy as np

SMALL_BYTES = 1 << 30  # smaller datasets are stored on the device
_ROUNDS = 8


def _mix(x, xp):
    """A bijection of uint32 in which every input bit reaches every output bit."""
    x = (x ^ (x >> xp.uint32(16))) * xp.uint32(0x7FEB352D)
    x = (x ^ (x >> xp.uint32(15))) * xp.uint32(0x846CA68B)
    return x ^ (x >> xp.uint32(16))


def _feistel(x, key, low_bits, high_bits, xp):
    """A permutation of [0, 2**(low_bits + high_bits)) for each key: uint32 arrays of one shape."""
    low_mask, high_mask = (1 << low_bits) - 1, (1 << high_bits) - 1
    low, high = x & xp.uint32(low_mask), x >> xp.uint32(low_bits)
    for r in range(_ROUNDS):
        salt = key ^ xp.uint32((r + 1) * 0x9E3779B9 & 0xFFFFFFFF)
        if r % 2:
            low = low ^ (_mix(_mix(high + salt, xp) + key, xp) & xp.uint32(low_mask))
        else:
            high = high ^ (_mix(_mix(low + salt, xp) + key, xp) & xp.uint32(high_mask))
    return (high << xp.uint32(low_bits)) | low


def shuffled_index(seed, position, num_examples, xp=np):
    """The example at each position of the stream: a keyed permutation of each epoch.

    seed: int (its low 32 bits count). position: integers [...] in [0, 2**32), so a run may draw
    steps * batch_size < 2**32 images. num_examples: a Python int in [1, 2**31). xp: numpy, or
    jax.numpy (also under jit), with equal results. -> int32 [...] in [0, num_examples).
    A Feistel network on the next power of two, applied again to values of num_examples or more.
    """
    if not 1 <= num_examples < 2**31:
        raise ValueError(f"num_examples must be in [1, 2**31), not {num_examples}")
    seed = xp.uint32(seed & 0xFFFFFFFF) if isinstance(seed, int) else xp.asarray(seed, xp.uint32)
    position = xp.asarray(position, xp.uint32)
    n, flat = xp.uint32(num_examples), position.reshape(-1)  # numpy warns of 0-d overflow only
    key = _mix(_mix(flat // n + xp.uint32(0x632BE5AB), xp) ^ seed.reshape(1), xp)
    bits = max(num_examples - 1, 1).bit_length()

    def permute(x):
        return _feistel(x, key, bits // 2, bits - bits // 2, xp)

    index = permute(flat % n)
    if xp is np:
        while (outside := index >= n).any():
            index = np.where(outside, permute(index), index)
    else:
        import jax
        index = jax.lax.while_loop(lambda x: (x >= n).any(),
                                   lambda x: xp.where(x >= n, permute(x), x), index)
    return index.astype(xp.int32).reshape(position.shape)


def batch_indices(seed, step, batch_size, num_examples, xp=np):
    """The examples of one step's global batch -> int32 [batch_size]. step: int or int32 []."""
    start = xp.asarray(step).astype(xp.uint32).reshape(1) * xp.uint32(batch_size)
    return shuffled_index(seed, start + xp.arange(batch_size, dtype=xp.uint32), num_examples, xp)


def is_small(source) -> bool:
    """Whether the images (less than 1 GiB) can be stored on the device beside the model."""
    return len(source) * int(np.prod(source.shape)) < SMALL_BYTES


class _Slots:
    """Random access for grain: element k is slot k % len(slots) of step k // len(slots)."""

    def __init__(self, source, seed, start_step, batch_size, slots, labels):
        self._source, self._start, self._slots = source, start_step, slots
        self._labels = labels
        self._batch_size = batch_size
        self._batch = functools.lru_cache(maxsize=64)(
            lambda step: batch_indices(seed, step, batch_size, len(source)))

    def __len__(self):
        return (2**32 // self._batch_size - self._start) * len(self._slots)

    def __getitem__(self, k):
        step, slot = divmod(int(k), len(self._slots))
        example = int(self._batch(self._start + step)[self._slots[slot]])
        image = self._source[example]
        return image if self._labels is None else (image, self._labels[example])


def stream(source, *, seed, start_step, batch_size, slots, labels=None, threads=16, prefetch=2):
    """Batches of `source` from `start_step` on, decoded by grain's worker threads.

    slots: the positions of the global batch that this process feeds, e.g. range(0, 64) of 128.
    labels: int32 [N], or None. prefetch: batches read ahead. Yields (images uint8 [len(slots), H,
    W, C], labels int32 [len(slots)] or None), one per step, for 2**32 images. Exceptions of a
    worker (UserError for a damaged image) are raised here.
    """
    import grain
    slots = list(slots)
    elements = grain.MapDataset.source(
        _Slots(source, seed, start_step, batch_size, slots, labels))
    options = grain.ReadOptions(num_threads=threads,
                                prefetch_buffer_size=max(threads, prefetch * len(slots)))
    batches = iter(elements.to_iter_dataset(options).batch(len(slots)))
    return batches if labels is not None else ((images, None) for images in batches)
