"""What lies inside an estimator: the net in a wrapper, the nets in an ensemble, the
modules in a net.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.exceptions import NotFittedError
from skorch import NeuralNet
from torch import nn

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
# Where learners and scikit-learn's meta-estimators keep what they fit, and where they
# keep what they fit clones of.
FITTED = (
    "estimator_",
    "best_estimator_",
    "estimators_",
    "calibrated_classifiers_",
    "final_estimator_",
    "learner_list",
    "steps",
    "estimator",
)
TEMPLATES = ("estimators", "final_estimator")


def eager(module: nn.Module) -> nn.Module:
    """The module that was given to `torch.compile`; skorch compiles the criterion as
    well.
    """
    return getattr(module, "_orig_mod", module)


def whole_module(net: NeuralNet) -> nn.Module:
    """All modules of a fitted net as one: its only one, or a `ModuleDict` of those that
    skorch registered.

    A module that lies in another registered one counts as part of that one, so that
    each weight has one name.
    """
    names = [f"{name}_" for name in getattr(net, "_modules", None) or ["module"]]
    modules = {
        name: eager(vars(net)[name])
        for name in names
        if isinstance(vars(net).get(name), nn.Module)
    }
    outer = {
        name: module
        for name, module in modules.items()
        if not any(
            module is inner
            for other in modules.values()
            if other is not module
            for inner in other.modules()
        )
    }
    unique = {id(module): name for name, module in reversed(outer.items())}
    if len(unique) == 1:
        return next(iter(outer.values()))
    return nn.ModuleDict(
        {name: module for name, module in outer.items() if unique[id(module)] == name}
    )


def nets_inside(estimator: Any) -> list[tuple[str, NeuralNet]]:
    """The skorch nets in an estimator or learner, fitted or not, each with the way to
    what holds it.

    The way is written as code, such as ".estimators_[0]"; it ends at the first member
    of an ensemble, which may be a pipeline around the net.
    """
    found: dict[int, tuple[str, NeuralNet]] = {}
    _collect(estimator, "", FITTED, found, set())
    if not found:
        _collect(estimator, "", TEMPLATES, found, set())
    return list(found.values())


def _collect(
    thing: Any,
    way: str,
    names: tuple[str, ...],
    found: dict[int, tuple[str, NeuralNet]],
    seen: set[int],
) -> None:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, NeuralNet):
        found[id(thing)] = (way, thing)
        return
    for name in names:
        value = getattr(thing, "__dict__", {}).get(name)
        for place, part in _parts(value):
            reached = way if "[" in way else f"{way}.{name}{place}"
            _collect(part, reached, FITTED + TEMPLATES, found, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The estimators in an attribute, each with its index in code."""
    if isinstance(value, np.ndarray):
        value = value.ravel().tolist()
    if not isinstance(value, (list, tuple)):
        yield "", value
        return
    for i, part in enumerate(value):
        # (name, estimator) in pipelines and before the fit of an ensemble
        yield f"[{i}]", part[1] if isinstance(part, tuple) and len(part) > 1 else part


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


def net_inside(estimator: Any) -> Any:
    """What `unwrapped` finds; an error in words where there is nothing.

    Raises
    ------
    sklearn.exceptions.NotFittedError
    TypeError
    """
    kind = type(estimator).__name__
    if kind == "CalibratedClassifierCV":
        raise TypeError(
            "A CalibratedClassifierCV changes the probabilities of the net inside, so "
            "its Fisher information is not the net's; pass "
            "calibrated.calibrated_classifiers_[0].estimator to mean the net as it was "
            "fitted."
        )
    inside = unwrapped(estimator)
    if inside is not None:
        return inside
    nets = nets_inside(estimator)
    fitted = [way for way, net in nets if getattr(net, "initialized_", False)]
    if fitted:
        holds = "a net" if len(fitted) == 1 else f"{len(fitted)} nets"
        raise TypeError(
            f"FisherMask reads the gradients of one net, and this {kind} holds {holds} "
            "and makes probabilities of its own; pass the one to ask, on the features "
            f"and classes that it was fitted on, for instance (this {kind})"
            f"{fitted[0]}."
        )
    if nets:
        raise NotFittedError(
            f"This {kind} is not fitted yet: the net in it has no weights. Fit it, and "
            "pass one fitted net."
        )
    raise TypeError(
        "FisherMask needs the gradients of a skorch net, and there is none in "
        f"this {kind}; wrap the torch module in skorch.NeuralNetClassifier, or use "
        "fishermask_sk.ResNet18Classifier."
    )
