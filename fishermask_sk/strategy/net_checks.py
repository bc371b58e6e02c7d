"""What a net must do for a sample to have gradients of its own, tried on the first few
samples of a query.

Four forward passes, two more of one sample each, and one backward pass, before any
expensive work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedParameter

from fishermask_sk._warnings import warn_user
from fishermask_sk.gradients.devices import check_device
from fishermask_sk.gradients.generic import samples
from fishermask_sk.nets.skorch_adapter import FittedNet

# How far apart two passes may be, relative to the largest score: over the same samples,
# and alone or in a batch, where products are summed in another order.
REPEATED = {torch.float64: 1e-9, torch.float32: 1e-4}
ALONE = {torch.float64: 1e-6, torch.float32: 2e-2}
HALF = 0.25


def check_module(module: nn.Module) -> None:
    """Refuse modules that no query can work on, before any sample is looked at.

    Raises
    ------
    ValueError
        Where the module has no weights, weights without a shape or on several devices,
        or was scripted or exported.
    """
    scripted = [
        type(m).__name__
        for m in module.modules()
        if isinstance(m, torch.jit.ScriptModule)
    ]
    if scripted:
        raise ValueError(
            f"The net holds a {scripted[0]}, which torch.jit made of a module: what "
            "its layers see cannot be recorded there. Pass the module as it was "
            "written; torch.compile is no hindrance."
        )
    # What torch.export gives has an `eval` of its own, which only raises.
    if any(isinstance(m, GraphModule) and "eval" in vars(m) for m in module.modules()):
        raise ValueError(
            "The net holds a graph that torch.export made of a module: it has neither "
            "layers nor an evaluation mode. Pass the module as it was written; "
            "torch.compile is no hindrance."
        )
    weights = dict(module.named_parameters())
    if not weights:
        raise ValueError(
            "The module has no parameters; FisherMask ranks a net's weights by their "
            "gradients and needs some with requires_grad=True."
        )
    lazy = [n for n, p in weights.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"{some_of(lazy)} have no shape yet, for the net's lazy modules never saw "
            "a sample; fit the net, or run it once on a batch."
        )
    check_device(module)


def check_real(module: nn.Module, names: Iterable[str]) -> None:
    """Refuse complex weights among those that a mask may touch.

    Raises
    ------
    ValueError
    """
    parameters = dict(module.named_parameters())
    found = [name for name in names if parameters[name].is_complex()]
    if found:
        raise ValueError(
            f"{some_of(found)} are complex; the Fisher information here is that of "
            "real weights. Leave them out with layers=..., or store real and "
            "imaginary parts (torch.view_as_real)."
        )


def check_samples_apart(fitted: FittedNet, example: Any, n_samples: int) -> None:
    """Refuse nets whose scores of a sample depend on chance, or on other samples of
    it.

    Parameters
    ----------
    fitted : FittedNet
        Its module in evaluation mode.
    example : batch of n_samples samples

    Raises
    ------
    ValueError
        Where the same samples get other scores a second time, or alone.

    Warns
    -----
    UserWarning
        Where the net predicts with other scores than those that have gradients.
    """
    with torch.no_grad():
        outputs = fitted.outputs(example)
        if len(outputs) != n_samples:
            raise ValueError(
                f"The module returned {len(outputs)} rows of scores for {n_samples} "
                "samples; expected one row a sample, samples along the first axis: "
                "batch_first=True, or pool over tokens or patches."
            )
        apart = _distance(fitted.outputs(example), outputs)
        if apart > _tolerance(REPEATED, fitted, outputs):
            raise ValueError(
                f"The module's scores of the same samples differ by {apart:.2g} of the "
                "largest from one pass to the next, in evaluation mode; expected the "
                "same scores. Turn off what draws random numbers or keeps state "
                "there: F.dropout takes training=self.training, noise belongs under "
                "`if self.training`."
            )
        _compare_with_predictions(fitted, example, outputs)
        for i in {0, n_samples - 1} if n_samples > 1 else ():
            try:
                alone = fitted.outputs(samples(example, slice(i, i + 1)))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(
                    f"The module takes {n_samples} samples but not one alone: "
                    f"{str(error).splitlines()[0]}. A sample's gradient is its own "
                    "only where nothing depends on the batch: give BatchNorm "
                    "track_running_stats=True (or use LayerNorm, GroupNorm), and "
                    "squeeze() its axis, squeeze(-1)."
                ) from error
            if alone.shape != (1, *outputs.shape[1:]):
                raise ValueError(
                    f"The module returned shape {tuple(alone.shape)} for one sample "
                    f"and {tuple(outputs.shape)} for {n_samples}; expected "
                    f"{(1, *outputs.shape[1:])}. squeeze() drops the samples' axis: "
                    "say squeeze(-1) or flatten(1)."
                )
            apart = _distance(alone, outputs[i : i + 1], outputs)
            if apart > _tolerance(ALONE, fitted, outputs):
                raise ValueError(
                    "The module's scores of a sample depend on the others of its "
                    f"batch: alone they differ by {apart:.2g} of the largest. A "
                    "sample's gradient must be its own: give BatchNorm "
                    "track_running_stats=True (or use LayerNorm, GroupNorm), "
                    "attention and recurrent layers batch_first=True."
                )


def _compare_with_predictions(fitted: FittedNet, example: Any, outputs: Tensor) -> None:
    """Warn where prediction takes another path through the net than training: attention
    has a fast one, which gives zeros for padding.
    """
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        predicted = fitted.outputs(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    with torch.enable_grad():
        trained = fitted.outputs(example).detach()
    apart = max(_distance(predicted, trained), _distance(outputs, trained))
    if apart > _tolerance(ALONE, fitted, outputs):
        warn_user(
            "The net's scores without gradients, from which it predicts, differ by "
            f"{apart:.2g} of the largest from those with gradients, by which it learns "
            "and which the query uses. Under padding, nn.TransformerEncoder's fast "
            "path gives zeros for padded tokens: pool over the others alone, or call "
            "torch.backends.mha.set_fastpath_enabled(False)."
        )


def reached_parameters(
    fitted: FittedNet, example: Any, trainable: Iterable[str]
) -> set[str]:
    """Which trainable parameters the class scores depend on differentiably.

    Raises
    ------
    ValueError
        Where there are none.
    """
    parameters = dict(fitted.module.named_parameters())
    trainable = list(trainable)
    with torch.enable_grad():
        logits = fitted.logits(example)
    reached: set[str] = set()
    if logits.requires_grad:
        found = torch.autograd.grad(
            logits.sum(), [parameters[name] for name in trainable], allow_unused=True
        )
        reached = {
            name for name, g in zip(trainable, found, strict=True) if g is not None
        }
    if not reached:
        raise ValueError(
            f"The module's scores depend on none of its {len(trainable)} trainable "
            "parameters in a way that autograd can follow; expected a differentiable "
            "path to some. Look for torch.no_grad(), .detach(), .data, argmax or "
            "NumPy in its forward, or for weights that it does not use."
        )
    return reached


def check_candidates(layers: Any, names: list[str], reached: set[str]) -> None:
    """Refuse candidates for the mask of which none influences the scores.

    Raises
    ------
    ValueError
    """
    if not reached.intersection(names):
        raise ValueError(
            f"layers={layers!r} allows {some_of(names)}, and the module's scores "
            "depend on none of them in a way that autograd can follow; they do on "
            f"{some_of(sorted(reached))}. Choose layers among these, or look for "
            "torch.no_grad() and .detach() behind the others."
        )


def _distance(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference, relative to the largest absolute score."""
    if a.shape != b.shape:
        return float("inf")
    largest = (b if scale is None else scale).abs().max().double()
    apart = (a.double() - b.double()).abs().max()
    return float(apart / largest) if apart > 0 else 0.0


def _tolerance(
    tolerances: dict[torch.dtype, float], fitted: FittedNet, outputs: Tensor
) -> float:
    """That of the coarsest dtype which takes part."""
    dtypes = {p.dtype for p in fitted.module.parameters() if p.is_floating_point()} | {
        outputs.dtype
    }
    return max(tolerances.get(dtype, HALF) for dtype in dtypes)


def some_of(names: list[str]) -> str:
    """The names, or the first of many."""
    return (
        ", ".join(names)
        if len(names) <= 6
        else f"{', '.join(names[:5])} and {len(names) - 5} more"
    )
