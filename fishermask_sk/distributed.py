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

    def objects(self, value: object) -> list[Any]:
        """Every process's value, a small object that can be pickled."""
        return [value]

    def object_of(self, source: int, value: object) -> Any:
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

    def objects(self, value: object) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._naming_the_step():
            dist.all_gather_object(found, value)
        return found

    def object_of(self, source: int, value: object) -> Any:
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
    """The position, among all samples, of the largest of all gains, that gain, there
    and for the host, whether all that are not −∞ are equal to it, and the position for
    the host, where it is known.
    """

    position: Tensor
    gain: Tensor
    value: float
    all_tied: bool
    place: int | None = None


class Shard:
    """The part of all samples that a process holds: here all `n` of them. `SharedOut`
    is for several processes.
    """

    is_shared = False

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
        level: Callable[[float], float],
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Best:
        """The largest gain of all processes. Of those that are equal the lowest
        position, or what `choose` says.

        Parameters
        ----------
        gains : Tensor of shape (n,)
        level : callable, the largest -> from where on gains are equal to it
        choose : callable, Tensor of positions -> one of them, optional

        Returns
        -------
        Best
            Where the largest is no finite number, the gain says so and the position
            means nothing.
        """
        # One look, for an accelerator waits for each: nearly always one is far ahead.
        values, places = gains.topk(min(2, len(gains)))
        numbers = torch.cat([values, places]).tolist()
        (first, *second), place = numbers[: len(values)], int(numbers[len(values)])
        is_last = all(value == -torch.inf for value in second)
        if not abs(first) < torch.inf or (is_last and choose is None):
            return Best(places[0], values[0], first, is_last, place)
        # Whoever chooses is asked at every pick, also where one is ahead.
        if choose is None and second[0] < level(first):
            return Best(places[0], values[0], first, False, place)
        tied = gains >= level(first)
        # Of several largest argmax is the first.
        i = tied.to(torch.uint8).argmax().reshape(1)
        if choose is not None:
            i = choose(tied.nonzero()[:, 0]).reshape(1)
        gain = gains[i]
        all_tied = bool((tied | torch.isneginf(gains)).all())
        return Best(i[0], gain[0], float(gain), all_tied)

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each column (m,) of what all processes have (n, m)."""
        return values.amax(0)

    def positions(self, mask: Tensor) -> Tensor:
        """Positions among all samples of those that a mask (n,) of each process
        marks.
        """
        return mask.nonzero()[:, 0]

    def value(self, values: Tensor, position: Tensor) -> Tensor:
        """One of the values (n,) that each process has of its samples."""
        return self.take(position.reshape(1), lambda own: values[own])[0]

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

    is_shared = True

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
        level: Callable[[float], float],
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Best:
        own = gains.amax() if len(gains) else gains.new_full((), -torch.inf)
        largest = own
        while True:
            tied = gains >= level(float(largest))
            found = self._processes.stack(_lowest(own, self.start, tied, gains))
            largest = found[:, 0].amax()
            if not bool(torch.isfinite(largest)):
                nobody = torch.zeros((), dtype=torch.int64, device=gains.device)
                return Best(nobody, largest, float(largest), False)
            # Where the lowest of a process's own best is none of the best of all, it
            # has to look again.
            leaders = found[found[:, 0] >= level(float(largest))]
            if bool((leaders[:, 2] >= level(float(largest))).all()):
                break
        tied = gains >= level(float(largest))
        is_all = (tied | torch.isneginf(gains)).all().to(largest)
        all_tied = bool(self._processes.stack(is_all[None]).amin())
        if choose is not None:
            chosen = choose(self.positions(tied))
            gain = self.value(gains, chosen)
            return Best(chosen, gain, float(gain), all_tied)
        first = leaders[leaders[:, 1].argmin()]
        return Best(first[1].long(), first[2], float(first[2]), all_tied)

    def largest(self, values: Tensor) -> Tensor:
        nothing = values.new_full((1, values.shape[1]), -torch.inf)
        own = torch.cat([values, nothing]).amax(0)
        return self._processes.stack(own).amax(0)

    def positions(self, mask: Tensor) -> Tensor:
        return self._processes.concatenated(self.start + mask.nonzero()[:, 0])

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


def _lowest(largest: Tensor, start: int, tied: Tensor, gains: Tensor) -> Tensor:
    """The largest gain, and the first of the tied positions with its gain, in float64:
    exact up to 2⁵³ samples.
    """
    first = largest.new_tensor([torch.inf, -torch.inf], dtype=torch.float64)
    if bool(tied.any()):
        i = tied.to(torch.uint8).argmax()
        first = torch.stack([(start + i).double(), gains[i].double()])
    return torch.cat([largest.double()[None], first])
