"""The seam to skorch: from a learner, pipeline or search to the fitted net, its class
scores and its batches.

The only file of the query that knows skorch and scikit-learn's wrappers. modAL is not
imported: a learner is whatever has an `estimator`.
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
from skorch.helper import SliceDataset
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fishermask_sk._warnings import warn_user
from fishermask_sk.fisher import Scores, class_logits

CRITERIA: dict[type[nn.Module], Scores] = {
    nn.CrossEntropyLoss: "logits",
    nn.NLLLoss: "probabilities",
    nn.BCEWithLogitsLoss: "logit",
}
# Wrappers whose probabilities are those of the estimator that they fitted, on the same
# X.
TRANSPARENT = {
    "ActiveLearningClassifier": "estimator_",
    "BaseSearchCV": "best_estimator_",
    "FixedThresholdClassifier": "estimator_",
    "FrozenEstimator": "estimator",
    "SelfTrainingClassifier": "estimator_",
    "TunedThresholdClassifierCV": "estimator_",
}


class FittedNet(NamedTuple):
    """A fitted skorch net, what its outputs mean, and the fitted transformers in front
    of it.
    """

    net: NeuralNet
    scores: Scores
    steps: tuple[Any, ...]

    @property
    def module(self) -> nn.Module:
        """The torch module as it is now, uncompiled: a refit makes a new one."""
        return _eager(self.net.module_)

    def dataset(self, X: Any, name: str) -> tuple[Any, int]:
        """X, after the steps before the net, as the Dataset that the net predicts from.

        Parameters
        ----------
        X : array, tensor, sparse matrix, DataFrame, list, dict of arrays, Dataset or
        None
        name : str
            What to call X in messages.

        Returns
        -------
        dataset : Dataset, or None where there are no samples
        n_samples : int
        """
        no_rows = not hasattr(X, "__len__") and not hasattr(X, "shape")
        if (
            X is None
            or no_rows
            or isinstance(X, str)
            or getattr(X, "shape", None) == ()
        ):
            raise TypeError(f"{name} is {X!r:.40}; pass samples, one a row.")
        if is_empty(X):
            return None, 0
        for step in self.steps:
            X = step.transform(X)
        if issparse(X):
            raise TypeError(
                f"{name} is a sparse matrix of shape {X.shape} where it reaches the "
                f"net, which takes dense samples: pass {name}.toarray()."
            )
        for values in X.values() if isinstance(X, dict) else [X]:
            _check_values(values, name)
        dataset = self.net.get_dataset(X)
        if isinstance(X, (list, tuple)) or hasattr(X, "select_dtypes"):
            self._check_several_inputs(X, dataset, name)
        return dataset, len(dataset)

    def _check_several_inputs(self, X: Any, dataset: Dataset, name: str) -> None:
        """Refuse a list or DataFrame, which skorch takes for several inputs, where the
        module has one.
        """
        try:
            with torch.no_grad():
                self.outputs(next(self.batches(dataset, 1, [0])))
        except (
            AttributeError,
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ) as error:
            if isinstance(X, (list, tuple)):
                taken, cure = (
                    "the module's inputs, not for samples",
                    f"pass one array, np.stack({name})",
                )
            else:
                taken = "the module's inputs, a column each"
                cure = (
                    f'pass {name}.to_numpy(dtype="float32"), '
                    "or put an encoder before the net in a Pipeline"
                )
            raise ValueError(
                f"{name} is a {type(X).__name__}, which skorch takes for {taken}, and "
                f"the module cannot: {str(error).splitlines()[0].rstrip('.')}. "
                f"Instead, {cure}."
            ) from error

    def batches(
        self, dataset: Dataset, batch_size: int, indices: Sequence[int] | None = None
    ) -> Iterator[Any]:
        """Inputs of the module, batch by batch, from the net's own iterator for
        prediction.
        """
        part = dataset if indices is None else Subset(dataset, indices)
        # A shallow twin with another batch size; copy.copy would pickle the module on
        # the way.
        net = object.__new__(type(self.net))
        vars(net).update(vars(self.net), iterator_valid__batch_size=batch_size)
        for batch in net.get_iterator(part, training=False):
            yield (
                batch[0]
                if isinstance(batch, (tuple, list)) and len(batch) == 2
                else batch
            )

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
                    f"The net cannot take these samples, {_describe(batch)}: "
                    f"{str(error).splitlines()[0]}. Pass samples of the shape and "
                    "dtype that it was fitted on."
                ) from error
        stated = getattr(self.net, "scores", None)  # of `as_estimator`
        meaning = (
            f"scores={stated!r}"
            if stated
            else type(_eager(self.net.criterion_)).__name__
        )
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"The net's module returned {type(outputs).__name__}; expected a "
                "tensor of class scores, or a tuple that begins with it: return that "
                "from forward, of a Hugging Face model its logits (as_estimator does)."
            )
        if not outputs.is_floating_point():
            raise ValueError(
                "The module returned numbers of dtype "
                f"{str(outputs.dtype).removeprefix('torch.')}; expected class scores, "
                "real numbers that gradients can be taken of: return them, not the "
                "classes."
            )
        shape = tuple(outputs.shape)
        if self.scores == "logit":
            if len(shape) not in (1, 2) or outputs.numel() != shape[0]:
                raise ValueError(
                    f"Under {meaning} the module must return one logit a sample, "
                    f"shape (n,) or (n, 1); it returned {shape}. For several classes "
                    "use CrossEntropyLoss (as_estimator: scores='logits')."
                )
        elif len(shape) != 2 or shape[1] < 2:
            raise ValueError(
                f"Under {meaning} the module must return class scores of shape (n, "
                f"n_classes) with two classes or more; it returned {shape}. One logit "
                "goes with BCEWithLogitsLoss (as_estimator: scores='logit')."
            )
        n_classes = getattr(self.net, "n_classes_", None)
        if self.scores != "logit" and n_classes not in (None, shape[1]):
            raise ValueError(
                f"The module returned {shape[1]} scores a sample, and classes= names "
                f"{n_classes} labels; pass one label a score."
            )
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                "The net's outputs hold NaN or infinite values; it diverged in "
                "training, or the samples are out of the range that it was fitted on."
            )
        if self.scores == "probabilities":
            _check_probabilities(outputs.float())
        elif self.scores == "logits" and _are_probabilities(outputs.float()):
            warn_user(
                f"The module's outputs are probabilities, and {meaning} takes logits: "
                "softmax is applied twice, and nothing is ever predicted with "
                "confidence. Leave softmax out of forward, or set "
                "criterion=nn.NLLLoss, for which skorch takes probabilities "
                "(as_estimator: scores='probabilities')."
            )
        return outputs[0].numel()


def fitted_net(learner: Any) -> FittedNet:
    """Find the fitted skorch net in a learner, pipeline, search or other wrapper.

    Parameters
    ----------
    learner : object
        A modAL learner, or an estimator: a skorch net, a `Pipeline` that ends in one, a
        search over one, or a wrapper that leaves its probabilities as they are.

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
            "FisherMask reads the gradients of one net, and a "
            f"{type(learner).__name__} has several; give each of its learners "
            "FisherMask() as query_strategy, or use an ActiveLearner."
        )
    is_learner = hasattr(learner, "estimator") and hasattr(learner, "query")
    estimator = learner.estimator if is_learner else learner
    steps: list[Any] = []
    while not isinstance(estimator, NeuralNet):
        if isinstance(estimator, Pipeline):
            steps.extend(
                step
                for _, step in estimator.steps[:-1]
                if step is not None and step != "passthrough"
            )
            estimator = estimator.steps[-1][1]
        else:
            estimator = _net_inside(estimator)
    if not getattr(estimator, "initialized_", False):
        raise NotFittedError(
            f"This {type(estimator).__name__} is not fitted yet; fit it, or give the "
            "learner its first labelled samples, before asking for more."
        )
    criterion = _eager(estimator.criterion_)
    for kind, scores in CRITERIA.items():
        if isinstance(criterion, kind):
            return FittedNet(estimator, scores, tuple(steps))
    raise ValueError(
        "FisherMask needs a classifier's criterion: CrossEntropyLoss on logits, "
        "NLLLoss on probabilities or BCEWithLogitsLoss on one logit; this net was "
        f"fitted with {type(criterion).__name__}. Fit it with one of these, or a class "
        "derived from one; a net fitted with a loss of your own goes in by "
        "as_estimator(net.module_, classes=..., scores='logits'); regression has no "
        "class probabilities to take gradients of, so use another strategy for it."
    )


def is_empty(X: Any) -> bool:
    """Whether there are no samples in X: no rows, no elements, or no keys, or none in
    what a dict holds.
    """
    if isinstance(X, dict) and X:
        return all(is_empty(values) for values in X.values())
    return (X.shape[0] if hasattr(X, "shape") else len(X)) == 0


def sample_shape(X: Any) -> Any:
    """Shape of one sample, by key for a dict; None where only reading one would
    tell.
    """
    if isinstance(X, (Dataset, SliceDataset)):
        return None
    if isinstance(X, dict):
        return {key: sample_shape(value) for key, value in X.items()}
    shape = getattr(X, "shape", None)
    return None if not shape else tuple(shape[1:])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Python's, NumPy's and torch's global generators are afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        # Reading a GPU's state would start CUDA, which a net on the CPU never needs.
        n_gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
        with torch.random.fork_rng(devices=range(n_gpus)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def unwrapped(estimator: Any) -> Any:
    """The fitted estimator inside one wrapper that changes neither X nor the
    probabilities; None for any other.

    Raises
    ------
    sklearn.exceptions.NotFittedError
    """
    kind = type(estimator).__name__
    attributes = [
        TRANSPARENT[base.__name__]
        for base in type(estimator).__mro__
        if base.__name__ in TRANSPARENT
    ]
    if not attributes:
        return None
    if not hasattr(estimator, attributes[0]):
        raise NotFittedError(
            f"This {kind} has no {attributes[0]} yet; fit it (a search with "
            "refit=True) first."
        )
    return getattr(estimator, attributes[0])


def _net_inside(estimator: Any) -> Any:
    """What `unwrapped` finds; an error in words where there is nothing."""
    kind = type(estimator).__name__
    if kind == "CalibratedClassifierCV":
        raise TypeError(
            "A CalibratedClassifierCV changes the probabilities of the net inside, so "
            "its Fisher information is not the net's; pass "
            "calibrated.calibrated_classifiers_[0].estimator to mean the net as it was "
            "fitted."
        )
    inside = unwrapped(estimator)
    if inside is None:
        raise TypeError(
            "FisherMask needs the gradients of a skorch net, and there is none in "
            f"this {kind}; wrap the torch module in skorch.NeuralNetClassifier, or use "
            "fishermask_sk.ResNet18Classifier."
        )
    return inside


def _eager(module: nn.Module) -> nn.Module:
    """The module that was given to `torch.compile`; skorch compiles the criterion as
    well.
    """
    return getattr(module, "_orig_mod", module)


def _check_values(values: Any, name: str) -> None:
    """Refuse arrays that hold no numbers, or NaN and infinite ones; what is no array
    shows in the batches.
    """
    if hasattr(values, "select_dtypes"):
        values = values.select_dtypes("number").to_numpy()
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biufc":
            raise TypeError(
                f"{name} is an array of shape {values.shape} and dtype {values.dtype}; "
                "the net takes numbers, one sample a row: encode it, or put an "
                "encoder before the net in a Pipeline."
            )
        if values.dtype.kind not in "fc":
            return
    elif not isinstance(values, Tensor):
        return
    per_sample = int(np.prod(values.shape[1:])) if values.ndim else 1
    step = max(1, 2**24 // max(1, per_sample))
    for start in range(0, len(values), step):
        part = values[start : start + step]
        if not bool(
            (
                np.isfinite(part)
                if isinstance(part, np.ndarray)
                else torch.isfinite(part)
            ).all()
        ):
            raise ValueError(
                f"{name} holds NaN or infinite values; impute or drop those samples "
                "first."
            )


def _are_probabilities(p: Tensor) -> bool:
    return not bool((p < 0).any()) and not bool(((p.sum(1) - 1).abs() > 1e-2).any())


def _check_probabilities(p: Tensor) -> None:
    sums = p.sum(1)
    if not _are_probabilities(p):
        raise ValueError(
            "Under NLLLoss skorch takes the module's outputs for probabilities, and "
            f"these are none: values from {p.min().item():.3g} to "
            f"{p.max().item():.3g}, rows that sum to {sums.min().item():.3g} to "
            f"{sums.max().item():.3g}. End the module with softmax (not log_softmax: "
            "skorch takes the logarithm), or set criterion=nn.CrossEntropyLoss for "
            "logits."
        )


def _describe(batch: Any) -> str:
    if isinstance(batch, dict):
        return ", ".join(f"{key} {_describe(value)}" for key, value in batch.items())
    if isinstance(batch, Tensor):
        dtype = str(batch.dtype).removeprefix("torch.")
        return f"of shape {tuple(batch.shape[1:])} and dtype {dtype}"
    return f"of type {type(batch).__name__}"
