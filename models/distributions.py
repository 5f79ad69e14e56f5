"""How far the films of a predictor are, as a whole, from the true ones: FVD and JEDi, from moments of features.

Both compare two sets of feature vectors, one for each film, and say nothing of single films; with few films both are
biased upwards, so sets of different sizes must not be compared. The networks that give the features are in
`models.video_features`.
"""

from __future__ import annotations

import numpy as np

from data.errors import EmptyError
from models.statistics import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Distance of two Gaussians, |mean difference|^2 + tr(A + B - 2 (AB)^(1/2)) for covariances A, B (Dowson and Landau
    1982; Unterthiner et al. 2018 for films). In [0, inf). Covariances divide by the count, as in cd-fvd. Raises
    EmptyError for less than two films."""
    _check(a, b)
    (mean_a, cov_a), (mean_b, cov_b) = _gaussian(a), _gaussian(b)
    # The product of two covariances is similar to a positive matrix: its eigenvalues are real but for rounding.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    return max(float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()), 0.0)


def polynomial_discrepancy(a: Moments, b: Moments) -> float:
    """Squared maximum mean discrepancy (Gretton et al. 2012) under the kernel (x.y / d)^2, of all pairs. In [0, inf).

    The mean of that kernel over all pairs is the product of the two matrices of second moments, hence it needs no
    pairs: |A - B|^2 / d^2 (Frobenius). Raises EmptyError for less than two films.
    """
    _check(a, b)
    difference = a.outer / a.count - b.outer / b.count
    return float((difference**2).sum()) / len(a.total) ** 2


def _gaussian(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    mean = moments.total / moments.count
    return mean, moments.outer / moments.count - np.outer(mean, mean)


def _check(a: Moments, b: Moments) -> None:
    if min(a.count, b.count) < 2:
        raise EmptyError(
            f"a distance of distributions needs two films of each, found {a.count} and {b.count}",
            remedy="evaluate more windows, or leave evaluate.fvd and evaluate.jedi out",
        )
