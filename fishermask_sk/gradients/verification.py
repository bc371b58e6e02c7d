r"""Which way each parameter's gradients are found, and whether they are right: decided
by comparison with plain autograd, on samples tried first and then on every batch.

Of a batch's per-sample gradients v (n, m) of one parameter, plain autograd gives the
sum
:math:`\sum_n w_n v_n` in one backward pass. With weights w that differ from sample to
sample the sum is right only where every sample's gradient is its own. A parameter that
fails once goes another way for that batch and from then on: from its layer's rule to
vmap, from vmap to one sample at a time, which is autograd itself. Where a gradient is
zero it proves nothing and costs nothing; it is compared when it first is not.

This file sees tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

RULE, VMAP, ONE_BY_ONE = "rule", "vmap", "one by one"

# What two orders of summation may differ by, relative to the size of the summands, by
# the coarsest dtype that takes part; bfloat16 and float16 have 5e-2.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2
# Gradients that are this many roundings of the largest are rounding themselves: those
# of a bias that softmax or a norm takes out again.
ROUNDINGS = 30
# Entries of a large parameter that are compared: the largest of each of so many parts
# of it, and as many drawn.
N_PARTS = 8


class Comparison(NamedTuple):
    """Weighted per-sample gradients of one parameter, and what their sum should be.

    `summed` and `squared` (m,) are the sums of w·v and (w·v)²; `expected` is (m,).
    """

    summed: Tensor
    squared: Tensor
    expected: Tensor


class Verification:
    """The way of each parameter, and what was learnt about it.

    Attributes
    ----------
    ways : dict of parameter name to "rule", "vmap" or "one by one"
        Empty until it is said where to begin.
    reasons : dict of parameter name to str
        Why a parameter left the way it had.
    coarsest : dtype
        The coarsest that takes part in the forward pass, as far as seen.
    """

    def __init__(self) -> None:
        self.ways, self.reasons = dict[str, str](), dict[str, str]()
        self.coarsest = torch.float64
        generator = torch.Generator().manual_seed(0)
        self._drawn: Any = {"generator": generator, "device": "cpu"}

    def see(self, *dtypes: torch.dtype) -> None:
        """Take note of dtypes that the net computes in."""
        for dtype in dtypes:
            if dtype.is_floating_point and _eps(dtype) > _eps(self.coarsest):
                self.coarsest = dtype

    def leave(self, name: str, reason: str) -> None:
        """Send a parameter the next way: a rule's to vmap, vmap's one by one."""
        self.ways[name] = VMAP if self.ways[name] == RULE else ONE_BY_ONE
        self.reasons[name] = reason

    def weights(self, *shape: int) -> Tensor:
        """Weights between 1 and 2 of either sign, no two the same."""
        size = 1 + torch.rand(shape, **self._drawn)
        return size * (2 * torch.randint(2, shape, **self._drawn) - 1)

    def row(self, n_rows: int) -> int:
        """One of so many rows, drawn."""
        return int(torch.randint(n_rows, (), **self._drawn))

    def positions(self, n: int, n_drawn: int) -> Tensor:
        """Some of n positions, on the CPU, in the order in which they were drawn."""
        return torch.randperm(n, **self._drawn)[:n_drawn]

    def telling_entries(self, expected: Tensor) -> Tensor:
        """A bounded number of a parameter's entries, sorted: large gradients from all
        over it, and some drawn; one may be there twice.
        """
        flat = expected.reshape(-1)
        n = len(flat)
        if n <= 2 * N_PARTS:
            return torch.arange(n, device=flat.device)
        size = n // N_PARTS
        of_parts = flat[: size * N_PARTS].reshape(N_PARTS, size)
        largest = of_parts.abs().argmax(1)
        largest = largest + size * torch.arange(N_PARTS, device=flat.device)
        drawn = torch.randint(n, (N_PARTS,), **self._drawn)
        drawn = drawn.to(flat.device, non_blocking=True)
        return torch.cat([largest, drawn]).sort().values

    def wrong(self, *groups: Mapping[str, Comparison]) -> dict[str, float]:
        """Which parameters' gradients are not autograd's, and by how much of the
        largest they differ. What is in one group is of one size.
        """
        compared = [
            c for c in chain(*(group.values() for group in groups)) if len(c.expected)
        ]
        if not compared:
            return {}
        summed, squared, expected = map(torch.cat, zip(*compared, strict=True))
        lengths = torch.tensor([len(c.expected) for c in compared], device="cpu")
        number = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
        number = number.to(summed.device, non_blocking=True).expand(2, -1)
        lost = expected.isfinite() & ~summed.isfinite()
        sizes = torch.maximum(squared.masked_fill(lost, 0).sqrt(), expected.abs())
        apart = (summed - expected).abs().masked_fill(lost, torch.inf)
        numbers = torch.stack([apart, sizes])
        largest = numbers.new_zeros(2, len(lengths))
        largest.scatter_reduce_(1, number, numbers, "amax")
        # The one time that a device is waited for.
        found_apart = iter(largest.mT.tolist())
        tolerance = TOLERANCE.get(self.coarsest, HALF_TOLERANCE)
        found = {}
        for group in groups:
            names = [name for name, each in group.items() if len(each.expected)]
            of_group = dict(zip(names, found_apart, strict=False))
            largest_of_all = max((size for _, size in of_group.values()), default=0.0)
            floor = ROUNDINGS * _eps(self.coarsest) * largest_of_all
            for name, (difference, size) in of_group.items():
                if difference > tolerance * size + floor:  # NaN is the caller's to see
                    found[name] = difference / size if size else torch.inf
        return found


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
