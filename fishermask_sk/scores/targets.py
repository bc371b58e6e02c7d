"""What labels are for: a target's samples and weights, checked, and handed to the
strategies that have parameters for them.

Knows no strategy by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from fishermask_sk._rows import as_rows, n_rows
from fishermask_sk._warnings import warn_user
from fishermask_sk.nets.skorch_adapter import is_empty, sample_shape


def checked_target(
    X: Any, n_samples: int, X_target: Any, target_weight: Any
) -> dict[str, Any]:
    """What is given of a loop's target, by the names of the parameters, checked against
    the pool X.

    Raises
    ------
    ValueError
        For an empty target, or one of another shape than the pool, and weights that are
        none.
    """
    given, n_target = {}, None
    if X_target is not None:
        given["X_target"] = as_rows(X_target, "X_target")
        n_target = n_rows(given["X_target"], "X_target")
        if n_target == 0:
            raise ValueError(
                "X_target is empty; pass samples of what the model will be used on, or "
                "leave it out."
            )
        check_same_shape(X, given["X_target"], "those of X_target")
    weights = checked_weights(target_weight, n_samples, n_target, pool="X")
    if weights is not None:
        check_some_weight(float(weights.sum()))
        given["target_weight"] = weights
    return given


def check_some_weight(total: float) -> None:
    """Refuse weights that are all zero."""
    if not total:
        raise ValueError(
            "target_weight is zero for every sample; give those that matter a positive "
            "weight."
        )


def taken_by(strategy: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a target and its weights, what this strategy has parameters for and does not
    bind itself.
    """
    bound = strategy.keywords if isinstance(strategy, partial) else {}
    if "X_target" in bound:
        return {}  # the weights are of another target than its own
    known = _parameters(strategy)
    taken = {
        name: value
        for name, value in given.items()
        if name in known and name not in bound
    }
    if "X_target" in given and "X_target" not in taken:
        return {}
    return taken


def warn_of_untargeted(
    strategies: Mapping[str, Callable[..., Any]], given: Mapping[str, Any]
) -> None:
    """Say which strategies have no parameters for what is given."""
    for parameter in given:
        lacking = [
            name
            for name, strategy in strategies.items()
            if parameter not in _parameters(strategy)
        ]
        if lacking:
            warn_user(
                f"No parameter {parameter}: {', '.join(lacking)}. Where a strategy has "
                "none, it chooses as if none were given."
            )


def check_same_shape(X_pool: Any, others: Any, whose: str) -> None:
    """Compare shapes of samples where they can be told; an axis of length 1 more or
    less is no difference.
    """
    if others is None:
        return
    pool, other = sample_shape(X_pool), sample_shape(others)
    if None in (pool, other) or is_empty(others) or is_empty(X_pool) or pool == other:
        return
    if isinstance(pool, tuple) and isinstance(other, tuple):
        kept = [[length for length in shape if length != 1] for shape in (pool, other)]
        if kept[0] == kept[1]:
            return
    raise ValueError(
        f"X_pool has samples of shape {pool} and {whose} of shape {other}; pass "
        "samples of the shape that the net was fitted on."
    )


def checked_weights(
    target_weight: Any, n_pool: int, n_target: int | None, pool: str = "X_pool"
) -> np.ndarray | None:
    """Weights of the target, or of the pool where `n_target` is None, as float64; None
    where all are one.

    Raises
    ------
    ValueError
        Where they are no numbers, too many or too few, negative or not finite.
    """
    if target_weight is None:
        return None
    whose, n = (pool, n_pool) if n_target is None else ("X_target", n_target)
    try:
        weights = np.asarray(target_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"target_weight must be numbers, one for each sample of {whose}; got "
            f"{target_weight!r:.60}."
        ) from error
    if weights.shape != (n,):
        raise ValueError(
            f"target_weight has shape {weights.shape}, and {whose} has {n} samples; "
            "pass one weight a sample."
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(
            f"target_weight goes from {weights.min()} to {weights.max()}; weights must "
            "be finite and not negative."
        )
    return weights


def _parameters(strategy: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(strategy).parameters)
    except (TypeError, ValueError):  # some that are written in C have none
        return set()
