"""A warning where a query will take long, from its first batches."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from fishermask_sk.memory import duration
from fishermask_sk.selection.embeddings import DenseEmbeddings, Embeddings
from fishermask_sk.strategy.sizes import Sizes

# Samples and sides of a matrix that are multiplied to learn the selection's pace.
TIMED_SAMPLES, TIMED_SIDE = 128, 1024
# After so many seconds of gradients their pace is known, and so many in all are long.
PACE_SECONDS, LONG_SECONDS = 10.0, 600.0


def paced(
    advance: Callable[[int], object],
    total: int,
    example: Embeddings,
    sizes: Sizes,
) -> Callable[[int], object]:
    """`advance`, and one warning where gradients and selection will take long, with the
    cheapest documented setting and what it would take.

    Parameters
    ----------
    advance : callable, told how many samples are done
    total : int
        How many have their gradients taken.
    example : Embeddings
        Of a few samples, on which a pick is tried.
    sizes : Sizes
    """
    start, done = perf_counter(), 0
    selection: float | None = None
    question = sizes.question

    def counted(n: int) -> None:
        nonlocal done, selection
        advance(n)
        done += n
        spent = perf_counter() - start
        if not 0 < done < total or spent < PACE_SECONDS or question.processes.rank:
            return
        per_sample = spent / done
        if selection is None:
            selection = _selection_seconds(example, sizes)
        if per_sample * total + selection < LONG_SECONDS:
            return
        n_pool, n_labeled = question.pool.n, question.labeled.n
        n_picked = min(10 * question.n_instances, n_pool)
        n_few = n_picked + min(2048, question.n_averaged) + n_labeled
        cheaper = per_sample * (n_few + n_pool / (1 + example.c))
        cure = (
            "candidates=10 with n_information_samples=2048 needs gradients of "
            f"{n_few} samples and a forward pass over the pool, about "
            f"{duration(cheaper)}"
            if cheaper < per_sample * total / 2
            else "layers='last' needs the head's gradients alone"
        )
        question.warn(
            f"This query needs about {duration(per_sample * total + selection)}, "
            f"{duration(selection)} of them for the selection. "
            f"The gradients of {total} samples will take about "
            f"{duration(per_sample * total)}, by the first {done}; {cure}. See "
            "the page on choosing settings.",
            "pace",
        )

    return counted


def _selection_seconds(example: Embeddings, sizes: Sizes) -> float:
    """About what the selection takes: a product of all embeddings for each pick, and
    before it 4·k³ multiplications in float64 and 3·N·c·k² in float32, of which a head
    as a product leaves a share; or those of the rows' kernel.
    """
    n, c, k = sizes.eligible.n_here, example.c, example.k
    few = torch.arange(TIMED_SAMPLES, device="cpu") % example.n
    some = example.of([tensor[few.to(tensor.device)] for tensor in example.tensors])
    columns = torch.ones(k, 2 * c, dtype=example.dtype, device=example.device)
    per_pick = _seconds(lambda: some.times(columns)) * n / TIMED_SAMPLES
    square = columns.new_ones(TIMED_SIDE, TIMED_SIDE, dtype=torch.float64)
    per_product = _seconds(lambda: square @ square) / TIMED_SIDE**3
    rows = n * c
    is_dense = isinstance(example, DenseEmbeddings)
    share = 1.0 if is_dense else sizes.share_of_dense(k, c)
    before = 4 * k**3 + 1.5 * rows * k**2 * share  # float32 is twice as fast
    if sizes.in_rows(c, k):
        before, per_pick = rows**2 * k, rows**2 * c * per_product
    return sizes.n_steps * per_pick + before * per_product


def _seconds(function: Callable[[], torch.Tensor]) -> float:
    """The shorter of two runs, to the last number."""
    spent = []
    for _ in range(2):
        start = perf_counter()
        float(function().sum())
        spent.append(perf_counter() - start)
    return min(spent)
