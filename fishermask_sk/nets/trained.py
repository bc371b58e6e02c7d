"""A trained torch module as a fitted classifier, without skorch's training.

    net = as_estimator(module, classes=["cat", "dog"])
    FisherMask().select(net, X_pool, 50, X_labeled=X)

Knows torch and skorch, and Hugging Face's outputs by their shape: whatever has
`logits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.utils import column_or_1d
from skorch import NeuralNet, NeuralNetClassifier
from torch import nn

from fishermask_sk._types import Device, Labels, Samples
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.nets.skorch_adapter import fitted_net

# The loss under which skorch and a query read such outputs right. Logarithms of
# probabilities are logits whose softmax is p.
CRITERION_OF = {
    "logits": nn.CrossEntropyLoss,
    "probabilities": nn.NLLLoss,
    "log_probabilities": nn.CrossEntropyLoss,
    "logit": nn.BCEWithLogitsLoss,
}


def as_estimator(
    module: nn.Module,
    *,
    classes: Labels,
    scores: str = "logits",
    device: Device = None,
    batch_size: int = 128,
) -> TrainedNetClassifier:
    """Wrap a trained torch module as a fitted classifier; nothing is trained.

    For modules that skorch did not train: a loop of your own, Lightning, timm, Hugging
    Face. The result goes wherever a fitted skorch net goes: to `FisherMask.select`, the
    baselines, `check_network`, or as the estimator of a learner that only queries.

    Parameters
    ----------
    module : torch.nn.Module
        Trained. Its ``forward`` returns the scores of shape (n_samples, n_classes), a
        tuple that begins with them, or an object or dict that has them as ``logits``.
        The module itself is kept, not a copy: train it on, and the next query sees it.
    classes : array-like of shape (n_classes,)
        The label of each score, in the module's order: names, or ``range(10)``.
    scores : {"logits", "probabilities", "log_probabilities", "logit"}, \
default="logits"
        What the module returns, whatever loss it was trained with: numbers whose
        softmax is p (cross-entropy, focal or class-balanced loss on logits), p itself,
        log p, or one logit for the second of two classes.
    device : str or torch.device, optional
        Where to compute; the module is moved there. By default where it is.
    batch_size : int, default=128
        Samples in a forward pass of `predict_proba`.

    Returns
    -------
    TrainedNetClassifier

    Raises
    ------
    TypeError
        If `module` is no torch module, but a class, a skorch net or something else.
    ValueError
        If a parameter is out of its range, or the module has no weights, or has them in
        several places and no `device` is named.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from fishermask_sk import FisherMask, as_estimator
    >>> _ = torch.manual_seed(0)
    >>> module = torch.nn.Linear(4, 3)  # trained somewhere
    >>> net = as_estimator(module, classes=["ant", "bee", "fly"])
    >>> X = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
    >>> FisherMask(1.0).select(net, X[10:], n_instances=5, X_labeled=X[:10]).shape
    (5,)
    >>> net.predict(X[:3])
    array(['fly', 'bee', 'fly'], dtype='<U3')
    """
    net = TrainedNetClassifier(
        _checked_module(module),
        classes=_checked_classes(classes, scores),
        scores=scores,
        device=_device_of(module) if device is None else device,
        batch_size=_checked_batch_size(batch_size),
    )
    return net.initialize()


class TrainedNetClassifier(NeuralNetClassifier):
    """What `as_estimator` returns: a skorch net that is fitted and stays as it is.

    Parameters
    ----------
    module, classes, scores, device, batch_size
        See `as_estimator`, which checks them and initialises the net.

    Attributes
    ----------
    module_ : torch.nn.Module
        The module itself.
    classes_ : ndarray of shape (n_classes,)
    n_classes_ : int
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        classes: Labels,
        scores: str = "logits",
        device: Device = "cpu",
        batch_size: int = 128,
    ) -> None:
        super().__init__(
            module,
            criterion=CRITERION_OF[scores],
            classes=classes,
            train_split=None,
            device=device,
            batch_size=batch_size,
            verbose=0,
        )
        self.scores = scores

    @property
    def n_classes_(self) -> int:
        """How many classes there are."""
        return len(self.classes_)

    def infer(self, x: Any, **fit_params: Any) -> Any:
        """Compute the module's scores on a batch: of an object or dict its `logits`."""
        result = super().infer(x, **fit_params)
        if isinstance(result, Mapping):
            return result.get("logits", result)
        return getattr(result, "logits", result)

    def predict_proba(self, X: Samples) -> np.ndarray:
        """Class probabilities, in the order of `classes_`; the module stays as found.

        Parameters
        ----------
        X : samples of shape (n_samples, ...), dict of arrays or Dataset

        Returns
        -------
        ndarray of shape (n_samples, n_classes)

        Raises
        ------
        TypeError, ValueError
            Where the module cannot take the samples, or its outputs are not what
            `scores` and `classes` say.
        """
        fitted = fitted_net(self)
        dataset, n_samples = fitted.dataset(X, "X")
        if n_samples == 0:
            return np.empty((0, self.n_classes_), dtype=np.float32)
        p: list[torch.Tensor] = []
        with torch.no_grad(), undisturbed(fitted.module):
            for batch in fitted.batches(dataset, self.batch_size):
                if not p:
                    fitted.check_outputs(batch)
                p.append(fitted.logits(batch).softmax(dim=1).cpu())
        return torch.cat(p).numpy()

    def predict(self, X: Samples) -> np.ndarray:
        """Most probable class of each sample, out of `classes_`.

        Parameters
        ----------
        X : samples of shape (n_samples, ...), dict of arrays or Dataset

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def fit(
        self, X: object, y: object = None, **fit_params: object
    ) -> TrainedNetClassifier:
        """Raise TypeError: the module is trained where it came from."""
        raise TypeError(
            "This module was trained elsewhere, and as_estimator only queries it: "
            "train it in its own loop and query again (leave X_training out of a "
            "learner, and pass X_labeled= to query), or wrap it in "
            "skorch.NeuralNetClassifier, which can fit and teach."
        )

    def partial_fit(
        self, X: object, y: object = None, classes: object = None, **fit_params: object
    ) -> TrainedNetClassifier:
        """Raise TypeError, as `fit` does."""
        return self.fit(X, y)

    def __sklearn_clone__(self) -> TrainedNetClassifier:
        """A fitted copy that has a copy of the weights."""
        return as_estimator(
            deepcopy(self.module_),
            classes=self.classes,
            scores=self.scores,
            device=self.device,
            batch_size=self.batch_size,
        )

    def _get_param_names(self) -> list[str]:
        return ["module", "classes", "scores", "device", "batch_size"]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.module).__name__}, "
            f"n_classes={self.n_classes_}, scores={self.scores!r}, "
            f"device={str(self.device)!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # `module` is `module_`, which skorch knows how to load where there is no GPU.
        state = dict(super().__getstate__())
        del state["module"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.module = self.module_


def _checked_module(module: Any) -> nn.Module:
    if isinstance(module, NeuralNet):
        raise TypeError(
            f"module is a {type(module).__name__}, a skorch net: where it is fitted, a "
            "query takes it as it is; to say what its outputs are, pass its module_."
        )
    if isinstance(module, type):
        raise TypeError(
            f"module is the class {module.__name__}; pass the trained object."
        )
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is a {type(module).__name__}; pass the torch.nn.Module in it, "
            "for instance trainer.model or pipeline.model."
        )
    if next(module.parameters(), None) is None:
        raise ValueError(
            f"module is a {type(module).__name__} without weights; pass the trained "
            "module."
        )
    return module


def _checked_classes(classes: Any, scores: Any) -> np.ndarray:
    if isinstance(classes, (Integral, str)) or classes is None:
        raise TypeError(
            f"classes={classes!r} is no list of labels; pass one label a score, "
            "range(10) where they have no names."
        )
    labels = column_or_1d(np.asarray(classes))
    if len(labels) < 2 or len(np.unique(labels)) < len(labels):
        raise ValueError(
            f"classes={classes!r:.60} must be two labels or more, each once, in the "
            "order of the module's scores."
        )
    if not isinstance(scores, str) or scores not in CRITERION_OF:
        raise ValueError(
            f"scores={scores!r} is unknown; pass one of "
            f"{', '.join(map(repr, CRITERION_OF))}: what the module returns."
        )
    if scores == "logit" and len(labels) != 2:
        raise ValueError(
            f"scores='logit' is one logit for the second of two classes, and classes "
            f"has {len(labels)}; pass scores='logits' for more."
        )
    return labels


def _checked_batch_size(batch_size: Any) -> int:
    if (
        not isinstance(batch_size, Integral)
        or isinstance(batch_size, bool)
        or batch_size < 1
    ):
        raise ValueError(
            f"batch_size={batch_size!r} must be an int >= 1, the samples in a forward "
            "pass."
        )
    return int(batch_size)


def _device_of(module: nn.Module) -> torch.device:
    devices = {p.device for p in module.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"The module's weights lie on {', '.join(sorted(map(str, devices)))}; pass "
            "device= to move them to one."
        )
    return devices.pop()
