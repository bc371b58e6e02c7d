"""The net inside a classifier of scikit-activeml, as FisherMask asks it: the fitted
skorch net, giving the one output that predicts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from skactiveml.classifier import SklearnClassifier, SkorchClassifier
from sklearn.exceptions import NotFittedError
from skorch import NeuralNetClassifier
from torch import Tensor, nn

from fishermask_sk.nets.trained import CRITERION_OF


def net_of(clf: Any) -> Any:
    """The fitted net in a classifier of scikit-activeml."""
    if isinstance(clf, SklearnClassifier):
        # what was given fitted stands in `estimator` alone
        return vars(clf).get("estimator_", clf.estimator)
    if not isinstance(clf, SkorchClassifier):
        raise TypeError(
            "FisherMask reads the gradients of a net, and there is none in this "
            f"{type(clf).__name__}; pass a SkorchClassifier, or a SklearnClassifier "
            "around a skorch net."
        )
    if not hasattr(clf, "neural_net_"):
        raise NotFittedError(
            "This SkorchClassifier is not fitted yet; fit it, or query with "
            "fit_clf=True."
        )
    index, transform = _predicting_output(clf)
    scores = "probabilities"
    if isinstance(transform, nn.Softmax):
        scores, transform = "logits", None
    elif transform is torch.exp:
        scores, transform = "log_probabilities", None
    # A shallow twin: `clf` stays as it is.
    net = object.__new__(_ScoresOfModule)
    net.__dict__.update(
        vars(clf.neural_net_),
        criterion_=CRITERION_OF[scores](),
        scores=scores,
        classes=None,
        output_index=index,
        transform=transform,
    )
    return net


def _predicting_output(clf: SkorchClassifier) -> tuple[int, Any]:
    """Which output of the module predicts, and what makes probabilities of it: as
    SkorchClassifier documents it.
    """
    if clf.forward_outputs is not None:
        return next(iter(clf.forward_outputs.values()))
    criterion = clf.criterion
    kind = criterion if isinstance(criterion, type) else type(criterion)
    if kind is nn.CrossEntropyLoss:
        return 0, nn.Softmax(dim=-1)
    return 0, torch.exp if kind is nn.NLLLoss else None


class _ScoresOfModule(NeuralNetClassifier):
    """The net in a SkorchClassifier, giving the output that predicts and nothing
    else.
    """

    output_index: int
    transform: Any

    def infer(self, x: Any, **fit_params: Any) -> Tensor:
        outputs = super().infer(x, **fit_params)
        if isinstance(outputs, (tuple, list)):
            outputs = outputs[self.output_index]
        return outputs if self.transform is None else self.transform(outputs)


def holder_of_features(clf: Any) -> Any:
    """The net inside, where there can be one, else the classifier: its features are
    its inputs.
    """
    return (
        net_of(clf) if isinstance(clf, (SkorchClassifier, SklearnClassifier)) else clf
    )


def cast(X: np.ndarray, clf: Any) -> np.ndarray:
    """Samples in the dtype to which the classifier casts them."""
    dtype = clf.sample_dtype if isinstance(clf, SkorchClassifier) else None
    return X if dtype is None else X.astype(dtype, copy=False)
