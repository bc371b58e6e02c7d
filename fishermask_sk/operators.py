"""F̄ and M⁻¹ as things that rows of gradients are multiplied with, so that neither
needs to be a k×k matrix.

This file sees tensors only. Everything is float64: sums and inverses lose the digits
that late picks depend on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

# Rows of embeddings handled at a time where they change dtype or basis: what fits into
# a processor's cache.
BLOCK_ROWS = 2**9


class DiagonalInformation:
    """F̄ in the basis of its eigenvectors.

    Parameters
    ----------
    values : Tensor of shape (k,)
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def times(self, rows: Tensor) -> Tensor:
        """P F̄, for rows P (..., k)."""
        return rows * self.values

    def quadratic(self, p: Tensor) -> Tensor:
        """P F̄ Pᵀ for each of n blocks P (n, c, k)."""
        return self.times(p) @ p.mT


class FactoredInformation:
    """F̄ = R Rᵀ.

    P F̄ Pᵀ from the factor keeps the digits that picks leave small; from F̄ itself it
    has the rounding of the largest.

    Parameters
    ----------
    matrix : Tensor of shape (k, k)
        F̄. It is singular where a whole head is in the mask: over the classes, its
        gradients sum to zero.
    """

    def __init__(self, matrix: Tensor) -> None:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            del factor  # its memory goes first
            factor = _pivoted_cholesky(matrix)
        self.root = factor

    def times(self, rows: Tensor) -> Tensor:
        """P F̄, for rows P (..., k)."""
        return (rows @ self.root) @ self.root.mT

    def quadratic(self, p: Tensor) -> Tensor:
        """P F̄ Pᵀ for each of n blocks P (n, c, k)."""
        half = p @ self.root
        return half @ half.mT


class EmbeddedInformation:
    r"""F̄ = scale · Σ VᵀV, from embeddings that are at hand, without the k×k matrix.

    For many weights and few samples: a product costs two passes over the embeddings.

    Parameters
    ----------
    parts : list of Tensors of shape (n, c, k)
    scale : float
    """

    def __init__(self, parts: list[Tensor], scale: float) -> None:
        self.parts, self.scale = parts, scale

    def times(self, rows: Tensor) -> Tensor:
        """P F̄, for rows P (m, k)."""
        product = torch.zeros_like(rows)
        for v in self._rows(rows):
            product += (rows @ v.mT) @ v
        return product * self.scale

    def quadratic(self, p: Tensor) -> Tensor:
        """P F̄ Pᵀ for each of n blocks P (n, c, k)."""
        result = p.new_zeros(*p.shape[:2], p.shape[1])
        for v in self._rows(p):
            # One large product, for one with a batch of small matrices is several times
            # slower.
            cross = (p.flatten(0, 1) @ v.mT).unflatten(0, p.shape[:2])
            result += cross @ cross.mT
        return result * self.scale

    def trace(self, like: Tensor) -> Tensor:
        """Trace of F̄, with the device and dtype of `like`."""
        return self.scale * sum(
            (v.square().sum() for v in self._rows(like)), like.new_zeros(())
        )

    def _rows(self, like: Tensor) -> Iterator[Tensor]:
        for part in self.parts:
            for block in blocks(part):
                yield part[block].to(like).flatten(0, 1)


PoolInformation = DiagonalInformation | FactoredInformation | EmbeddedInformation


class InverseInformation:
    """M⁻¹ = base − Q diag(s) Qᵀ: every pick adds columns to Q, with signs s; there is
    room for some.

    Where `base` is a matrix, columns that find no room are folded into it.

    Parameters
    ----------
    base : Tensor of shape () or (k, k)
        A number stands for that multiple of the identity.
    n_weights : int
        k.
    room : int
        How many columns may be added.
    """

    def __init__(self, base: Tensor, n_weights: int, room: int) -> None:
        self.base = base
        self.n_columns = 0
        self._rows = base.new_empty(room, n_weights)  # Qᵀ
        self._signs = base.new_empty(room)

    def times(self, rows: Tensor) -> Tensor:
        """P M⁻¹, for rows P (..., k)."""
        # The base is symmetric; a few rows times the transpose of a large matrix are
        # faster.
        product = rows @ self.base.mT if self.base.ndim else rows * self.base
        if self.n_columns:
            q = self._rows[: self.n_columns]
            product -= ((rows @ q.mT) * self._signs[: self.n_columns]) @ q
        return product

    def diagonal(self) -> Tensor:
        """The diagonal of M⁻¹ (k,), where the base is a matrix."""
        q = self._rows[: self.n_columns]
        return self.base.diagonal() - (
            q.square() * self._signs[: self.n_columns, None]
        ).sum(0)

    def leading(self, n: int) -> Tensor:
        """The first n rows and columns of M⁻¹, where the base is a matrix."""
        q = self._rows[: self.n_columns, :n]
        return self.base[:n, :n] - (q * self._signs[: self.n_columns, None]).mT @ q

    def subtract(self, columns: Tensor, sign: int) -> None:
        """M⁻¹ ← M⁻¹ − sign · U Uᵀ, for U (k, m)."""
        self.reserve(columns.shape[1])
        place = slice(self.n_columns, self.n_columns + columns.shape[1])
        self._rows[place] = columns.mT
        self._signs[place] = sign
        self.n_columns = place.stop

    def reserve(self, n_columns: int) -> None:
        """Make room, so that the next columns can be taken back one by one."""
        if self.base.ndim and self.n_columns + n_columns > len(self._signs):
            q = self._rows[: self.n_columns]
            self.base.addmm_((q * self._signs[: self.n_columns, None]).mT, q, alpha=-1)
            self.n_columns = 0

    def drop_last(self, n_columns: int) -> None:
        """Take back the last columns, which `reserve` made room for."""
        self.n_columns -= n_columns


def _pivoted_cholesky(matrix: Tensor) -> Tensor:
    """R (k, rank) with R Rᵀ = matrix up to rounding, where the matrix (k, k) is
    singular.
    """
    # LAPACK ends where what is left is small beside the largest entry: with a diagonal
    # of ones none is larger.
    scale = matrix.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    scaled = (matrix / scale).div_(scale[:, None]).cpu().numpy()
    factor, pivots, rank, _ = dpstrf(scaled.T, lower=1, overwrite_a=1)
    root = matrix.new_empty(len(matrix), rank)
    place = torch.as_tensor(pivots - 1, device=root.device).long()
    root[place] = torch.as_tensor(factor[:, :rank]).tril_().to(root)
    return root.mul_(scale[:, None])


def blocks(embeddings: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Slices of the samples, of about `rows` rows each (default `BLOCK_ROWS`)."""
    n, c, _ = embeddings.shape
    step = max(1, (rows or BLOCK_ROWS) // c)
    return (slice(start, start + step) for start in range(0, n, step))
