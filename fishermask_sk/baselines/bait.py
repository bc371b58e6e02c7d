"""BAIT: FisherMask's objective on the whole head."""

from __future__ import annotations

from typing import Any

from fishermask_sk._types import Labels, Learner, RandomState, Samples
from fishermask_sk.baselines.shared import documented
from fishermask_sk.strategy.fisher_mask import FisherMask


@documented
def bait_sampling(
    learner: Learner,
    X_pool: Samples,
    n_instances: int = 1,
    *,
    X_labeled: Samples | None = None,
    X_target: Samples | None = None,
    target_weight: Labels | None = None,
    head: str | None = None,
    damping: float = 1.0,
    oversample: float = 2.0,
    batch_size: int = 128,
    random_state: RandomState = None,
    random_tie_break: bool = False,
    return_metrics: object = None,
) -> Any:
    """Pick samples by the Fisher information of the whole head: BAIT.

    This is :class:`~fishermask_sk.FisherMask` with all of the head and nothing else for
    its mask, and with the backward pass: twice as many samples are picked, then the
    least useful ones are dropped one by one.

    Parameters
    ----------
    learner : modAL learner or fitted estimator
        With a skorch net in it.
    X_target : samples of shape (n_target, ...), default=None
        Unlabelled samples of what the model will be used on: F̄ is their mean.
    target_weight : array-like of shape (n_target,), default=None
        Weights in that mean; without `X_target` of the pool's samples.
    head : str, default=None
        Name of the head's module. By default the layer nearest the output with one
        output per class.
    damping : float, default=1.0
        λ, the prior information of every weight.
    oversample : float, default=2.0
        How many times `n_instances` are picked before the backward pass.

    Returns
    -------
    query_idx : ndarray of shape (n_instances,)
        Positions in `X_pool`, in the order of picking; under modAL 0.4.2 a pair of
        these and the trace reductions.

    Raises
    ------
    TypeError, ValueError, MemoryError
        See `FisherMask.select`.
    sklearn.exceptions.NotFittedError
        Where the net is not fitted.

    Notes
    -----
    The head of c classes and d features has k = c·d (+ c) weights: k×k matrices are
    held, for 10 classes and 512 features up to five of 210 MB each in float64.

    References
    ----------
    .. [1] J. T. Ash et al., "Gone Fishing: Neural Active Learning with Fisher
       Embeddings", arXiv:2106.09675, algorithm 1.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from skorch import NeuralNetClassifier
    >>> from fishermask_sk.baselines import bait_sampling
    >>> _ = torch.manual_seed(0)
    >>> X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> net = NeuralNetClassifier(
    ...     torch.nn.Linear(4, 2), criterion=torch.nn.CrossEntropyLoss,
    ...     verbose=0, train_split=None,
    ... ).fit(X[:10], (X[:10, 0] > 0).astype("int64"))
    >>> bait_sampling(net, X[10:], n_instances=3, X_labeled=X[:10]).shape
    (3,)
    """
    # Every candidate is kept, whatever its score: one sample is enough to score them.
    strategy = FisherMask(
        sparsity=1.0,
        layers="last",
        head=head,
        n_mask_samples=1,
        damping=damping,
        oversample=oversample,
        batch_size=batch_size,
        n_components=None,
        random_state=random_state,
    )
    return strategy(
        learner,
        X_pool,
        n_instances,
        X_labeled=X_labeled,
        X_target=X_target,
        target_weight=target_weight,
        random_tie_break=random_tie_break,
    )
