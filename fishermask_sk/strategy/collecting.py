"""Step 3 of a query: the candidates' embeddings, F̄, and what is known of the labelled
samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask_sk.memory import Budget
from fishermask_sk.selection.embeddings import Embeddings
from fishermask_sk.strategy.embedding import Embed, in_batches
from fishermask_sk.strategy.pace import Pace, selection_seconds
from fishermask_sk.strategy.progress import Progress
from fishermask_sk.strategy.question import Drawn, Samples
from fishermask_sk.strategy.sizes import Sizes

# Numbers of embeddings that wait until their information is summed: 16 MiB of float32.
WAITING = 2**22


class Embedded(NamedTuple):
    """What the selection is given: matrices, or the embeddings of those that they are
    sums of where these cost less; and how many directions it works in.
    """

    pool: Embeddings
    pool_information: Tensor | None
    labeled_information: Tensor | None
    labeled: Embeddings | None
    information: Embeddings | None
    n_components: int


def collect(
    embed: Embed,
    sizes: Sizes,
    budget: Budget,
    progress: Progress,
    drawn: Drawn,
    n_rows: int,
    pace: Pace,
) -> Embedded:
    """Embed the samples that this process holds: its part of all sums.

    Parameters
    ----------
    embed : callable batch -> Embeddings
    sizes, budget, progress
    drawn : Drawn
        The samples that F̄ is a mean over.
    n_rows : int
        Of an embedding.
    pace : Pace
    """
    question, eligible = sizes.question, sizes.eligible
    example = embed(question.shared_example[0])
    none = example.part(slice(0, 0))
    k = none.k
    in_rows = sizes.in_rows(n_rows, k)
    total: _Information | None = None
    known: _Information | None = None
    rows: list[Embeddings] = []  # of the labelled samples, for the kernel
    averaged: list[Embeddings] = []  # of what F̄ is a mean over, likewise
    if not in_rows:
        dtype = torch.float64 if sizes.sums_in_float64 else none.dtype
        total = _Information(none, dtype)
    whole = sizes.passes_are_the_mean
    n_embedded = sizes.n_embedded(drawn.n_own)
    with progress.bar("embeddings", n_embedded) as bar:
        selection = partial(selection_seconds, example, sizes)
        advance = pace.counted(bar, n_embedded, selection=selection)

        def embedded(
            samples: Samples, positions: list[int] | None = None
        ) -> Iterator[Embeddings]:
            return in_batches(question, embed, none, samples, advance, positions)

        def average(v: Embeddings, weights: Tensor | None) -> None:
            if weights is not None:
                v = v.scaled(weights.sqrt())
            if total is not None:
                total.add(v)
            elif not sizes.shares_rows:
                averaged.append(v)

        if question.labeled.shard.total:
            if not in_rows:  # M_∅ is inverted: rounding must stay far below λ
                known = _Information(none, torch.float64)
            for v in embedded(question.labeled):
                if known is None:
                    rows.append(v)
                else:
                    known.add(v)
            if whole and known is not None and total is not None:
                total.matrix.add_(known.sum(), alpha=question.labeled_weight)
            elif whole:
                for v in rows:
                    average(v, _equal(question.labeled_weight, v.n))
        if not whole:
            for part, weights in drawn.weighted_parts():
                start = 0
                for v in embedded(*part):
                    own = None if weights is None else weights[start:][: v.n]
                    average(v, own)
                    start += v.n
        stored, start = none, 0
        positions = None if whole else eligible.proposed
        for v in embedded(
            question.pool, None if positions is None else positions.tolist()
        ):
            if start == 0:
                stored = _room_for(v, sizes, budget)
            if whole:
                weights = question.averaged[0].weights
                average(v, None if weights is None else weights[start:][: v.n])
            for to, tensor in zip(stored.tensors, v.tensors, strict=True):
                if positions is None:
                    eligible.store(tensor, to, start)
                else:
                    to[start : start + v.n] = tensor
            start += v.n
    of_mean = None if total is None else total.sum().div_(drawn.total_weight)
    of_labeled = None
    if known is not None:
        of_labeled = known.sum().div_(question.labeled.shard.total)
    scaled = _joined(averaged)
    if scaled is not None:
        share = _equal(1 / drawn.total_weight, scaled.n)
        scaled = scaled.scaled(share.sqrt())
    return Embedded(stored, of_mean, of_labeled, _joined(rows), scaled, k)


class _Information:
    """The sum of VᵀV of batches that come one by one. Each addition reads and writes
    k² numbers, so it is made for several batches at a time.
    """

    def __init__(self, like: Embeddings, dtype: torch.dtype) -> None:
        k, self.dtype = like.k, dtype
        self.matrix = torch.zeros(k, k, dtype=torch.float64, device=like.device)
        self._waiting: list[Embeddings] = []

    def add(self, v: Embeddings) -> None:
        self._waiting.append(v)
        held = sum(t.numel() for each in self._waiting for t in each.tensors)
        if held >= min(WAITING, self.matrix.numel()):
            self.sum()

    def sum(self) -> Tensor:
        """Of all that came."""
        together = _joined(self._waiting)
        if together is not None:
            self.matrix += together.information(self.dtype)
        self._waiting.clear()
        return self.matrix


def _room_for(v: Embeddings, sizes: Sizes, budget: Budget) -> Embeddings:
    """Room for what is stored of the candidates."""
    n = sizes.eligible.n_here
    per_sample = sum(tensor[:1].nbytes for tensor in v.tensors)
    needed = sizes.needs_of(v.k, v.c, v.dtype.itemsize)
    needed = needed._replace(embeddings=n * per_sample)
    return v.of([budget.empty((n, *t.shape[1:]), t.dtype, needed) for t in v.tensors])


def _joined(parts: list[Embeddings]) -> Embeddings | None:
    """Those of all batches in one."""
    if not parts:
        return None
    tensors = zip(*(part.tensors for part in parts), strict=True)
    return parts[0].of([torch.cat(each) for each in tensors])


def _equal(weight: float, n: int) -> Tensor:
    """The same weight for each of n samples."""
    return torch.full((n,), weight, dtype=torch.float64, device="cpu")
