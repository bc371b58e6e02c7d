"""What k-center and BADGE look at: the inputs of a net's head, or of the last step
where there is no net.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.pipeline import Pipeline
from sklearn.utils import check_array
from torch import nn
from torch.utils.data import Dataset

from fishermask_sk.layers import find_layout, holds_layers
from fishermask_sk.modules import undisturbed
from fishermask_sk.skorch_adapter import FittedNet, fitted_net, preserved_rng, unwrapped


def describe_samples(
    learner: Any,
    X: Any,
    name: str,
    head: str | None,
    batch_size: int,
    probabilities: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and class probabilities (n, c); the latter empty where they cost
    more and nobody asks.
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
            ensure_2d=False,
            allow_nd=True,
            dtype=np.float64,
            input_name=name,
        )
        p = estimator.predict_proba(X) if probabilities else np.empty((len(inputs), 0))
        return inputs.reshape(len(inputs), -1), np.asarray(p, dtype=np.float64)
    with preserved_rng(), undisturbed(fitted.module):
        dataset, _ = fitted.dataset(X, name)
        return _penultimate(fitted, dataset, head, batch_size)


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
    fitted: FittedNet, dataset: Dataset[Any], head: str | None, batch_size: int
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
            for batch in fitted.batches(dataset, batch_size):
                p.append(fitted.logits(batch).double().softmax(1).cpu())
                h.append(entered["head"].double().flatten(1).cpu())
    finally:
        handle.remove()
    return torch.cat(h).numpy(), torch.cat(p).numpy()
