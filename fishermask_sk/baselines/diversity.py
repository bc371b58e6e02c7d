"""Strategies that ask for samples unlike each other: k-center and BADGE."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.utils import check_random_state
from sklearn.utils.extmath import row_norms

from fishermask_sk._rows import as_rows, n_rows
from fishermask_sk._types import Learner, RandomState, Samples
from fishermask_sk.baselines.shared import check_pool, documented, first_or_any
from fishermask_sk.scores.features import describe_samples
from fishermask_sk.strategy.contract import answer, labeled_samples


@documented
def kcenter_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    X_labeled: Samples | None = None,
    head: str | None = None,
    batch_size: int = 128,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick, one by one, the sample that is farthest from all labelled and picked ones:
    core-set, k-center greedy.

    Distances are Euclidean, between penultimate features. Without labelled samples the
    first pick is the sample nearest to the mean.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of picking; under modAL 0.4.2 a pair of
        these and the distance at which each was picked.

    Notes
    -----
    Time O((L + b)·N·d) for d features, memory O((N + L)·d) in float64. The greedy rule
    reaches at most twice the smallest possible radius.

    References
    ----------
    .. [1] O. Sener and S. Savarese, "Active Learning for Convolutional Neural
       Networks: A Core-Set Approach", arXiv:1708.00489, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.baselines import kcenter_sampling
    >>> X = np.array([[0.0], [1.0], [5.0], [9.0]])
    >>> estimator = LogisticRegression().fit(X, [0, 0, 1, 1])
    >>> kcenter_sampling(estimator, X[1:], n_instances=2, X_labeled=X[:1])
    array([2, 1])
    """
    check_pool(X_pool, n_instances)
    rng = check_random_state(random_state)
    features, _ = describe_samples(learner, X_pool, "X_pool", head, batch_size)
    X_labeled = labeled_samples(learner, X_labeled)
    if (
        X_labeled is not None
        and n_rows(as_rows(X_labeled, "X_labeled"), "X_labeled") == 0
    ):
        X_labeled = None
    norms = row_norms(features, squared=True)
    if X_labeled is None:
        center = np.asarray(features.mean(axis=0)).ravel()
        nearest = norms - 2 * (features @ center) + center @ center
        utility, squared = -nearest, np.full(len(norms), np.inf)
    else:
        # Blockwise within scikit-learn's working memory: never the whole (n_samples,
        # n_labeled) matrix.
        labeled, _ = describe_samples(learner, X_labeled, "X_labeled", head, batch_size)
        utility = squared = pairwise_distances_argmin_min(features, labeled)[1] ** 2
    query_idx, distances = [], []
    for _ in range(n_instances):
        i = first_or_any(utility == utility.max(), rng, random_tie_break)
        query_idx.append(i)
        distances.append(np.sqrt(squared[i]))
        to_pick = norms - 2 * _products(features, i) + norms[i]
        utility = squared = np.minimum(squared, np.maximum(to_pick, 0.0))
        squared[query_idx] = -1.0  # picked samples are out, among duplicates as well
    return answer(learner, np.array(query_idx), np.array(distances))


@documented
def badge_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    head: str | None = None,
    batch_size: int = 128,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick samples by k-means++ seeding on the gradients at the head's weights: BADGE.

    The gradient of sample x, with the predicted class ŷ for its label, is the outer
    product of the residual q_x = p − e_ŷ and the penultimate features h_x. It is never
    formed: distances come from ``|g_x − g_z|² = |q_x|²|h_x|² + |q_z|²|h_z|² − 2
    (q_x·q_z)(h_x·h_z)``. The first pick is the sample of largest gradient, as in the
    authors' code (the paper leaves it to k-means++, which draws it); each further one
    is drawn with a probability proportional to the squared distance from the nearest
    pick.

    Parameters
    ----------
    head : str, default=None
        Name of the module whose inputs are the features. By default the layer nearest
        the output with one output per class. For a linear one the factors above are
        exact. Without a net, the features are the inputs of the estimator, after the
        earlier steps of its pipeline.
    random_state : int, RandomState instance or None, default=None
        Seeds the draws; None draws from NumPy's global generator.
    random_tie_break : bool, default=False
        Settle ties for the first pick at random instead of by the lowest index.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of picking; under modAL 0.4.2 a pair of
        these and the squared distance (for the first the squared norm) at which each
        was picked.

    Notes
    -----
    Time O(b·N·(c + d)), memory O(N·(c + d)) in float64, where the embedding itself has
    N·c·d numbers.

    References
    ----------
    .. [1] J. T. Ash et al., "Deep Batch Active Learning by Diverse, Uncertain
       Gradient Lower Bounds", arXiv:1906.03671, algorithm 1.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.baselines import badge_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> fitted = LogisticRegression(max_iter=500).fit(X, y)
    >>> badge_sampling(fitted, X, n_instances=5, random_state=0).shape
    (5,)
    """
    check_pool(X_pool, n_instances)
    rng = check_random_state(random_state)
    h, p = describe_samples(
        learner, X_pool, "X_pool", head, batch_size, probabilities=True
    )
    q = p - np.eye(p.shape[1])[p.argmax(axis=1)]
    norms = row_norms(q, squared=True) * row_norms(h, squared=True)
    # What rounding leaves of a distance that is zero: k-means++ must not draw
    # duplicates of its picks.
    rounding = 8 * np.finfo(norms.dtype).eps * norms
    query_idx = [first_or_any(norms == norms.max(), rng, random_tie_break)]
    metrics, squared = [norms[query_idx[0]]], np.full(len(norms), np.inf)
    for _ in range(n_instances - 1):
        i = query_idx[-1]
        to_pick = norms + norms[i] - 2 * _products(q, i) * _products(h, i)
        squared = np.minimum(
            squared, np.where(to_pick > rounding + rounding[i], to_pick, 0.0)
        )
        squared[query_idx] = 0.0
        weights = squared
        if (
            not squared.any()
        ):  # only duplicates of the picks are left, each as good as any other
            weights = np.ones(len(norms))
            weights[query_idx] = 0.0
        i = int(rng.choice(len(weights), p=weights / weights.sum()))
        query_idx.append(i)
        metrics.append(squared[i])
    return answer(learner, np.array(query_idx), np.array(metrics))


def _products(features: Any, i: int) -> np.ndarray:
    """Inner products of all rows, dense or sparse, with row i."""
    row = features[[i]].toarray()[0] if issparse(features) else features[i]
    return features @ row
