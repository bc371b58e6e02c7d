"""Query strategies to compare FisherMask with, called as it is called, for modAL and
for our own loops.

Each is a function ``(learner, X_pool, n_instances=1, *, ...)`` that returns what the
caller's modAL expects. The features of a net are the inputs of its head. An estimator
that holds no net (a logistic regression) has its own inputs for features, after the
earlier steps of its pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils import check_random_state
from sklearn.utils.extmath import row_norms

from fishermask_sk._features import describe_samples
from fishermask_sk._loaders import predictions_in_order
from fishermask_sk._rows import as_rows, n_rows
from fishermask_sk._targets import check_same_shape
from fishermask_sk._wrong_dtypes import explained
from fishermask_sk.query_strategy import (
    FisherMask,
    answer,
    check_n_instances,
    labeled_samples,
)

__all__ = [
    "badge_sampling",
    "bait_sampling",
    "entropy_sampling",
    "facility_location_sampling",
    "kcenter_sampling",
    "least_confidence_sampling",
    "margin_sampling",
    "power_margin_sampling",
    "random_sampling",
    "weighted_margin_sampling",
]

# How many candidates the facility location looks at again at a time.
_BLOCK = 256


def random_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Pick samples at random, every one as likely as any other.

    Parameters
    ----------
    learner : modAL learner or estimator
        Only asked which modAL it belongs to.
    X_pool : samples of shape (n_samples, ...)
        The unlabelled samples.
    n_instances : int, default=1
        How many to pick.
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
    n_pool = _check_pool(X_pool, n_instances)
    query_idx = check_random_state(random_state).permutation(n_pool)[:n_instances]
    return answer(learner, query_idx, np.zeros(n_instances))


def least_confidence_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Pick the samples whose most likely class is least likely: largest 1 − max_c p_c
    (modAL's measure).

    Parameters
    ----------
    learner : modAL learner or fitted classifier
        Anything with `predict_proba`.
    X_pool : samples of shape (n_samples, ...)
        The unlabelled samples.
    n_instances : int, default=1
        How many to pick.
    random_state : int, RandomState instance or None, default=None
        Seeds `random_tie_break`.
    random_tie_break : bool, default=False
        Settle ties at random instead of by the lowest index.
    return_metrics
        Accepted because modAL forwards it.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, the least certain first; under modAL 0.4.2 a pair of
        these and the measure.

    Raises
    ------
    TypeError, ValueError
        For an `n_instances` that is no integer from 1 to the size of the pool, or
        probabilities that are NaN.

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
    from modAL.uncertainty import classifier_uncertainty

    return _most_uncertain(
        classifier_uncertainty,
        1,
        learner,
        X_pool,
        n_instances,
        random_tie_break,
        random_state,
    )


def margin_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Pick the samples whose two likeliest classes are closest: smallest p_(1) − p_(2)
    (modAL's measure).

    Parameters
    ----------
    learner, X_pool, n_instances, random_state, random_tie_break, return_metrics
        See `least_confidence_sampling`.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, the smallest margin first; under modAL 0.4.2 a pair of
        these and the margins.

    Raises
    ------
    TypeError, ValueError
        See `least_confidence_sampling`.

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
    from modAL.uncertainty import classifier_margin

    return _most_uncertain(
        classifier_margin,
        -1,
        learner,
        X_pool,
        n_instances,
        random_tie_break,
        random_state,
    )


def entropy_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Pick the samples whose prediction has the largest entropy −Σ_c p_c log p_c
    (modAL's measure).

    Parameters
    ----------
    learner, X_pool, n_instances, random_state, random_tie_break, return_metrics
        See `least_confidence_sampling`.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, the largest entropy first; under modAL 0.4.2 a pair of
        these and the entropies.

    Raises
    ------
    TypeError, ValueError
        See `least_confidence_sampling`.

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
    from modAL.uncertainty import classifier_entropy

    return _most_uncertain(
        classifier_entropy,
        1,
        learner,
        X_pool,
        n_instances,
        random_tie_break,
        random_state,
    )


def kcenter_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    X_labeled: Any = None,
    head: str | None = None,
    batch_size: int = 128,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Pick, one by one, the sample that is farthest from all labelled and picked ones:
    core-set, k-center greedy.

    Distances are Euclidean, between penultimate features. Without labelled samples the
    first pick is the sample nearest to the mean.

    Parameters
    ----------
    learner : modAL learner or fitted estimator
        With a skorch net in it, or any other estimator (see the module's docstring).
    X_pool : samples of shape (n_samples, ...)
        The unlabelled samples.
    n_instances : int, default=1
        How many to pick.
    X_labeled : samples of shape (n_labeled, ...), default=None
        The labelled samples; an empty array means none. By default the learner's
        `X_training`.
    head : str, default=None
        Name of the module whose inputs are the features. By default the layer nearest
        the output with one output per class.
    batch_size : int, default=128
        Samples in a forward pass.
    random_state : int, RandomState instance or None, default=None
        Seeds `random_tie_break`.
    random_tie_break : bool, default=False
        Settle ties at random instead of by the lowest index.
    return_metrics
        Accepted because modAL forwards it.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of picking; under modAL 0.4.2 a pair of
        these and the distance at which each was picked.

    Raises
    ------
    TypeError, ValueError
        For an `n_instances` that is no integer from 1 to the size of the pool, samples
        that the estimator cannot take, a net without a head.
    sklearn.exceptions.NotFittedError
        Where the net is not fitted.

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
    _check_pool(X_pool, n_instances)
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
        i = _first_or_any(utility == utility.max(), rng, random_tie_break)
        query_idx.append(i)
        distances.append(np.sqrt(squared[i]))
        to_pick = norms - 2 * _products(features, i) + norms[i]
        utility = squared = np.minimum(squared, np.maximum(to_pick, 0.0))
        squared[query_idx] = -1.0  # picked samples are out, among duplicates as well
    return answer(learner, np.array(query_idx), np.array(distances))


def badge_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    head: str | None = None,
    batch_size: int = 128,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
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
    learner : modAL learner or fitted estimator
        With a skorch net in it, or any other classifier (see the module's docstring).
    X_pool : samples of shape (n_samples, ...)
        The unlabelled samples.
    n_instances : int, default=1
        How many to pick.
    head : str, default=None
        Name of the module whose inputs are the features. By default the layer nearest
        the output with one output per class. For a linear one the factors above are
        exact.
    batch_size : int, default=128
        Samples in a forward pass.
    random_state : int, RandomState instance or None, default=None
        Seeds the draws; None draws from NumPy's global generator.
    random_tie_break : bool, default=False
        Settle ties for the first pick at random instead of by the lowest index.
    return_metrics
        Accepted because modAL forwards it.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of picking; under modAL 0.4.2 a pair of
        these and the squared distance (for the first the squared norm) at which each
        was picked.

    Raises
    ------
    TypeError, ValueError
        See `kcenter_sampling`.
    sklearn.exceptions.NotFittedError
        Where the net is not fitted.

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
    _check_pool(X_pool, n_instances)
    rng = check_random_state(random_state)
    h, p = describe_samples(
        learner, X_pool, "X_pool", head, batch_size, probabilities=True
    )
    q = p - np.eye(p.shape[1])[p.argmax(axis=1)]
    norms = row_norms(q, squared=True) * row_norms(h, squared=True)
    # What rounding leaves of a distance that is zero: k-means++ must not draw
    # duplicates of its picks.
    rounding = 8 * np.finfo(norms.dtype).eps * norms
    query_idx = [_first_or_any(norms == norms.max(), rng, random_tie_break)]
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


def bait_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    X_labeled: Any = None,
    X_target: Any = None,
    target_weight: Any = None,
    head: str | None = None,
    damping: float = 1.0,
    oversample: float = 2.0,
    batch_size: int = 128,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Pick samples by the Fisher information of the whole head: BAIT.

    This is :class:`~fishermask_sk.FisherMask` with all of the head and nothing else for
    its mask, and with the backward pass: twice as many samples are picked, then the
    least useful ones are dropped one by one.

    Parameters
    ----------
    learner : modAL learner or fitted estimator
        With a skorch net in it.
    X_pool : samples of shape (n_samples, ...)
        The unlabelled samples.
    n_instances : int, default=1
        How many to pick.
    X_labeled : samples of shape (n_labeled, ...), default=None
        The labelled samples; an empty array means none. By default the learner's
        `X_training`.
    X_target : samples of shape (n_target, ...), default=None
        Unlabelled samples of what the model will be used on: F̄ is their mean.
    target_weight : array-like of shape (n_target,), default=None
        Weights in that mean; without `X_target` of the pool's samples.
    head : str, default=None
        Name of the head's module. By default the layer nearest the output with one
        output per class.
    damping : float, default=1.0
        λ, the prior information of every weight.
    oversample : float, default=2.0
        How many times `n_instances` are picked before the backward pass.
    batch_size : int, default=128
        Samples in a forward pass.
    random_state : int, RandomState instance or None, default=None
        Seeds `random_tie_break`.
    random_tie_break : bool, default=False
        Settle ties at random instead of by the lowest index.
    return_metrics
        Accepted because modAL forwards it.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of picking; under modAL 0.4.2 a pair of
        these and the trace reductions.

    Raises
    ------
    TypeError, ValueError, MemoryError
        See `FisherMask.select`.
    sklearn.exceptions.NotFittedError
        Where the net is not fitted.

    Notes
    -----
    The head of c classes and d features has k = c·d (+ c) weights: k×k matrices are
    held, for 10 classes and 512 features up to five of 210 MB each in float64.

    References
    ----------
    .. [1] J. T. Ash et al., "Gone Fishing: Neural Active Learning with Fisher
       Embeddings", arXiv:2106.09675, algorithm 1.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from skorch import NeuralNetClassifier
    >>> from fishermask_sk.baselines import bait_sampling
    >>> _ = torch.manual_seed(0)
    >>> X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> net = NeuralNetClassifier(
    ...     torch.nn.Linear(4, 2), criterion=torch.nn.CrossEntropyLoss,
    ...     verbose=0, train_split=None,
    ... ).fit(X[:10], (X[:10, 0] > 0).astype("int64"))
    >>> bait_sampling(net, X[10:], n_instances=3, X_labeled=X[:10]).shape
    (3,)
    """
    # Every candidate is kept, whatever its score: one sample is enough to score them.
    strategy = FisherMask(
        sparsity=1.0,
        layers="last",
        head=head,
        n_mask_samples=1,
        damping=damping,
        oversample=oversample,
        batch_size=batch_size,
        n_components=None,
        random_state=random_state,
    )
    return strategy(
        learner,
        X_pool,
        n_instances,
        X_labeled=X_labeled,
        X_target=X_target,
        target_weight=target_weight,
        random_tie_break=random_tie_break,
    )


def power_margin_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Draw samples without replacement, in proportion to 1 − (p_(1) − p_(2)): margin
    sampling that does not buy the same uncertain sample many times.

    The largest values of ``log(1 − margin) + g``, with g from the standard Gumbel
    distribution, are such a draw.

    Parameters
    ----------
    learner : modAL learner or fitted classifier
        Anything with `predict_proba`.
    X_pool : samples of shape (n_samples, ...)
        The unlabelled samples.
    n_instances : int, default=1
        How many to pick.
    random_state : int, RandomState instance or None, default=None
        Seeds the draw; None draws from NumPy's global generator.
    random_tie_break, return_metrics
        Accepted because modAL forwards them.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of the draw; under modAL 0.4.2 a pair of
        these and the perturbed logarithms.

    Raises
    ------
    TypeError, ValueError
        See `least_confidence_sampling`.

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

    def measure(learner: Any, X_pool: Any) -> np.ndarray:
        from modAL.uncertainty import classifier_margin

        uncertainty = _log_uncertainty(classifier_margin(learner, X_pool))
        rng = check_random_state(random_state)
        return uncertainty + rng.gumbel(size=len(uncertainty))

    return _most_uncertain(measure, 1, learner, X_pool, n_instances, False, None)


def weighted_margin_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    X_target: Any,
    head: str | None = None,
    batch_size: int = 128,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Pick the uncertain samples that look like the target: largest
    (1 − (p_(1) − p_(2)))·r(x).

    r(x) is how many times denser the target is than the pool at x. It is the odds that
    a logistic regression gives, which tells target from pool by the standardised
    features, both parts with the same total weight.

    Parameters
    ----------
    learner : modAL learner or fitted estimator
        With a skorch net in it, or any other classifier (see the module's docstring).
    X_pool : samples of shape (n_samples, ...)
        The unlabelled samples.
    n_instances : int, default=1
        How many to pick.
    X_target : samples of shape (n_target, ...)
        Unlabelled samples of what the model will be used on.
    head : str, default=None
        Name of the module whose inputs are the features. By default the layer nearest
        the output with one output per class.
    batch_size : int, default=128
        Samples in a forward pass.
    random_state : int, RandomState instance or None, default=None
        Seeds `random_tie_break`.
    random_tie_break : bool, default=False
        Settle ties at random instead of by the lowest index.
    return_metrics
        Accepted because modAL forwards it.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, the largest product first; under modAL 0.4.2 a pair of
        these and the products' logarithms.

    Raises
    ------
    TypeError, ValueError
        See `kcenter_sampling`; and for an empty target, or one whose samples have
        other features than the pool's.
    sklearn.exceptions.NotFittedError
        Where the net is not fitted.

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

    def measure(learner: Any, X_pool: Any) -> np.ndarray:
        pool, target, p = _pool_and_target(
            learner, X_pool, X_target, head, batch_size, probabilities=True
        )
        best = -np.sort(-p, axis=1)[:, :2]
        return _log_uncertainty(best[:, 0] - best[:, -1]) + _log_density_ratio(
            pool, target
        )

    return _most_uncertain(
        measure, 1, learner, X_pool, n_instances, random_tie_break, random_state
    )


def facility_location_sampling(
    learner: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    X_target: Any,
    head: str | None = None,
    batch_size: int = 128,
    random_state: Any = None,
    random_tie_break: bool = False,
    return_metrics: Any = None,
) -> Any:
    """Pick samples that resemble the target and cover it: facility-location mutual
    information, SIMILAR's FLQMI.

    Greedily makes ``Σ_t max_{x∈S} s(t, x) + Σ_{x∈S} max_t s(t, x)`` large over the
    picks S, where s is the cosine similarity of the features and t runs over the
    target. A maximum over no picks is 0. What the model predicts does not matter.

    Parameters
    ----------
    learner, X_pool, n_instances, X_target, head, batch_size, random_state
        See `weighted_margin_sampling`.
    random_tie_break, return_metrics
        See `weighted_margin_sampling`.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of picking; under modAL 0.4.2 a pair of
        these and how much each pick added.

    Raises
    ------
    TypeError, ValueError
        See `weighted_margin_sampling`.
    sklearn.exceptions.NotFittedError
        Where the net is not fitted.

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
    n_pool = _check_pool(X_pool, n_instances)
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
        i = _first_or_any(tied, rng, random_tie_break)
        query_idx.append(i)
        metrics.append(bounds[i])
        covered = np.maximum(covered, target @ pool[i])
        bounds[i] = -np.inf
    return answer(learner, np.array(query_idx), np.array(metrics))


def _check_pool(X_pool: Any, n_instances: Any) -> int:
    n_pool = n_rows(as_rows(X_pool, "X_pool"), "X_pool")
    check_n_instances(n_instances, n_pool)
    return n_pool


def _most_uncertain(
    measure: Callable[..., np.ndarray],
    sign: int,
    learner: Any,
    X_pool: Any,
    n_instances: int,
    random_tie_break: bool,
    random_state: Any,
) -> Any:
    """The samples of largest (sign 1) or smallest (sign −1) measure; ties by index, or
    at random.

    modAL's own selection partitions, which leaves order and ties to chance, or draws
    from the global generator.
    """
    n_pool = _check_pool(X_pool, n_instances)
    with explained(X_pool), predictions_in_order(learner):
        values = measure(learner, X_pool)
    if not np.isfinite(values).all():
        raise ValueError(
            f"predict_proba gave NaN for {np.sum(~np.isfinite(values))} of {n_pool} "
            "samples; the estimator diverged in training, or the samples hold NaN."
        )
    order = (
        check_random_state(random_state).permutation(n_pool)
        if random_tie_break
        else np.arange(n_pool)
    )
    query_idx = order[np.argsort(-sign * values[order], kind="stable")][:n_instances]
    return answer(learner, query_idx, values[query_idx])


def _first_or_any(tied: np.ndarray, rng: np.random.RandomState, at_random: bool) -> int:
    candidates = np.flatnonzero(tied)
    return int(rng.choice(candidates) if at_random else candidates[0])


def _products(features: Any, i: int) -> np.ndarray:
    """Inner products of all rows, dense or sparse, with row i."""
    row = features[[i]].toarray()[0] if issparse(features) else features[i]
    return features @ row


def _log_uncertainty(margins: np.ndarray) -> np.ndarray:
    """log(1 − margin), finite also where the model is certain."""
    return np.log(np.maximum(1 - margins, np.finfo(np.float64).tiny))


def _pool_and_target(
    learner: Any,
    X_pool: Any,
    X_target: Any,
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
