"""Masks: which k of a network's P weights are kept. One ranking, and the rules that
feed it.

Scores have shape (P,), one per weight of all `module.parameters()`, as
`parameters_to_vector` lays them out. A mask is always `mask_indices`, the sorted
positions (k,) that are kept. This file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, floor
from numbers import Integral

import torch
from torch import Tensor

from fishermask_sk._warnings import warn_user

# 0.29 * 100 is 28.999999999999996, and 0.07 * 100 is 7.000000000000001.
ROUNDING = 1e-6

RANKED_AT_A_TIME = 2**20

Slices = Mapping[str, slice]
MaskRule = Callable[[Tensor, int, dict[str, slice]], Tensor]


def n_kept(sparsity: float, n_weights: int) -> int:
    """How many of `n_weights` weights a sparsity keeps: a fraction (float), or the
    number itself (int).

    Examples
    --------
    >>> n_kept(0.002, 701_456), n_kept(50, 701_456), n_kept(1e-9, 10)
    (1402, 50, 1)
    """
    if isinstance(sparsity, Integral):
        return int(sparsity)
    return max(1, floor(sparsity * n_weights + ROUNDING))


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores, sorted; of equal scores the lowest positions.

    Parameters
    ----------
    scores : Tensor of shape (n,)
    k : int, between 0 and n

    Returns
    -------
    Tensor of shape (k,), int64

    Examples
    --------
    >>> import torch
    >>> top_k(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3)
    tensor([1, 2, 3])
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    # torch.topk promises nothing about equal scores, so it only supplies the threshold.
    # It takes 16 bytes a score: of so many at a time.
    best = [
        part.topk(min(k, len(part)), sorted=False).values
        for part in scores.split(RANKED_AT_A_TIME)
    ]
    threshold = torch.cat(best).topk(k, sorted=False).values.min()
    above = (scores > threshold).nonzero()[:, 0]
    level = (scores == threshold).nonzero()[:, 0]
    return torch.cat([above, level[: k - len(above)]]).sort().values


def ranked_mask(
    scores: Tensor, k: int, candidates: Tensor, head: Tensor | None = None
) -> Tensor:
    """The `k` best of the candidates; a head, where given, is kept whole before the
    rest is filled.

    Parameters
    ----------
    scores : Tensor of shape (P,)
    k : int
        At least 1. Where there are fewer candidates, all of them are kept.
    candidates : Tensor of shape (n_candidates,), int64, sorted
    head : Tensor of shape (n_head,), int64, sorted, or None
        Candidates to keep first. Where they are k or more, the k best of them are the
        mask.

    Returns
    -------
    mask_indices : Tensor of shape (min(k, n_candidates),), int64, sorted

    Examples
    --------
    >>> import torch
    >>> scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    >>> ranked_mask(scores, 3, torch.arange(5), head=torch.tensor([4]))
    tensor([0, 1, 4])
    """
    k = min(k, len(candidates))
    if head is None or len(head) == 0:
        return candidates[top_k(scores[candidates], k)]
    if len(head) >= k:
        return head[top_k(scores[head], k)]
    left = scores[candidates]
    left[torch.searchsorted(candidates, head)] = -torch.inf  # the head is in already
    filled = candidates[top_k(left, k - len(head))]
    return torch.cat([head, filled]).sort().values


def per_layer_mask(
    scores: Tensor,
    fraction: float,
    slices: Slices,
    candidates: Tensor,
    head: Tensor | None = None,
) -> Tensor:
    """The ⌈fraction·size⌉ best of each parameter tensor, and the head, where given,
    whole.

    Parameters
    ----------
    scores : Tensor of shape (P,)
    fraction : float in (0, 1]
    slices : mapping from parameter name to its slice of the scores
    candidates, head : Tensors of positions, as in `ranked_mask`

    Returns
    -------
    mask_indices : Tensor of shape (k,), int64, sorted
    """
    kept = [] if head is None else [head]
    ends = [(place.start, place.stop) for place in slices.values()]
    # The candidates are sorted: those of one tensor stand side by side.
    places = torch.searchsorted(
        candidates, torch.tensor(ends, device=candidates.device)
    )
    for first, last in places.tolist():
        inside = candidates[first:last]
        share = max(1, ceil(fraction * len(inside) - ROUNDING))
        kept.append(inside[top_k(scores[inside], min(share, len(inside)))])
    return torch.unique(torch.cat(kept))


def custom_mask(
    rule: MaskRule, scores: Tensor, k: int, slices: dict[str, slice], candidates: Tensor
) -> Tensor:
    """Ask a user's rule for positions, and check that they are a mask of candidates.

    Parameters
    ----------
    rule : callable (scores, k, slices) -> positions
    scores, k, slices, candidates
        As in `ranked_mask`; the rule sees the slices of parameters that hold
        candidates.

    Returns
    -------
    mask_indices : Tensor of shape (n_positions,), int64, sorted

    Raises
    ------
    ValueError
        Where the positions are empty, repeated, not whole numbers, or not among the
        candidates.
    """
    answer = rule(scores, k, slices)
    try:
        positions = torch.as_tensor(answer, device=scores.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "The mask callable must return a one-dimensional, non-empty array of "
            f"integer positions; it returned {type(answer).__name__}."
        ) from error
    whole = (
        not positions.is_floating_point()
        and not positions.is_complex()
        and positions.dtype != torch.bool
    )
    if positions.ndim != 1 or len(positions) == 0 or not whole:
        raise ValueError(
            "The mask callable must return a one-dimensional, non-empty array of "
            f"integer positions; it returned shape {tuple(positions.shape)} and dtype "
            f"{positions.dtype}. Return positions, not a boolean mask."
        )
    mask_indices = positions.to(torch.int64).sort().values
    if len(torch.unique(mask_indices)) != len(mask_indices):
        raise ValueError(
            "The mask callable returned a position twice; return each position once."
        )
    foreign = mask_indices[~torch.isin(mask_indices, candidates)]
    if len(foreign):
        raise ValueError(
            f"The mask callable returned {len(foreign)} positions that may not be "
            f"chosen (the first is {int(foreign[0])}): frozen weights, weights outside "
            f"`layers`, or outside 0..{len(scores) - 1}. Return positions inside the "
            "slices that the callable is given."
        )
    return mask_indices


def warn_if_head_fills_mask(
    k: int, n_head: int, n_weights: int, warn: Callable[[str], None] = warn_user
) -> None:
    """Say that no room is left outside the head, and which sparsity would keep it
    whole.

    Parameters
    ----------
    k, n_head, n_weights : int
        Positions kept, the head's size, and the number of trainable weights.
    warn : callable
        What is done with the message.
    """
    if n_head < k:
        return
    share = ceil(n_head / n_weights * 10**6) / 10**6
    which = (
        "exactly the head" if n_head == k else f"the head's {k} highest-scoring weights"
    )
    warn(
        f"The mask keeps k={k} weights and the head alone has {n_head}, so the mask is "
        f"{which} and no other layer is in it. From sparsity={share:g} or an int of "
        f"{n_head} on the head is whole; with more, other layers enter. With "
        "keep_head=False all layers compete."
    )
