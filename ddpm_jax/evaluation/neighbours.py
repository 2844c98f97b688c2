"""Nearest training images of samples, in pixels and in features (paper, figs. 12 and 15)."""

from typing import NamedTuple

import numpy as np

from ddpm_jax.storage import pictures

BLOCK = 4096
LEAST_SIDE = 32      # pixels of an image in a picture
BLOCK_NUMBERS = 1 << 24      # 128 MiB of float64


class Neighbours(NamedTuple):
    """indices int [Q,k] into the references, nearest first; distances float64 [Q,k] (Euclidean)."""
    indices: np.ndarray
    distances: np.ndarray


def nearest(queries, references, k: int) -> Neighbours:
    """Exact neighbours of queries [Q,...] among references [N,...], in blocks of references.

    references: an array, or anything with len() and slices that are arrays. Any numeric dtype;
    rows are flattened. uint8 distances are exact. Ties go to the lower index.
    """
    q = np.asarray(queries, np.float64).reshape(len(queries), -1)
    block = max(1, min(BLOCK, BLOCK_NUMBERS // max(1, q.shape[1])))
    k = min(k, len(references))
    best = np.full((len(q), 0), np.inf)
    where = np.zeros((len(q), 0), np.int64)
    for s in range(0, len(references), block):
        r = np.asarray(references[s:s + block], np.float64).reshape(-1, q.shape[1])
        d = (q * q).sum(1)[:, None] + (r * r).sum(1)[None, :] - 2 * (q @ r.T)
        best = np.concatenate([best, np.maximum(d, 0)], axis=1)
        index = np.broadcast_to(s + np.arange(len(r)), d.shape)
        where = np.concatenate([where, index], axis=1)
        order = np.argsort(best, axis=1, kind="stable")[:, :k]
        best, where = np.take_along_axis(best, order, 1), np.take_along_axis(where, order, 1)
    return Neighbours(where, np.sqrt(best))


def centre_crop(images, size: int | None):
    """The middle size x size of images [N,H,W,C] (100 for CelebA-HQ in the paper); None: all."""
    if not size:
        return images
    h, w = images.shape[1:3]
    top, left = max(0, (h - size) // 2), max(0, (w - size) // 2)
    return images[:, top:top + size, left:left + size]


def picture(queries, references, found: Neighbours, *, gap: int = 2) -> np.ndarray:
    """One row a query: the query, a gap, its neighbours. uint8 [Q,H,W,C] -> uint8 [h,w,3]; images
    under 32 pixels are enlarged by whole pixels."""
    near = [[references[int(index)] for index in row] for row in found.indices]
    images = np.concatenate([queries[:, None], near], axis=1)
    images = np.broadcast_to(images, (*images.shape[:-1], 3))
    scale = max(1, LEAST_SIDE // images.shape[2])
    grid = pictures.tile(images.reshape(-1, *images.shape[2:]), images.shape[1], scale=scale,
                         gap=gap, grey=255)
    return np.insert(grid, [scale * images.shape[3]] * 2 * gap, 255, axis=1)


def summary(found: Neighbours, reference_to_reference: Neighbours) -> dict:
    """Are samples nearer to the training set than unseen real images are?

    found: of samples; reference_to_reference: of held-out real images in the same set.
    """
    return {"median_distance": float(np.median(found.distances[:, 0])),
            "median_distance_held_out": float(np.median(reference_to_reference.distances[:, 0])),
            "exact_copies": int(np.sum(found.distances[:, 0] == 0))}
