"""What users may hand in, for mypy: `make types` reads this file, and nothing runs it.

Each `type: ignore` is a mistake that the types find; mypy complains where it does not.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from skorch import NeuralNetClassifier
from torch.utils.data import Dataset

from fishermask_sk import (
    ActiveLearningClassifier,
    FisherMask,
    ResNet18Classifier,
    as_estimator,
    check_network,
    compare_strategies,
    fisher_mask_sampling,
)
from fishermask_sk.baselines import margin_sampling, random_sampling


class Pool(Dataset[torch.Tensor]):
    """Samples of one's own."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(2)


class Classifier:
    """An estimator of one's own."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> "Classifier":
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X


def alphabetical(learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
    """A strategy of one's own."""
    return np.arange(n_instances)


def samples(
    net: NeuralNetClassifier, X: np.ndarray, rng: np.random.RandomState
) -> None:
    select = FisherMask(random_state=np.int64(0)).select
    select(net, X, X_labeled=X[:0], target_weight=[1.0, 2.0])
    select(net, torch.zeros(3, 2), candidates=[0, 2])
    select(net, {"ids": X, "mask": X}, candidates="all")
    select(net, Pool(), candidates=partial(margin_sampling, n_instances=50))
    random_sampling(net, csr_matrix(X), 2, random_state=rng)
    check_network(net, [[0.0, 1.0], [2.0, 3.0]])
    select(net, 3)  # type: ignore[arg-type]
    select("net", X)  # type: ignore[arg-type]
    FisherMask(random_state="0")  # type: ignore[arg-type]


def estimators(module: torch.nn.Module, X: np.ndarray, y: np.ndarray) -> None:
    wrapped = as_estimator(module, classes=["cat", "dog"], device=torch.device("cpu"))
    FisherMask().select(wrapped, X)
    ResNet18Classifier(classes=range(3), random_state=0).fit(Pool())
    loop = ActiveLearningClassifier(Classifier(), FisherMask(), initial=[0, 1])
    loop.fit(X, y, eval_set=(X, y)).predict(X)
    sparse = partial(fisher_mask_sampling, sparsity=0.01)
    compare_strategies(
        Classifier(), {"sparse": sparse, "first": alphabetical}, X, y, X, y
    )
    ActiveLearningClassifier(Classifier(), max)  # type: ignore[arg-type]
    ActiveLearningClassifier(module, alphabetical)  # type: ignore[arg-type]
