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
over what it holds. This file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishermask_sk.selection.embeddings import DenseEmbeddings, blocks


class HeadEmbeddings:
    """Embeddings of a linear head, from what went in and the cotangents at its output.

    Parameters
    ----------
    cotangents : Tensor of shape (n, c, C)
        R.
    inputs : Tensor of shape (n, d)
        h, with a last column of ones where the bias is masked.
    classes, columns : Tensors of shape (k,), int64
        For each masked weight its y and its j.
    device : torch.device, optional
        Where arithmetic is done; by default where the cotangents are.
    """

    def __init__(
        self,
        cotangents: Tensor,
        inputs: Tensor,
        classes: Tensor,
        columns: Tensor,
        device: torch.device | None = None,
    ) -> None:
        self.cotangents, self.inputs = cotangents, inputs
        self.classes, self.columns = classes, columns
        self.n, self.c, self.n_classes = cotangents.shape
        self.k = len(classes)
        self.dtype, self.device = cotangents.dtype, device or cotangents.device

    @property
    def tensors(self) -> list[Tensor]:
        """What is stored of every sample."""
        return [self.cotangents, self.inputs]

    def of(self, tensors: Sequence[Tensor]) -> HeadEmbeddings:
        """The same weights of other samples."""
        cotangents, inputs = tensors
        places = self.classes, self.columns
        return HeadEmbeddings(cotangents, inputs, *places, self.device)

    def scaled(self, factors: Tensor) -> HeadEmbeddings:
        """Each sample's V times a number (n,)."""
        r = self.cotangents * factors.to(self.cotangents)[:, None, None]
        return self.of([r, self.inputs])

    def times(self, u: Tensor) -> Tensor:
        """As of all `Embeddings`."""
        r, h = self._here(u.dtype)
        d = h.shape[1]
        spread = u.new_zeros(d, self.n_classes, u.shape[1])
        spread[self.columns, self.classes] = u
        of_classes = (h @ spread.flatten(1)).unflatten(1, (self.n_classes, -1))
        return r @ of_classes

    def transposed(self, values: Tensor) -> Tensor:
        """The sum of V_xᵀ X_x (k, r), for X (n, c, r)."""
        r, h = self._here(values.dtype)
        of_classes = h.mT @ (r.mT @ values).flatten(1)
        spread = of_classes.unflatten(1, (self.n_classes, -1))
        return spread[self.columns, self.classes]

    def rows(self, samples: Tensor) -> Tensor:
        """As of all `Embeddings`."""
        some = self.of([t[samples.to(t.device)] for t in self.tensors])
        r, h = some._here(self.dtype)
        return r[:, :, self.classes] * h[:, None, self.columns]

    def information(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """As of all `Embeddings`."""
        total = torch.zeros(self.k, self.k, dtype=torch.float64, device=self.device)
        for part in blocks(self, self.k):
            r, h = self.part(part)._here(dtype)
            weights = r.mT @ r
            for y, own, later in self._pairs():
                of_later = h[:, self.columns[later]]
                of_later = of_later * weights[:, y, self.classes[later]]
                product = (h[:, self.columns[own]].mT @ of_later).double()
                total[own[:, None], later] += product
        for _, own, later in self._pairs():
            total[later[:, None], own] = total[own[:, None], later].mT
        return total

    def quadratic(self, m: Tensor | None = None) -> Tensor:
        """As of all `Embeddings`."""
        r, h = self._here(torch.float64)
        if m is None:
            squares = h.new_zeros(self.n, self.n_classes)
            squares.index_add_(1, self.classes, h[:, self.columns].square())
            return (r * squares[:, None]) @ r.mT
        middle = h.new_zeros(self.n, self.n_classes, self.n_classes)
        for y, own, later in self._pairs():
            products = h[:, self.columns[own]] @ m[own[:, None], later]
            products *= h[:, self.columns[later]]
            middle[:, y].index_add_(1, self.classes[later], products)
        upper = middle.triu(1)
        middle = upper + upper.mT + middle.diagonal(dim1=1, dim2=2).diag_embed()
        return r @ middle @ r.mT

    def part(self, samples: slice) -> HeadEmbeddings:
        """As of all `Embeddings`."""
        return self.of([tensor[samples] for tensor in self.tensors])

    def _here(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            self.cotangents.to(self.device, dtype),
            self.inputs.to(self.device, dtype),
        )

    def _pairs(self) -> list[tuple[int, Tensor, Tensor]]:
        """Each class in the mask with its own weights and those of it and later
        classes.
        """
        return [
            (int(y), (self.classes == y).nonzero()[:, 0], later.nonzero()[:, 0])
            for y in self.classes.unique()
            if bool((later := self.classes >= y).any())
        ]


class JoinedEmbeddings:
    """A head as a product, and the rest of a mask beside it.

    Parameters
    ----------
    head : HeadEmbeddings
    rest : DenseEmbeddings
    in_head, in_rest : Tensors of int64
        Which of the k weights are whose.
    """

    def __init__(
        self,
        head: HeadEmbeddings,
        rest: DenseEmbeddings,
        in_head: Tensor,
        in_rest: Tensor,
    ) -> None:
        self.head, self.rest = head, rest
        self.in_head, self.in_rest = in_head, in_rest
        self.n, self.c, self.k = head.n, head.c, head.k + rest.k
        self.dtype, self.device = rest.dtype, head.device

    @property
    def tensors(self) -> list[Tensor]:
        """What is stored of every sample."""
        return [*self.head.tensors, self.rest.values]

    def of(self, tensors: Sequence[Tensor]) -> JoinedEmbeddings:
        """The same weights of other samples."""
        *of_head, values = tensors
        rest = DenseEmbeddings(values, self.rest.device)
        places = self.in_head, self.in_rest
        return JoinedEmbeddings(self.head.of(of_head), rest, *places)

    def scaled(self, factors: Tensor) -> JoinedEmbeddings:
        """Each sample's V times a number (n,)."""
        scaled = self.head.scaled(factors), self.rest.scaled(factors)
        return JoinedEmbeddings(*scaled, self.in_head, self.in_rest)

    def times(self, u: Tensor) -> Tensor:
        """As of all `Embeddings`."""
        product = self.head.times(u[self.in_head])
        return product.add_(self.rest.times(u[self.in_rest]))

    def rows(self, samples: Tensor) -> Tensor:
        """As of all `Embeddings`."""
        of_head, of_rest = self.head.rows(samples), self.rest.rows(samples)
        rows = of_head.new_empty(*of_head.shape[:2], self.k)
        rows[..., self.in_head], rows[..., self.in_rest] = of_head, of_rest
        return rows

    def information(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """As of all `Embeddings`."""
        head, rest = self.in_head, self.in_rest
        total = torch.empty(self.k, self.k, dtype=torch.float64, device=self.device)
        total[head[:, None], head] = self.head.information(dtype)
        total[rest[:, None], rest] = self.rest.information(dtype)
        between = total.new_zeros(self.head.k, self.rest.k)
        for part in blocks(self, self.k):
            values = self.rest.values[part].to(self.device, dtype)
            between += self.head.part(part).transposed(values)
        total[head[:, None], rest] = between
        total[rest[:, None], head] = between.mT
        return total

    def quadratic(self, m: Tensor | None = None) -> Tensor:
        """As of all `Embeddings`."""
        if m is None:
            return self.head.quadratic() + self.rest.quadratic()
        head, rest = self.in_head[:, None], self.in_rest[:, None]
        among = self.head.quadratic(m[head, self.in_head])
        among += self.rest.quadratic(m[rest, self.in_rest])
        values = self.rest.values.to(self.device, torch.float64)
        between = self.head.times(m[head, self.in_rest]) @ values.mT
        return among + between + between.mT

    def part(self, samples: slice) -> JoinedEmbeddings:
        """As of all `Embeddings`."""
        return self.of([tensor[samples] for tensor in self.tensors])


def is_worth_it(k: int, c: int, n_classes: int, d: int) -> bool:
    """Whether the product with a head takes fewer multiplications than with its k
    masked weights as they are.
    """
    return n_classes * d + c * n_classes < c * k


def head_places(
    positions: Tensor, weight: slice, bias: slice | None, d: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which masked weights are of a head, and for these class and column; of a bias the
    column is d.

    Parameters
    ----------
    positions : Tensor of shape (k,), int64, sorted
    weight, bias : slices
        Where the weight (C, d) and the bias (C,) lie among all parameters.
    d : int
    """
    in_weight = (positions >= weight.start) & (positions < weight.stop)
    classes = (positions - weight.start) // d
    columns = (positions - weight.start) % d
    in_head = in_weight
    if bias is not None:
        in_bias = (positions >= bias.start) & (positions < bias.stop)
        classes = torch.where(in_bias, positions - bias.start, classes)
        columns = torch.where(in_bias, d, columns)
        in_head = in_weight | in_bias
    return in_head, classes[in_head], columns[in_head]
