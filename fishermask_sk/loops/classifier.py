"""A pool-based active learning loop as a scikit-learn classifier, and the same loop as
a generator.

Takes any classifier and any modAL-style query strategy; knows neither modAL nor
FisherMask by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from tqdm.auto import tqdm

from fishermask_sk._rows import as_rows, n_rows, take_rows
from fishermask_sk._types import (
    Estimator,
    Labels,
    Positions,
    QueryStrategy,
    RandomState,
    Samples,
)
from fishermask_sk.loops.learner import (
    PoolLearner,
    check_positions,
    column_labels,
    name_of,
)
from fishermask_sk.loops.rounds import Round, as_oracle, fit_on, look_up, seeded
from fishermask_sk.nets.loaders import predictions_in_order
from fishermask_sk.nets.skorch_adapter import preserved_rng
from fishermask_sk.scores.targets import checked_target, taken_by, warn_of_untargeted

__all__ = ["ActiveLearningClassifier", "PoolLearner", "Round"]


def _inner_has(method: str) -> Callable[[Any], bool]:
    """Check that the wrapped estimator has this method; raises AttributeError where it
    does not.
    """

    def check(self: ActiveLearningClassifier) -> bool:
        getattr(getattr(self, "estimator_", self.estimator), method)
        return True

    return check


class ActiveLearningClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A classifier that labels a few samples of its training set, chosen by a query
    strategy.

    `fit` runs pool-based active learning with `y` as the oracle: it labels a first
    batch, then round by round fits a fresh clone of the estimator, asks the query
    strategy which samples to label next, and looks up their labels. `y` is read only at
    queried rows (see `initial` for the one exception). In the end it predicts like the
    estimator of the last round, so that scikit-learn's searches can tune the query
    strategy: the held-out score is the score after the label budget is spent. This
    takes a data set that is labelled already, as a proxy for the one that is not.

    Parameters
    ----------
    estimator : estimator
        A classifier, or a pipeline that ends in one. Every round fits a clone of it;
        it is never fitted itself. Most strategies ask for its `predict_proba`.
    query_strategy : callable
        A modAL-style strategy, called as ``query_strategy(learner, X_pool,
        n_instances=b)`` with a :class:`~fishermask_sk.loops.learner.PoolLearner`:
        :class:`~fishermask_sk.FisherMask`, a function of
        :mod:`fishermask_sk.baselines` or of modAL, or any other. It returns positions
        in `X_pool`, or a pair of positions and metrics. `fit` uses a clone (a deep copy
        where it has no `get_params`).
    n_initial : int, default=100
        Labels of the first batch.
    n_instances : int, default=100
        Labels per query.
    n_queries : int, default=10
        Queries after the first batch. A budget beyond the data labels all rows, and the
        loop ends there.
    initial : {"random", "stratified"} or array-like of int, default="random"
        How the first batch is drawn. "stratified" gives every class its share, and at
        least one label where `n_initial` allows: for that it **reads all of y**, which
        a real pool could not offer. Positions in `X` are taken as they are, and
        `n_initial` is passed over.
    random_state : int, RandomState instance or None, default=None
        With an int, every candidate of a search has the same first batch and the same
        training noise, whatever its query strategy: in each round every parameter of
        the estimator's clone that is called ``random_state`` or ends in
        ``__random_state`` is set to an integer derived from this one and the round, as
        scikit-learn's ensembles do, and the same is done to the query strategy, from
        integers of its own. Values given there are overwritten. What has no such
        parameter (a plain skorch net) draws from the global generators of Python, NumPy
        and torch: these are seeded during each fit and query, and are afterwards as
        before. With None, nothing is set.
    verbose : int, default=0
        Whether to show a progress bar over the rounds.

    Attributes
    ----------
    estimator_ : estimator
        Fitted on all labelled samples.
    query_strategy_ : callable
        The clone that was asked, as its last query left it.
    classes_ : ndarray of shape (n_classes,)
        Labels of the columns of `predict_proba`. A class that no queried row has is
        unknown, unless the estimator was told of it (``classes=`` of a net).
    labeled_indices_ : ndarray of shape (n_labeled,)
        The labelled rows of `X`, in the order in which they were labelled.
    labeled_iter_ : ndarray of shape (n_samples,)
        The round in which each row was labelled: 0 for the first batch, -1 for never.
    learning_curve_ : list of dict
        One entry per round, with "round", "n_labels" and "accuracy" on `eval_set`. Only
        with an `eval_set`.
    n_features_in_ : int
        Where `estimator_` has it.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Where `estimator_` has it.

    See Also
    --------
    fishermask_sk.compare_strategies : Several strategies, several seeds, resumable.
    sklearn.semi_supervised.SelfTrainingClassifier : It asks itself for the labels.

    Notes
    -----
    `X` may be anything that rows can be taken from: arrays of any dimension (images),
    sparse matrices, DataFrames, lists, tensors, dicts of arrays, skorch's
    ``SliceDataset``, and torch Datasets, which are never read as a whole (the net then
    takes labels from the Dataset, and `y` must be the same ones). Rows are not
    validated here, but by the estimator. Memory: one copy of the pool and of the
    labelled rows per round; none for Datasets.

    References
    ----------
    .. [1] B. Settles, "Active Learning Literature Survey", 2009, section 2.3:
       pool-based sampling.
    .. [2] S. Gul et al., "FisherMask", arXiv:2411.05752, section 4: the protocol of
       first batch and rounds.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk import ActiveLearningClassifier
    >>> from fishermask_sk.baselines import margin_sampling
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = ActiveLearningClassifier(
    ...     LogisticRegression(max_iter=1000), margin_sampling,
    ...     n_initial=50, n_instances=25, n_queries=2, random_state=0,
    ... )
    >>> _ = clf.fit(X[:1000] / 16, y[:1000], eval_set=(X[1000:] / 16, y[1000:]))
    >>> clf.labeled_indices_.shape
    (100,)
    >>> [row["n_labels"] for row in clf.learning_curve_]
    [50, 75, 100]
    """

    def __init__(
        self,
        estimator: Estimator,
        query_strategy: QueryStrategy,
        *,
        n_initial: int = 100,
        n_instances: int = 100,
        n_queries: int = 10,
        initial: str | Positions = "random",
        random_state: RandomState = None,
        verbose: int = 0,
    ) -> None:
        self.estimator = estimator
        self.query_strategy = query_strategy
        self.n_initial = n_initial
        self.n_instances = n_instances
        self.n_queries = n_queries
        self.initial = initial
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        X: Samples,
        y: Labels,
        *,
        eval_set: tuple[Samples, Labels] | None = None,
        X_target: Samples | None = None,
        target_weight: Labels | None = None,
        **unsupported: object,
    ) -> ActiveLearningClassifier:
        """Play all rounds, and keep the estimator of the last one.

        Parameters
        ----------
        X : samples of shape (n_samples, ...)
            The pool, first batch included.
        y : array-like of shape (n_samples,)
            The oracle.
        eval_set : tuple (X, y), default=None
            Held-out samples to score every round on, for `learning_curve_`. Nothing is
            chosen by them.
        X_target : samples of shape (n_target, ...), default=None
            Unlabelled samples of what the model will be used on, as they are before any
            step of a pipeline. They are handed to a query strategy that has a parameter
            of this name; what a :func:`functools.partial` binds is left as it is. A
            search of scikit-learn cuts every argument of `fit` that is as long as `X`
            as it cuts `X`: there a target must have another number of samples.
        target_weight : array-like of shape (n_target,), default=None
            Importance of each sample of the target, handed on in the same way. Without
            `X_target`: of each row of `X`, shape (n_samples,).

        Returns
        -------
        self : ActiveLearningClassifier

        Raises
        ------
        TypeError
            For `sample_weight` and other unknown keywords, and for what is no query
            strategy.
        ValueError
            For parameters out of range, samples and labels that do not match, missing
            labels, targets or weights that are none, and answers of the query strategy
            that are not positions in the pool.

        Warns
        -----
        UserWarning
            Where the query strategy has no parameter for what is given of a target.
        """
        if unsupported:
            raise TypeError(
                "ActiveLearningClassifier.fit takes X, y, eval_set, X_target and "
                f"target_weight, and got {sorted(unsupported)}; weights of samples "
                "that may never be labelled have no meaning here, so leave them out."
            )
        if eval_set is not None:
            X_eval, y_eval = _checked_eval_set(eval_set)
        curve = []
        rounds = self.iter_rounds(X, y, X_target=X_target, target_weight=target_weight)
        for done in tqdm(
            rounds, total=self.n_queries + 1, desc="rounds", disable=not self.verbose
        ):
            if eval_set is not None:
                with preserved_rng():  # a net's data loader draws, also to predict
                    accuracy = float(np.mean(done.learner.predict(X_eval) == y_eval))
                n_labels = len(done.labeled_indices)
                curve.append(
                    {"round": done.number, "n_labels": n_labels, "accuracy": accuracy}
                )
            if done.number == 0:
                labeled_iter = np.full(n_rows(as_rows(X, "X"), "X"), -1)
            labeled_iter[done.query_idx] = done.number
        self.estimator_ = done.learner.estimator
        self.query_strategy_ = done.learner.query_strategy
        self.labeled_indices_ = done.labeled_indices
        self.labeled_iter_ = labeled_iter
        self.classes_ = np.asarray(self.estimator_.classes_)
        if hasattr(self.estimator_, "predict_proba"):
            one_row = take_rows(as_rows(X, "X"), self.labeled_indices_[:1])
            with preserved_rng():
                n_columns = self.estimator_.predict_proba(one_row).shape[1]
            self.classes_ = column_labels(self.estimator_, n_columns)
        if eval_set is not None:
            self.learning_curve_ = curve
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        return self

    def iter_rounds(
        self,
        X: Samples,
        y: Labels,
        *,
        labeled_iter: Sequence[Positions] | None = None,
        X_target: Samples | None = None,
        target_weight: Labels | None = None,
    ) -> Iterator[Round]:
        """Play the loop by hand: a generator that yields after every fit.

        Nothing of it is stored in this object. Stop whenever you like; what was not
        asked for is not computed.

        Parameters
        ----------
        X : samples of shape (n_samples, ...)
            The pool, first batch included.
        y : array-like of shape (n_samples,)
            The oracle, read only at queried rows unless ``initial="stratified"``.
        labeled_iter : list of array-like of int, default=None
            What was labelled before, in order: the positions of the first batch, of the
            first query, and so on, as the `query_idx` of the rounds. The loop then goes
            on from there: it first yields the last of these rounds again, refitted with
            that round's seeds. With an int `random_state`, and an estimator and a
            strategy without memory of their own, what follows is what would have
            followed.
        X_target, target_weight
            As for `fit`.

        Yields
        ------
        Round
            `n_queries` + 1 of them, fewer where all rows are labelled before.

        Raises
        ------
        TypeError, ValueError
            As for `fit`; those that need no fit are raised by the call itself.

        Examples
        --------
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.naive_bayes import GaussianNB
        >>> from fishermask_sk import ActiveLearningClassifier
        >>> from fishermask_sk.baselines import entropy_sampling
        >>> X, y = load_iris(return_X_y=True)
        >>> loop = ActiveLearningClassifier(
        ...     GaussianNB(), entropy_sampling, n_initial=9, n_instances=3,
        ...     initial="stratified", random_state=0,
        ... )
        >>> for done in loop.iter_rounds(X, y):
        ...     if done.learner.score(X, y) > 0.9:
        ...         break
        >>> len(done.labeled_indices) < 150
        True
        """
        self._check_parameters()
        X, y = as_rows(X, "X"), as_oracle(y)
        n_samples, n_labels = n_rows(X, "X"), n_rows(y, "y")
        if n_samples != n_labels:
            raise ValueError(
                f"X has {n_samples} samples and y has {n_labels} labels: inconsistent "
                "numbers of samples; pass one label per sample."
            )
        if n_samples == 0:
            raise ValueError(
                "Found array with 0 samples, a minimum of 1 is required; pass samples."
            )
        history = [
            np.asarray(batch, dtype=np.intp)
            for batch in (() if labeled_iter is None else labeled_iter)
        ]
        if history:
            check_positions(np.concatenate(history), n_samples, "labeled_iter")
        target = checked_target(X, n_samples, X_target, target_weight)
        warn_of_untargeted({name_of(self.query_strategy): self.query_strategy}, target)
        return self._rounds(X, y, n_samples, history, target)

    def _rounds(
        self,
        X: Any,
        y: Any,
        n_samples: int,
        history: list[np.ndarray],
        target: dict[str, Any],
    ) -> Iterator[Round]:
        rng = check_random_state(self.random_state)
        training_seed = query_seed = None
        if self.random_state is not None:
            # Streams of their own, so that the number of seeds that a strategy takes
            # moves no one else's.
            training_seed, query_seed = rng.randint(np.iinfo(np.int32).max, size=2)
        batches = history or [self._first_batch(y, n_samples, rng)]
        strategy = clone(self.query_strategy, safe=False)
        target = taken_by(strategy, target)
        labels = np.concatenate(
            [look_up(y, batch, warn=not i) for i, batch in enumerate(batches)]
        )
        metrics, query_seconds = None, 0.0
        while True:
            number = len(batches) - 1
            labeled = np.concatenate(batches)
            estimator = clone(self.estimator)
            X_training = take_rows(X, labeled)
            started = time.perf_counter()
            with seeded(estimator, training_seed, number):
                fit_on(estimator, X_training, labels)
            fit_seconds = time.perf_counter() - started
            learner = PoolLearner(estimator, strategy, X_training, labels)
            yield Round(
                number,
                learner,
                batches[-1],
                labeled,
                metrics,
                query_seconds,
                fit_seconds,
            )
            pool = np.setdiff1d(np.arange(n_samples), labeled)
            if number >= self.n_queries or not len(pool):
                return
            X_pool, n_instances = take_rows(X, pool), min(self.n_instances, len(pool))
            if "target_weight" in target and "X_target" not in target:
                of_pool = {"target_weight": target["target_weight"][pool]}
            else:
                of_pool = target
            started = time.perf_counter()
            with seeded(strategy, query_seed, number):
                query_idx, _, metrics = learner.query(
                    X_pool, n_instances, return_metrics=True, **of_pool
                )
            query_seconds = time.perf_counter() - started
            del X_pool  # not needed next to the next round's copies
            batches.append(pool[query_idx])
            labels = np.concatenate([labels, look_up(y, batches[-1])])

    def _first_batch(
        self, y: Any, n_samples: int, rng: np.random.RandomState
    ) -> np.ndarray:
        """Positions of the first batch, in the order of drawing."""
        if not isinstance(self.initial, str):
            return check_positions(np.asarray(self.initial), n_samples, "initial")
        shuffled = rng.permutation(n_samples)
        if self.initial == "random":
            return shuffled[: self.n_initial]
        labels = look_up(y, shuffled, warn=True)
        classes, of_class, counts = np.unique(
            labels, return_inverse=True, return_counts=True
        )
        rank = np.empty(n_samples)
        for c in range(len(classes)):
            rank[of_class == c] = np.arange(counts[c])
        # Every class's first comes before any class's second; then each follows at the
        # pace of its share.
        return shuffled[np.argsort(rank / counts[of_class], kind="stable")][
            : self.n_initial
        ]

    def _check_parameters(self) -> None:
        if not hasattr(self.estimator, "fit") or isinstance(self.estimator, type):
            raise TypeError(
                "estimator must be a classifier object with a fit method, got "
                f"{self.estimator!r}."
            )
        if not callable(self.query_strategy) or isinstance(self.query_strategy, type):
            raise TypeError(
                "query_strategy must be a function or a callable object, got "
                f"{self.query_strategy!r}; hand in FisherMask(), for instance, with "
                "its parentheses."
            )
        for name, lowest in (("n_initial", 1), ("n_instances", 1), ("n_queries", 0)):
            value = getattr(self, name)
            if (
                not isinstance(value, Integral)
                or isinstance(value, bool)
                or value < lowest
            ):
                raise ValueError(
                    f"{name} must be an integer of at least {lowest}, got {value!r}."
                )
        if isinstance(self.initial, str) and self.initial not in (
            "random",
            "stratified",
        ):
            raise ValueError(
                "initial must be 'random', 'stratified' or positions in X, got "
                f"{self.initial!r}."
            )

    @available_if(_inner_has("predict"))
    def predict(self, X: Samples) -> np.ndarray:
        """Predict classes with the estimator of the last round.

        Parameters
        ----------
        X : samples of shape (n_samples, ...)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        check_is_fitted(self, "estimator_")
        with predictions_in_order(self.estimator_):
            return self.estimator_.predict(X)

    @available_if(_inner_has("predict_proba"))
    def predict_proba(self, X: Samples) -> np.ndarray:
        """Class probabilities from the estimator of the last round.

        Parameters
        ----------
        X : samples of shape (n_samples, ...)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Columns in the order of `classes_`.
        """
        check_is_fitted(self, "estimator_")
        with predictions_in_order(self.estimator_):
            return self.estimator_.predict_proba(X)

    @available_if(_inner_has("predict_log_proba"))
    def predict_log_proba(self, X: Samples) -> np.ndarray:
        """Log class probabilities from the estimator of the last round, as
        `predict_proba`.
        """
        check_is_fitted(self, "estimator_")
        return self.estimator_.predict_log_proba(X)

    @available_if(_inner_has("decision_function"))
    def decision_function(self, X: Samples) -> np.ndarray:
        """Decision function of the estimator of the last round."""
        check_is_fitted(self, "estimator_")
        return self.estimator_.decision_function(X)

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import (
            get_tags,
        )  # scikit-learn 1.5 has neither it nor a use for this method

        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.input_tags.sparse = inner.input_tags.sparse
        tags.input_tags.allow_nan = inner.input_tags.allow_nan
        if inner.classifier_tags is not None:
            # y is one column here, whatever the estimator takes.
            tags.classifier_tags = replace(inner.classifier_tags, multi_label=False)
        return tags


def _checked_eval_set(eval_set: Any) -> tuple[Any, np.ndarray]:
    if not isinstance(eval_set, (tuple, list)) or len(eval_set) != 2:
        raise ValueError(
            f"eval_set must be a pair (X, y), got {type(eval_set).__name__}; pass "
            "eval_set=(X_test, y_test)."
        )
    # A column of labels would be compared with every prediction, instead of with its
    # own.
    X, y = as_rows(eval_set[0], "eval_set[0]"), column_or_1d(np.asarray(eval_set[1]))
    n_samples = n_rows(X, "eval_set[0]")
    if n_samples != len(y):
        raise ValueError(
            f"eval_set has {n_samples} samples and {len(y)} labels; pass one label per "
            "sample."
        )
    return X, y
