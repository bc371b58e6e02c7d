"""What processes that share a query tell each other. One process alone has nothing to
tell: all is the identity.

The only file that sees `torch.distributed`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """One process that holds everything, and the functions that `Group` has for
    several.
    """

    rank, size = 0, 1

    def shard(self, n: int) -> Shard:
        """All samples, of which this process holds `n`."""
        return Shard(n)

    def enter(self, step: str) -> None:
        """Note the step that errors are to name."""

    def together(self) -> AbstractContextManager[Any]:
        """Inside, each process works for itself; if one raises, all do."""
        return nullcontext()

    def objects(self, value: Any) -> list[Any]:
        """Every process's value, a small object that can be pickled."""
        return [value]

    def object_of(self, source: int, value: Any) -> Any:
        """The value that the process `source` has."""
        return value

    def stack(self, tensor: Tensor) -> Tensor:
        """Every process's tensor, all of one shape, along a new first axis."""
        return tensor[None]

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        return tensor

    def concatenated(self, rows: Tensor) -> Tensor:
        """Every process's rows (m, d), however many, in the order of the processes."""
        return rows

    def send(self, source: int, tensor: Tensor) -> Tensor:
        """The tensor of the process `source`, in place of everyone's."""
        return tensor


class Group(Processes):
    """The processes of the default process group of `torch.distributed`."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._step = "start"
        # "cpu:gloo,cuda:nccl". Gloo knows few operations on an accelerator's tensors.
        backends = [part.split(":") for part in dist.get_backend_config().split(",")]
        self._carriers = [
            device for device, name in backends if device == "cpu" or name != "gloo"
        ]

    def shard(self, n: int) -> Shard:
        return SharedOut(n, self)

    def enter(self, step: str) -> None:
        self._step = step

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):  # whoever is gone need not be told
                self.objects(f"{type(error).__name__}: {error}")
            raise
        for rank, message in enumerate(self.objects(None)):
            if message is not None:
                raise RuntimeError(
                    f"Rank {rank} of {self.size} failed in the step {self._step!r}: "
                    f"{message}"
                )

    def objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._naming_the_step():
            dist.all_gather_object(found, value)
        return found

    def object_of(self, source: int, value: Any) -> Any:
        found = [value]
        with self._naming_the_step():
            dist.broadcast_object_list(found, source)
        return found[0]

    def stack(self, tensor: Tensor) -> Tensor:
        own = self._carried(tensor)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._naming_the_step():
            dist.all_gather(found, own)
        return torch.stack(found).to(tensor.device)

    def add(self, tensor: Tensor) -> Tensor:
        own = self._carried(tensor)
        with self._naming_the_step():
            dist.all_reduce(own)
        return tensor if own is tensor else tensor.copy_(own)

    def concatenated(self, rows: Tensor) -> Tensor:
        counts = self.objects(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat(
            [part[:n] for part, n in zip(self.stack(padded), counts, strict=True)]
        )

    def send(self, source: int, tensor: Tensor) -> Tensor:
        own = self._carried(tensor)
        with self._naming_the_step():
            dist.broadcast(own, source)
        return tensor if own is tensor else tensor.copy_(own)

    def _carried(self, tensor: Tensor) -> Tensor:
        """The tensor where the backend takes it: as it is, else by way of main memory,
        or for NCCL alone by this process's GPU.
        """
        if tensor.device.type not in self._carriers:
            tensor = tensor.to("cpu" if "cpu" in self._carriers else self._carriers[0])
        return tensor.contiguous()

    @contextmanager
    def _naming_the_step(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {self.rank} of {self.size} lost the others in the step "
                f"{self._step!r}: {str(error).splitlines()[0]}. Another process has "
                "died or raised, is not in this call, or needs more time than "
                "init_process_group was told; look at what the others print."
            ) from error


ALONE = Processes()


def all_processes() -> Processes:
    """Those of the default process group, where there is one with several processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Group()
    return ALONE


class Best(NamedTuple):
    """The position, among all samples, of the largest of all gains, and that gain."""

    position: Tensor
    gain: Tensor


class Shard:
    """The part of all samples that a process holds: here all `n` of them. `SharedOut`
    is for several processes.
    """

    def __init__(self, n: int) -> None:
        self.n = self.total = n
        self.start = 0

    def own(self, positions: Tensor) -> Tensor:
        """Of positions among all samples those that are here, as positions here."""
        return positions

    def owner(self, position: int) -> int:
        """The rank of the process that holds this sample."""
        return 0

    def best(
        self,
        gains: Tensor,
        tolerance: float,
        choose: Callable[[Tensor], Tensor] | None = None,
        places: Tensor | None = None,
    ) -> Best:
        """The largest gain of all processes. Of those that are equal the lowest
        position, or what `choose` says.

        Parameters
        ----------
        gains : Tensor of shape (m,)
        tolerance : float
            Gains closer than this, relative to the best, are equal.
        choose : callable, Tensor of positions -> one of them, optional
        places : Tensor of shape (m,), int64, rising, optional
            Which of the samples here the gains are of; by default all.

        Returns
        -------
        Best
            Where the largest is no finite number, the gain says so and the position
            means nothing.
        """
        tied = _tied(gains, largest := gains.amax(), tolerance)
        if not len(tied):
            return Best(tied.new_zeros(()), largest)
        i = (choose or torch.amin)(tied)
        # Copies: views would keep all the gains in memory for as long as the pick is
        # remembered.
        return Best((i if places is None else places[i]).clone(), gains[i].clone())

    def take(self, positions: Tensor, fetch: Callable[[Tensor], Tensor]) -> Tensor:
        """The rows of these samples, wherever they are.

        Parameters
        ----------
        positions : Tensor of shape (m,), int64
        fetch : callable, Tensor of positions here -> their rows, also for none

        Returns
        -------
        Tensor of shape (m, ...)
        """
        return fetch(positions)

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in place of everyone's."""
        return tensor

    def from_first(
        self, compute: Callable[[], Sequence[Tensor]], *like: Tensor
    ) -> Sequence[Tensor]:
        """What the first process computes, tensors of the shapes of `like`: work that
        is better done once.
        """
        return compute()


class SharedOut(Shard):
    """Samples numbered through the processes in the order of their ranks."""

    def __init__(self, n: int, processes: Processes) -> None:
        self.n, self._processes = n, processes
        self._ends = list(accumulate(processes.objects(n)))
        self.start, self.total = self._ends[processes.rank] - n, self._ends[-1]

    def own(self, positions: Tensor) -> Tensor:
        return positions[self._is_here(positions)] - self.start

    def owner(self, position: int) -> int:
        return bisect_right(self._ends, position)

    def best(
        self,
        gains: Tensor,
        tolerance: float,
        choose: Callable[[Tensor], Tensor] | None = None,
        places: Tensor | None = None,
    ) -> Best:
        own = gains.amax() if len(gains) else gains.new_full((), -torch.inf)
        largest = own
        while True:
            tied = _tied(gains, largest, tolerance)
            positions = self.start + (tied if places is None else places[tied])
            found = self._processes.stack(_lowest(own, positions, gains[tied]))
            largest = found[:, 0].amax()
            if not bool(torch.isfinite(largest)):
                return Best(positions.new_zeros(()), largest)
            # Where the lowest of a process's own best is none of the best of all, it
            # has to look again.
            level = _level(largest, tolerance)
            leaders = found[found[:, 0] >= level]
            if bool((leaders[:, 2] >= level).all()):
                break
        if choose is not None:
            here = self.start + _tied(gains, largest, tolerance)
            chosen = choose(self._processes.concatenated(here))
            return Best(chosen, self.take(chosen[None], lambda own: gains[own])[0])
        first = leaders[leaders[:, 1].argmin()]
        return Best(first[1].long(), first[2])

    def take(self, positions: Tensor, fetch: Callable[[Tensor], Tensor]) -> Tensor:
        here = self._is_here(positions)
        rows = fetch(positions[here] - self.start)
        result = rows.new_zeros(len(positions), *rows.shape[1:])
        result[here.to(rows.device)] = rows
        if len(positions) == 1:
            return self._processes.send(self.owner(int(positions)), result)
        return self._processes.add(result)

    def same(self, tensor: Tensor) -> Tensor:
        return self._processes.send(0, tensor)

    def from_first(
        self, compute: Callable[[], Sequence[Tensor]], *like: Tensor
    ) -> Sequence[Tensor]:
        with self._processes.together():
            found = (
                compute()
                if self._processes.rank == 0
                else [torch.empty_like(tensor) for tensor in like]
            )
        return [self.same(tensor.contiguous()) for tensor in found]

    def _is_here(self, positions: Tensor) -> Tensor:
        return (positions >= self.start) & (positions < self.start + self.n)


def _level(largest: Tensor, tolerance: float) -> Tensor:
    """From here on gains are equal to the largest."""
    return largest - tolerance * largest.abs()


def _tied(gains: Tensor, largest: Tensor, tolerance: float) -> Tensor:
    return (gains >= _level(largest, tolerance)).nonzero()[:, 0]


def _lowest(largest: Tensor, positions: Tensor, gains: Tensor) -> Tensor:
    """The largest gain, and the first of the tied positions with its gain, in float64:
    exact up to 2⁵³ samples.
    """
    nothing = largest.new_tensor([torch.inf, -torch.inf], dtype=torch.float64)
    first = (
        torch.stack([positions[0].double(), gains[0].double()])
        if len(gains)
        else nothing
    )
    return torch.cat([largest.double()[None], first])
