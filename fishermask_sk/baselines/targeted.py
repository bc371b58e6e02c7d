"""Rivals that know what the labels are for: density ratio, facility location."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils import check_random_state

from fishermask_sk._rows import as_rows, n_rows
from fishermask_sk._types import Learner, RandomState, Samples
from fishermask_sk.baselines.shared import (
    check_pool,
    documented,
    first_or_any,
    log_uncertainty,
    margins,
    most_uncertain,
)
from fishermask_sk.scores.features import describe_samples
from fishermask_sk.scores.targets import check_same_shape
from fishermask_sk.strategy.contract import answer


@documented
def weighted_margin_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    X_target: Samples,
    head: str | None = None,
    batch_size: int = 128,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick the uncertain samples that look like the target: largest
    (1 − (p_(1) − p_(2)))·r(x).

    r(x) is how many times denser the target is than the pool at x. It is the odds that
    a logistic regression gives, which tells target from pool by the standardised
    features, both parts with the same total weight.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, the largest product first; under modAL 0.4.2 a pair of
        these and the products' logarithms.

    Notes
    -----
    Memory O((N + T)·d) for T target samples and d features.

    References
    ----------
    .. [1] M. Sugiyama, T. Suzuki and T. Kanamori, "Density Ratio Estimation in Machine
       Learning", 2012, chapter 4: the ratio by logistic regression.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.baselines import weighted_margin_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> regression = LogisticRegression(max_iter=500).fit(X, y)
    >>> weighted_margin_sampling(regression, X, 2, X_target=X[y == 2][::5]).shape
    (2,)
    """

    def measure() -> np.ndarray:
        pool, target, p = _pool_and_target(
            learner, X_pool, X_target, head, batch_size, probabilities=True
        )
        return log_uncertainty(margins(p)) + _log_density_ratio(pool, target)

    return most_uncertain(
        measure, 1, learner, X_pool, n_instances, random_tie_break, random_state
    )


# So many candidates are looked at again at a time.
_BLOCK = 256


@documented
def facility_location_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    X_target: Samples,
    head: str | None = None,
    batch_size: int = 128,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick samples that resemble the target and cover it: facility-location mutual
    information, SIMILAR's FLQMI.

    Greedily makes ``Σ_t max_{x∈S} s(t, x) + Σ_{x∈S} max_t s(t, x)`` large over the
    picks S, where s is the cosine similarity of the features and t runs over the
    target. A maximum over no picks is 0. What the model predicts does not matter.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of picking; under modAL 0.4.2 a pair of
        these and how much each pick added.

    Notes
    -----
    What a sample adds can only fall as picks are made, so that an old value is a bound
    and most samples are not looked at again. One pass over all N samples takes O(N·T·d)
    time, for T target samples and d features. Memory is O((N + T)·d + T): similarities
    are made block by block.

    References
    ----------
    .. [1] S. Kothawade et al., "SIMILAR: Submodular Information Measures Based Active
       Learning in Realistic Scenarios", arXiv:2107.00717, table 1: FLQMI with η = 1.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.baselines import facility_location_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> regression = LogisticRegression(max_iter=500).fit(X, y)
    >>> facility_location_sampling(regression, X, 2, X_target=X[y == 2][::5]).shape
    (2,)
    """
    n_pool = check_pool(X_pool, n_instances)
    rng = check_random_state(random_state)
    found = _pool_and_target(learner, X_pool, X_target, head, batch_size)
    pool, target = map(normalize, found[:2])
    covered = np.zeros(len(target))  # max over the picks of s(t, x)

    def gains(positions: np.ndarray) -> np.ndarray:
        similar = pool[positions] @ target.T
        return np.maximum(similar - covered, 0).sum(1) + similar.max(1)

    blocks = np.array_split(np.arange(n_pool), -(-n_pool // _BLOCK))
    bounds = np.concatenate([gains(block) for block in blocks])
    query_idx, metrics = [], []
    for _ in range(n_instances):
        fresh = np.zeros(n_pool, dtype=bool)
        # Sums in blocks of other shapes differ in their last bits.
        tolerance = 1e-12 * np.abs(bounds[np.isfinite(bounds)]).max()
        while True:
            best = np.max(bounds, where=fresh, initial=-np.inf)
            open_ = np.flatnonzero(~fresh & (bounds >= best - tolerance))
            open_ = open_[np.isfinite(bounds[open_])]
            if not len(open_):
                break
            open_ = open_[np.argsort(-bounds[open_], kind="stable")][:_BLOCK]
            bounds[open_], fresh[open_] = gains(open_), True
        tied = fresh & (bounds >= best - tolerance)
        i = first_or_any(tied, rng, random_tie_break)
        query_idx.append(i)
        metrics.append(bounds[i])
        covered = np.maximum(covered, target @ pool[i])
        bounds[i] = -np.inf
    return answer(learner, np.array(query_idx), np.array(metrics))


def _pool_and_target(
    learner: Learner,
    X_pool: Samples,
    X_target: Samples,
    head: str | None,
    batch_size: int,
    probabilities: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of the pool (N, d) and the target (T, d), and the pool's probabilities
    (N, c) as from `describe_samples`.
    """
    if n_rows(as_rows(X_target, "X_target"), "X_target") == 0:
        raise ValueError(
            "X_target is empty; pass unlabelled samples of what the model will be used "
            "on."
        )
    check_same_shape(X_pool, X_target, "those of X_target")
    pool, p = describe_samples(
        learner, X_pool, "X_pool", head, batch_size, probabilities
    )
    target, _ = describe_samples(learner, X_target, "X_target", head, batch_size)
    pool, target = (
        features.toarray() if issparse(features) else features
        for features in (pool, target)
    )
    if pool.shape[1] != target.shape[1]:
        raise ValueError(
            f"X_pool's samples have {pool.shape[1]} features and X_target's "
            f"{target.shape[1]}; pass samples of one shape."
        )
    return pool, target, p


def _log_density_ratio(pool: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Log of target density over pool density at the pool's samples (N,)."""
    features = StandardScaler().fit_transform(np.concatenate([target, pool]))
    is_target = np.arange(len(features)) < len(target)
    # With balanced classes the odds are the ratio itself.
    regression = LogisticRegression(class_weight="balanced", max_iter=1000, tol=1e-6)
    regression.fit(features, is_target)
    return regression.decision_function(features[len(target) :])
