"""What a query strategy is handed, and what it answers: positions in the pool.

Takes any fitted classifier; knows neither modAL nor FisherMask by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from fishermask_sk._rows import n_rows, take_rows
from fishermask_sk._types import Labels, Learner, QueryStrategy, Samples
from fishermask_sk.nets.loaders import predictions_in_order


class PoolLearner:
    """What a query strategy is handed: a fitted estimator and what it was fitted on,
    named as in modAL.

    Parameters
    ----------
    estimator : estimator
        Fitted.
    query_strategy : callable
        Called as ``query_strategy(learner, X_pool, n_instances=...)``.
    X_training : samples of shape (n_labeled, ...)
        The labelled samples, in the order in which they were labelled.
    y_training : ndarray of shape (n_labeled,)
        Their labels.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.loops.learner import PoolLearner
    >>> from fishermask_sk.baselines import margin_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> estimator = LogisticRegression().fit(X[::10], y[::10])
    >>> learner = PoolLearner(estimator, margin_sampling, X[::10], y[::10])
    >>> query_idx, X_query = learner.query(X, n_instances=2)
    >>> X_query.shape
    (2, 4)
    """

    on_transformed = False  # modAL's ranked batches look for it

    def __init__(
        self,
        estimator: Learner,
        query_strategy: QueryStrategy,
        X_training: Samples,
        y_training: Labels,
    ):
        self.estimator: Any = estimator
        self.query_strategy = query_strategy
        self.X_training = X_training
        self.y_training = y_training

    def predict(self, X: Samples, **predict_kwargs: Any) -> Any:
        """Predict with the estimator, in the order of the samples whatever a net's
        loader does.
        """
        with predictions_in_order(self.estimator):
            return self.estimator.predict(X, **predict_kwargs)

    def predict_proba(self, X: Samples, **predict_proba_kwargs: Any) -> Any:
        """Class probabilities from the estimator, in the order of the samples."""
        with predictions_in_order(self.estimator):
            return self.estimator.predict_proba(X, **predict_proba_kwargs)

    def score(self, X: Samples, y: Labels, **score_kwargs: Any) -> Any:
        """Score of the estimator, each sample's prediction against its own label."""
        with predictions_in_order(self.estimator):
            return self.estimator.score(X, y, **score_kwargs)

    # `return_metrics` stands in the signature because strategies look for it there: it
    # is how modAL 0.4.2.1, which expects a pair of indices and metrics, is told from
    # 0.4.1, which expects indices alone.
    def query(
        self,
        X_pool: Samples,
        n_instances: int = 1,
        *,
        return_metrics: bool = False,
        **query_kwargs: Any,
    ) -> tuple[Any, ...]:
        """Ask the query strategy, once, which samples of the pool to label next.

        Parameters
        ----------
        X_pool : samples of shape (n_pool, ...)
            Samples without labels.
        n_instances : int, default=1
            How many to pick.
        return_metrics : bool, default=False
            Whether to return what the strategy says about its picks, too.
        **query_kwargs
            Passed to the query strategy.

        Returns
        -------
        query_idx : ndarray of shape (n_instances,)
            Positions in `X_pool`.
        X_query : same type as X_pool
            The samples there.
        metrics : object or None
            Only if `return_metrics`; None where the strategy has none.

        Raises
        ------
        ValueError
            Where the strategy's answer is not `n_instances` different positions in the
            pool.
        """
        answer = self.query_strategy(
            self, X_pool, n_instances=n_instances, **query_kwargs
        )
        query_idx, metrics = read_answer(
            answer, n_instances, n_rows(X_pool, "X_pool"), self.query_strategy
        )
        X_query = take_rows(X_pool, query_idx)
        return (query_idx, X_query, metrics) if return_metrics else (query_idx, X_query)


def read_answer(
    answer: Any, n_instances: int, n_pool: int, strategy: Any
) -> tuple[np.ndarray, Any]:
    """Positions and metrics, from a strategy that returns positions, or a pair of
    positions and metrics.
    """
    metrics = None
    if (
        isinstance(answer, tuple)
        and len(answer) == 2
        and (np.ndim(answer[0]) or n_instances == 1)
    ):
        answer, metrics = answer
    name = name_of(strategy)
    query_idx = np.atleast_1d(np.asarray(answer))
    if query_idx.shape != (n_instances,):
        raise ValueError(
            f"{name} returned indices of shape {query_idx.shape} for "
            f"n_instances={n_instances}; a query strategy must return {n_instances} "
            "positions in X_pool, or a pair of these and metrics."
        )
    return check_positions(query_idx, n_pool, f"The answer of {name}"), metrics


def check_positions(positions: np.ndarray, n_samples: int, name: str) -> np.ndarray:
    """Refuse what is not different positions among so many samples."""
    if positions.ndim != 1 or not len(positions) or positions.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a one-dimensional array of integers, got shape "
            f"{positions.shape} of {positions.dtype}."
        )
    if positions.min() < 0 or positions.max() >= n_samples:
        raise ValueError(
            f"{name} has positions from {positions.min()} to {positions.max()}; there "
            f"are {n_samples} samples, 0 to {n_samples - 1}."
        )
    if len(np.unique(positions)) < len(positions):
        raise ValueError(
            f"{name} has a position twice; every sample can be labelled once."
        )
    return positions.astype(np.intp)


def name_of(strategy: Any) -> str:
    """What a strategy is called: its function's or class's name."""
    if isinstance(strategy, partial):
        return name_of(strategy.func)
    return str(getattr(strategy, "__name__", type(strategy).__name__))


def column_labels(estimator: Any, n_columns: int) -> np.ndarray:
    """Labels of the columns of a fitted classifier's `predict_proba`.

    A skorch net's `classes_` are the labels seen, while it has a column for every
    output of its module, and predicts column numbers: there the labels are these
    numbers.

    Parameters
    ----------
    estimator : estimator
        Fitted.
    n_columns : int
        Columns of its `predict_proba`.

    Returns
    -------
    ndarray of shape (n_columns,)

    Raises
    ------
    ValueError
        Where columns and classes cannot be brought together.
    """
    classes = np.asarray(estimator.classes_)
    if len(classes) == n_columns:
        return classes
    if classes.dtype.kind in "iu" and classes.min() >= 0 and classes.max() < n_columns:
        return np.arange(n_columns)
    raise ValueError(
        f"{type(estimator).__name__} gives {n_columns} probabilities per sample and "
        f"has the classes {classes.tolist()}; tell it all its classes (classes=... of "
        "a net)."
    )
