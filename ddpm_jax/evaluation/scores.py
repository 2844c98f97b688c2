"""Inception scores, KID, precision and recall from features, in numpy float64."""

import numpy as np

BLOCK = 1024
OPENAI_SPLITS = 10
NEIGHBOURS = 3      # of precision and recall


def softmax(logits) -> np.ndarray:
    """Rows of float64 probabilities from logits [N,K]."""
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _split_score(logits):
    """exp of the mean KL(p(y|x) | p(y)) of one split, in blocks: 50,000 x 1008 stay small."""
    marginal, negative_entropy = 0.0, 0.0
    for start in range(0, len(logits), BLOCK):
        p = softmax(logits[start:start + BLOCK])
        marginal = marginal + p.sum(0)
        negative_entropy += float(np.sum(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))))
    marginal = marginal / len(logits)
    cross = float(np.sum(marginal * np.log(np.maximum(marginal, np.finfo(np.float64).tiny))))
    return float(np.exp(negative_entropy / len(logits) - cross))


def inception_score(logits, splits: int) -> tuple[float, float]:
    """(mean, standard deviation with ddof 0) over contiguous splits of logits [N,K], in order.

    Split i is [i N // splits, (i+1) N // splits), as openai/improved-gan inception_score/model.py.
    ValueError when a split would be empty.
    """
    n = len(logits)
    if n < splits:
        raise ValueError(f"{n} images cannot be split in {splits}")
    scores = [_split_score(logits[i * n // splits:(i + 1) * n // splits]) for i in range(splits)]
    return float(np.mean(scores)), float(np.std(scores))


def logits(pool_3, kernel, bias=None):
    """pool_3 [N,2048] @ kernel [2048,1008] in float32 blocks: the layer is the network's own."""
    kernel = np.asarray(kernel, np.float32)
    out = np.concatenate([np.asarray(pool_3[s:s + BLOCK], np.float32) @ kernel
                          for s in range(0, len(pool_3), BLOCK)])
    return out if bias is None else out + np.asarray(bias, np.float32)[None, :]


def is_openai10(pool_3, fc: dict) -> dict:
    """OpenAI's score: no bias, 10 contiguous splits, mean and spread over them (paper, app. B)."""
    mean, spread = inception_score(logits(pool_3, fc["kernel"]), OPENAI_SPLITS)
    return {"is_openai10": mean, "is_openai10_std": spread}


def is_tfgan1(pool_3, fc: dict) -> dict:
    """tfgan's score: with bias, all images as one split (hojonathanho/diffusion, tpu_utils.py)."""
    return {"is_tfgan1": inception_score(logits(pool_3, fc["kernel"], fc["bias"]), 1)[0]}


# name: (function of pool_3 [N,2048] and the last layer, splits: the images that it needs at least)
INCEPTION_SCORES = {"is_openai10": (is_openai10, OPENAI_SPLITS), "is_tfgan1": (is_tfgan1, 1)}


def polynomial_kernel(x, y) -> np.ndarray:
    """(x.y / D + 1)^3 (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2_unbiased(x, y) -> float:
    """Unbiased squared maximum mean discrepancy of x [m,D] and y [n,D]; may be negative."""
    kxx, kyy, kxy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    m, n = len(x), len(y)
    return float((kxx.sum() - np.trace(kxx)) / (m * (m - 1))
                 + (kyy.sum() - np.trace(kyy)) / (n * (n - 1)) - 2 * kxy.mean())


def kid(real, fake, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> dict:
    """Unbiased KID: mean over random subsets and its spread over them (the paper's convention).

    real, fake [N,D]. The subset size is lowered to the smaller set, and returned.
    """
    size = min(size, len(real), len(fake))
    if size < 2:
        raise ValueError(f"KID needs 2 images or more in each set, got {len(real)}, {len(fake)}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = np.asarray(real[rng.choice(len(real), size, replace=False)], np.float64)
        y = np.asarray(fake[rng.choice(len(fake), size, replace=False)], np.float64)
        values.append(mmd2_unbiased(x, y))
    return {"kid": float(np.mean(values)), "kid_std": float(np.std(values)),
            "kid_subsets": subsets, "kid_subset_size": size}


def squared_distances(x, y) -> np.ndarray:
    """[m,n] squared Euclidean distances of float64 x [m,D], y [n,D], clipped at 0."""
    d = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2 * (x @ y.T)
    return np.maximum(d, 0)


def radii(features, k: int, block: int = BLOCK) -> np.ndarray:
    """Squared distance of each row of features [N,D] to its k-th nearest other row."""
    if len(features) <= k:
        raise ValueError(f"k={k} neighbours need more than {k} images, got {len(features)}")
    out = np.empty(len(features))
    for s in range(0, len(features), block):
        d = squared_distances(features[s:s + block], features)
        rows = np.arange(len(d))
        d[rows, s + rows] = -1       # itself, whatever the rounding
        out[s:s + block] = np.partition(d, k, axis=1)[:, k]
    return out


def _covered(points, centres, radius, block=BLOCK):
    """Share of points inside the ball of at least one centre."""
    inside = 0
    for s in range(0, len(points), block):
        d = squared_distances(points[s:s + block], centres)
        inside += int(np.any(d <= radius[None, :], axis=1).sum())
    return inside / len(points)


def precision_recall(real, fake, *, k: int = NEIGHBOURS) -> dict:
    """Improved precision and recall (Kynkaanniemi et al. 2019) in the space of the features given.

    precision: share of fake [N,D] within the k-nearest-neighbour balls of real [M,D]; recall: the
    reverse. The common mean is taken out first, so that distances keep their digits.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    return {"precision": _covered(fake, real, radii(real, k)),
            "recall": _covered(real, fake, radii(fake, k)), "precision_recall_k": k}
