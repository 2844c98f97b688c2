"""Frechet distance between two Gaussians, in float64 on the host."""

import numpy as np

RANK_TOLERANCE = 1e-10


def _root(cov):
    """(A, w) with A A' = cov: eigenvectors scaled by the root of the eigenvalues w.

    Eigenvalues within rounding of zero are taken as zero, and A [D,rank] is without them: their
    roots would not be small.
    """
    values, vectors = np.linalg.eigh(cov)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept]), values


def trace_sqrt_product(cov1, cov2) -> float:
    """tr((cov1 cov2)^(1/2)) of two symmetric positive semidefinite float64 [D,D].

    The eigenvalues of cov1^(1/2) cov2 cov1^(1/2); where one of them is too small to be
    distinguished from rounding (rank-deficient input), the singular values of A'B with cov1 = AA',
    cov2 = BB', which keep their relative precision. scipy's sqrtm is never needed.
    """
    a, values = _root(cov1)
    full_rank = values[0] > RANK_TOLERANCE * max(values[-1], np.finfo(np.float64).tiny)
    if full_rank:
        # A' cov2 A has the eigenvalues of cov1^(1/2) cov2 cov1^(1/2): one product fewer.
        product = a.T @ cov2 @ a
        values = np.linalg.eigvalsh((product + product.T) / 2)
        if values[0] > RANK_TOLERANCE * max(values[-1], np.finfo(np.float64).tiny):
            return float(np.sqrt(values).sum())
    b, _ = _root(cov2)
    product = a.T @ b
    return float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1-mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) (Heusel et al. 2017, eq. 6).

    mu [D], cov [D,D], any float dtype; computed in float64. ValueError: shapes that do not fit,
    values that are not finite.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(x, np.float64) for x in (mu1, cov1, mu2, cov2))
    shapes = {mu1.shape * 2, cov1.shape, mu2.shape * 2, cov2.shape}
    if len(shapes) != 1 or mu1.ndim != 1:
        raise ValueError(f"frechet_distance: shapes do not fit: {sorted(shapes)}")
    if not all(np.all(np.isfinite(x)) for x in (mu1, cov1, mu2, cov2)):
        raise ValueError("frechet_distance: a mean or covariance has a value that is not finite")
    cov1, cov2 = (cov1 + cov1.T) / 2, (cov2 + cov2.T) / 2
    gap = mu1 - mu2
    return float(gap @ gap + np.trace(cov1) + np.trace(cov2) - 2 * trace_sqrt_product(cov1, cov2))
