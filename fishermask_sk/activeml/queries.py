"""The strategies: what each parameter is, and whom they ask. Missing labels say what is
labelled and what is the pool.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from skactiveml.base import SingleAnnotatorPoolQueryStrategy, SkactivemlClassifier
from skactiveml.utils import (
    MISSING_LABEL,
    check_equal_missing_label,
    check_scalar,
    check_type,
    is_labeled,
)
from sklearn.base import clone
from sklearn.preprocessing import normalize
from sklearn.utils import check_array

from fishermask_sk._docstrings import completed_by
from fishermask_sk._types import Estimator, Labels, Proposer, RandomState
from fishermask_sk.activeml.nets import cast, holder_of_features, net_of
from fishermask_sk.activeml.utilities import Asked, gains_at_each_pick
from fishermask_sk.baselines import (
    bait_sampling,
    facility_location_sampling,
    power_margin_sampling,
    weighted_margin_sampling,
)
from fishermask_sk.gradients.fisher import Weighting
from fishermask_sk.nets.resnet_module import reproducible
from fishermask_sk.nets.skorch_adapter import preserved_rng
from fishermask_sk.scores.features import describe_samples
from fishermask_sk.strategy.fisher_mask import FisherMask
from fishermask_sk.strategy.masks import MaskRule

# What the docstrings of the classes have in common.
_COMMON = """
    Parameters
    ----------
    missing_label : scalar, str, None or np.nan, default=MISSING_LABEL
        What stands in y for no label.
    random_state : int, RandomState or None, default=None
        Seeds the fit in `query`, and what the strategy draws.
    """


class _PoolQuery(SingleAnnotatorPoolQueryStrategy):
    """What the strategies share: everything but how samples are picked."""

    def query(
        self,
        X: ArrayLike,
        y: Labels,
        clf: Estimator,
        fit_clf: bool = True,
        candidates: ArrayLike | None = None,
        batch_size: int = 1,
        return_utilities: bool = False,
    ) -> Any:
        """Pick the samples to label next.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            All samples, with labels and without.
        y : array-like of shape (n_samples,)
            Their labels, `missing_label` where there is none.
        clf : skactiveml classifier
            A `SkorchClassifier`, or a `SklearnClassifier` around a skorch net or what
            holds one.
        fit_clf : bool, default=True
            Fit a clone on X and y first, seeded by `random_state`. False takes `clf` as
            it is fitted.
        candidates : array-like, optional
            By default all samples without a label. Positions in X: only these may be
            picked. Or samples of shape (n_candidates, ...).
        batch_size : int, default=1
            How many to pick.
        return_utilities : bool, default=False
            Return what every candidate was worth at every pick too.

        Returns
        -------
        query_indices : ndarray of shape (batch_size,)
            In the order of picking; positions in X, or in `candidates` where these are
            samples.
        utilities : ndarray of shape (batch_size, n_samples) or (batch_size, \
n_candidates)
            If `return_utilities`. NaN for earlier picks and what is no candidate.

        Raises
        ------
        TypeError, ValueError
            Where an argument is not what it should be, or the query raises.
        sklearn.exceptions.NotFittedError
            Where the net is not fitted: with `SklearnClassifier`, without any label.
        """
        return self._query(
            X, y, clf, fit_clf, candidates, batch_size, return_utilities, None
        )

    def _query(
        self,
        X: Any,
        y: Any,
        clf: Any,
        fit_clf: bool,
        candidates: Any,
        batch_size: int,
        return_utilities: bool,
        X_target: Any,
    ) -> Any:
        X, y, candidates, batch_size, return_utilities = self._validate_data(
            X, y, candidates, batch_size, return_utilities, reset=True
        )
        check_type(clf, "clf", SkactivemlClassifier)
        check_equal_missing_label(clf.missing_label, self.missing_label_)
        check_scalar(fit_clf, "fit_clf", bool)
        if fit_clf:
            with preserved_rng(), reproducible(self.random_state_):
                clf = clone(clf).fit(X, y)
        labeled = is_labeled(y, self.missing_label_)
        X_target = None if X_target is None else check_array(X_target, allow_nd=True)
        samples, places = X, np.flatnonzero(~labeled)
        if candidates is not None and candidates.ndim == 1:
            places = np.unique(candidates)
        elif candidates is not None:
            samples, places = candidates, np.arange(len(candidates))
        # The pool is what has no label, and what may be picked.
        in_pool = np.isin(np.arange(len(samples)), places)
        if samples is X:
            in_pool |= ~labeled
        pool_places = np.flatnonzero(in_pool)
        with preserved_rng():
            asked = Asked(
                clf,
                cast(samples[pool_places], clf),
                cast(X[labeled], clf),
                None if X_target is None else cast(X_target, clf),
                np.searchsorted(pool_places, places),
                batch_size,
                return_utilities,
            )
            picks, gains = self._pick(asked)
        query_indices = pool_places[picks]
        if not return_utilities:
            return query_indices
        utilities = np.full((batch_size, len(samples)), np.nan)
        utilities[:, places] = gains
        for t in range(1, batch_size):
            utilities[t, query_indices[:t]] = np.nan
        return query_indices, utilities

    @abstractmethod
    def _pick(self, asked: Asked) -> tuple[np.ndarray, np.ndarray | None]:
        """Picks among the pool's candidates, as positions in the pool; and, if asked
        for, the worth (n_instances, n_candidates) of each candidate at each pick.
        """


class _TargetQuery(_PoolQuery):
    """With samples of what the model will be used on."""

    @completed_by(_PoolQuery.query.__doc__)
    def query(
        self,
        X: ArrayLike,
        y: Labels,
        clf: Estimator,
        fit_clf: bool = True,
        candidates: ArrayLike | None = None,
        batch_size: int = 1,
        return_utilities: bool = False,
        X_target: ArrayLike | None = None,
    ) -> Any:
        """Pick the samples to label next.

        Parameters
        ----------
        X_target : array-like of shape (n_target, ...), optional
            Unlabelled samples of what the model will be used on: the labels are chosen
            for them. None of them is ever picked.
        """
        return self._query(
            X, y, clf, fit_clf, candidates, batch_size, return_utilities, X_target
        )


class _FisherQuery(_TargetQuery):
    """Picks by Fisher information: F̄ is that of all samples in the pool and the
    labelled ones, whatever may be picked.
    """

    @abstractmethod
    def _strategy(self) -> FisherMask:
        """The strategy to ask."""

    def _pick(self, asked: Asked) -> tuple[np.ndarray, np.ndarray | None]:
        strategy = self.query_strategy_ = self._strategy()
        if asked.return_utilities and strategy.n_components == "auto":
            strategy.n_components = None
        for name in ("n_components", "n_information_samples", "candidates"):
            if asked.return_utilities and getattr(strategy, name) is not None:
                raise ValueError(
                    "return_utilities=True gives exact gains of all candidates, and "
                    f"{name}={getattr(strategy, name)!r} spares some of them; set "
                    f"{name}=None."
                )
        net = net_of(asked.clf)
        picks = strategy.select(
            net,
            asked.pool,
            asked.n_instances,
            X_labeled=asked.known,
            X_target=asked.target,
            candidates=asked.candidates
            if len(asked.candidates) < len(asked.pool)
            else None,
        )
        if not asked.return_utilities:
            return picks, None
        return picks, gains_at_each_pick(net, strategy, asked, picks)


@completed_by(_COMMON, FisherMask.__doc__)
class FisherMaskQuery(_FisherQuery):
    """FisherMask as a pool query strategy of scikit-activeml.

    Parameters
    ----------
    batch_size : int, default=128
        Samples in a forward pass; how many samples to pick is said to `query`. A batch
        that runs out of memory is halved, and so are those after it.

    Notes
    -----
    Utilities are trace reductions: by how much each candidate would lower tr(M⁻¹F̄)
    after the picks before. They invert a k×k matrix of the k masked weights in float64
    and take n·c·k² operations a pick, beyond the query itself: for pictures and small
    nets. With ``oversample`` > 1 the picks need not be those of largest utility.

    Attributes
    ----------
    query_strategy_ : FisherMask
        Of the last query, with `mask_indices_`, `weights_per_layer_`,
        `trace_reductions_` and `timings_`.

    References
    ----------
    .. [1] Gul, Elmahallawy, Madria, Tripathy. FisherMask. arXiv 2411.05752.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from skactiveml.classifier import SkorchClassifier
    >>> from fishermask_sk.activeml import FisherMaskQuery
    >>> _ = torch.manual_seed(0)
    >>> X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> y = np.full(60, np.nan)
    >>> y[:10] = X[:10, 0] > 0
    >>> clf = SkorchClassifier(
    ...     torch.nn.Linear(4, 2), classes=[0, 1],
    ...     neural_net_param_dict={"verbose": 0, "train_split": None},
    ... )
    >>> query = FisherMaskQuery(sparsity=1.0, random_state=0)
    >>> query.query(X, y, clf, batch_size=3).shape
    (3,)
    """

    def __init__(
        self,
        sparsity: float = 0.002,
        *,
        layers: str | Sequence[str] = "all",
        mask: str | MaskRule = "fisher",
        keep_head: bool = True,
        head: str | None = None,
        weighting: Weighting = "fisher",
        n_mask_samples: int = 1024,
        n_information_samples: int | None = None,
        candidates: int | Proposer | None = None,
        damping: float = 1.0,
        oversample: float = 1.0,
        batch_size: int = 128,
        max_memory: int | str | None = None,
        n_top_classes: int | None = None,
        n_components: int | str | None = "auto",
        missing_label: float | str | None = MISSING_LABEL,
        random_state: RandomState = None,
    ) -> None:
        super().__init__(missing_label=missing_label, random_state=random_state)
        self.sparsity = sparsity
        self.layers = layers
        self.mask = mask
        self.keep_head = keep_head
        self.head = head
        self.weighting = weighting
        self.n_mask_samples = n_mask_samples
        self.n_information_samples = n_information_samples
        self.candidates = candidates
        self.damping = damping
        self.oversample = oversample
        self.batch_size = batch_size
        self.max_memory = max_memory
        self.n_top_classes = n_top_classes
        self.n_components = n_components

    def _strategy(self) -> FisherMask:
        params = self.get_params(deep=False)
        del params["missing_label"]
        return FisherMask(**{**params, "random_state": self.random_state_})


@completed_by(_COMMON, bait_sampling.__doc__)
class BaitQuery(_FisherQuery):
    """BAIT, the Fisher information of the whole head, as a pool query strategy.

    Notes
    -----
    Utilities are those of `FisherMaskQuery`.

    Attributes
    ----------
    query_strategy_ : FisherMask
        Of the last query.

    References
    ----------
    .. [1] J. T. Ash et al., "Gone Fishing: Neural Active Learning with Fisher
       Embeddings", arXiv:2106.09675.
    """

    def __init__(
        self,
        *,
        head: str | None = None,
        damping: float = 1.0,
        oversample: float = 2.0,
        batch_size: int = 128,
        missing_label: float | str | None = MISSING_LABEL,
        random_state: RandomState = None,
    ) -> None:
        super().__init__(missing_label=missing_label, random_state=random_state)
        self.head = head
        self.damping = damping
        self.oversample = oversample
        self.batch_size = batch_size

    def _strategy(self) -> FisherMask:
        return FisherMask(
            sparsity=1.0,
            layers="last",
            head=self.head,
            n_mask_samples=1,  # all of the head is kept, whatever its scores
            n_components=None,
            damping=self.damping,
            oversample=self.oversample,
            batch_size=self.batch_size,
            random_state=self.random_state_,
        )


@completed_by(_COMMON)
class PowerMarginQuery(_PoolQuery):
    """A draw in proportion to 1 − margin, for any classifier of scikit-activeml.

    Utilities are the perturbed logarithms, whose largest are picked.

    References
    ----------
    .. [1] A. Kirsch et al., "Stochastic Batch Acquisition: A Simple Baseline for Deep
       Active Learning", arXiv:2106.12059.
    """

    def __init__(
        self,
        *,
        missing_label: float | str | None = MISSING_LABEL,
        random_state: RandomState = None,
    ) -> None:
        super().__init__(missing_label=missing_label, random_state=random_state)

    def _pick(self, asked: Asked) -> tuple[np.ndarray, np.ndarray | None]:
        return _best_of_a_ranking(
            power_margin_sampling, asked.clf, asked, random_state=self.random_state_
        )


@completed_by(_COMMON, weighted_margin_sampling.__doc__)
class WeightedMarginQuery(_TargetQuery):
    """Uncertain samples that look like the target: margin times density ratio.

    For any classifier of scikit-activeml; `query` needs `X_target`. Utilities are the
    products' logarithms.
    """

    def __init__(
        self,
        *,
        head: str | None = None,
        batch_size: int = 128,
        missing_label: float | str | None = MISSING_LABEL,
        random_state: RandomState = None,
    ) -> None:
        super().__init__(missing_label=missing_label, random_state=random_state)
        self.head = head
        self.batch_size = batch_size

    def _pick(self, asked: Asked) -> tuple[np.ndarray, np.ndarray | None]:
        return _best_of_a_ranking(
            weighted_margin_sampling,
            holder_of_features(asked.clf),
            asked,
            X_target=_needed(asked.target, self),
            head=self.head,
            batch_size=self.batch_size,
        )


@completed_by(_COMMON, facility_location_sampling.__doc__)
class FacilityLocationQuery(WeightedMarginQuery):
    """Samples that resemble the target and cover it: SIMILAR's FLQMI.

    For any classifier of scikit-activeml; `query` needs `X_target`. Utilities are what
    each candidate adds at each pick.
    """

    def _pick(self, asked: Asked) -> tuple[np.ndarray, np.ndarray | None]:
        source = holder_of_features(asked.clf)
        target = _needed(asked.target, self)
        pool = asked.pool[asked.candidates]
        picks = facility_location_sampling(
            source,
            pool,
            asked.n_instances,
            X_target=target,
            head=self.head,
            batch_size=self.batch_size,
        )
        if not asked.return_utilities:
            return asked.candidates[picks], None
        features = [
            normalize(describe_samples(source, X, "X", self.head, self.batch_size)[0])
            for X in (pool, target)
        ]
        similar = features[0] @ features[1].T
        covered, gains = np.zeros(len(target)), []
        for pick in picks:
            added = np.maximum(similar - covered, 0).sum(axis=1)
            gains.append(added + similar.max(axis=1))
            covered = np.maximum(covered, similar[pick])
        return asked.candidates[picks], np.stack(gains)


def _best_of_a_ranking(
    strategy: Callable[..., Any], learner: Any, asked: Asked, **params: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Picks and utilities of a strategy that gives each sample one value: all are
    ranked, the first taken.
    """
    n_candidates = len(asked.candidates)
    order, values = strategy(
        _Asking(learner), asked.pool[asked.candidates], n_candidates, **params
    )
    return asked.candidates[order[: asked.n_instances]], values[np.argsort(order)]


def _needed(target: np.ndarray | None, strategy: Any) -> np.ndarray:
    if target is None:
        raise ValueError(
            f"{type(strategy).__name__} chooses labels for a target; pass X_target= to "
            "query, unlabelled samples of what the model will be used on."
        )
    return target


class _Asking:
    """A learner of whom strategies know that it wants their metrics too."""

    def __init__(self, clf: Any) -> None:
        self.estimator, self.predict = clf, clf.predict
        self.predict_proba = clf.predict_proba

    def query(self, X: Any, return_metrics: bool = True) -> None:
        """Only looked at for its signature."""
