r"""The head's embeddings as a product, which is never formed.

A linear head z = W h + b has the gradient R ⊗ [h, 1] at W and b, so that with R_x
(c, C), the reduced cotangents at its output, and h_x (d), its input and a one,

.. math:: V_x[:, (y, j)] = R_x[:, y] \; h_{x,j}, \qquad
    V_x U = \sum_y R_x[:, y] \otimes (h_x^\top U_y),

for U (k, r) with rows (y, j). That is C·d + c·C multiplications a sample and column in
place of c·C·d, and c·C + d numbers in place of c·C·d. Likewise

.. math:: \sum_x V_x^\top V_x = \Big[ \sum_x (R_x^\top R_x)_{yz} \, h_x h_x^\top
    \Big]_{yz}, \qquad V_x M V_x^\top = R_x \big[ h_x^\top M_{yz} h_x \big]_{yz}
    R_x^\top.

Where the mask holds the head in part, what it leaves out is zero in U, and all sums are
over what it holds. Where it holds all, and the rows of R sum to zero, as those of a
softmax do, one class can go: a rotation of the classes takes what they share to an axis
along which nothing lies. This file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Protocol

import torch
from torch import Tensor

from fishermask_sk.selection.embeddings import (
    DenseEmbeddings,
    Embeddings,
    aligned,
    blocks,
    gathered,
    room_for_rows,
)

# The cotangents of all classes sum to zero where they do to so many roundings.
ROUNDINGS_OF_SUM = 64


@dataclass(frozen=True)
class HeadMask:
    """Which of a head's weights are masked: of each its y, its j, and where it is among
    all of the head, inputs first (k,), ascending.
    """

    classes: Tensor
    columns: Tensor
    places: Tensor

    @cached_property
    def of_one_class_less(self) -> HeadMask:
        """Of a whole head all classes but the last."""
        n, d = len(self.runs) - 1, len(self.classes) // len(self.runs)
        places = torch.arange(n * d, device=self.classes.device)
        return HeadMask(places % n, places // n, places)

    @cached_property
    def order(self) -> Tensor:
        """The masked weights class by class (k,)."""
        return self.classes.argsort(stable=True)

    @cached_property
    def runs(self) -> list[tuple[int, slice, slice]]:
        """Each masked class with where in that order its own weights are, and those of
        it and later classes.
        """
        classes, counts = self.classes.unique(return_counts=True)
        ends = counts.cumsum(0)
        bounds = torch.stack([classes, ends - counts, ends]).mT.tolist()
        return [(y, slice(i, j), slice(i, None)) for y, i, j in bounds]

    @cached_property
    def _of_class(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {y: (self.order[own], self.order[later]) for y, own, later in self.runs}

    def own(self, y: int) -> Tensor:
        """Which masked weights are those of a class."""
        return self._of_class[y][0]

    def later(self, y: int) -> Tensor:
        """Which are those of it and later classes."""
        return self._of_class[y][1]


class HeadEmbeddings:
    """Embeddings of a linear head, from what went in and the cotangents at its output.

    Parameters
    ----------
    cotangents : Tensor of shape (n, c, C)
        R.
    inputs : Tensor of shape (n, d)
        h, with a last column of ones where the bias is masked.
    mask : HeadMask
    device : torch.device, optional
        Where arithmetic is done; by default where the cotangents are.

    Attributes
    ----------
    is_whole : bool
        Whether all of the head is masked.
    """

    def __init__(
        self,
        cotangents: Tensor,
        inputs: Tensor,
        mask: HeadMask,
        device: torch.device | None = None,
    ) -> None:
        self.cotangents, self.inputs, self.mask = cotangents, inputs, mask
        self.classes, self.columns = mask.classes, mask.columns
        self.n, self.c, self.n_classes = cotangents.shape
        self.k = len(self.classes)
        self.is_whole = self.k == self.n_classes * inputs.shape[1]
        # Products of a k×k matrix with a block's inputs should stay near the processor.
        self.width = max(self.c * self.n_classes, self.k // 2)
        self.dtype, self.device = cotangents.dtype, device or cotangents.device

    @property
    def tensors(self) -> list[Tensor]:
        """What is stored of every sample."""
        return [self.cotangents, self.inputs]

    def of(self, tensors: Sequence[Tensor]) -> HeadEmbeddings:
        """The same weights of other samples."""
        cotangents, inputs = tensors
        return HeadEmbeddings(cotangents, inputs, self.mask, self.device)

    def scaled(self, factors: Tensor) -> HeadEmbeddings:
        """Each sample's V times a number (n,)."""
        r = self.cotangents * factors.to(self.cotangents)[:, None, None]
        return self.of([r, self.inputs])

    def centred(self) -> HeadEmbeddings | None:
        """The same embeddings of a whole head in a basis without what all classes
        share; None where something lies along that.

        Of the reflection that takes (1, ..., 1) to the last axis all columns but that.
        """
        r, n_classes = self.cotangents, self.n_classes
        rounding = ROUNDINGS_OF_SUM * torch.finfo(r.dtype).eps
        if n_classes < 2 or bool(r.sum(2).abs().max() > rounding * r.abs().max()):
            return None
        rotated = r[..., :-1] - r[..., -1:] / (1 + n_classes**0.5)
        mask = self.mask.of_one_class_less
        return HeadEmbeddings(rotated, self.inputs, mask, self.device)

    def times(self, u: Tensor) -> Tensor:
        """As of all `Embeddings`."""
        r, h = self._here(u.dtype)
        if not self.is_whole:
            whole = u.new_zeros(h.shape[1] * self.n_classes, u.shape[1])
            u = whole.index_copy_(0, self.mask.places, u)
        of_classes = h @ u.reshape(h.shape[1], -1)
        return r @ of_classes.view(self.n, self.n_classes, -1)

    def transposed(self, values: Tensor) -> Tensor:
        """The sum of V_xᵀ X_x (k, r), for X (n, c, r)."""
        r, h = self._here(values.dtype)
        of_classes = h.mT @ (r.mT @ values).flatten(1)
        spread = of_classes.unflatten(1, (self.n_classes, -1))
        return spread[self.columns, self.classes]

    def rows(self, samples: Tensor, out: Tensor | None = None) -> Tensor:
        """As of all `Embeddings`."""
        here = samples.to(self.inputs.device)
        some = self.of([gathered(tensor, here) for tensor in self.tensors])
        r, h = some._here(self.dtype)
        out = room_for_rows(self, len(here)) if out is None else out
        shape = h.shape[1], self.n_classes
        whole = out if self.is_whole else out.new_empty(*out.shape[:2], prod(shape))
        torch.mul(h[:, None, :, None], r[:, :, None], out=whole.unflatten(2, shape))
        if not self.is_whole:
            torch.index_select(whole, 2, self.mask.places, out=out)
        return out

    def information(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """As of all `Embeddings`."""
        total = torch.empty(self.k, self.k, dtype=torch.float64, device=self.device)
        order = self.mask.order
        classes, columns = self.classes[order], self.columns[order]
        # What a class has is added to once a block: few blocks.
        width = max(self.c * self.n_classes, self.k // 8)
        for y, own, later in self.mask.runs:
            n_own = own.stop - own.start
            of_class = total.new_zeros(self.k - own.start, n_own)
            for part in blocks(self, width):
                r, h = self.part(part)._here(dtype)
                h = _samples_last(h)
                weights = _samples_last((r[:, :, y, None] * r).sum(1))
                if self.is_whole:
                    seen = (weights[y:, None] * h).flatten(0, 1)
                else:
                    seen = weights[classes[later]].mul_(h[columns[later]])
                of_class += (seen @ aligned(h[columns[own]].mT))[:, :n_own]
            total[order[later][:, None], order[own]] = of_class
            total[order[own][:, None], order[later]] = of_class.mT
        return total

    def quadratic(
        self, m: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """As of all `Embeddings`."""
        shape = self.n, self.c, self.c
        found = torch.empty(shape, dtype=torch.float64, device=self.device)
        order = self.mask.order
        classes, columns = self.classes[order], self.columns[order]
        # Of M each class with itself and later ones, taken once and not once a block.
        parts_of_m = []
        if m is not None:
            for _, own, later in self.mask.runs:
                parts_of_m.append(m[order[later]][:, order[own]].to(dtype))
        for part in blocks(self):
            r, h = self.part(part)._here(dtype)
            h = _samples_last(h)  # sums over what a class has are sums of rows
            middle = h.new_zeros(self.n_classes, self.n_classes, h.shape[1])
            if m is None:
                squares = middle.diagonal(dim1=0, dim2=1).mT
                squares.index_add_(0, classes, h.square()[columns])
            for (y, own, later), of_m in zip(self.mask.runs, parts_of_m, strict=False):
                products = of_m @ h[columns[own]]
                if self.is_whole:
                    of_classes = products.unflatten(0, (-1, len(h))).mul_(h)
                    torch.sum(of_classes, 1, out=middle[y, y:])
                else:
                    products *= h[columns[later]]
                    middle[y].index_add_(0, classes[later], products)
                middle[y + 1 :, y] = middle[y, y + 1 :]
            found[part] = r @ middle.permute(2, 0, 1) @ r.mT
        return found

    def part(self, samples: slice) -> HeadEmbeddings:
        """As of all `Embeddings`."""
        return self.of([tensor[samples] for tensor in self.tensors])

    def _here(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """R and h where arithmetic is done; nobody waits for the copies."""
        r, h = (t.to(self.device, dtype, non_blocking=True) for t in self.tensors)
        return r, h


def _samples_last(values: Tensor) -> Tensor:
    """Of values (n, m) the columns as rows, which are quick to take."""
    return values.mT.contiguous()


class Head(Embeddings, Protocol):
    """A head's embeddings in any form, the whole head's among them."""

    mask: HeadMask
    inputs: Tensor
    n_classes: int

    def transposed(self, values: Tensor) -> Tensor:
        """The sum of V_xᵀ X_x (k, r), for X (n, c, r)."""

    def part(self, samples: slice) -> Head:
        """As of all `Embeddings`."""

    def of(self, tensors: Sequence[Tensor]) -> Head:
        """As of all `Embeddings`."""

    def scaled(self, factors: Tensor) -> Head:
        """As of all `Embeddings`."""


class JoinedEmbeddings:
    """A head as a product, and the rest of a mask behind it.

    Parameters
    ----------
    head : HeadEmbeddings or TopHeadEmbeddings
    rest : DenseEmbeddings
    """

    def __init__(self, head: Head, rest: DenseEmbeddings) -> None:
        self.head, self.rest = head, rest
        self.n, self.c, self.k = head.n, head.c, head.k + rest.k
        self.width = head.width + rest.width
        self.dtype, self.device = rest.dtype, head.device

    @property
    def tensors(self) -> list[Tensor]:
        """What is stored of every sample."""
        return [*self.head.tensors, self.rest.values]

    def of(self, tensors: Sequence[Tensor]) -> JoinedEmbeddings:
        """The same weights of other samples."""
        *of_head, values = tensors
        rest = DenseEmbeddings(values, self.rest.device)
        return JoinedEmbeddings(self.head.of(of_head), rest)

    def scaled(self, factors: Tensor) -> JoinedEmbeddings:
        """Each sample's V times a number (n,)."""
        return JoinedEmbeddings(self.head.scaled(factors), self.rest.scaled(factors))

    def times(self, u: Tensor) -> Tensor:
        """As of all `Embeddings`."""
        product = self.head.times(u[: self.head.k])
        values = self.rest.values.to(self.device, u.dtype, non_blocking=True)
        product.flatten(0, 1).addmm_(values.flatten(0, 1), u[self.head.k :])
        return product

    def rows(self, samples: Tensor, out: Tensor | None = None) -> Tensor:
        """As of all `Embeddings`."""
        here = samples.to(self.rest.values.device)
        out = room_for_rows(self, len(here)) if out is None else out
        self.head.rows(here, out[..., : self.head.k])
        self.rest.rows(here, out[..., self.head.k :])
        return out

    def information(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """As of all `Embeddings`."""
        head, rest = slice(self.head.k), slice(self.head.k, None)
        total = torch.empty(self.k, self.k, dtype=torch.float64, device=self.device)
        total[head, head] = self.head.information(dtype)
        total[rest, rest] = self.rest.information(dtype)
        between = total[head, rest].zero_()
        for part in blocks(self):
            values = self.rest.values[part].to(self.device, dtype)
            between += self.head.part(part).transposed(values)
        total[rest, head] = between.mT
        return total

    def quadratic(
        self, m: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """As of all `Embeddings`."""
        if m is None:
            return self.head.quadratic(None, dtype) + self.rest.quadratic(None, dtype)
        head, rest = slice(self.head.k), slice(self.head.k, None)
        found = self.head.quadratic(m[head, head], dtype)
        found += self.rest.quadratic(m[rest, rest], dtype)
        across = m[head, rest].to(dtype)
        for part in blocks(self):
            values = self.rest.values[part].to(self.device, dtype)
            between = self.head.part(part).times(across) @ values.mT
            found[part] += between + between.mT
        return found

    def part(self, samples: slice) -> JoinedEmbeddings:
        """As of all `Embeddings`."""
        return self.of([tensor[samples] for tensor in self.tensors])


def cheapest_form(k: int, c: int, n_classes: int, d: int, on_cpu: bool = True) -> str:
    """The form of k masked weights of a head with the fewest multiplications: "dense",
    as they are; "whole", as a product of the whole head; or "tops", where each sample
    has c rows for its c + 1 most probable classes alone. That goes class by class,
    which an accelerator had better not.

    Examples
    --------
    >>> cheapest_form(5130, 9, 10, 513), cheapest_form(5000, 4, 100, 513)
    ('whole', 'tops')
    """
    counts = multiplications(k, c, n_classes, d, on_cpu)
    return min(counts, key=lambda form: counts[form])


def multiplications(
    k: int, c: int, n_classes: int, d: int, on_cpu: bool = True
) -> dict[str, int]:
    """Of a product with one column, a sample, by form."""
    counts = {"dense": c * k, "whole": n_classes * d + c * n_classes}
    if on_cpu and c + 1 < n_classes:
        counts["tops"] = (c + 1) * ceil(k / n_classes) + c * (c + 1)
    return counts


def head_mask(
    positions: Tensor, weight: slice, bias: slice | None, d: int
) -> tuple[Tensor, HeadMask]:
    """Which masked weights are a head's, inputs first, and what they are of it; of a
    bias the column is d.

    Parameters
    ----------
    positions : Tensor of shape (k,), int64, sorted
    weight, bias : slices
        Where the weight (C, d) and the bias (C,) lie among all parameters.
    d : int
    """
    in_head = (positions >= weight.start) & (positions < weight.stop)
    classes = (positions - weight.start) // d
    columns = (positions - weight.start) % d
    if bias is not None:
        in_bias = (positions >= bias.start) & (positions < bias.stop)
        classes = torch.where(in_bias, positions - bias.start, classes)
        columns = torch.where(in_bias, d, columns)
        in_head = in_head | in_bias
    n_classes = (weight.stop - weight.start) // d
    places, order = (columns * n_classes + classes)[in_head].sort()
    own = in_head.nonzero()[order, 0]
    return own, HeadMask(classes[own], columns[own], places)
