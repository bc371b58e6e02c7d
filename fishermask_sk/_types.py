"""What the public functions take, in types: samples, labels, estimators, strategies.

A Protocol asks for the methods that are called and for nothing else, so that what fits
needs no base class of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike


class Rows(Protocol):
    """Samples with a length: array, tensor, DataFrame, list, dict, Dataset."""

    def __len__(self) -> int:
        """How many rows; of a dict, how many arrays."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Rows by position, or a dict's array by its name."""
        ...


class SparseRows(Protocol):
    """A scipy sparse matrix or array: rows without a length."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_samples, n_features)."""
        ...

    def tocsr(self) -> Any:
        """By rows, which can be taken."""
        ...


class Learner(Protocol):
    """What is asked: a fitted estimator, or a learner of modAL around one."""

    def predict(self, X: Any, /) -> Any:
        """Classes of samples."""
        ...


class Estimator(Learner, Protocol):
    """What is fitted: a classifier in scikit-learn's sense."""

    def fit(self, X: Any, y: Any, /) -> Any:
        """Learn from labelled samples."""
        ...


class QueryStrategy(Protocol):
    """What picks: a function or an object like FisherMask, called as modAL calls it."""

    def __call__(self, learner: Any, X_pool: Any, /, *, n_instances: int) -> Any:
        """Positions in the pool, or a pair of these and metrics."""
        ...


Samples: TypeAlias = Rows | SparseRows
# A Dataset as torch declares it has no length; where there must be one is checked.
Images: TypeAlias = Rows | torch.utils.data.Dataset[Any]
Labels: TypeAlias = ArrayLike
Positions: TypeAlias = ArrayLike
# (estimator, X_pool) -> positions in the pool
Proposer: TypeAlias = Callable[..., Any]
RandomState: TypeAlias = int | np.integer[Any] | np.random.RandomState | None
Device: TypeAlias = str | torch.device | None
