"""modAL's ActiveLearner for every supported scikit-learn.

modAL is no longer maintained: its `fit` and `teach` hand scikit-learn a keyword that
1.6 deprecated and 1.8 removed, and its pandas branch calls a method that pandas 2
removed. Only this module imports modAL.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from modAL.models import ActiveLearner as _ModALActiveLearner
from modAL.uncertainty import uncertainty_sampling
from modAL.utils.data import data_vstack
from scipy.sparse import issparse
from sklearn.utils import check_random_state, check_X_y
from skorch.helper import SliceDataset
from torch.utils.data import Dataset

from fishermask_sk._rows import as_rows, n_rows, take_rows
from fishermask_sk._types import Estimator, Labels, RandomState, Samples
from fishermask_sk._warnings import warn_user
from fishermask_sk.nets.loaders import predictions_in_order
from fishermask_sk.nets.wrong_dtypes import explained

__all__ = ["ActiveLearner"]

_WITHOUT_A_LEARNER = (
    "or do without a learner: keep the labelled samples yourself, fit the net on them "
    "and call FisherMask().select(net, X_pool, n_instances, X_labeled=...)."
)

# scikit-learn 1.5 knows only the old name, 1.6 and 1.7 warn about it, and 1.8 knows
# only the new one.
_NEW_NAME = "ensure_all_finite" in signature(check_X_y).parameters
_FINITE = "ensure_all_finite" if _NEW_NAME else "force_all_finite"


class ActiveLearner(_ModALActiveLearner):
    """modAL's ActiveLearner, the same with modAL 0.4.1 and 0.4.2.1 and scikit-learn
    from 1.5 on.

    A drop-in replacement: `fit`, `teach`, `query`, `predict`, `predict_proba` and
    `score` are modAL's. Beyond that, samples and labels may be pandas objects or torch
    tensors, `clone` and `repr` work, and input that does not fit what was taught before
    is refused before anything changes. Where the estimator's own fit raises, samples
    and labels are as before as well.

    Parameters
    ----------
    estimator : estimator
        What predicts. It is not cloned: `teach` refits this very object.
    query_strategy : callable, default=modAL.uncertainty.uncertainty_sampling
        Called as ``query_strategy(learner, X_pool, *args, **kwargs)``, once per query.
        Returns positions in `X_pool`, or a pair of positions and metrics.
    X_training : {array-like, sparse matrix, DataFrame, Tensor} of shape (n_samples,
    ...), default=None
        Initial samples. Where there are some, the estimator is fitted on them at once.
    y_training : array-like, Series or Tensor, default=None
        Their labels, of shape (n_samples,) or (n_samples, n_outputs).
    bootstrap_init : bool, default=False
        Fit on a bootstrap of the initial samples.
    on_transformed : bool, default=False
        Whether modAL's own strategies see samples as a Pipeline's last step does.
    force_all_finite : bool or "allow-nan", default=True
        Whether NaN and infinite values are refused.
    random_state : int, RandomState instance or None, default=None
        Seeds the bootstraps. None draws from NumPy's global state, as modAL does.
    **fit_kwargs
        Passed to the first fit of the estimator. `clone` does not know them.

    Attributes
    ----------
    X_training, y_training : as handed in
        Everything taught so far; None before that.

    Raises
    ------
    TypeError
        If `query_strategy` is not callable, or is a class instead of an object, or the
        initial samples are a dict or a Dataset.
    ValueError
        If the initial samples and labels do not match, or are not finite.

    See Also
    --------
    fishermask_sk.FisherMask : The query strategy of this package.

    Notes
    -----
    Two things differ between modAL's versions, and here they are one. `query` takes
    `return_metrics`, as in 0.4.2.1. Samples taught with ``only_new=True`` are
    remembered, as in 0.4.1 and in the docstrings of both.

    `fit` and `teach` are all or nothing for `X_training` and `y_training`, whatever is
    raised: MemoryError and KeyboardInterrupt too. (A skorch net takes a
    KeyboardInterrupt for the end of its training and raises nothing; these samples
    count as taught.) The estimator is not copied for this. After an error it is what
    its own fit left: as before where that refused the input, half trained where it
    broke off. The next `teach` or `fit` that goes through fits it anew.

    References
    ----------
    .. [1] T. Danka and P. Horvath, "modAL: A modular active learning framework for
       Python", arXiv:1805.00979.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fishermask_sk.modal import ActiveLearner
    >>> X, y = load_iris(return_X_y=True)
    >>> learner = ActiveLearner(
    ...     LogisticRegression(), X_training=X[::10], y_training=y[::10]
    ... )
    >>> query_idx, X_query = learner.query(X, n_instances=2)
    >>> learner.teach(X_query, y[query_idx])
    >>> len(learner.X_training)
    17
    """

    def __init__(
        self,
        estimator: Estimator,
        query_strategy: Callable[..., Any] = uncertainty_sampling,
        X_training: Samples | None = None,
        y_training: Labels | None = None,
        bootstrap_init: bool = False,
        on_transformed: bool = False,
        *,
        force_all_finite: bool | str = True,
        random_state: RandomState = None,
        **fit_kwargs: Any,
    ) -> None:
        if not callable(query_strategy) or isinstance(query_strategy, type):
            raise TypeError(
                "query_strategy must be a function or a callable object, got "
                f"{query_strategy!r}; hand in FisherMask(), for instance, with its "
                "parentheses."
            )
        # Without samples modAL's constructor only stores; what it would fit comes after
        # the checks below.
        super().__init__(estimator, query_strategy, on_transformed=on_transformed)
        self.bootstrap_init = (
            bootstrap_init  # modAL drops it, and clone and repr look for it
        )
        self.force_all_finite = force_all_finite
        self.random_state = random_state
        if X_training is not None:
            # no labels: refused there, in words
            self.fit(
                X_training,
                cast(Labels, y_training),
                bootstrap=bootstrap_init,
                **fit_kwargs,
            )

    def fit(
        self, X: Samples, y: Labels, bootstrap: bool = False, **fit_kwargs: Any
    ) -> "ActiveLearner":
        """Forget what was taught, remember these samples and fit the estimator on them.

        Parameters
        ----------
        X : {array-like, sparse matrix, DataFrame, Tensor} of shape (n_samples, ...)
            Samples.
        y : {array-like, Series, Tensor} of shape (n_samples,) or (n_samples, n_outputs)
            Their labels.
        bootstrap : bool, default=False
            Fit on a bootstrap of them.
        **fit_kwargs
            Passed to the estimator's fit.

        Returns
        -------
        self : ActiveLearner
            The fitted learner.

        Raises
        ------
        TypeError
            If X is a dict or a Dataset.
        ValueError
            If X and y do not match, or are not finite.
        """
        with self._taught_or_as_before():
            self._check(X, y)
            self.X_training, self.y_training = X, y
            return self._fit_to_known(bootstrap=bootstrap, **fit_kwargs)

    def teach(
        self,
        X: Samples,
        y: Labels,
        bootstrap: bool = False,
        only_new: bool = False,
        **fit_kwargs: Any,
    ) -> None:
        """Add samples to what was taught and refit the estimator.

        Parameters
        ----------
        X : {array-like, sparse matrix, DataFrame, Tensor} of shape (n_samples, ...)
            New samples.
        y : {array-like, Series, Tensor} of shape (n_samples,) or (n_samples, n_outputs)
            Their labels.
        bootstrap : bool, default=False
            Fit on a bootstrap.
        only_new : bool, default=False
            Fit on the new samples alone. They are remembered all the same: a strategy
            that asks what is labelled has to know them.
        **fit_kwargs
            Passed to the estimator's fit.

        Raises
        ------
        TypeError
            If X is a dict or a Dataset, or pandas objects or tensors are to be joined
            with something else.
        ValueError
            If X and y do not match, are not finite, or have another shape than what was
            taught before.
        """
        with self._taught_or_as_before():
            self._add_training_data(X, y)
            if only_new:
                self._fit_on_new(X, y, bootstrap=bootstrap, **fit_kwargs)
            else:
                self._fit_to_known(bootstrap=bootstrap, **fit_kwargs)

    def query(
        self,
        X_pool: Samples,
        *query_args: Any,
        return_metrics: bool = False,
        **query_kwargs: Any,
    ) -> tuple[Any, ...]:
        """Ask the query strategy, once, which samples of the pool to label next.

        Parameters
        ----------
        X_pool : {array-like, sparse matrix, DataFrame, Tensor} of shape (n_pool, ...)
            Samples without labels.
        *query_args, **query_kwargs
            Passed to the query strategy, for instance ``n_instances=10``.
        return_metrics : bool, default=False
            Whether to return the metrics as well.

        Returns
        -------
        query_idx : ndarray of shape (n_instances,)
            Positions in `X_pool`.
        X_query : same type as X_pool
            The samples there.
        metrics : ndarray of shape (n_instances,) or None
            What the strategy says about them; only if `return_metrics`. None where it
            says nothing.
        """
        answer = self.query_strategy(self, X_pool, *query_args, **query_kwargs)
        # Strategies for modAL 0.4.1 return positions, those for 0.4.2.1 a pair. modAL
        # 0.4.2.1 tells them apart by unpacking under a bare `except`: it calls some
        # twice, and takes two positions for a pair.
        query_idx, metrics = answer if isinstance(answer, tuple) else (answer, None)
        # modAL 0.4.1 has no rows of tensors, and 0.4.2.1 takes columns of a DataFrame
        # that has numbers for names.
        X_query = take_rows(as_rows(X_pool, "X_pool"), query_idx)
        if not return_metrics:
            return query_idx, X_query
        if metrics is None:
            warn_user(
                f"{self.query_strategy!r} has no metrics; return_metrics=True gives "
                "None."
            )
        return query_idx, X_query, metrics

    def predict(self, X: Samples, **predict_kwargs: Any) -> Any:
        """Predict with the estimator, in the order of the samples whatever a net's
        loader does.
        """
        with predictions_in_order(self.estimator):
            return super().predict(X, **predict_kwargs)

    def predict_proba(self, X: Samples, **predict_proba_kwargs: Any) -> Any:
        """Class probabilities from the estimator, in the order of the samples."""
        with predictions_in_order(self.estimator):
            return super().predict_proba(X, **predict_proba_kwargs)

    def score(self, X: Samples, y: Labels, **score_kwargs: Any) -> Any:
        """Score of the estimator, each sample's prediction against its own label."""
        with predictions_in_order(self.estimator):
            return super().score(X, y, **score_kwargs)

    @contextmanager
    def _taught_or_as_before(self) -> Iterator[None]:
        """After any error inside, samples and labels are those of before."""
        before = self.X_training, self.y_training
        try:
            yield
        except BaseException:
            self.X_training, self.y_training = before
            raise

    def _check(self, X: Any, y: Any) -> None:
        """Refuse samples and labels that are no rows, do not match or are not
        finite.
        """
        _refuse_what_has_no_rows(X)
        try:
            check_X_y(
                _as_array(X),
                _as_array(y),
                accept_sparse=True,
                ensure_2d=False,
                allow_nd=True,
                multi_output=True,
                dtype=None,
                **{_FINITE: self.force_all_finite},
            )
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{str(error).rstrip('.')}; hand in one sample or more, all finite, "
                "and a label for each (a single sample as X[[i]], y[[i]])."
            ) from error

    def _add_training_data(self, X: Any, y: Any) -> None:
        """Remember new samples and labels: both or, where either does not fit,
        neither.
        """
        self._check(X, y)
        if self.X_training is not None:
            for rows in (self.X_training, X):
                _refuse_to_join(rows)
            X, y = _join(self.X_training, X, "X"), _join(self.y_training, y, "y")
        self.X_training, self.y_training = X, y

    def _fit_to_known(
        self, bootstrap: bool = False, **fit_kwargs: Any
    ) -> "ActiveLearner":
        """Fit the estimator on everything taught so far; modAL's Committee calls this,
        too.
        """
        return self._fit_on_new(
            self.X_training, self.y_training, bootstrap=bootstrap, **fit_kwargs
        )

    def _fit_on_new(
        self, X: Any, y: Any, bootstrap: bool = False, **fit_kwargs: Any
    ) -> "ActiveLearner":
        """Fit the estimator on these samples alone; modAL's Committee calls this,
        too.
        """
        if bootstrap:
            n_samples = n_rows(X, "X")
            drawn = check_random_state(self.random_state).choice(n_samples, n_samples)
            X, y = take_rows(X, drawn), take_rows(y, drawn)
        with explained(X, y):
            self.estimator.fit(X, y, **fit_kwargs)
        return self


def _as_array(data: Any) -> Any:
    """Return a tensor, wherever it lives, as scikit-learn's checks can read it;
    anything else as it is.
    """
    return data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else data


def _refuse_what_has_no_rows(X: Any) -> None:
    """Refuse dicts and Datasets, whose rows modAL's learner cannot check."""
    if isinstance(X, Mapping) and not issparse(X):
        raise TypeError(
            f"X is a {type(X).__name__}, and a learner keeps rows of one array, sparse "
            "matrix, DataFrame or tensor. Teach it one array, and make the dict of it "
            f"in a Pipeline before the net; {_WITHOUT_A_LEARNER}"
        )
    if isinstance(X, Dataset) and not isinstance(X, SliceDataset):
        _refuse_to_join(X)


def _refuse_to_join(X: Any) -> None:
    """Refuse Datasets, in skorch's SliceDataset or bare: rows of two cannot be joined
    to one.
    """
    if isinstance(X, (Dataset, SliceDataset)):
        example = (
            "np.stack(X)"
            if isinstance(X, SliceDataset)
            else "np.stack([sample for sample, _ in X])"
        )
        raise TypeError(
            f"X is a {type(X).__name__}, and a learner cannot join it to what it is "
            "taught before or after. Teach it arrays from the start, for instance "
            f"{example}; {_WITHOUT_A_LEARNER}"
        )


def _join(known: Any, new: Any, name: str) -> Any:
    """Return known rows and new ones in one container of the known rows' type."""
    known_shape, new_shape = (tuple(np.shape(rows)[1:]) for rows in (known, new))
    if known_shape != new_shape:
        raise ValueError(
            f"{name} has rows of shape {new_shape}, but this learner was taught rows "
            f"of shape {known_shape}; hand in rows of that shape, or start afresh with "
            "fit."
        )
    for kind in (pd.DataFrame, pd.Series, torch.Tensor):
        if isinstance(known, kind) and not isinstance(new, kind):
            raise TypeError(
                f"{name} is a {type(new).__name__}, but this learner was taught a "
                f"{kind.__name__}; hand in a {kind.__name__}, or start afresh with fit."
            )
    if isinstance(known, pd.DataFrame) and set(known.columns) != set(new.columns):
        raise ValueError(
            f"{name} has the columns {list(new.columns)}, but this learner was taught "
            f"{list(known.columns)}; rename them."
        )
    if isinstance(known, pd.DataFrame | pd.Series):
        return pd.concat([known, new])
    if isinstance(known, torch.Tensor):
        return torch.cat([known, new])
    return data_vstack((known, new))
