"""The metrics, from features already collected. numpy float64; each returns {name: number}."""

import numpy as np

from ddpm_jax.evaluation import moments, neighbours, scores, small_cnn
from ddpm_jax.evaluation.frechet import frechet_distance
from ddpm_jax.evaluation.subset import subset

DIMENSIONS = 2048
BUCKETS = 10
OFFLINE_NOTE = "not comparable with published FID: compare only equal keys, at equal n"


def fid(pool_3, reference) -> dict:
    """Against a references.Reference; with a warning where there are too few images for a FID."""
    found = moments.of(pool_3, reference.mu)
    values = {"fid": frechet_distance(*moments.finish(found), reference.mu, reference.sigma),
              "fid_n": found.n}
    small = [f"{found.n} samples"] if found.n <= DIMENSIONS else []
    if reference.n is not None and reference.n <= DIMENSIONS:
        small.append(f"{reference.n} reference images")
    if small:
        values["fid_warning"] = (f"{' and '.join(small)} cannot fill a {DIMENSIONS}-dimensional "
                                 "covariance: not a meaningful FID (use kid)")
    return values


def called(logits, labels) -> dict:
    """Shares of images whose largest of logits [N,K] is that of their label [N]: of all, and of
    each label in turn (None: it has no images)."""
    labels = np.asarray(labels)
    right = np.argmax(logits, axis=1) == labels
    by_class = [float(right[labels == k].mean()) if (labels == k).any() else None
                for k in range(logits.shape[1])]
    return {"labels_called": float(right.mean()), "labels_called_by_class": by_class,
            "labels_n": len(right)}


def kid(pool_3, reference) -> dict:
    return scores.kid(reference.features, pool_3)


def _equal(fake, real, n, given) -> tuple:
    """n rows of each; given images may be sorted, samples of a model are not."""
    return fake[subset(len(fake), n) if given else np.arange(n)], real[subset(len(real), n)]


def precision_recall(pool_3, reference, *, given=False) -> dict:
    """In pool_3 (ADM's choice), equal numbers on both sides, at most the features stored. given:
    pool_3 is of given images, not of a model's samples."""
    real = reference.features
    n = min(len(real), len(pool_3))
    fake, real = _equal(pool_3, real, n, given)
    return scores.precision_recall(real, fake) | {
        "precision_recall_n": n, "precision_recall_space": "pool_3"}


def nearest(images, features, real_images, real_features, held_images, held_features, *,
            queries: int, k: int, crop=None) -> tuple[dict, dict]:
    """Neighbours of the first images in pixels and features, next to held-out real images'.

    -> ({name: number}, {space: (picture uint8)}).
    """
    values, pictures = {}, {}
    cut = lambda x: neighbours.centre_crop(x, crop)  # noqa: E731
    spaces = {"pixels": (cut(images), cut(real_images), cut(held_images)),
              "features": (features, real_features, held_features)}
    for space, (ours, real, held) in spaces.items():
        found = neighbours.nearest(ours[:queries], real, k)
        floor = neighbours.nearest(held[:queries], real, 1)
        values |= {f"nn_{space}_{name}": v
                   for name, v in neighbours.summary(found, floor).items()}
        pictures[space] = neighbours.picture(images[:queries], real_images, found)
    return values, pictures


def offline(fake: dict, real: dict, held: dict, *, classifier_key, accuracy, seed=0,
            given=False) -> dict:
    """Distances without downloaded weights, each beside that of held-out real images.

    fake, real, held: {'cnn', 'cnn_logits', 'random', 'channels'} arrays by image. Keys ending in
    _equal_n and _real_vs_real share one n. given: as `precision_recall`.
    """
    n = min(len(fake["random"]), len(held["random"]))
    values = {"offline_n": len(fake["random"]), "offline_equal_n": n, "offline_note": OFFLINE_NOTE,
              "offline_real_n": len(real["random"])}
    keys = {f"FD-rand@{seed}": "random"} | ({classifier_key: "cnn"} if classifier_key else {})
    for name, feature in keys.items():
        values[name] = small_cnn.distance(fake[feature], real[feature])
        ours, theirs = _equal(fake[feature], held[feature], n, given)
        values[f"{name}_equal_n"] = small_cnn.distance(ours, real[feature])
        values[f"{name}_real_vs_real"] = small_cnn.distance(theirs, real[feature])
    if classifier_key:
        values["cnn_accuracy"] = accuracy
        for name, arrays in (("samples", fake), ("reals", held)):
            p = scores.softmax(arrays["cnn_logits"])
            values[f"cnn_confident_{name}"] = float(np.mean(p.max(1) > small_cnn.CONFIDENT))
            values[f"cnn_classes_{name}"] = [
                float(s) for s in np.bincount(p.argmax(1), minlength=p.shape[1]) / len(p)]
    for name, arrays in (("samples", fake), ("reals", real)):
        mean, square = np.split(arrays["channels"].astype(np.float64).mean(0), 2)
        values[f"channel_mean_{name}"] = mean.tolist()
        values[f"channel_std_{name}"] = np.sqrt(np.maximum(square - mean ** 2, 0)).tolist()
    return values


def likelihood(sums: dict) -> dict:
    """Averages over images of the bound's parts (paper, table 1 and sec. 4.3).

    sums: {'bpd', 'prior': per image; 'sum_terms', 'sum_mse', 'sum_eps': [T] float64}. -> bpd = rate
    + distortion + prior in bits/dim; rmse of the last prediction in [0,255]; curves by t.
    """
    n = len(sums["bpd"])
    terms, mse, eps = (sums[f"sum_{name}"] / n for name in ("terms", "mse", "eps"))
    prior = float(np.mean(sums["prior"], dtype=np.float64))
    bpd = float(np.mean(sums["bpd"], dtype=np.float64))
    buckets = np.array_split(eps, min(BUCKETS, len(eps)))
    return {"bpd": bpd, "bpd_n": n, "bpd_std_error": float(np.std(sums["bpd"]) / np.sqrt(n)),
            "prior": prior, "distortion": float(terms[0]), "rate": float(terms[1:].sum()),
            "rmse": float(127.5 * np.sqrt(mse[0])),
            "eps_loss": [float(b.mean()) for b in buckets],
            "terms": terms.tolist(), "mse": mse.tolist()}


def rate_distortion(terms, prior, mse) -> tuple[np.ndarray, np.ndarray]:
    """Table 4, Fig. 5: after k = 1 ... T reverse steps, bits/dim received and RMSE in [0,255].

    terms, mse: averages over images [T] by t (t = 0: the decoder, never sent as rate).
    """
    terms, mse = np.asarray(terms, np.float64)[::-1], np.asarray(mse, np.float64)[::-1]
    rate = prior + np.concatenate([[0.0], np.cumsum(terms)[:-1]])
    return rate, 127.5 * np.sqrt(mse)
