r"""Masked gradient embeddings :math:`V_x \in \mathbb{R}^{c \times k}` as something that
matrices are multiplied with.

The selection needs five things of them and no more: ``times(U)`` is V_x U for every
sample, ``rows(i)`` are V_i themselves, ``information()`` is :math:`\sum_x V_x^\top
V_x`, ``quadratic(M)`` is :math:`V_x M V_x^\top`, and ``part(samples)`` are the
embeddings of some samples. Tensors are laid out (n, c, k): samples, rows, weights. This
file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers that one block of samples may hold as they are multiplied: 16 MiB of float64
# stay near a processor's cache, and an accelerator wants few launches.
BLOCK_NUMBERS = {"cpu": 2**21}
ACCELERATOR_NUMBERS = 2**27
# Blocks of many samples are a multiple of this, and large float32 products have columns
# that are a multiple of that: others take half as long again.
ALIGNED_SAMPLES, ALIGNED_COLUMNS = 64, 16


class Embeddings(Protocol):
    """What the selection is written against. `device` is where arithmetic is done, and
    `width` how many numbers of a sample are held there at a time.
    """

    n: int
    c: int
    k: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def times(self, u: Tensor) -> Tensor:
        """V_x U for every sample (n, c, r), for U (k, r); in the dtype of U."""

    def rows(self, samples: Tensor, out: Tensor | None = None) -> Tensor:
        """V_i of some samples (m, c, k), float64; into `out`, where that is given."""

    def information(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The sum of VᵀV (k, k), float64; the products are of the given dtype."""

    def quadratic(
        self, m: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """V_x M V_xᵀ for every sample (n, c, c), float64; M (k, k), or None for I. The
        products are of the given dtype.
        """

    def part(self, samples: slice) -> Embeddings:
        """The embeddings of these samples, without a copy."""

    @property
    def tensors(self) -> list[Tensor]:
        """What is stored of every sample, samples first."""

    def of(self, tensors: Sequence[Tensor]) -> Embeddings:
        """The embeddings, at the same weights, that such tensors stand for."""

    def scaled(self, factors: Tensor) -> Embeddings:
        """Each sample's V times a number (n,)."""


class DenseEmbeddings:
    """Embeddings that are a tensor.

    Parameters
    ----------
    values : Tensor of shape (n, c, k)
        In memory, in a mapped file, or on another device than the arithmetic: it is
        read in blocks.
    device : torch.device, optional
        Where arithmetic is done; by default where the values are.
    """

    def __init__(self, values: Tensor, device: torch.device | None = None) -> None:
        self.values = values
        self.n, self.c, self.k = values.shape
        self.width = self.c * self.k
        self.dtype, self.device = values.dtype, device or values.device

    @property
    def tensors(self) -> list[Tensor]:
        """As of all `Embeddings`."""
        return [self.values]

    def of(self, tensors: Sequence[Tensor]) -> DenseEmbeddings:
        """As of all `Embeddings`."""
        return DenseEmbeddings(tensors[0], self.device)

    def scaled(self, factors: Tensor) -> DenseEmbeddings:
        """As of all `Embeddings`."""
        factors = factors.to(self.values)[:, None, None]
        return DenseEmbeddings(self.values * factors, self.device)

    def times(self, u: Tensor) -> Tensor:
        """As of all `Embeddings`."""
        return self._there(self.values, u.dtype) @ u

    def rows(self, samples: Tensor, out: Tensor | None = None) -> Tensor:
        """As of all `Embeddings`."""
        here = samples.to(self.values.device)
        found = self._there(gathered(self.values, here), self.dtype)
        return found.double() if out is None else out.copy_(found)

    def information(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """As of all `Embeddings`."""
        total = torch.zeros(self.k, self.k, dtype=torch.float64, device=self.device)
        for part in blocks(self):
            rows = self._there(self.values[part], dtype).flatten(0, 1)
            total += (rows.mT @ aligned(rows))[:, : self.k]
        return total

    def quadratic(
        self, m: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """As of all `Embeddings`."""
        m = m if m is None else aligned(m.to(dtype))
        found = torch.empty(
            self.n, self.c, self.c, dtype=torch.float64, device=self.device
        )
        for part in blocks(self):
            v = self._there(self.values[part], dtype)
            found[part] = (v if m is None else (v @ m)[..., : self.k]) @ v.mT
        return found

    def _there(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Where arithmetic is done. Nobody waits for the copy, for nobody writes into
        what is copied.
        """
        return values.to(self.device, dtype, non_blocking=True)

    def part(self, samples: slice) -> DenseEmbeddings:
        """As of all `Embeddings`."""
        return DenseEmbeddings(self.values[samples], self.device)


def as_embeddings(
    values: Tensor | Embeddings, device: torch.device | None = None
) -> Embeddings:
    """A tensor as embeddings; embeddings as they are."""
    return DenseEmbeddings(values, device) if isinstance(values, Tensor) else values


def blocks(embeddings: Embeddings, width: int | None = None) -> Iterator[slice]:
    """Slices of the samples, each a block where one takes so many numbers."""
    numbers = BLOCK_NUMBERS.get(embeddings.device.type, ACCELERATOR_NUMBERS)
    step = max(1, numbers // max(1, width or embeddings.width))
    if step > ALIGNED_SAMPLES:
        step -= step % ALIGNED_SAMPLES
    return (slice(i, i + step) for i in range(0, embeddings.n, step))


def aligned(matrix: Tensor) -> Tensor:
    """A matrix with zeros at its right, where its columns are not quick to make."""
    return F.pad(matrix, (0, -matrix.shape[1] % ALIGNED_COLUMNS))


def room_for_rows(embeddings: Embeddings, m: int) -> Tensor:
    """For V_i of m samples."""
    shape = m, embeddings.c, embeddings.k
    return torch.empty(shape, dtype=torch.float64, device=embeddings.device)


def gathered(tensor: Tensor, samples: Tensor) -> Tensor:
    """A tensor's entries of some samples, in pinned memory where the tensor's is."""
    if not tensor.is_pinned():
        return tensor.index_select(0, samples)
    shape = len(samples), *tensor.shape[1:]
    room = torch.empty(shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return torch.index_select(tensor, 0, samples, out=room)


def first_copies(embeddings: Embeddings) -> Tensor:
    """Of each sample the first that equals it (n,).

    Sums of the bits of a sample, with random weights, are equal for copies; those that
    have the same are compared.
    """
    tensors = embeddings.tensors
    places = torch.arange(embeddings.n, device=tensors[0].device)
    if not embeddings.n:
        return places.to(embeddings.device)
    generator = torch.Generator("cpu").manual_seed(0)
    keys = torch.zeros_like(places)
    for tensor in tensors:
        size = (tensor[0].numel() * tensor.itemsize // 4,)
        weights = torch.randint(
            -(2**62), 2**62, size, generator=generator, device="cpu"
        ).to(tensor.device)
        for part in blocks(embeddings):
            # −0 equals 0 and has other bits; a sum with 0 is never −0.
            bits = (tensor[part] + 0).flatten(1).contiguous().view(torch.int32)
            keys[part] += (bits * weights).sum(1)
    groups = keys.unique(return_inverse=True)[1]
    first = torch.empty_like(places).scatter_reduce_(
        0, groups, places, "amin", include_self=False
    )[groups]
    later = (first < places).nonzero()[:, 0]
    for some in later.split(max(1, BLOCK_NUMBERS["cpu"] // max(1, embeddings.width))):
        for tensor in tensors:
            differ = (tensor[some] != tensor[first[some]]).flatten(1).any(1)
            first[some] = torch.where(differ, some, first[some])
    return first.to(embeddings.device)
