"""Which samples of a pool may be picked: positions that were given, or the most
uncertain.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_candidates_parameter(candidates: Any) -> None:
    """Refuse a constructor's `candidates` that is no number, callable or None."""
    is_number = isinstance(candidates, Integral) and not isinstance(candidates, bool)
    if candidates is None or callable(candidates) or (is_number and candidates >= 1):
        return
    raise ValueError(
        f"candidates={candidates!r:.60} must be None, an int >= 1 (so many times "
        "n_instances, by margin) or a callable (estimator, X_pool) -> positions; "
        "positions themselves go to select."
    )


def given_positions(candidates: Any, n_pool: int) -> np.ndarray:
    """The positions that may be picked, sorted, each once."""
    # Strategies answer a learner of modAL 0.4.2 with a pair.
    positions = np.asarray(
        candidates[0] if isinstance(candidates, tuple) else candidates
    )
    if positions.size == 0:
        return np.empty(0, dtype=np.int64)
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise ValueError(
            f"candidates have shape {positions.shape} and dtype {positions.dtype}; "
            "pass positions in X_pool, a one-dimensional array of int. np.flatnonzero "
            "makes them of a boolean mask."
        )
    if positions.min() < 0 or positions.max() >= n_pool:
        raise ValueError(
            f"candidates hold positions from {positions.min()} to {positions.max()}, "
            f"and X_pool has {n_pool} samples; pass positions in X_pool, from 0 on."
        )
    return np.unique(positions).astype(np.int64)


def seeded(
    proposal: Callable[..., Any], rng: np.random.RandomState, rank: int
) -> Callable[..., Any]:
    """The proposal, drawing from the query's random state where it draws at all.

    The query's own draws stay what they are without it.
    """
    bound = proposal.keywords if isinstance(proposal, partial) else {}
    try:
        takes_seed = "random_state" in inspect.signature(proposal).parameters
    except ValueError:  # a builtin that shows no signature
        takes_seed = False
    if not takes_seed or "random_state" in bound:
        return proposal
    seed = copy.deepcopy(rng).randint(2**31 - 1 - rank) + rank
    return partial(proposal, random_state=seed)


def margins(batches: Iterable[Tensor]) -> Tensor:
    """How far apart each sample's two likeliest classes are (n,), from batches of
    logits.
    """
    found = [torch.empty(0, device="cpu")]
    for logits in batches:
        p = logits.detach().softmax(1).topk(2, dim=1).values
        found.append((p[:, 0] - p[:, 1]).cpu().to(torch.float64))
    return torch.cat([part.to(torch.float64) for part in found])


def least(values: Tensor, n: int) -> Tensor:
    """Positions of the n smallest values, sorted; of equal values the lowest."""
    return values.argsort(stable=True)[:n].sort().values
