"""What every strategy has from its learner, and how that wants its answer: the contract
with modAL, and with whoever calls strategies in its place.
"""

from __future__ import annotations

import inspect
from numbers import Integral
from typing import Any

import numpy as np

from fishermask_sk._warnings import warn_user

LABELED = "the labelled ones (X_labeled, or the learner's X_training)"


def answer(learner: Any, query_idx: np.ndarray, metrics: np.ndarray) -> Any:
    """What the learner's modAL wants from a strategy: the indices, or from 0.4.2 on a
    pair with the metrics.
    """
    query = getattr(learner, "query", None)
    wants_pair = (
        query is not None and "return_metrics" in inspect.signature(query).parameters
    )
    return (query_idx, metrics) if wants_pair else query_idx


def check_n_instances(n_instances: Any, n_pool: int | None = None) -> None:
    """Refuse a number of picks that is none, or that exceeds the pool where its size is
    known by now.
    """
    if not isinstance(n_instances, Integral) or isinstance(n_instances, bool):
        raise TypeError(
            f"n_instances={n_instances!r} must be an int, the number of samples to "
            "pick."
        )
    if n_pool == 0:
        raise ValueError("X_pool is empty; there is nothing left to label.")
    if int(n_instances) < 1:
        raise ValueError(f"n_instances={n_instances} must be 1 or more.")
    if n_pool is not None and int(n_instances) > n_pool:
        raise ValueError(
            f"n_instances={n_instances} exceeds the pool of {n_pool} samples; lower "
            "n_instances."
        )


def labeled_samples(estimator: Any, X_labeled: Any) -> Any:
    """The labelled samples: as given, else the learner's, else none, with a warning."""
    if X_labeled is not None:
        return X_labeled
    X_training = getattr(estimator, "X_training", None)
    if X_training is None:
        warn_user(
            "No labelled samples: X_labeled was not given and the estimator has no "
            "X_training, so samples are picked as if nothing were labelled yet. Pass "
            "X_labeled, or an empty array to mean none."
        )
    return X_training
