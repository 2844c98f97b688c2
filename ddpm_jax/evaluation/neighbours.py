"""Nearest training images of samples, in pixels and in features (paper, figs. 12 and 15)."""

from typing import NamedTuple

import numpy as np

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
    scale = max(1, LEAST_SIDE // queries.shape[1])
    h, w = (scale * side for side in queries.shape[1:3])

    def enlarged(image):
        return image.repeat(scale, axis=0).repeat(scale, axis=1)

    k = found.indices.shape[1]
    rows = len(queries)
    canvas = np.full((rows * (h + gap) - gap, (k + 1) * (w + gap) + 2 * gap, 3), 255, np.uint8)
    for row in range(rows):
        top = row * (h + gap)
        canvas[top:top + h, :w] = enlarged(queries[row])
        for column, index in enumerate(found.indices[row]):
            left = (column + 1) * (w + gap) + 2 * gap
            canvas[top:top + h, left:left + w] = enlarged(references[int(index)])
    return canvas


def summary(found: Neighbours, reference_to_reference: Neighbours) -> dict:
    """Are samples nearer to the training set than unseen real images are?

    found: of samples; reference_to_reference: of held-out real images in the same set.
    """
    return {"median_distance": float(np.median(found.distances[:, 0])),
            "median_distance_held_out": float(np.median(reference_to_reference.distances[:, 0])),
            "exact_copies": int(np.sum(found.distances[:, 0] == 0))}
