"""What a query is asked: of which net, about which samples, and what is drawn of them.

Every step of a query reads this, and none changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor
from torch.utils.data import Dataset

from fishermask_sk._warnings import warn_user
from fishermask_sk.distributed import ALONE, Processes, Shard
from fishermask_sk.nets.skorch_adapter import FittedNet
from fishermask_sk.strategy.settings import Settings

# Samples that the net is tried on before any expensive work.
EXAMPLES = 8


class Samples(NamedTuple):
    """Samples of one kind that this process holds, their place among those of all
    processes, and their weights (n,) in means where these differ.
    """

    name: str
    dataset: Any  # a Dataset, or None where there are none here
    n: int
    shard: Shard
    weights: Tensor | None = None


class Drawn(NamedTuple):
    """Samples of each kind here that a mean is over, by position, with their weights,
    and the sum of the weights of all that were drawn anywhere.
    """

    parts: list[tuple[Samples, list[int]]]
    weights: Tensor | None
    total_weight: float

    @property
    def n_own(self) -> int:
        """How many there are here."""
        return sum(len(positions) for _, positions in self.parts)

    def weighted_parts(
        self,
    ) -> Iterator[tuple[tuple[Samples, list[int]], Tensor | None]]:
        """The samples of each kind that were drawn, with their weights."""
        for samples, positions in self.parts:
            weights = samples.weights
            yield (samples, positions), None if weights is None else weights[positions]


class Question:
    """What `select` was given, as all steps need it.

    Of several processes each has a Question of its own, with the samples that it holds.

    Attributes
    ----------
    pool, labeled, target : Samples
        `target` is None where there is none.
    averaged : list of Samples
        What F̄ and the scores are means over.
    labeled_weight : float
        Of each labelled sample in these means.
    rng : RandomState
        One for the whole query, the same on all processes.
    warn : callable (message, about=None)
    """

    def __init__(
        self,
        params: Settings,
        fitted: FittedNet,
        pool: Dataset[Any] | None,
        labeled: Dataset[Any] | None,
        n_pool: int,
        n_labeled: int,
        n_instances: int,
        processes: Processes = ALONE,
        target: tuple[Dataset[Any] | None, int] | None = None,
        target_weight: np.ndarray | None = None,
        warn: Callable[..., None] | None = None,
    ) -> None:
        self.params, self.fitted, self.processes = params, fitted, processes
        self.warn = warn or (lambda message, about=None: warn_user(message))
        self.n_instances = n_instances
        weights = None
        if target_weight is not None:
            weights = torch.as_tensor(target_weight, device="cpu")
        self.pool = Samples("X_pool", pool, n_pool, processes.shard(n_pool))
        self.labeled = Samples(
            "X_labeled", labeled, n_labeled, processes.shard(n_labeled)
        )
        self.target = target and Samples(
            "X_target", *target, processes.shard(target[1]), weights
        )
        self.labeled_weight = 1.0
        self.averaged = self._averaged(weights)
        seed = params.random_state
        rng = np.random.RandomState() if seed is None else check_random_state(seed)
        self.rng = processes.object_of(0, rng)

    def _averaged(self, weights: Tensor | None) -> list[Samples]:
        """The target where there is one, else pool and labelled samples, of whom each
        counts as the mean of the pool.
        """
        if self.target is not None:
            return [self.target]
        if weights is None:
            return [self.pool, self.labeled]
        total = sum(self.processes.objects(float(weights.sum())))
        self.labeled_weight = total / self.pool.shard.total
        of_labeled = torch.full(
            (self.labeled.n,), self.labeled_weight, dtype=torch.float64, device="cpu"
        )
        return [
            self.pool._replace(weights=weights),
            self.labeled._replace(weights=of_labeled),
        ]

    def by(self, params: Settings) -> Question:
        """The same question, asked with other parameters."""
        other = copy(self)
        other.params = params
        other.__dict__.pop("ranking_samples", None)  # so many, by the parameters
        return other

    @property
    def device(self) -> torch.device:
        """Where the module's weights are."""
        return next(self.fitted.module.parameters()).device

    @property
    def n_averaged(self) -> int:
        """How many samples there are that F̄ is a mean over."""
        return sum(samples.shard.total for samples in self.averaged)

    @property
    def n_information(self) -> int | None:
        """How many of these are drawn for F̄, where not all."""
        n = self.params.n_information_samples
        return None if n is None or n >= self.n_averaged else n

    def batches(
        self, samples: Samples, positions: list[int] | None = None
    ) -> Iterator[Any]:
        """Batches of all these samples, or of those at some positions."""
        if samples.dataset is None or positions == []:
            return
        for batch in self.fitted.batches(
            samples.dataset, self.params.batch_size, positions
        ):
            yield self.fitted.on_device(batch)

    def example(self, samples: Samples) -> Any:
        """The first samples, for checks that read no more."""
        first = range(min(EXAMPLES, samples.n))
        return next(self.fitted.batches(samples.dataset, EXAMPLES, first))

    @cached_property
    def shared_example(self) -> tuple[Any, int]:
        """The first samples of all, and how many: for the same layout everywhere, and
        for processes without any.
        """
        source = self.pool.shard.owner(0)
        with self.processes.together():
            own = self.example(self.pool) if self.processes.rank == source else None
        example, n, self.fitted.meaning = self.processes.object_of(
            source, (own, min(EXAMPLES, self.pool.n), self.fitted.meaning)
        )
        return example, n

    @cached_property
    def ranking_samples(self) -> Drawn:
        """The samples that rank the weights."""
        return self._draw(self.params.n_mask_samples)

    def information_samples(self) -> Drawn:
        """The samples that F̄ is a mean over: all, or so many."""
        n = self.n_information or self.n_averaged
        return weighty(self._draw(n), "n_information_samples")

    def _draw(self, n_wanted: int) -> Drawn:
        """So many of those that F̄ is a mean over, without replacement; all where there
        are no more.
        """
        n = self.n_averaged
        n_drawn = min(n, n_wanted)
        drawn = torch.arange(n_drawn, device="cpu")
        if n_drawn < n:
            chosen = np.sort(self.rng.choice(n, n_drawn, replace=False))
            drawn = torch.as_tensor(chosen, device="cpu")
        parts, weights, start = [], [], 0
        for samples in self.averaged:
            end = start + samples.shard.total
            here = drawn[(drawn >= start) & (drawn < end)] - start
            own = samples.shard.own(here)
            parts.append((samples, own.tolist()))
            if samples.weights is not None:
                weights.append(samples.weights[own])
            start = end
        if not weights:
            return Drawn(parts, None, n_drawn)
        of_drawn = torch.cat(weights)
        total = sum(self.processes.objects(float(of_drawn.sum())))
        return Drawn(parts, of_drawn, total)


def weighty(drawn: Drawn, parameter: str) -> Drawn:
    """What was drawn, if any of it has a weight."""
    if not drawn.total_weight:
        raise ValueError(
            "All samples that were drawn have target_weight 0; leave samples without "
            f"weight out, or raise {parameter}."
        )
    return drawn


def check_complete(
    n_found: int, samples: Samples, positions: list[int] | None = None
) -> None:
    """Refuse an iterator that left samples out, or gave some twice."""
    expected = samples.n if positions is None else len(positions)
    if n_found != expected:
        raise ValueError(
            f"The net's iterator gave {n_found} of the {expected} samples of "
            f"{samples.name}; let iterator_valid give each of them once."
        )
