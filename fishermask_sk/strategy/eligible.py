"""Which samples of the pool may be picked: all, those that were proposed, or the most
uncertain.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishermask_sk.scores.proposals import given_positions, least, margins, seeded
from fishermask_sk.strategy.progress import Progress
from fishermask_sk.strategy.question import Question, check_complete


class Eligible:
    """The samples that may be picked.

    Parameters
    ----------
    question : Question
    candidates : int, positions, callable or None
        A multiple of `n_instances`, positions, a callable that gives them, or None for
        all.
    estimator, X_pool
        What a callable is handed.

    Attributes
    ----------
    proposed : ndarray of shape (m,), or None for all
        Their positions among the pool's samples here, sorted.
    n_most_uncertain : int or None
        How many are to be found by their margin, of all processes together.
    shard : Shard
        The place of those here among those of all processes.
    """

    def __init__(
        self,
        question: Question,
        candidates: Any = None,
        estimator: Any = None,
        X_pool: Any = None,
    ) -> None:
        self.question = question
        self.proposed: np.ndarray | None = None
        self.n_most_uncertain: int | None = None
        self.shard = question.pool.shard
        if candidates is None:
            return
        processes, n_instances = question.processes, question.n_instances
        if isinstance(candidates, Integral):
            n = min(int(candidates) * n_instances, question.pool.shard.total)
            self.n_most_uncertain = n if n < question.pool.shard.total else None
            return
        n_pool = question.pool.n
        with processes.together():
            if callable(candidates):
                proposal = seeded(candidates, question.rng, processes.rank)
                candidates = proposal(estimator, X_pool) if n_pool else []
            proposed = given_positions(candidates, n_pool)
        n_proposed = sum(processes.objects(len(proposed)))
        if n_instances > n_proposed:
            raise ValueError(
                f"n_instances={n_instances} exceeds the {n_proposed} candidates; "
                "lower n_instances, or propose more."
            )
        self._set(proposed)

    def _set(self, proposed: np.ndarray) -> None:
        self.proposed = proposed
        self.shard = self.question.processes.shard(len(proposed))

    def find_most_uncertain(self, progress: Progress) -> None:
        """Pass the pool through the net; the samples of all processes may be picked
        whose margin is smallest.
        """
        assert self.n_most_uncertain is not None  # for the type checker
        question = self.question
        pool, processes = question.pool, question.processes
        with (
            processes.together(),
            torch.no_grad(),
            progress.bar("candidates", pool.n) as advance,
        ):

            def logits() -> Iterator[Tensor]:
                for batch in question.batches(pool):
                    yield (found := question.fitted.logits(batch))
                    advance(len(found))

            own = margins(logits())
            check_complete(len(own), pool)
            broken = (~own.isfinite()).nonzero()[:, 0]
            if len(broken):
                raise ValueError(
                    f"The net's outputs on sample {int(broken[0])} of X_pool hold NaN "
                    "or infinite values; drop the sample, or scale the samples."
                )
        chosen = least(processes.concatenated(own), self.n_most_uncertain)
        self._set(pool.shard.own(chosen).numpy())

    @property
    def n_here(self) -> int:
        """How many there are here, or may be; their embeddings are kept."""
        if self.proposed is not None:
            return len(self.proposed)
        n_pool = self.question.pool.n
        return min(n_pool, self.n_most_uncertain or n_pool)

    @property
    def n_total(self) -> int:
        """How many there are on all processes."""
        return self.n_most_uncertain or self.shard.total

    @property
    def is_all(self) -> bool:
        """Whether every sample of the pool may be picked."""
        return self.proposed is None and self.n_most_uncertain is None

    def store(self, v: Tensor, room: Tensor, start: int) -> None:
        """Of the pool's samples start, start + 1, … with values v keep those that may
        be picked.
        """
        if self.proposed is None:
            room[start : start + len(v)] = v
            return
        first, last = np.searchsorted(self.proposed, [start, start + len(v)])
        chosen = torch.as_tensor(self.proposed[first:last] - start, device=v.device)
        room[first:last] = v[chosen].to(room.device)

    def positions_in_pool(self, picks: Tensor) -> Tensor:
        """Picks, counted among those that may be picked, as positions in the whole
        pool.
        """
        if self.proposed is None:
            return picks
        start = self.question.pool.shard.start
        positions = start + torch.as_tensor(self.proposed, device="cpu")
        return self.shard.take(picks, lambda own: positions[own])
