r"""The two factors of a linear head's gradients.

A head z = W h + b has the gradient R ⊗ [h, 1] at W and b, with R (rows, C) the
cotangents at z. Where z are the class scores, R are the cotangents there, and no
backward pass is made. Where something lies between, such as a temperature or
log-softmax, they are pulled back through that alone, and checked as all gradients are.
Where the scores are an average of z over P positions, all positions of a sample have
the same cotangent r, so that

.. math:: \sum_p r \otimes h_p = (P r) \otimes \tfrac{1}{P} \sum_p h_p.

This file sees tensors and torch modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fishermask_sk.gradients.continuing_check import PRODUCT_ROUNDINGS, ContinuingCheck
from fishermask_sk.gradients.recording import Outputs, Recorded, Recorder
from fishermask_sk.gradients.ways import Ways


class HeadFactors(NamedTuple):
    """R (n, rows, C), h (n, d), and the embeddings of other weights (n, rows, k) from
    the same pass, where they were asked for.
    """

    cotangents: Tensor
    inputs: Tensor
    rest: Tensor | None


def factors_of_head(
    names: Sequence[str],
    logits: Tensor,
    cotangents: Tensor,
    recorded: Recorded,
    recorder: Recorder,
    ways: Ways,
    check: ContinuingCheck,
) -> tuple[Tensor, Tensor] | None:
    """R and h of one batch, or None where the head's gradients are no such product.

    Parameters
    ----------
    names : sequence of str
        The head's weight, or its weight and bias.
    logits : Tensor of shape (n, c), with its graph
    cotangents : Tensor of shape (n, rows, c)
        At the logits.
    recorded, recorder, ways, check
        Of the pass that gave the logits.
    """
    ruled, unused = ways.split(names, recorded, len(logits))
    if check.is_product(logits, names, unused, recorded):
        return cotangents, recorded[recorder.routes[names[0]].module][0].seen
    layers = {recorder.routes[name].module for name in ruled}
    if list(ruled) != list(names) or len(layers) != 1:
        return None
    (layer,) = layers
    seen = recorded[layer][0].seen
    if not isinstance(layer, nn.Linear) or not check.is_exact(logits.dtype):
        return None
    r = _pulled_back(names[0], logits, cotangents, recorded, recorder)
    if r is None:
        return None
    h = seen.reshape(len(seen), -1, seen.shape[-1]).mean(1)
    compared = check.sums(logits, cotangents, dict.fromkeys(names))
    for name in names:
        places = compared.places[name]
        d = h.shape[1] if name == names[0] else 1
        rows = r[..., places // d]
        if name == names[0]:
            rows = rows * h[:, None, places % d]
        compared.add(name, slice(None), slice(None), rows)
    return None if check.wrong(compared.of(names)) else (r, h)


def _pulled_back(
    name: str,
    logits: Tensor,
    cotangents: Tensor,
    recorded: Recorded,
    recorder: Recorder,
) -> Tensor | None:
    """The cotangents at the head's output (n, rows, C), summed over positions; None
    where these have different ones, or the scores do not depend on the head.
    """
    rounding = PRODUCT_ROUNDINGS * torch.finfo(logits.dtype).eps
    outputs = Outputs([recorder.routes[name].module], recorded)
    rows: list[Tensor] = []

    def arrived(layer: nn.Module, g: Tensor) -> None:
        at_positions = g.flatten(1, -2) if g.ndim > 2 else g[:, None]
        mean = at_positions.mean(1)
        apart = (at_positions - mean[:, None]).abs().max()
        if bool(apart <= rounding * mean.abs().max()):
            rows.append(mean * at_positions.shape[1])

    for row in range(cotangents.shape[1]):
        outputs.pull_back(logits, cotangents[:, row], arrived, retain_graph=True)
        if len(rows) <= row:
            return None
    return torch.stack(rows, dim=1)
