"""What happens in one round of a loop: random states are set, an estimator is fitted,
and labels are looked up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from fishermask_sk._rows import as_rows, take_rows
from fishermask_sk.loops.learner import PoolLearner
from fishermask_sk.nets.skorch_adapter import preserved_rng
from fishermask_sk.nets.wrong_dtypes import explained


@dataclass(frozen=True, eq=False)
class Round:
    """One round of the loop, just after its fit.

    Attributes
    ----------
    number : int
        0 for the first batch, then 1, 2, ...
    learner : PoolLearner
        With the estimator fitted in this round.
    query_idx : ndarray of shape (n_instances,)
        The samples labelled in this round, as positions in the `X` of the whole loop,
        in pick order.
    labeled_indices : ndarray of shape (n_labeled,)
        All labelled samples so far, in the order in which they were labelled.
    metrics : object or None
        What the strategy said about its picks, where it returned a pair.
    query_seconds, fit_seconds : float
        Wall time of the query and of the fit.
    """

    number: int
    learner: PoolLearner
    query_idx: np.ndarray
    labeled_indices: np.ndarray
    metrics: Any
    query_seconds: float
    fit_seconds: float


@contextmanager
def seeded(thing: Any, seed: int | None, number: int) -> Iterator[None]:
    """Seed the parameters of an estimator or strategy, or of the one in a partial, and
    the global generators while it works.
    """
    while isinstance(thing, partial):
        thing = thing.func
    if seed is None:
        yield
        return
    rng = np.random.RandomState([seed, number])
    if hasattr(thing, "get_params") and not isinstance(thing, type):
        names = sorted(thing.get_params(deep=True))
        seeds = {
            name: int(rng.randint(np.iinfo(np.int32).max))
            for name in names
            if name == "random_state" or name.endswith("__random_state")
        }
        if seeds:
            thing.set_params(**seeds)
    with preserved_rng():
        global_seed = int(rng.randint(np.iinfo(np.int32).max))
        random.seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002 - what draws from the global state is meant
        torch.manual_seed(global_seed)
        yield


def fit_on(estimator: Any, X: Any, y: np.ndarray) -> None:
    """Fit an estimator, and say what is wrong with labels that it cannot take."""
    try:
        with explained(X, y):
            estimator.fit(X, y)
    except ValueError as error:
        if len(np.unique(y)) > 1:
            raise
        raise ValueError(
            f"All {len(y)} labels so far are of one class, {y[0]!r}, and "
            f"{type(estimator).__name__} could not be fitted to them ({error}); raise "
            "n_initial, or use initial='stratified'."
        ) from error


def as_oracle(y: Any) -> Any:
    """Labels that rows can be taken from, none of them read."""
    if y is None:
        raise ValueError(
            "ActiveLearningClassifier requires y to be passed, but the target y is "
            "None."
        )
    return as_rows(y, "y")


def look_up(y: Any, indices: np.ndarray, warn: bool = False) -> np.ndarray:
    """The labels of these rows: the only place where y is read."""
    labels = column_or_1d(np.asarray(take_rows(y, indices)), warn=warn)
    # NaN is what differs from itself.
    missing = [i for i, label in enumerate(labels) if label is None or label != label]
    if missing:
        raise ValueError(
            f"y has no label for row {indices[missing[0]]}, which was queried: "
            f"{labels[missing[0]]!r}; give every row of the pool its label."
        )
    if labels.dtype.kind == "f":
        check_classification_targets(labels)
    return labels
