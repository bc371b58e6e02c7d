"""What several baselines need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from fishermask_sk._docstrings import completed_by
from fishermask_sk._rows import as_rows, n_rows
from fishermask_sk.nets.loaders import predictions_in_order
from fishermask_sk.nets.wrong_dtypes import explained
from fishermask_sk.strategy.contract import answer, check_n_instances

# What the strategies' docstrings have in common.
documented = completed_by(
    """
    Parameters
    ----------
    learner : modAL learner or fitted estimator
        With a skorch net in it, or any other classifier.
    X_pool : samples of shape (n_samples, ...)
        The unlabelled samples.
    n_instances : int, default=1
        How many to pick.
    X_labeled : samples of shape (n_labeled, ...), default=None
        The labelled samples; an empty array means none. By default the learner's
        `X_training`.
    X_target : samples of shape (n_target, ...)
        Unlabelled samples of what the model will be used on.
    head : str, default=None
        Name of the module whose inputs are the features. By default the layer nearest
        the output with one output per class. Without a net, the features are the inputs
        of the estimator, after the earlier steps of its pipeline.
    batch_size : int, default=128
        Samples in a forward pass.
    random_state : int, RandomState instance or None, default=None
        Seeds `random_tie_break`.
    random_tie_break : bool, default=False
        Settle ties at random instead of by the lowest index.
    return_metrics
        Accepted because modAL forwards it.

    Raises
    ------
    TypeError, ValueError
        For an `n_instances` that is no integer from 1 to the size of the pool, samples
        that the estimator cannot take, probabilities that are NaN; where features are
        read, a net without a head; a target that is empty or unlike the pool.
    sklearn.exceptions.NotFittedError
        Where the estimator is not fitted.
    """
)


def check_pool(X_pool: Any, n_instances: Any) -> int:
    """How many samples the pool has, if so many can be picked."""
    n_pool = n_rows(as_rows(X_pool, "X_pool"), "X_pool")
    check_n_instances(n_instances, n_pool)
    return n_pool


def first_or_any(tied: np.ndarray, rng: np.random.RandomState, at_random: bool) -> int:
    """The first of those that are tied, or any of them."""
    candidates = np.flatnonzero(tied)
    return int(rng.choice(candidates) if at_random else candidates[0])


def log_uncertainty(margins: np.ndarray) -> np.ndarray:
    """log(1 − margin), finite also where the model is certain."""
    return np.log(np.maximum(1 - margins, np.finfo(np.float64).tiny))


def class_probabilities(learner: Any, X: Any) -> np.ndarray:
    """Probabilities p (n, c), as the learner predicts them."""
    return np.asarray(learner.predict_proba(X))


def margins(p: np.ndarray) -> np.ndarray:
    """p_(1) − p_(2) for probabilities p (n, c); 0 where there is one class alone."""
    best = -np.sort(-p, axis=1)[:, :2]
    return best[:, 0] - best[:, -1]


def most_uncertain(
    measure: Callable[[], np.ndarray],
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
    n_pool = check_pool(X_pool, n_instances)
    with explained(X_pool), predictions_in_order(learner):
        values = measure()
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
