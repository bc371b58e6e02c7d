"""Fisher information of a softmax classifier, as tensors: class scores in, cotangents
and information out.

Axes are n (samples), c (classes) and k (weights). The diagonal, over all weights, is
`per_sample`'s. This file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scores = Literal["logits", "probabilities", "logit", "probability"]
Weighting = Literal["fisher", "uniform"]


def class_logits(outputs: Tensor, scores: Scores) -> Tensor:
    """Turn a module's outputs into logits whose softmax is p(y|x).

    Parameters
    ----------
    outputs : Tensor of shape (n, c), or (n,) or (n, 1) for one number
    scores : {"logits", "probabilities", "logit", "probability"}
        What `outputs` are: logits (CrossEntropyLoss), probabilities (NLLLoss as skorch
        means it), one logit (BCEWithLogitsLoss) or one probability (BCELoss) of the
        second of two classes.

    Returns
    -------
    Tensor of shape (n, c), at least float32; differentiable with respect to `outputs`.

    Examples
    --------
    >>> import torch
    >>> class_logits(torch.tensor([0.0, 2.0]), "logit")
    tensor([[0., 0.],
            [0., 2.]])
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if scores == "logit":
        logit = outputs.reshape(len(outputs))
        return torch.stack([torch.zeros_like(logit), logit], dim=1)
    if scores == "probability":
        p = outputs.reshape(len(outputs))
        outputs = torch.stack([1 - p, p], dim=1)
    if scores in ("probabilities", "probability"):
        # Below the smallest normal number the logarithm's slope overflows; such a class
        # counts as p = 0.
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
    return outputs


def class_cotangents(
    logits: Tensor, weighting: Weighting = "fisher", n_top_classes: int | None = None
) -> Tensor:
    r"""Gradients of each class's weighted log-probability with respect to the logits.

    Row c of sample x is :math:`\sqrt{p_c}\,(e_c - p)`: pulled back through the network
    it becomes row c of the embedding, :math:`V_x = [\sqrt{p_c}\,\partial \log p_c /
    \partial\theta]_c`. A class with p = 0 gives a zero row.

    Parameters
    ----------
    logits : Tensor of shape (n, c)
    weighting : {"fisher", "uniform"}
        "uniform" leaves out the square root, as the FisherMask authors' code does.
    n_top_classes : int, optional
        m: of each sample only the m most probable classes count, as if there were no
        others: the softmax is taken over them, and there are m rows.

    Returns
    -------
    Tensor of shape (n, c, c), or (n, m, c); the last axis is that of the logits.

    Examples
    --------
    >>> import torch
    >>> class_cotangents(torch.zeros(1, 2))
    tensor([[[ 0.3536, -0.3536],
             [-0.3536,  0.3536]]])
    """
    if n_top_classes is not None and n_top_classes < logits.shape[1]:
        return _spread(class_cotangents, logits, weighting, n_top_classes)
    p = logits.detach().softmax(dim=1)
    residuals = torch.eye(p.shape[1], dtype=p.dtype, device=p.device) - p[:, None, :]
    return residuals * p.sqrt()[:, :, None] if weighting == "fisher" else residuals


def reduced_cotangents(
    logits: Tensor, weighting: Weighting = "fisher", n_top_classes: int | None = None
) -> Tensor:
    r"""The same Fisher information in c − 1 rows: `class_cotangents` without its null
    direction.

    The rows of V_x are dependent, since :math:`\sum_c w_c V_{x,c} = 0` for w = √p
    ("fisher") or p ("uniform"). A Householder reflection H that takes w to an axis
    turns one row of HV into zero; the others have :math:`(HV)^\top HV = V^\top V`, and
    with it the same trace reductions and picks.

    Parameters
    ----------
    logits : Tensor of shape (n, c)
    weighting : {"fisher", "uniform"}
    n_top_classes : int, optional
        m, see `class_cotangents`.

    Returns
    -------
    Tensor of shape (n, c - 1, c), or (n, m - 1, c)
    """
    if n_top_classes is not None and n_top_classes < logits.shape[1]:
        return _spread(reduced_cotangents, logits, weighting, n_top_classes)
    p = logits.detach().softmax(dim=1)
    null = p.sqrt() if weighting == "fisher" else p
    v = null / null.norm(dim=1, keepdim=True)
    v[:, -1] += 1  # entries of w are never negative, so this sum does not cancel
    reflection = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)[:-1] - (
        2 * v[:, :-1, None] * v[:, None, :] / v.square().sum(dim=1)[:, None, None]
    )
    return reflection @ class_cotangents(logits, weighting)


def _spread(
    cotangents: Callable[[Tensor, Weighting], Tensor],
    logits: Tensor,
    weighting: Weighting,
    m: int,
) -> Tensor:
    """Cotangents of the m largest logits alone, in the places of these among all."""
    largest, places = logits.detach().topk(m, dim=1)
    of_largest = cotangents(largest, weighting)
    spread = of_largest.new_zeros(*of_largest.shape[:2], logits.shape[1])
    return spread.scatter_(2, places[:, None, :].expand_as(of_largest), of_largest)


def information(embeddings: Tensor) -> Tensor:
    r"""Sum of the samples' Fisher information on the mask, :math:`\sum_x V_x^\top V_x`.

    Parameters
    ----------
    embeddings : Tensor of shape (n, c, k)

    Returns
    -------
    Tensor of shape (k, k)

    Examples
    --------
    >>> import torch
    >>> information(torch.ones(3, 2, 1))
    tensor([[6.]])
    """
    rows = embeddings.reshape(-1, embeddings.shape[-1])
    return rows.mT @ rows
