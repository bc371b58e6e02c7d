"""A warning where a query will take long, from its first batches."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from fishermask_sk.memory import duration
from fishermask_sk.strategy.sizes import Sizes

# After so many seconds of gradients their pace is known, and so many in all are long.
PACE_SECONDS, LONG_SECONDS = 10.0, 600.0


def paced(
    advance: Callable[[int], object],
    total: int,
    n_rows: int,
    sizes: Sizes,
) -> Callable[[int], object]:
    """`advance`, and one warning where the gradients will take long, with the cheapest
    documented setting and what it would take.
    """
    start, done = perf_counter(), 0
    question = sizes.question

    def counted(n: int) -> None:
        nonlocal done
        advance(n)
        done += n
        spent = perf_counter() - start
        if not 0 < done < total or spent < PACE_SECONDS or question.processes.rank:
            return
        per_sample = spent / done
        if per_sample * total < LONG_SECONDS:
            return
        n_pool, n_labeled = question.pool.n, question.labeled.n
        n_picked = min(10 * question.n_instances, n_pool)
        n_few = n_picked + min(2048, question.n_averaged) + n_labeled
        cheaper = per_sample * (n_few + n_pool / (1 + n_rows))
        cure = (
            "candidates=10 with n_information_samples=2048 needs gradients of "
            f"{n_few} samples and a forward pass over the pool, about "
            f"{duration(cheaper)}"
            if cheaper < per_sample * total / 2
            else "layers='last' needs the head's gradients alone"
        )
        question.warn(
            f"The gradients of {total} samples will take about "
            f"{duration(per_sample * total)}, by the first {done}; {cure}. See "
            "the page on choosing settings.",
            "pace",
        )

    return counted
