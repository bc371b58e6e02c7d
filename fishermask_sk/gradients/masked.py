"""What depends on a mask alone: which entries of each parameter it keeps, and where
these go among the columns of an embedding (n, c, k).

Positions (k,) are sorted, so that a parameter's columns are a slice, and its own
entries (m,) are these positions less its first.

This file sees tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask_sk.gradients.layer_rules import FromSeen


class Masked(NamedTuple):
    """What depends on the mask alone: each masked parameter's own entries, there and
    on the CPU, the columns of the embedding that they fill, and its prepared rules.
    """

    mask_indices: Tensor
    wanted: dict[str, Tensor]
    on_host: dict[str, Tensor]
    columns: dict[str, slice]
    prepared: dict[str, FromSeen]


def masked(mask_indices: Tensor, slices: Mapping[str, slice]) -> Masked:
    """Look it up, with one copy to the CPU, where rules look at entries.

    Parameters
    ----------
    mask_indices : Tensor of shape (k,), int64, sorted
    slices : mapping of parameter name to its place among all, in their order
    """
    on_host = mask_indices.cpu()
    starts = [place.start for place in slices.values()]
    stops = [place.stop for place in slices.values()]
    ends = torch.tensor([*starts, *stops[-1:]], device="cpu")
    firsts = torch.searchsorted(on_host, ends).tolist()
    found = Masked(mask_indices, {}, {}, {}, {})
    for i, (name, start) in enumerate(zip(slices, starts, strict=True)):
        columns = slice(firsts[i], firsts[i + 1])
        if columns.stop > columns.start:
            found.columns[name] = columns
            found.wanted[name] = mask_indices[columns] - start
            found.on_host[name] = on_host[columns] - start
    return found
