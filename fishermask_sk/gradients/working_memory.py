r"""How many samples of a batch are computed on at a time, so that working memory stays
within what is allowed (`max_memory`, by way of `memory.Budget.beside`): known before
the batch runs, and halved where memory runs out.

With G bytes a sample in the graph and in gradients at outputs, and H in what rules make
of their inputs, a batch of n takes n(G + H) while those are kept from row to row. Where
that leaves too few samples, what rules of squares make is made layer by layer, for each
row again, and the graph takes nG. What rules of single entries make is always kept, and
counts as part of the graph.

This file sees tensors and torch modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishermask_sk.gradients.generic import is_out_of_memory, samples
from fishermask_sk.gradients.layer_rules import held_numbers, squared_at_a_time
from fishermask_sk.gradients.modules import Batch, map_tensors
from fishermask_sk.gradients.recording import Recorder, Route, Use, Wanted
from fishermask_sk.gradients.vouched import SHARE_DRAWN

logger = logging.getLogger(__name__)

# What rules make of their inputs is kept from row to row where this many samples at a
# time are left; else it is made layer by layer, for each row again, in parts of
# samples, and the graph has this share of the working memory.
FEW_SAMPLES, GRAPH_SHARE = 16, 0.75
# Channels that oneDNN holds side by side.
BLOCKED = 16
# Where squares would take more, a batch has this share.
LEAST_ROOM = 0.25


class Load(NamedTuple):
    """Bytes that one sample takes: in the graph and its gradients, in what all rules
    make of their inputs, and in the largest gradient that a rule squares; of that so
    many bytes at a time.
    """

    graph: float
    held: float
    squared: int = 0
    most_squared: int = 0

    def apart(self, n: int) -> int:
        """What n samples take for squares, beside all else."""
        return min(n * self.squared, self.most_squared)


class WorkingMemory:
    """What a batch may take beside what is returned.

    Parameters
    ----------
    recorder : Recorder
    n_bytes : int or None
        None where there is no limit.

    Attributes
    ----------
    max_samples : int or None
        Larger batches are taken in parts; halved whenever a part runs out of memory.
    """

    def __init__(self, recorder: Recorder, n_bytes: int | None) -> None:
        self.n_bytes = n_bytes
        self.max_samples: int | None = None
        self._recorder = recorder
        self._loads: dict[Any, Load] = {}

    def in_parts(
        self,
        batch: Batch,
        wanted: Wanted,
        compute: Callable[[Batch], tuple[int, Tensor]],
    ) -> Iterator[tuple[int, Tensor]]:
        """Number of samples and result of one part of the batch after the other, as
        large as memory allows.
        """
        n, start = length(batch), 0
        bound = self.affordable(batch, wanted)
        while start < n:
            size = min(n, bound, self.max_samples or n)
            whole = size == n
            part = batch if whole else samples(batch, slice(start, start + size))
            result = _unless_out_of_memory(compute, part)
            if result is None:
                self.max_samples = size
                self.halve()
                continue
            yield result
            start += size

    def halve(self) -> None:
        """Take half as many samples at a time.

        Raises
        ------
        MemoryError
            Where that was one.
        """
        assert self.max_samples is not None  # for the type checker
        if self.max_samples == 1:
            raise MemoryError(
                "Memory ran out on a single sample; free some, or lower sparsity, or "
                "use a larger machine."
            )
        self.max_samples //= 2
        logger.info(
            "Out of memory; going on with %d samples at a time.", self.max_samples
        )

    def affordable(self, batch: Batch, wanted: Wanted) -> int:
        """How many samples of this batch fit, at least one."""
        n = length(batch)
        if self.n_bytes is None or n == 1:
            return n
        load = self.load(batch, wanted)
        room = self._room(load, n)
        if self._holds_inputs(load, n):
            return max(1, int(room / (load.graph + load.held)))
        return max(1, int(room * GRAPH_SHARE / load.graph))

    def bytes_of(self, batch: Batch, wanted: Wanted, n: int) -> int:
        """What a batch of n samples like these takes while its gradients are made, in
        parts where it must be.
        """
        load = self.load(batch, wanted)
        if self.n_bytes is None or self._holds_inputs(load, n):
            whole = n * (load.graph + load.held)
        else:
            whole = n * load.graph / GRAPH_SHARE
        if self.n_bytes is not None:
            whole = min(whole, self._room(load, n))
        return int(max(whole, load.graph)) + load.apart(n)

    def together(
        self, batch: Batch, wanted: Wanted
    ) -> Callable[[Route, Tensor], int | None]:
        """How many samples' inputs a rule takes apart at a time: None for all, which
        are then kept from row to row.
        """
        memory = self.n_bytes
        if memory is None:
            return lambda route, seen: None
        if self._holds_inputs(self.load(batch, wanted), length(batch)):
            return lambda route, seen: None
        load = self.load(batch, wanted)
        room = (1 - GRAPH_SHARE) * self._room(load, length(batch))

        def n_samples(route: Route, seen: Tensor) -> int:
            size = seen.itemsize * held_numbers(route.module, seen, None)
            return max(1, int(room * len(seen) / size))

        return n_samples

    def _holds_inputs(self, load: Load, n: int) -> bool:
        """Whether all that rules make of their inputs is kept from row to row: where
        that leaves room for a batch worth its name.
        """
        return self._room(load, n) >= (load.graph + load.held) * min(n, FEW_SAMPLES)

    def _room(self, load: Load, n: int) -> float:
        """What is left beside squares, and never less than a part of all."""
        assert self.n_bytes is not None  # for the type checker
        return max(self.n_bytes - load.apart(n), LEAST_ROOM * self.n_bytes)

    def load(self, batch: Batch, wanted: Wanted) -> Load:
        """What a sample of this shape takes, seen on the first of the batch."""
        shapes: list[torch.Size] = []

        def measure(tensor: Tensor) -> Tensor:
            shapes.append(tensor.shape[1:])
            return tensor

        map_tensors(measure, batch)
        sizes = {name: None if e is None else len(e) for name, e in wanted.items()}
        key = (*shapes, *sizes.items())
        if key not in self._loads:
            few = samples(batch, slice(1))
            self._loads[key] = self._measured(few, sizes)
        return self._loads[key]

    def _measured(self, few: Batch, sizes: dict[str, int | None]) -> Load:
        n, stored = length(few), dict[int, int]()
        routes = self._recorder.routes
        weights = self._recorder.parameters.values()
        own = {p.untyped_storage().data_ptr() for p in weights}

        def note(tensor: Tensor) -> None:
            if tensor.layout == torch.strided:
                memory = tensor.untyped_storage()
                stored[memory.data_ptr()] = memory.nbytes()

        with self._recorder.recorded(few, list(sizes), note) as (_, recorded):
            pass
        held = dict[nn.Module, float]()
        graph = float(sum(size for place, size in stored.items() if place not in own))
        for module, uses in recorded.items():
            for use in uses:
                itemsize = max(4, use.seen.itemsize)
                graph += use.n_outputs * itemsize
                most = [
                    size
                    for name, size in sizes.items()
                    if name in routes and routes[name].module is module
                ]
                largest = None if None in most else max(filter(None, most), default=1)
                held[module] = itemsize * held_numbers(module, use.seen, largest)
        graph *= 1 + 1 / SHARE_DRAWN  # of some samples a and g are kept
        graph += max(
            (_copied(m, use) for m, uses in recorded.items() for use in uses), default=0
        )
        squared = [
            max(4, p.itemsize) * p.numel()
            for name, p in self._recorder.parameters.items()
            if name in routes and p.ndim > 1 and sizes.get(name, 0) is None
        ]
        kept = sum(held.values())
        if None not in sizes.values():  # rows of entries: one batch serves all rows
            graph, kept = graph + kept, 0.0
        return Load(
            max(1.0, graph / n),
            kept / n,
            max(squared, default=0),
            4 * squared_at_a_time(next(iter(weights)).device),
        )


def length(batch: Batch) -> int:
    """How many samples a batch holds: the length of its first tensor."""
    lengths: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        lengths.append(len(tensor) if tensor.ndim else 1)
        return tensor

    map_tensors(note, batch)
    return lengths[0]


def _copied(module: nn.Module, use: Use) -> float:
    """Bytes that a convolution's backward pass takes for copies of what comes in and
    out, in the library's own layout (oneDNN's: channels in sixteens).
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 0.0
    sides = (use.seen.numel(), use.seen.shape[1]), (use.n_outputs, len(module.weight))
    numbers = sum(n * ceil(c / BLOCKED) * BLOCKED / c for n, c in sides)
    return max(4, use.seen.itemsize) * numbers


def _unless_out_of_memory(
    compute: Callable[[Batch], tuple[int, Tensor]], batch: Batch
) -> tuple[int, Tensor] | None:
    """None where memory ran out."""
    try:
        return compute(batch)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
