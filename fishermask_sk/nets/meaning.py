"""What a net's outputs mean: which of them are the class scores, and how p(y|x) comes
from these.

skorch says it by the criterion. Where that leaves it open (a loss of the user's own,
several outputs, a predict_proba of the user's own), the outputs on a few samples are
compared with the net's `predict_proba`, and with the number of its classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from torch import Tensor, nn

from fishermask_sk._warnings import warn_user
from fishermask_sk.gradients.fisher import Scores, class_logits
from fishermask_sk.nets.inside import eager

CRITERIA: dict[type[nn.Module], Scores] = {
    nn.CrossEntropyLoss: "logits",
    nn.NLLLoss: "probabilities",
    nn.BCEWithLogitsLoss: "logit",
    nn.BCELoss: "probability",
}
ALL: tuple[Scores, ...] = ("logits", "probabilities", "logit", "probability")
SINGLE = ("logit", "probability")  # one number a sample, for the second of two classes
REGRESSION = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    nn.GaussianNLLLoss,
)
MULTI_LABEL = (nn.MultiLabelSoftMarginLoss, nn.MultiLabelMarginLoss)
# How far probabilities may be apart that are the same.
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4}
CLOSE_IN_HALF = 2e-2
MULTI_LABEL_SAYS = (
    "each of these outputs says yes or no for itself (several labels a sample), and "
    "FisherMask describes one class out of several. Where a sample has exactly one, "
    "train with CrossEntropyLoss; for several labels a sample use a strategy made for "
    "them, such as those of modAL.multilabel."
)


class Meaning(NamedTuple):
    """The place of the class scores among the outputs, and what they are."""

    place: int
    scores: Scores


def stated_scores(net: NeuralNet) -> Scores | None:
    """What the criterion says that the outputs are; None where it leaves that open.

    Raises
    ------
    ValueError
        Where it makes the net no classifier of one class out of several.
    """
    criterion = criterion_of(net)
    if isinstance(net, NeuralNetRegressor):
        raise ValueError(_no_classifier(net))
    if isinstance(criterion, MULTI_LABEL):
        raise ValueError(f"Under {type(criterion).__name__} {MULTI_LABEL_SAYS}")
    if isinstance(criterion, nn.NLLLoss) and not takes_logarithm(net):
        return None
    for kind, scores in CRITERIA.items():
        if isinstance(criterion, kind):
            return scores
    return None


def criterion_of(net: NeuralNet) -> nn.Module | None:
    """The fitted net's criterion; None where it has another name than skorch's."""
    criterion = vars(net).get("criterion_")
    return None if criterion is None else eager(criterion)


def takes_logarithm(net: NeuralNet) -> bool:
    """Whether the net's loss is NLLLoss as `NeuralNetClassifier` means it, on
    probabilities.
    """
    return type(net).get_loss is NeuralNetClassifier.get_loss


def predicts_by_criterion(net: NeuralNet) -> bool:
    """Whether skorch alone makes probabilities of the outputs, as the criterion
    says.
    """
    return (
        net.predict_nonlinearity == "auto"
        and type(net).predict_proba.__module__.partition(".")[0] == "skorch"
    )


def find_meaning(
    net: NeuralNet, result: Any, stated: Scores | None, p: np.ndarray | None
) -> Meaning:
    """Which output holds the class scores, and what they are.

    Parameters
    ----------
    net : NeuralNet
    result : Tensor, or tuple with Tensors of shape (n, ...)
        What the net infers on n samples.
    stated : str or None
        What the criterion says.
    p : ndarray of shape (n, c) or None
        The net's `predict_proba` of them; None where it gives no probabilities.

    Raises
    ------
    ValueError
        Where that cannot be told.
    """
    outputs = result if isinstance(result, tuple) else (result,)
    several = len(outputs) > 1
    if stated is None and isinstance(criterion_of(net), nn.NLLLoss):
        stated = _under_plain_nll(outputs[0])
    candidates = [
        Meaning(place, scores)
        for place, values in enumerate(outputs)
        for scores in ((stated,) if stated else ALL)
        if _may_be(scores, values)
        and (not several or _enough_columns(net, scores, values))
    ]
    if p is not None:
        apart = {m: _distance(outputs[m.place], m.scores, p) for m in candidates}
        fitting = [m for m in candidates if apart[m] <= _close(outputs[m.place])]
        if fitting:
            found = min(fitting, key=lambda m: (m.place, apart[m]))
            _warn_of_columns(net, outputs, found)
            return found
    if stated is None and not _is_finite(outputs[0]):
        stated = "logits"  # whoever checks them says what is wrong
    if stated is None:
        raise ValueError(_unreadable(net, outputs[0], p))
    first = Meaning(0, stated)
    if first in candidates or not candidates:
        if p is not None and candidates:
            warn_user(
                "predict_proba gives other probabilities than the module's outputs "
                f"under {_named(criterion_of(net))}, up to {apart[first]:.2g} apart: a "
                "query takes the latter. Where the former are meant, pass "
                "as_estimator(module, ...) with a module that returns their logarithms."
            )
        return first
    if len({m.place for m in candidates}) > 1:
        raise ValueError(
            f"The module returns {_shapes(outputs)}; the first has no column for each "
            "class, and of the others several have. Return the class scores first."
        )
    found = candidates[0]
    warn_user(
        f"The module returns {_shapes(outputs)}: only output {found.place} has as many "
        "columns as there are classes, and it is taken for the class scores. Return "
        "the scores first, where skorch's predict_proba looks for them."
    )
    return found


def warn_of_classes(net: NeuralNet, values: Any, scores: Scores) -> None:
    """Where the only output has another number of columns than the net was told
    classes: an embedding, or classes that were forgotten.
    """
    n_classes, told = _n_classes(net)
    if not told or not _may_be(scores, values) or _enough_columns(net, scores, values):
        return
    n_columns = 2 if scores in SINGLE else values.shape[1]
    warn_user(
        f"The module returns {n_columns} scores a sample, and the net was told "
        f"{n_classes} classes: a query takes each score for a class. If these are "
        "features, return the scores (as the only output, or the first); if not, name "
        "all classes."
    )


def are_probabilities(p: Tensor) -> bool:
    """Whether rows hold no negative numbers and sum to 1."""
    return not bool((p < 0).any()) and not bool(((p.sum(1) - 1).abs() > 1e-2).any())


def check_probabilities(p: Tensor, scores: Scores) -> None:
    """Refuse outputs that are no probabilities, where the criterion takes them for
    some.

    Raises
    ------
    ValueError
    """
    if scores == "probability":
        if bool(((p < 0) | (p > 1)).any()):
            raise ValueError(
                "Under BCELoss the module's output must be a probability, and values "
                f"go from {p.min().item():.3g} to {p.max().item():.3g}. End the module "
                "with sigmoid, or set criterion=nn.BCEWithLogitsLoss for a logit."
            )
        return
    if not are_probabilities(p):
        sums = p.sum(1)
        raise ValueError(
            "Under NLLLoss skorch takes the module's outputs for probabilities, and "
            f"these are none: values from {p.min().item():.3g} to "
            f"{p.max().item():.3g}, rows that sum to {sums.min().item():.3g} to "
            f"{sums.max().item():.3g}. End the module with softmax (not log_softmax: "
            "skorch takes the logarithm), or set criterion=nn.CrossEntropyLoss for "
            "logits."
        )


def _under_plain_nll(outputs: Any) -> Scores | None:
    """NLLLoss on what the module returns, no logarithm between: on log p."""
    if not _may_be("logits", outputs):
        return None
    values = outputs.float()
    if are_probabilities(values.exp()):
        return "logits"  # whose softmax is p, as logarithms of p are
    if are_probabilities(values):
        return "probabilities"  # the user's own loss takes the logarithm
    sums = values.exp().sum(1)
    raise ValueError(
        "This net hands the module's outputs to NLLLoss as they are, which takes "
        "log-probabilities, and these are none: exp of a row sums to "
        f"{sums.min().item():.3g} to {sums.max().item():.3g}. End the module with "
        "log_softmax(1), or set criterion=nn.CrossEntropyLoss for logits."
    )


def _may_be(scores: Scores, values: Any) -> bool:
    """Whether an output has the shape and the range of such scores."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        return False
    if values.ndim not in (1, 2) or not _is_finite(values):
        return False
    if scores in SINGLE:
        one = values.numel() == len(values)
        return one and (
            scores == "logit" or bool(((values >= 0) & (values <= 1)).all())
        )
    wide = values.ndim == 2 and values.shape[1] > 1
    return wide and (scores == "logits" or are_probabilities(values.float()))


def _is_finite(values: Any) -> bool:
    return not isinstance(values, Tensor) or bool(torch.isfinite(values).all())


def _enough_columns(net: NeuralNet, scores: Scores, values: Tensor) -> bool:
    """Whether there is a column for each class: exactly, where the net was told
    them.
    """
    n_columns = 2 if scores in SINGLE else values.shape[1]
    n_classes, told = _n_classes(net)
    return n_columns == n_classes if told else n_columns >= n_classes


def _n_classes(net: NeuralNet) -> tuple[int, bool]:
    """How many classes the net knows, and whether it was told them all or saw them in
    its labels.
    """
    try:
        classes = net.classes_
    except AttributeError:
        return 0, False
    return len(classes), getattr(net, "classes", None) is not None


def _warn_of_columns(net: NeuralNet, outputs: tuple[Any, ...], found: Meaning) -> None:
    """Where predict_proba is made of the first output, and another has exactly as many
    columns as the labels have classes.
    """
    n_classes, told = _n_classes(net)
    if told or found.scores in SINGLE or len(outputs) < 2 or n_classes < 2:
        return
    widths = [
        values.shape[1] if _may_be("logits", values) else None for values in outputs
    ]
    if widths[found.place] != n_classes and n_classes in widths:
        warn_user(
            f"The module returns {_shapes(outputs)}, predict_proba is made of output "
            f"{found.place}, and the net's labels had {n_classes} classes, as many as "
            f"output {widths.index(n_classes)} has columns. If that holds the class "
            "scores, return it first; if not, name all classes: classes=... of the net."
        )


def _distance(values: Tensor, scores: Scores, p: np.ndarray) -> float:
    own = class_logits(values.detach(), scores).double().softmax(1).cpu().numpy()
    return float(np.abs(own - p).max()) if own.shape == p.shape else np.inf


def _close(values: Tensor) -> float:
    return CLOSE.get(values.dtype, CLOSE_IN_HALF)


def _unreadable(net: NeuralNet, outputs: Any, p: np.ndarray | None) -> str:
    """Why outputs under a criterion that skorch does not know have no meaning here."""
    criterion = criterion_of(net)
    if isinstance(criterion, REGRESSION):
        return _no_classifier(net)
    name = _named(criterion)
    if p is not None:
        return (
            f"Under {name} FisherMask takes from predict_proba what the module's "
            "outputs mean, and its probabilities are neither these nor their softmax. "
            "Say what they are: as_estimator(net.module_, classes=..., "
            "scores='logits')."
        )
    seen = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs)
    return (
        f"FisherMask needs a classifier's probabilities. {name} is no loss of which "
        "skorch knows how they come from the module's outputs, and predict_proba gives "
        f"none (outputs of shape {seen}; rows must sum to 1). For logits set "
        "predict_nonlinearity=lambda z: z.softmax(-1), or pass "
        "as_estimator(net.module_, classes=..., scores='logits'); regression has no "
        "class probabilities to take gradients of, so use another strategy for it."
    )


def _no_classifier(net: NeuralNet) -> str:
    return (
        "FisherMask needs a classifier's criterion: CrossEntropyLoss on logits, "
        "NLLLoss on probabilities or BCEWithLogitsLoss on one logit; this "
        f"{type(net).__name__} was fitted with {_named(criterion_of(net))}. For "
        "classes, fit it with one of these; a net fitted with a loss of your own goes "
        "in by as_estimator(net.module_, classes=..., scores='logits'); regression has "
        "no class probabilities to take gradients of, so use another strategy for it."
    )


def _named(criterion: nn.Module | None) -> str:
    return (
        "a criterion of another name" if criterion is None else type(criterion).__name__
    )


def _shapes(outputs: tuple[Any, ...]) -> str:
    shapes = [
        str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__
        for v in outputs
    ]
    return f"{len(outputs)} outputs, {', '.join(shapes)}"
