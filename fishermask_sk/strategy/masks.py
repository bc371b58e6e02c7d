"""Masks: which k of a network's P weights are kept. One ranking, and the rules that
feed it.

Scores have shape (P,), one per weight of all `module.parameters()`, as
`parameters_to_vector` lays them out. A mask is always `mask_indices`, the sorted
positions (k,) that are kept. Which rule a query's `mask` names, "random" among them, is
in `ranking`. This file sees tensors only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, floor
from numbers import Integral

import torch
from torch import Tensor

from fishermask_sk._warnings import warn_user

# 0.29 * 100 is 28.999999999999996, and 0.07 * 100 is 7.000000000000001.
ROUNDING = 1e-6

RANKED_AT_A_TIME = 2**20

Slices = Mapping[str, slice]
Ranges = Sequence[slice]
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


def merged(places: Iterable[slice]) -> list[slice]:
    """Slices in their order, those that touch each other as one."""
    ends: list[list[int]] = []
    for place in places:
        if ends and ends[-1][1] == place.start:
            ends[-1][1] = place.stop
        else:
            ends.append([place.start, place.stop])
    return [slice(*pair) for pair in ends]


def n_positions(ranges: Ranges) -> int:
    """How many positions there are in them."""
    return sum(place.stop - place.start for place in ranges)


def top_k(scores: Tensor, k: int, ranges: Ranges | None = None) -> Tensor:
    """Positions of the k largest scores, sorted; of equal scores the lowest positions.

    Parameters
    ----------
    scores : Tensor of shape (P,)
    k : int, between 0 and the number of positions
    ranges : sequence of slice, optional
        Sorted and apart; by default all positions. Their scores are looked at where
        they are, and no list is made of the positions.

    Returns
    -------
    Tensor of shape (k,), int64

    Examples
    --------
    >>> import torch
    >>> scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0])
    >>> top_k(scores, 3)
    tensor([1, 2, 3])
    >>> top_k(scores, 2, [slice(0, 1), slice(2, 5)])
    tensor([2, 3])
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    # torch.topk promises nothing about equal scores, so it only supplies the threshold.
    # It takes 16 bytes a score: of so many at a time.
    parts = [
        (place.start + i * RANKED_AT_A_TIME, part)
        for place in ([slice(0, len(scores))] if ranges is None else ranges)
        for i, part in enumerate(scores[place].split(RANKED_AT_A_TIME))
    ]
    best = [part.topk(min(k, len(part)), sorted=False).values for _, part in parts]
    threshold = torch.cat(best).topk(k, sorted=False).values.min()
    found = [start + (part > threshold).nonzero()[:, 0] for start, part in parts]
    left = k - sum(map(len, found))
    for start, part in parts:
        if not left:
            break
        found.append(start + (part == threshold).nonzero()[:left, 0])
        left -= len(found[-1])
    return torch.cat(found).sort().values


def ranked_mask(
    scores: Tensor, k: int, candidates: Ranges, head: Ranges = ()
) -> Tensor:
    """The `k` best of the candidates; a head, where given, is kept whole before the
    rest is filled.

    Parameters
    ----------
    scores : Tensor of shape (P,)
    k : int
        At least 1. Where there are fewer candidates, all of them are kept.
    candidates : sequence of slice
        The positions that may be kept, sorted and apart.
    head : sequence of slice
        Candidates to keep first. Where they are k or more, the k best of them are the
        mask.

    Returns
    -------
    mask_indices : Tensor of shape (min(k, n_candidates),), int64, sorted

    Examples
    --------
    >>> import torch
    >>> scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    >>> ranked_mask(scores, 3, [slice(0, 5)], head=[slice(4, 5)])
    tensor([0, 1, 4])
    """
    k = min(k, n_positions(candidates))
    n_head = n_positions(head)
    if n_head >= k:
        return top_k(scores, k, head)
    filled = top_k(scores, k - n_head, _without(candidates, head))
    return torch.cat([top_k(scores, n_head, head), filled]).sort().values


def per_layer_mask(
    scores: Tensor,
    fraction: float,
    slices: Slices,
    candidates: Ranges,
    head: Ranges = (),
) -> Tensor:
    """The ⌈fraction·size⌉ best of each parameter tensor, and the head, where given,
    whole.

    Parameters
    ----------
    scores : Tensor of shape (P,)
    fraction : float in (0, 1]
    slices : mapping from parameter name to its slice of the scores
    candidates, head : sequences of slice, as in `ranked_mask`

    Returns
    -------
    mask_indices : Tensor of shape (k,), int64, sorted
    """
    kept = [top_k(scores, n_positions(head), head)]
    for place in slices.values():
        inside = _within(candidates, place)
        if n := n_positions(inside):
            share = max(1, ceil(fraction * n - ROUNDING))
            kept.append(top_k(scores, min(share, n), inside))
    return torch.unique(torch.cat(kept))


def _within(ranges: Ranges, place: slice) -> list[slice]:
    """What of the ranges lies inside this place."""
    cut = [
        slice(max(each.start, place.start), min(each.stop, place.stop))
        for each in ranges
    ]
    return [each for each in cut if each.start < each.stop]


def _without(ranges: Ranges, others: Ranges) -> list[slice]:
    """What of the ranges lies outside the others, which are sorted."""
    starts = [-1, *(other.stop for other in others)]
    stops = [*(other.start for other in others), sys.maxsize]
    gaps = [slice(*pair) for pair in zip(starts, stops, strict=True)]
    return [part for each in ranges for gap in gaps for part in _within([each], gap)]


def custom_mask(
    rule: MaskRule, scores: Tensor, k: int, slices: dict[str, slice], candidates: Ranges
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
    bounds = [end for place in candidates for end in (place.start, place.stop)]
    # Inside where an odd number of bounds lies at or below.
    ends = mask_indices.new_tensor(bounds)
    n_below = torch.searchsorted(ends, mask_indices, right=True)
    foreign = mask_indices[n_below % 2 == 0]
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
