"""A warning where a query will take long, from its first batches."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from fishermask_sk.memory import duration
from fishermask_sk.selection.embeddings import Embeddings
from fishermask_sk.strategy.selection_costs import SelectionCosts
from fishermask_sk.strategy.sizes import Sizes

# Weights that are tried to learn the selection's pace, which takes a second or less.
TIMED_WEIGHTS = 512
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
            damping = float(sizes.params.damping)
            selection = SelectionCosts(example, damping, TIMED_WEIGHTS).seconds(sizes)
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
