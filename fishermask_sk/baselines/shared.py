"""What several baselines need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from fishermask_sk._rows import as_rows, n_rows
from fishermask_sk.nets.loaders import predictions_in_order
from fishermask_sk.nets.wrong_dtypes import explained
from fishermask_sk.strategy.fisher_mask import (
    answer,
    check_n_instances,
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


def most_uncertain(
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
    n_pool = check_pool(X_pool, n_instances)
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
