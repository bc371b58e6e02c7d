"""FisherMask as a query strategy: what a user sets, hands in and gets back, joined to
modAL and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator

from fishermask_sk._docstrings import completed_by
from fishermask_sk._types import (
    Labels,
    Learner,
    Positions,
    Proposer,
    RandomState,
    Samples,
)
from fishermask_sk._warnings import warn_user
from fishermask_sk.distributed import ALONE, Processes, all_processes
from fishermask_sk.gradients.fisher import Weighting
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.nets.skorch_adapter import fitted_net, preserved_rng
from fishermask_sk.scores.proposals import check_candidates_parameter
from fishermask_sk.scores.targets import (
    check_same_shape,
    check_some_weight,
    checked_weights,
)
from fishermask_sk.strategy.agreement import check_same_question
from fishermask_sk.strategy.contract import (
    LABELED,
    answer,
    check_n_instances,
    labeled_samples,
)
from fishermask_sk.strategy.directions import Auto
from fishermask_sk.strategy.masks import MaskRule
from fishermask_sk.strategy.net_checks import check_module
from fishermask_sk.strategy.prices import cheapest
from fishermask_sk.strategy.query import Query
from fishermask_sk.strategy.question import Question
from fishermask_sk.strategy.settings import Settings, check_flag, check_settings


class FisherMask(BaseEstimator):
    r"""Query strategy that picks the samples whose labels lower a deep network's
    expected error most.

    The diagonal Fisher information of all trainable weights gives a sparse mask of the
    few that matter; each sample is described by its gradient on that mask; a batch is
    picked greedily so that the trace of the inverse information times the pool's
    information falls most.

    Parameters
    ----------
    sparsity : float in (0, 1] or int >= 1, default=0.002
        The fraction of trainable weights to keep, or their number k. Embeddings grow
        with k, matrices with k², the time of their eigenvectors with k³.
    layers : {"all", "last", "middle"}, str or sequence of str, default="all"
        Which weights may be masked: all; the head's; those of neither the head nor the
        layers that see the input first; or those whose parameter name matches an
        `fnmatch` pattern.
    mask : {"fisher", "per_layer", "random"} or callable, default="fisher"
        The k weights of largest diagonal Fisher information; the best ⌈sparsity·size⌉
        of every parameter tensor; k at random; or a callable ``(scores, k, slices) ->
        positions``, which is given the scores (P,), zero for weights that may not be
        masked, and the slice of each parameter that may.
    keep_head : bool, default=True
        Keep all of the head's weights (where `layers` allows them) and fill the rest by
        score, or at random with ``mask="random"``. A callable decides for itself.
    head : str, optional
        Name of the head's module. By default the layer nearest the output with one
        output a class.
    weighting : {"fisher", "uniform"}, default="fisher"
        Weigh each class's gradient by √p, as Fisher information is defined, or not at
        all, as the authors' code does. The mask's scores are weighed by p either way.
    n_mask_samples : int, default=1024
        Samples, drawn from pool and labelled together, or from the target where there
        is one, that the diagonal Fisher information is averaged over.
    n_information_samples : int, optional
        F̄ is the mean over so many samples, drawn as those are, instead of all. With
        `candidates`, gradients are computed for these, the candidates and the labelled
        samples alone.
    candidates : int or callable, optional
        Who may be picked. An int m: the m·n_instances samples of smallest margin, of
        all processes together. A callable ``(estimator, X_pool) -> positions``: whom it
        proposes; where it takes a `random_state` that is not bound, it is given one
        from the query's. By default every sample.
    damping : float, default=1.0
        λ > 0: the prior information of every masked weight. Below 0.1 every product of
        the selection is float64.
    oversample : float, default=1.0
        Pick ⌈oversample·b⌉ first, then drop the least useful one by one (BAIT's
        backward pass, 2 there).
    batch_size : int, default=128
        Samples in a forward pass. A batch that runs out of memory is halved, and so are
        those after it.
    max_memory : int or str, optional
        What a query may hold on its device, in bytes or as text ("2GiB"); by default 80
        % of what is free. Embeddings that do not fit lie in main memory where the
        device is another, else in a mapped file in the folder for temporary files
        (TMPDIR), and stream. The picks are the same.
    n_top_classes : int >= 2, optional
        Of each sample only this many most probable classes count, as if there were no
        others: for hundreds of classes. Time and memory grow with it as with the number
        of classes.
    n_components : "auto", int >= 1 or None, default="auto"
        How many principal directions of the embeddings the selection works in, those of
        the samples that the mask is computed from: its time and memory then grow with
        them instead of k. None keeps all. "auto" does so for masks of up to 6,000
        weights; beyond, it keeps the leading ones that hold 99.9 % of the information's
        trace, measured on an eighth of these samples, which did not find them, and at
        most 1,000. One warning says how many and what they hold. A linear head of up to
        12,000 weights is held as a product and never cut: besides it only the others
        are. An int is obeyed, for the whole mask with its head, or refused.
    random_state : int, RandomState or None, default=None
        Draws the mask's samples, a random mask, where the search for principal
        directions starts, and random ties. No global generator is touched.
    verbose : int, default=0
        1 shows progress bars.

    Attributes
    ----------
    mask_indices_ : ndarray of shape (k,), int64
        Kept positions in the flat vector of all ``module.parameters()``, sorted.
    weights_per_layer_ : dict of str to int
        How many weights of each trainable parameter are kept.
    query_idx_ : ndarray of shape (n_instances,), int64
        The last query's positions in its `X_pool`, in the order of picking.
    trace_reductions_ : ndarray of shape (n_instances,)
        How much each pick lowered tr(M⁻¹F̄) when it was picked. Not comparable between
        queries: mask and information change.
    n_components_ : int
        How many directions the selection worked in; k, where it kept all.
    timings_ : dict
        Seconds spent on "mask", "embeddings" and "selection".
    check_seconds_ : float
        Of these, the seconds in which per-sample gradients were compared with plain
        autograd, on every batch.

    References
    ----------
    .. [1] Gul, Elmahallawy, Madria, Tripathy. FisherMask. arXiv 2411.05752.
    .. [2] Ash, Goel, Krishnamurthy, Kakade. Gone Fishing: Neural Active Learning
       with Fisher Embeddings. arXiv 2106.09675 (the selection).

    Examples
    --------
    >>> import numpy as np, torch
    >>> from skorch import NeuralNetClassifier
    >>> from fishermask_sk import FisherMask
    >>> _ = torch.manual_seed(0)
    >>> X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> y = (X[:, 0] > 0).astype("int64")
    >>> net = NeuralNetClassifier(
    ...     torch.nn.Linear(4, 2), criterion=torch.nn.CrossEntropyLoss,
    ...     verbose=0, train_split=None,
    ... ).fit(X[:10], y[:10])
    >>> strategy = FisherMask(sparsity=1.0, random_state=0)
    >>> strategy.select(net, X[10:], n_instances=3, X_labeled=X[:10]).shape
    (3,)
    >>> strategy.weights_per_layer_
    {'weight': 8, 'bias': 2}
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
        n_components: int | str | Auto | None = "auto",
        random_state: RandomState = None,
        verbose: int = 0,
    ) -> None:
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
        self.random_state = random_state
        self.verbose = verbose

    def __call__(
        self,
        learner: Learner,
        X_pool: Samples,
        n_instances: int = 1,
        *,
        X_labeled: Samples | None = None,
        X_target: Samples | None = None,
        target_weight: Labels | None = None,
        random_tie_break: bool = False,
        return_metrics: object = None,
    ) -> Any:
        """Pick the samples to label next, in the form that the caller's modAL expects.

        This is for one process: under a process group too, each asks for itself, with
        the pool that it hands in.

        Parameters
        ----------
        learner : modAL learner or fitted estimator
        X_pool, n_instances, X_labeled, X_target, target_weight, random_tie_break
            See `select`.
        return_metrics
            Accepted because modAL forwards it; which modAL is calling shows in its
            ``query``.

        Returns
        -------
        query_idx : ndarray of shape (n_instances,)
            Under modAL 0.4.2 the pair (query_idx, trace_reductions_).
        """
        query_idx = self._select(
            ALONE,
            learner,
            X_pool,
            n_instances,
            X_labeled,
            X_target,
            target_weight,
            random_tie_break,
            None,
        )
        return answer(learner, query_idx, self.trace_reductions_)

    def select(
        self,
        estimator: Learner,
        X_pool: Samples,
        n_instances: int = 1,
        *,
        X_labeled: Samples | None = None,
        X_target: Samples | None = None,
        target_weight: Labels | None = None,
        random_tie_break: bool = False,
        candidates: Positions | Proposer | None = None,
    ) -> np.ndarray:
        """Pick the samples to label next, with any fitted estimator that holds a skorch
        net.

        Under an initialised process group of `torch.distributed`, every process of it
        calls this, each with its part of the pool and of the labelled samples (either
        may be empty), and all get the same answer. See the page "A pool larger than one
        machine".

        Parameters
        ----------
        estimator : fitted skorch net, pipeline or search around one, or modAL learner
        X_pool : array, tensor, DataFrame, dict of arrays or Dataset
            The n_samples unlabelled samples, as the estimator takes them.
        n_instances : int, default=1
            How many to pick.
        X_labeled : like X_pool, optional
            The samples that have labels; an empty array means none. By default the
            learner's `X_training`.
        X_target : like X_pool, optional
            Unlabelled samples of what the model will be used on. They stand in for pool
            and labelled samples in F̄ and in the ranking of the weights, so that the
            labels are chosen for them. None of them is ever picked.
        target_weight : array-like of shape (n_target,), optional
            Importance or cost of each sample of `X_target` in both means; without
            `X_target` of each sample of `X_pool`, shape (n_samples,), and a labelled
            sample counts as much as the pool's mean. Not negative, and not all zero.
        random_tie_break : bool, default=False
            Settle equal gains at random instead of by the lowest index.
        candidates : array of int, int, callable or "all", optional
            Positions in `X_pool`: only these may be picked, while what the pool needs
            to know still comes from all of it. Or a cheap strategy that proposes them,
            ``(estimator, X_pool) -> positions``, for example ``partial(margin_sampling,
            n_instances=5000)``. Embeddings are kept of these alone. None means what the
            constructor says, "all" every sample.

        Returns
        -------
        query_idx : ndarray of shape (n_instances,), int64
            Positions in `X_pool`, in the order of picking; under a process group in all
            pools, one behind the other in the order of the ranks.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Where the net is not fitted.
        TypeError, ValueError
            Where parameters or samples are not what they should be; before any
            expensive work.
        MemoryError
            Where the query would need more than `max_memory`, or more than is free;
            before any expensive work, but after the scores where `mask` is "per_layer"
            or a callable and the mask larger than k.
        FloatingPointError
            Where scores, information or gains are not finite.
        RuntimeError
            Where another process of the group raised, or is gone; the step is named.
        """
        return self._select(
            all_processes(),
            estimator,
            X_pool,
            n_instances,
            X_labeled,
            X_target,
            target_weight,
            random_tie_break,
            candidates,
        )

    def _select(
        self,
        processes: Processes,
        estimator: Any,
        X_pool: Any,
        n_instances: int,
        X_labeled: Any,
        X_target: Any,
        target_weight: Any,
        random_tie_break: bool,
        candidates: Any,
    ) -> np.ndarray:
        """`select` by these processes."""
        with processes.together():
            settings = self.settings()
            candidates = self._may_be_picked(candidates)
            check_flag(random_tie_break, "random_tie_break")
            fitted = fitted_net(estimator)
            check_module(fitted.module)
            check_n_instances(n_instances)
            if (
                processes.size > 1
                and X_labeled is None
                and getattr(estimator, "X_training", None) is not None
            ):
                raise ValueError(
                    "Under a process group X_labeled must be this rank's part of the "
                    "labelled samples (or an empty array), so that each is counted "
                    "once; the learner's X_training may be the same on every rank."
                )
            X_labeled = labeled_samples(estimator, X_labeled)
            check_same_shape(X_pool, X_labeled, LABELED)
            check_same_shape(X_pool, X_target, "those of X_target")
        with torch.inference_mode(False), preserved_rng(), undisturbed(fitted.module):
            with processes.together():
                pool, n_pool = fitted.dataset(X_pool, "X_pool")
                labeled, n_labeled = (
                    (None, 0)
                    if X_labeled is None
                    else fitted.dataset(X_labeled, "X_labeled")
                )
                target = None
                if X_target is not None:
                    target = fitted.dataset(X_target, "X_target")
                weights = checked_weights(
                    target_weight, n_pool, None if target is None else target[1]
                )
            check_n_instances(n_instances, sum(processes.objects(n_pool)))
            of_call = {
                "n_instances": int(n_instances),
                "random_tie_break": bool(random_tie_break),
                "whether there are candidates": candidates is not None,
                "whether there is a target": target is not None,
                "whether there are weights": weights is not None,
            }
            check_same_question(
                processes, self.get_params(deep=False), fitted.module, of_call
            )
            if target is not None and not sum(processes.objects(target[1])):
                raise ValueError(
                    "X_target is empty; pass samples of what the model will be used "
                    "on, or leave it out."
                )
            if weights is not None:
                check_some_weight(sum(processes.objects(float(weights.sum()))))
            question = Question(
                settings,
                fitted,
                pool,
                labeled,
                n_pool,
                n_labeled,
                int(n_instances),
                processes,
                target,
                weights,
                self._warn_once,
            )
            query = Query(question, cheapest)
            query.propose(candidates, estimator, X_pool)
            result = query.run(random_tie_break)
        for name, value in result.items():
            setattr(self, name, value)
        return self.query_idx_

    def _may_be_picked(self, candidates: Any) -> Any:
        """The candidates of one query: its own, else the constructor's; None for
        all.
        """
        if candidates is None:
            return self.candidates
        if isinstance(candidates, str):
            if candidates != "all":
                raise ValueError(
                    f"candidates={candidates!r} is unknown; pass positions in X_pool, "
                    "an int, a callable, or 'all'."
                )
            return None
        if isinstance(candidates, (Integral, bool)):
            check_candidates_parameter(candidates)
        return candidates

    def _warn_once(self, message: str, about: str | None = None) -> None:
        """Give a warning, but not at every query of a loop again; `about` stands for
        messages whose numbers differ.
        """
        said: set[str] = self.__dict__.setdefault("_said", set())
        if (about or message) not in said:
            said.add(about or message)
            warn_user(message)

    def settings(self) -> Settings:
        """The constructor's parameters, each checked against its range.

        Returns
        -------
        Settings
            What a query is handed; frozen.

        Raises
        ------
        TypeError, ValueError
            Where a parameter is out of its range.
        """
        settings = Settings(**self.get_params(deep=False))
        check_settings(settings)
        return settings


@completed_by(FisherMask.select.__doc__)
def fisher_mask_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    X_labeled: Samples | None = None,
    X_target: Samples | None = None,
    target_weight: Labels | None = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
    **params: Any,
) -> Any:
    """`FisherMask` as a function, for modAL loops that pass functions and
    `functools.partial`.

    Parameters
    ----------
    learner : modAL learner or fitted estimator
        With a skorch net in it.
    return_metrics
        Accepted because modAL forwards it.
    **params
        Parameters of `FisherMask`.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Under modAL 0.4.2 the pair (query_idx, trace reductions).

    Raises
    ------
    TypeError
        For a keyword that `FisherMask` does not have, and as `FisherMask.select`.

    Examples
    --------
    >>> from functools import partial
    >>> strategy = partial(fisher_mask_sampling, sparsity=0.01, random_state=0)
    """
    return FisherMask(**params)(
        learner,
        X_pool,
        n_instances,
        X_labeled=X_labeled,
        X_target=X_target,
        target_weight=target_weight,
        random_tie_break=random_tie_break,
        return_metrics=return_metrics,
    )
