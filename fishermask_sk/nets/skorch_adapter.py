"""The seam to skorch: from a learner, pipeline or search to the fitted net, its class
scores and its batches.

The only file of the query that knows skorch and scikit-learn's wrappers. modAL is not
imported: a learner is whatever has an `estimator`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from skorch import NeuralNet
from skorch.dataset import Dataset as SkorchDataset
from skorch.helper import SliceDataset
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fishermask_sk._rows import refuse_what_has_no_rows
from fishermask_sk._warnings import warn_user
from fishermask_sk.gradients.fisher import Scores, class_logits
from fishermask_sk.gradients.modules import map_tensors
from fishermask_sk.nets.channels_last import (
    Convolutions,
    channels_last,
    gains_by_channels_last,
    same_scores,
)
from fishermask_sk.nets.inside import net_inside, whole_module
from fishermask_sk.nets.loaders import (
    FORWARD_ERRORS,
    check_order,
    inputs_of,
    loader_in_order,
    predictions_in_order,
    readable,
)
from fishermask_sk.nets.meaning import (
    MULTI_LABEL_SAYS,
    SINGLE,
    Meaning,
    are_probabilities,
    check_probabilities,
    criterion_of,
    find_meaning,
    predicts_by_criterion,
    stated_scores,
    warn_of_classes,
)

# Samples on which outputs are compared with `predict_proba`.
EXAMPLES = 8


@dataclass
class FittedNet:
    """A fitted skorch net, what its outputs mean, and the fitted transformers in front
    of it.

    `meaning` is what the criterion says, or None, until the first samples are seen.
    `takes_channels_last` says how batches of images are laid out, see `lay_out`.
    """

    net: NeuralNet
    meaning: Meaning | None
    steps: tuple[Any, ...]
    takes_channels_last: bool = False
    _is_read: bool = False

    @property
    def module(self) -> nn.Module:
        """The torch module as it is now, uncompiled: a refit makes a new one.

        Of several registered modules a `ModuleDict` under their names in the net, such
        as "module_" and "encoder_".
        """
        return whole_module(self.net)

    @property
    def scores(self) -> Scores:
        """What the class scores are."""
        return "logits" if self.meaning is None else self.meaning.scores

    def dataset(self, X: Any, name: str) -> tuple[Any, int]:
        """X, after the steps before the net, as the Dataset that the net predicts from.

        Parameters
        ----------
        X : array, tensor, sparse matrix, DataFrame, list, dict, Dataset or None
        name : str
            What to call X in messages.

        Returns
        -------
        dataset : Dataset, or None where there are no samples
        n_samples : int
        """
        refuse_what_has_no_rows(X, name)
        if is_empty(X):
            return None, 0
        for step in self.steps:
            X = step.transform(X)
        if _takes_values(self.net):
            for values in X.values() if isinstance(X, dict) else [X]:
                _check_values(values, name)
        if isinstance(X, (list, tuple)) or hasattr(X, "select_dtypes"):
            dataset = self._several_inputs(X, name)
        else:
            # skorch takes rows of a csr matrix, and of no other sparse container.
            dataset = self.net.get_dataset(csr_matrix(X) if issparse(X) else X)
        check_order(self.net, dataset, name)
        n_samples = len(dataset)  # type: ignore[arg-type]
        self._find_meaning(dataset, min(EXAMPLES, n_samples), name)
        return dataset, n_samples

    def _several_inputs(self, X: Any, name: str) -> Dataset[Any]:
        """The Dataset of a list or DataFrame, which skorch takes for several inputs;
        refused where the module has one.
        """
        try:
            dataset = self.net.get_dataset(X)
            with torch.no_grad():
                self.outputs(next(self.batches(dataset, 1, [0])))
            return dataset
        except FORWARD_ERRORS as error:
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

    def _find_meaning(self, dataset: Dataset[Any], n: int, name: str) -> None:
        """Say by the first n samples what the outputs mean, where the criterion alone
        does not.
        """
        if self._is_read or getattr(self.net, "scores", None):  # of `as_estimator`
            return
        batch = next(self.batches(dataset, n, range(n), name))
        try:
            with torch.no_grad():
                result = self.net.infer(batch)
        except FORWARD_ERRORS:  # `check_outputs` says it in words
            return
        stated = None if self.meaning is None else self.meaning.scores
        by_criterion = stated is not None and predicts_by_criterion(self.net)
        if isinstance(result, tuple) or not by_criterion:
            p = self._predicted(Subset(dataset, range(n)), n)
            self.meaning = find_meaning(self.net, result, stated, p)
        if not isinstance(result, tuple):
            warn_of_classes(self.net, result, self.scores)
        self._is_read = True

    def _predicted(self, first: Dataset[Any], n: int) -> np.ndarray | None:
        """What the net's own `predict_proba` gives; None where that is no
        probabilities.
        """
        try:
            with predictions_in_order(self.net):
                p = np.asarray(self.net.predict_proba(first), dtype=np.float64)
        except FORWARD_ERRORS:  # it has none, or one that takes no Dataset
            return None
        if p.ndim != 2 or len(p) != n or p.shape[1] < 2 or not np.isfinite(p).all():
            return None
        return p if are_probabilities(torch.from_numpy(p)) else None

    def batches(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        indices: Sequence[int] | None = None,
        name: str = "the pool",
    ) -> Iterator[Any]:
        """Inputs of the module, batch by batch, from the net's own iterator for
        prediction, in the order of the samples.
        """
        part = dataset if indices is None else Subset(dataset, indices)
        loader = loader_in_order(self.net, part, batch_size)
        for batch in readable(loader, part, name):
            yield self.laid_out(inputs_of(batch, self.net, name))

    def lay_out(self, example: Any) -> None:
        """From here on batches of images lie with channels last, if the net gives the
        same scores for them so, and may be faster.

        Parameters
        ----------
        example : inputs of the module
        """
        if not gains_by_channels_last(self.module):
            return
        try:
            with torch.no_grad():
                with Convolutions() as found:
                    scores = self.outputs(example)
                if found.any_wrong:
                    return
                others = self.outputs(channels_last(example))
        except FORWARD_ERRORS:  # such as .view, which wants them as they were
            return
        self.takes_channels_last = same_scores(scores, others)

    def laid_out(self, batch: Any) -> Any:
        """A batch as the net takes it."""
        return channels_last(batch) if self.takes_channels_last else batch

    def on_device(self, batch: Any) -> Any:
        """A batch where the net is, if that is a GPU: copied once, from pinned memory,
        so that the host need not wait. Elsewhere skorch moves it.
        """
        device = torch.device(self.net.device or "cpu")
        if device.type != "cuda":
            return batch

        def moved(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cpu" or tensor.layout != torch.strided:
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        return map_tensors(moved, batch)

    def outputs(self, batch: Any) -> Tensor:
        """The module's class scores on a batch; of several outputs those that were
        found to hold them, or the first, as skorch takes it.
        """
        result = self.net.infer(batch)
        place = 0 if self.meaning is None else self.meaning.place
        return result[place] if isinstance(result, tuple) else result

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
                weights = next((p.dtype for p in self.module.parameters()), None)
                cure = (
                    f"its weights are {_name(weights)}: cast the samples, "
                    f"X.astype({_name(weights)!r})"
                    if _is_float_other_than(batch, weights)
                    else "pass samples of the shape and dtype that it was fitted on"
                )
                raise ValueError(
                    f"The net cannot take these samples, {_describe(batch)}: "
                    f"{str(error).splitlines()[0].rstrip('.')}; {cure}."
                ) from error
        stated = getattr(self.net, "scores", None)  # of `as_estimator`
        meaning = (
            f"scores={stated!r}" if stated else type(criterion_of(self.net)).__name__
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
        if self.scores in SINGLE:
            if len(shape) not in (1, 2) or outputs.numel() != shape[0]:
                cure = (
                    "For several classes use scores='logits'."
                    if stated
                    else f"Under {meaning} {MULTI_LABEL_SAYS}"
                )
                raise ValueError(
                    f"Under {meaning} the module must return one {self.scores} a "
                    f"sample, shape (n,) or (n, 1); it returned {shape}. {cure}"
                )
        elif len(shape) != 2 or shape[1] < 2:
            raise ValueError(
                f"Under {meaning} the module must return class scores of shape (n, "
                f"n_classes) with two classes or more; it returned {shape}. One logit "
                "goes with BCEWithLogitsLoss (as_estimator: scores='logit')."
            )
        n_classes = getattr(self.net, "n_classes_", None)
        if self.scores not in SINGLE and n_classes not in (None, shape[1]):
            raise ValueError(
                f"The module returned {shape[1]} scores a sample, and classes= names "
                f"{n_classes} labels; pass one label a score."
            )
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                "The net's outputs hold NaN or infinite values; it diverged in "
                "training, or the samples are out of the range that it was fitted on."
            )
        if self.scores in ("probabilities", "probability"):
            check_probabilities(outputs.float(), self.scores)
        elif self.scores == "logits" and are_probabilities(outputs.float()):
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
            estimator = net_inside(estimator)
    if not getattr(estimator, "initialized_", False):
        raise NotFittedError(
            f"This {type(estimator).__name__} is not fitted yet; fit it, or give the "
            "learner its first labelled samples, before asking for more."
        )
    scores = stated_scores(estimator)
    meaning = None if scores is None else Meaning(0, scores)
    return FittedNet(estimator, meaning, tuple(steps))


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


def _takes_values(net: NeuralNet) -> bool:
    """Whether the module gets the values of X itself, not what a Dataset of the user's
    own makes of file names, row numbers or other objects.
    """
    own = type(net).get_dataset.__module__.partition(".")[0]
    return net.dataset is SkorchDataset and own in ("skorch", "fishermask_sk")


def _check_values(values: Any, name: str) -> None:
    """Refuse arrays that hold no numbers, or NaN and infinite ones; what is no array
    shows in the batches.
    """
    if hasattr(values, "select_dtypes"):
        values = values.select_dtypes("number").to_numpy()
    if issparse(values):
        values = values.tocsr().data
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biufc":
            raise TypeError(
                f"{name} is an array of shape {values.shape} and dtype {values.dtype}; "
                "the net takes numbers, one sample a row: encode it, put an encoder "
                "before the net in a Pipeline, or give the net a dataset= that reads "
                "what these name."
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


def _is_float_other_than(batch: Any, dtype: torch.dtype | None) -> bool:
    values = batch.values() if isinstance(batch, dict) else [batch]
    return any(
        isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype
        for x in values
    )


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(batch: Any) -> str:
    if isinstance(batch, dict):
        return ", ".join(f"{key} {_describe(value)}" for key, value in batch.items())
    if isinstance(batch, Tensor):
        dtype = str(batch.dtype).removeprefix("torch.")
        return f"of shape {tuple(batch.shape[1:])} and dtype {dtype}"
    return f"of type {type(batch).__name__}"
