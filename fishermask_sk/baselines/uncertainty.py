"""Random sampling, and the strategies that ask for what the model is least sure of."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import entropy
from sklearn.utils import check_random_state

from fishermask_sk._types import Learner, RandomState, Samples
from fishermask_sk.baselines.shared import (
    check_pool,
    class_probabilities,
    documented,
    log_uncertainty,
    margins,
    most_uncertain,
)
from fishermask_sk.strategy.contract import answer


@documented
def random_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick samples at random, every one as likely as any other.

    Parameters
    ----------
    learner : modAL learner or estimator
        Only asked which modAL it belongs to.
    random_state : int, RandomState instance or None, default=None
        None draws from NumPy's global generator, as in scikit-learn.
    random_tie_break, return_metrics
        Accepted because modAL forwards them.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`; under modAL 0.4.2 a pair of these and zeros.

    Raises
    ------
    TypeError, ValueError
        For an `n_instances` that is no integer from 1 to the size of the pool.

    Examples
    --------
    >>> import numpy as np
    >>> from fishermask_sk.baselines import random_sampling
    >>> random_sampling(None, np.zeros((50, 3)), n_instances=4, random_state=0).shape
    (4,)
    """
    n_pool = check_pool(X_pool, n_instances)
    query_idx = check_random_state(random_state).permutation(n_pool)[:n_instances]
    return answer(learner, query_idx, np.zeros(n_instances))


@documented
def least_confidence_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick the samples whose most likely class is least likely: largest 1 − max_c p_c.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, the least certain first; under modAL 0.4.2 a pair of
        these and the measure.

    References
    ----------
    .. [1] D. D. Lewis and W. A. Gale, "A Sequential Algorithm for Training Text
       Classifiers", SIGIR 1994.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.baselines import least_confidence_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> fitted = LogisticRegression(max_iter=500).fit(X, y)
    >>> least_confidence_sampling(fitted, X, n_instances=2)
    array([106,  77])
    """
    return most_uncertain(
        lambda: 1 - class_probabilities(learner, X_pool).max(axis=1),
        1,
        learner,
        X_pool,
        n_instances,
        random_tie_break,
        random_state,
    )


@documented
def margin_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick the samples whose two likeliest classes are closest: smallest
    p_(1) − p_(2).

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, the smallest margin first; under modAL 0.4.2 a pair of
        these and the margins.

    References
    ----------
    .. [1] T. Scheffer, C. Decomain and S. Wrobel, "Active Hidden Markov Models for
       Information Extraction", IDA 2001.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.baselines import margin_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> margin_sampling(LogisticRegression(max_iter=500).fit(X, y), X, n_instances=2)
    array([106,  77])
    """
    return most_uncertain(
        lambda: margins(class_probabilities(learner, X_pool)),
        -1,
        learner,
        X_pool,
        n_instances,
        random_tie_break,
        random_state,
    )


@documented
def entropy_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick the samples whose prediction has the largest entropy
    −Σ_c p_c log p_c.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, the largest entropy first; under modAL 0.4.2 a pair of
        these and the entropies.

    References
    ----------
    .. [1] B. Settles, "Active Learning Literature Survey", 2009, section 3.1.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.baselines import entropy_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> entropy_sampling(LogisticRegression(max_iter=500).fit(X, y), X, n_instances=1)
    array([106])
    """
    return most_uncertain(
        lambda: entropy(class_probabilities(learner, X_pool).T),
        1,
        learner,
        X_pool,
        n_instances,
        random_tie_break,
        random_state,
    )


@documented
def power_margin_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Draw samples without replacement, in proportion to 1 − (p_(1) − p_(2)): margin
    sampling that does not buy the same uncertain sample many times.

    The largest values of ``log(1 − margin) + g``, with g from the standard Gumbel
    distribution, are such a draw.

    Parameters
    ----------
    random_state : int, RandomState instance or None, default=None
        Seeds the draw; None draws from NumPy's global generator.
    random_tie_break, return_metrics
        Accepted because modAL forwards them.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of the draw; under modAL 0.4.2 a pair of
        these and the perturbed logarithms.

    References
    ----------
    .. [1] A. Kirsch et al., "Stochastic Batch Acquisition: A Simple Baseline for Deep
       Active Learning", arXiv:2106.12059: power acquisition with β = 1.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.baselines import power_margin_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> regression = LogisticRegression(max_iter=500).fit(X, y)
    >>> power_margin_sampling(regression, X, n_instances=3, random_state=0).shape
    (3,)
    """

    def measure() -> np.ndarray:
        uncertainty = log_uncertainty(margins(class_probabilities(learner, X_pool)))
        rng = check_random_state(random_state)
        return uncertainty + rng.gumbel(size=len(uncertainty))

    return most_uncertain(measure, 1, learner, X_pool, n_instances, False, None)
