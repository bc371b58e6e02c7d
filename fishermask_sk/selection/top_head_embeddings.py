r"""A head's embeddings as a product, where only a few classes of a sample count.

With the m most probable classes of each sample alone, R_x (c, m) has a column for each
of them and y_x (m) says which they are, so that

.. math:: V_x U = \sum_{i \le m} R_x[:, i] \otimes (h_x^\top U_{y_x(i)}).

Of U (k, r) a sample meets the weights of its own classes only: about m·k/C + c·m
multiplications a column, for c·m + m + d numbers that are stored. Everything goes class
by class, over the samples that have it among theirs. This file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fishermask_sk.selection.embeddings import blocks, gathered, room_for_rows
from fishermask_sk.selection.head_embeddings import HeadEmbeddings, HeadMask


class TopHeadEmbeddings:
    """Embeddings of a linear head, of a few classes a sample.

    Parameters
    ----------
    cotangents : Tensor of shape (n, c, m)
        R.
    tops : Tensor of shape (n, m), int32
        The classes of its columns, ascending.
    inputs : Tensor of shape (n, d)
        h, with a last column of ones where the bias is masked.
    mask : HeadMask
    n_classes : int
        C.
    device : torch.device, optional
        Where arithmetic is done; by default where the cotangents are.
    """

    def __init__(
        self,
        cotangents: Tensor,
        tops: Tensor,
        inputs: Tensor,
        mask: HeadMask,
        n_classes: int,
        device: torch.device | None = None,
    ) -> None:
        self.cotangents, self.tops, self.inputs = cotangents, tops, inputs
        self.mask, self.n_classes = mask, n_classes
        self.classes, self.columns = mask.classes, mask.columns
        self.n, self.c, self.m = cotangents.shape
        self.k = len(self.classes)
        self.width = self.c * self.m + self.n_classes + inputs.shape[1]
        self.dtype, self.device = cotangents.dtype, device or cotangents.device

    @classmethod
    def of_whole(cls, whole: HeadEmbeddings, m: int) -> TopHeadEmbeddings | None:
        """The same embeddings, or None where a sample has more than m classes."""
        r = whole.cotangents
        largest = r.abs().amax(1)
        if r.shape[2] <= m or bool(((largest != 0).sum(1) > m).any()):
            return None
        tops = largest.topk(m, dim=1).indices.sort(1).values
        of_tops = r.gather(2, tops[:, None].expand(-1, r.shape[1], -1))
        n_classes = whole.n_classes
        return cls(of_tops, tops.int(), whole.inputs, whole.mask, n_classes)

    @property
    def tensors(self) -> list[Tensor]:
        """What is stored of every sample."""
        return [self.cotangents, self.tops, self.inputs]

    def of(self, tensors: Sequence[Tensor]) -> TopHeadEmbeddings:
        """The same weights of other samples."""
        r, tops, inputs = tensors
        settings = self.mask, self.n_classes, self.device
        return TopHeadEmbeddings(r, tops, inputs, *settings)

    def scaled(self, factors: Tensor) -> TopHeadEmbeddings:
        """Each sample's V times a number (n,)."""
        r = self.cotangents * factors.to(self.cotangents)[:, None, None]
        return self.of([r, self.tops, self.inputs])

    def times(self, u: Tensor) -> Tensor:
        """As of all `Embeddings`."""
        r, tops, h = self._here(u.dtype)
        products = u.new_zeros(self.n * self.m, u.shape[1])
        for y, pairs in self._by_class(tops):
            own = self.mask.own(y)
            products[pairs] = self._inputs_of(h, pairs, own) @ u[own]
        return r @ products.view(self.n, self.m, -1)

    def transposed(self, values: Tensor) -> Tensor:
        """The sum of V_xᵀ X_x (k, r), for X (n, c, r)."""
        r, tops, h = self._here(values.dtype)
        of_tops = (r.mT @ values).flatten(0, 1)
        total = values.new_zeros(self.k, values.shape[2])
        for y, pairs in self._by_class(tops):
            own = self.mask.own(y)
            total[own] = self._inputs_of(h, pairs, own).mT @ of_tops[pairs]
        return total

    def rows(self, samples: Tensor, out: Tensor | None = None) -> Tensor:
        """As of all `Embeddings`."""
        here = samples.to(self.inputs.device)
        some = self.of([gathered(tensor, here) for tensor in self.tensors])
        r, tops, h = some._here(self.dtype)
        spread = r.new_zeros(len(r), self.c, self.n_classes)
        spread.scatter_(2, tops[:, None].expand_as(r), r)
        out = room_for_rows(self, len(here)) if out is None else out
        return out.copy_(h[:, None, self.columns] * spread[..., self.classes])

    def information(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """As of all `Embeddings`."""
        total = torch.zeros(self.k, self.k, dtype=torch.float64, device=self.device)
        for part in blocks(self):
            self.part(part)._add_information(total, dtype)
        for y, _, _ in self.mask.runs:
            own, later = self.mask.own(y), self.mask.later(y)
            total[later[:, None], own] = total[own[:, None], later].mT
        return total

    def _add_information(self, total: Tensor, dtype: torch.dtype) -> None:
        """Of each class with itself and later ones."""
        r, tops, h = self._here(dtype)
        squares = (r.mT @ r).flatten(0, 1)  # (n·m, m)
        for y, pairs in self._by_class(tops):
            own, later = self.mask.own(y), self.mask.later(y)
            samples = pairs // self.m
            weights = r.new_zeros(len(pairs), self.n_classes)
            weights.scatter_(1, tops[samples], squares[pairs])
            of_later = (
                self._inputs_of(h, pairs, later) * weights[:, self.classes[later]]
            )
            total[own[:, None], later] += self._inputs_of(h, pairs, own).mT @ of_later

    def quadratic(
        self, m: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """As of all `Embeddings`."""
        shape = self.n, self.c, self.c
        found = torch.empty(shape, dtype=torch.float64, device=self.device)
        for part in blocks(self):
            found[part] = self.part(part)._quadratic(m, dtype)
        return found

    def _quadratic(self, m: Tensor | None, dtype: torch.dtype) -> Tensor:
        r, tops, h = self._here(dtype)
        middle = h.new_zeros(self.n * self.m, self.m)
        for y, pairs in self._by_class(tops):
            own = self.mask.own(y)
            of_own = self._inputs_of(h, pairs, own)
            samples = pairs // self.m
            if m is None:
                is_y = tops[samples] == y
                middle[pairs] = of_own.square().sum(1, keepdim=True) * is_y
                continue
            later = self.mask.later(y)
            products = of_own @ m[own][:, later].to(dtype)
            products *= self._inputs_of(h, pairs, later)
            of_classes = h.new_zeros(len(pairs), self.n_classes)
            of_classes.index_add_(1, self.classes[later], products)
            middle[pairs] = of_classes.gather(1, tops[samples])
        middle = middle.view(self.n, self.m, self.m)
        upper = middle.triu(1)  # a sample's classes ascend
        middle = upper + upper.mT + middle.diagonal(dim1=1, dim2=2).diag_embed()
        return r @ middle @ r.mT

    def part(self, samples: slice) -> TopHeadEmbeddings:
        """As of all `Embeddings`."""
        return self.of([tensor[samples] for tensor in self.tensors])

    def _by_class(self, tops: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each masked class with the places, among all (n·m) of samples and their
        classes, where it is.
        """
        flat = tops.flatten()
        counts = flat.bincount(minlength=self.n_classes).tolist()
        places = flat.argsort(stable=True).split(counts)
        for y, _, _ in self.mask.runs:
            if counts[y]:
                yield y, places[y]

    def _inputs_of(self, h: Tensor, pairs: Tensor, weights: Tensor) -> Tensor:
        """What some weights see of the samples of such places."""
        return h[(pairs // self.m)[:, None], self.columns[weights]]

    def _here(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """R, the classes and h where arithmetic is done."""
        r, h = (
            t.to(self.device, dtype, non_blocking=True)
            for t in (self.cotangents, self.inputs)
        )
        return r, self.tops.to(self.device, torch.int64), h
