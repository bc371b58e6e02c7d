"""The seam to skorch: from a learner, pipeline or search to the fitted net, its class scores and its batches.

The only file of the query that knows skorch and scikit-learn's wrappers. modAL is not imported: a learner is
whatever has an `estimator`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from skorch import NeuralNet
from skorch.dataset import get_len
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fishermask_sk.fisher import Scores, class_logits

CRITERIA: dict[type[nn.Module], Scores] = {
    nn.CrossEntropyLoss: "logits",
    nn.NLLLoss: "probabilities",
    nn.BCEWithLogitsLoss: "logit",
}
# Wrappers whose probabilities are those of the estimator that they fitted, on the same X.
TRANSPARENT = {
    "ActiveLearningClassifier": "estimator_",
    "BaseSearchCV": "best_estimator_",
    "FixedThresholdClassifier": "estimator_",
    "FrozenEstimator": "estimator",
    "SelfTrainingClassifier": "estimator_",
    "TunedThresholdClassifierCV": "estimator_",
}


class FittedNet(NamedTuple):
    """A fitted skorch net, what its outputs mean, and the fitted transformers in front of it."""

    net: NeuralNet
    scores: Scores
    steps: tuple[Any, ...]

    @property
    def module(self) -> nn.Module:
        """The torch module as it is now: a refit makes a new one."""
        return self.net.module_

    def transform(self, X: Any) -> Any:
        """Apply the steps before the net, each once."""
        for step in self.steps:
            X = step.transform(X)
        return X

    def dataset(self, X: Any) -> Dataset:
        """X as the Dataset that the net predicts from."""
        return self.net.get_dataset(X)

    def batches(
        self, dataset: Dataset, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[Any]:
        """Inputs of the module, batch by batch, from the net's own iterator for prediction."""
        part = dataset if indices is None else Subset(dataset, indices)
        # A shallow twin with another batch size; copy.copy would pickle the module on the way.
        net = object.__new__(type(self.net))
        vars(net).update(vars(self.net), iterator_valid__batch_size=batch_size)
        for batch in net.get_iterator(part, training=False):
            yield batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch

    def outputs(self, batch: Any) -> Tensor:
        """The module's outputs on a batch; of a tuple the first, as skorch takes it."""
        result = self.net.infer(batch)
        return result[0] if isinstance(result, tuple) else result

    def logits(self, batch: Any) -> Tensor:
        """Logits of shape (n, c) whose softmax is p(y|x)."""
        return class_logits(self.outputs(batch), self.scores)

    def check_outputs(self, batch: Any) -> int:
        """Refuse outputs that are no class scores under this criterion.

        Parameters
        ----------
        batch : inputs of the module

        Returns
        -------
        int
            How many scores the module gives a sample: c, or 1 for one logit.
        """
        with torch.no_grad():
            try:
                outputs = self.outputs(batch)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(
                    f"The net cannot take these samples, of shape {_sample_shape(batch)}: "
                    f"{str(error).splitlines()[0]}. Pass samples of the shape that it was fitted on."
                ) from error
        criterion = type(self.net.criterion_).__name__
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"The net's module returned {type(outputs).__name__}; expected a tensor of class scores."
            )
        shape = tuple(outputs.shape)
        if self.scores == "logit":
            if len(shape) not in (1, 2) or outputs.numel() != shape[0]:
                raise ValueError(
                    f"Under {criterion} the module must return one logit a sample, shape (n,) or (n, 1); it returned "
                    f"{shape}. For several classes use CrossEntropyLoss."
                )
        elif len(shape) != 2 or shape[1] < 2:
            raise ValueError(
                f"Under {criterion} the module must return class scores of shape (n, n_classes) with two classes or "
                f"more; it returned {shape}. One logit goes with BCEWithLogitsLoss."
            )
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                "The net's outputs hold NaN or infinite values; it diverged in training, or the samples are out of "
                "the range that it was fitted on."
            )
        if self.scores == "probabilities":
            _check_probabilities(outputs.float())
        return outputs[0].numel()


def fitted_net(learner: Any) -> FittedNet:
    """Find the fitted skorch net in a learner, pipeline, search or other wrapper.

    Parameters
    ----------
    learner : object
        A modAL learner, or an estimator: a skorch net, a `Pipeline` that ends in one, a search over one, or a
        wrapper that leaves its probabilities as they are.

    Returns
    -------
    FittedNet

    Raises
    ------
    TypeError
        Where there is no skorch net inside, or several.
    sklearn.exceptions.NotFittedError
        Where the net, or what wraps it, was not fitted.
    ValueError
        Where the net's criterion does not make it a classifier.
    """
    if hasattr(learner, "learner_list"):
        raise TypeError(
            f"FisherMask reads the gradients of one net, and a {type(learner).__name__} has several; give each of "
            "its learners FisherMask() as query_strategy, or use an ActiveLearner."
        )
    is_learner = hasattr(learner, "estimator") and hasattr(learner, "query")
    estimator = learner.estimator if is_learner else learner
    steps: list[Any] = []
    while not isinstance(estimator, NeuralNet):
        if isinstance(estimator, Pipeline):
            steps.extend(
                step for _, step in estimator.steps[:-1] if step is not None and step != "passthrough"
            )
            estimator = estimator.steps[-1][1]
        else:
            estimator = _unwrap(estimator)
    if not getattr(estimator, "initialized_", False):
        raise NotFittedError(
            f"This {type(estimator).__name__} is not fitted yet; fit it, or give the learner its first labelled "
            "samples, before asking for more."
        )
    for kind, scores in CRITERIA.items():
        if isinstance(estimator.criterion_, kind):
            return FittedNet(estimator, scores, tuple(steps))
    raise ValueError(
        f"FisherMask needs a classifier's criterion: CrossEntropyLoss on logits, NLLLoss on probabilities or "
        f"BCEWithLogitsLoss on one logit; this net was fitted with {type(estimator.criterion_).__name__}."
    )


def check_samples(X: Any, name: str) -> int:
    """Refuse what no net can take, and count the samples.

    Parameters
    ----------
    X : array, tensor, dict of arrays, DataFrame or Dataset
    name : str
        What to call it in messages.

    Returns
    -------
    int
        Number of samples.
    """
    if issparse(X):
        raise TypeError(
            f"{name} is a sparse matrix of shape {X.shape}; the net takes dense samples: pass {name}.toarray()."
        )
    if X is None:
        raise TypeError(f"{name} is None; pass the samples, one a row.")
    for values in X.values() if isinstance(X, dict) else [X]:
        _check_finite(values, name)
    return len(X) if hasattr(X, "__len__") and not isinstance(X, (dict, list, tuple)) else int(get_len(X))


def sample_shape(X: Any) -> Any:
    """Shape of one sample, by key for a dict; None where only reading one would tell."""
    if isinstance(X, dict):
        return {key: sample_shape(value) for key, value in X.items()}
    shape = getattr(X, "shape", None)
    return None if shape is None else tuple(shape[1:])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Python's, NumPy's and torch's global generators are afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _unwrap(estimator: Any) -> Any:
    """The fitted estimator inside one wrapper, where the wrapper changes neither X nor the probabilities."""
    kind = type(estimator).__name__
    if kind == "CalibratedClassifierCV":
        raise TypeError(
            "A CalibratedClassifierCV changes the probabilities of the net inside, so its Fisher information is not "
            "the net's; pass calibrated.calibrated_classifiers_[0].estimator to mean the net as it was fitted."
        )
    attributes = [
        TRANSPARENT[base.__name__] for base in type(estimator).__mro__ if base.__name__ in TRANSPARENT
    ]
    if not attributes:
        raise TypeError(
            f"FisherMask needs the gradients of a skorch net, and there is none in this {kind}; wrap the torch module "
            "in skorch.NeuralNetClassifier, or use fishermask_sk.ResNet18Classifier."
        )
    if not hasattr(estimator, attributes[0]):
        raise NotFittedError(
            f"This {kind} has no {attributes[0]} yet; fit it (a search with refit=True) first."
        )
    return getattr(estimator, attributes[0])


def _check_finite(values: Any, name: str) -> None:
    if not isinstance(values, (np.ndarray, Tensor)):
        return
    step = max(1, 2**24 // max(1, values[:1].size if isinstance(values, np.ndarray) else values[:1].numel()))
    for start in range(0, len(values), step):
        part = values[start : start + step]
        if isinstance(part, np.ndarray):
            finite = part.dtype.kind not in "fc" or bool(np.isfinite(part).all())
        else:
            finite = bool(torch.isfinite(part).all())
        if not finite:
            raise ValueError(f"{name} holds NaN or infinite values; impute or drop those samples first.")


def _check_probabilities(p: Tensor) -> None:
    sums = p.sum(1)
    if bool((p < 0).any()) or bool(((sums - 1).abs() > 1e-2).any()):
        raise ValueError(
            "Under NLLLoss skorch takes the module's outputs for probabilities, and these are none: values from "
            f"{p.min().item():.3g} to {p.max().item():.3g}, rows that sum to {sums.min().item():.3g} to "
            f"{sums.max().item():.3g}. End the module with softmax, or set criterion=nn.CrossEntropyLoss for "
            "logits."
        )


def _sample_shape(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: _sample_shape(value) for key, value in batch.items()}
    return tuple(batch.shape[1:]) if isinstance(batch, Tensor) else type(batch).__name__
