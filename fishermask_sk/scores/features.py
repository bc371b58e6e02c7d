"""What k-center and BADGE look at: the inputs of a net's head, or of the last step
where there is no net.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.pipeline import Pipeline
from sklearn.utils import check_array
from torch import nn
from torch.utils.data import Dataset

from fishermask_sk.gradients.layers import find_layout, holds_layers
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.nets.inside import unwrapped
from fishermask_sk.nets.loaders import predictions_in_order
from fishermask_sk.nets.skorch_adapter import FittedNet, fitted_net, preserved_rng


def describe_samples(
    learner: Any,
    X: Any,
    name: str,
    head: str | None,
    batch_size: int,
    probabilities: bool = False,
) -> tuple[Any, np.ndarray]:
    """Features (n, d) and class probabilities (n, c); the latter empty where they cost
    more and nobody asks.

    Features are sparse, in rows, where an estimator without a net takes sparse samples.
    """
    if hasattr(learner, "learner_list"):
        raise TypeError(
            f"A {type(learner).__name__} has several estimators, each with features of "
            "its own; query its learners one by one, or use an ActiveLearner."
        )
    try:
        fitted = fitted_net(learner)
    except TypeError:  # there is no net inside
        estimator = learner.estimator if hasattr(learner, "query") else learner
        inputs = check_array(
            _inputs_of_last(estimator, X),
            accept_sparse="csr",
            ensure_2d=False,
            allow_nd=True,
            dtype=np.float64,
            input_name=name,
        )
        p = np.empty((inputs.shape[0], 0))
        if probabilities:
            with predictions_in_order(estimator):  # of an ensemble of nets
                p = np.asarray(estimator.predict_proba(X), dtype=np.float64)
        return inputs if issparse(inputs) else inputs.reshape(len(inputs), -1), p
    with preserved_rng(), undisturbed(fitted.module):
        dataset, _ = fitted.dataset(X, name)
        return _penultimate(fitted, dataset, name, head, batch_size)


def _inputs_of_last(estimator: Any, X: Any) -> Any:
    """X after the earlier steps of a pipeline, which may lie in a search or another
    wrapper, or hold one.
    """
    while estimator is not None:
        if isinstance(estimator, Pipeline):
            X = estimator[:-1].transform(X) if len(estimator) > 1 else X
            estimator = estimator.steps[-1][1]
        else:
            estimator = unwrapped(estimator)
    return X


def _penultimate(
    fitted: FittedNet,
    dataset: Dataset[Any],
    name: str,
    head: str | None,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the head (n, d) and class probabilities (n, c), in one forward pass
    over the samples.
    """
    example = next(fitted.batches(dataset, min(batch_size, 8)))
    n_outputs = fitted.check_outputs(example)
    layout = find_layout(
        fitted.module, lambda: fitted.outputs(example), n_outputs, head
    )
    if not layout.head:
        raise ValueError(
            "The features are the inputs of the head, and no layer's output dimension "
            "is the number of classes; name it with head='...'."
        )
    path = layout.head[0].split(
        "."
    )  # of a parameter; a parametrised weight lies deeper
    owner = (
        path[: path.index("parametrizations")]
        if "parametrizations" in path
        else path[:-1]
    )
    layer = fitted.module.get_submodule(".".join(owner))
    if holds_layers(layer):
        raise ValueError(
            f"The features are the inputs of the head, and {layout.head[0]!r} is a "
            f"parameter of a {type(layer).__name__} that holds other layers: what it "
            "is multiplied with cannot be seen. Make it the weight of a layer, or "
            "name another with head='...'."
        )
    entered: dict[str, torch.Tensor] = {}

    def remember(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        entered["head"] = args[0] if args else next(iter(kwargs.values()))

    h, p = [], []
    handle = layer.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in fitted.batches(dataset, batch_size, name=name):
                p.append(fitted.logits(batch).double().softmax(1).cpu())
                h.append(entered["head"].double().flatten(1).cpu())
    finally:
        handle.remove()
    features, probabilities = torch.cat(h), torch.cat(p)
    finite = torch.isfinite(features).all(1) & torch.isfinite(probabilities).all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"The net gives NaN or infinite values for sample "
            f"{int(finite.int().argmin())} of {name}; drop it, or scale the samples."
        )
    return features.numpy(), probabilities.numpy()
