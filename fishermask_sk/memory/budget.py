"""What a query holds in memory, what it may hold, and where embeddings go that do not
fit.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask_sk.memory.free import free_bytes
from fishermask_sk.memory.room import mapped, pinned
from fishermask_sk.memory.units import parse_memory, readable
from fishermask_sk.selection.candidates import FOLDED_PICKS
from fishermask_sk.selection.embeddings import BLOCK_NUMBERS
from fishermask_sk.selection.gains import ENTRIES_AT_A_TIME, ENTRIES_ON_DEVICE

# Of the free memory, the share that a query may take where `max_memory` is not given.
SHARE_OF_FREE = 0.8
# Of a budget, the share that a batch may take whatever else is held.
LEAST_SHARE = 0.25
# With at most this many rows a weight the kernel of all rows takes no more memory than
# the k×k matrices, and its first gains cost less.
ROWS_PER_WEIGHT = 2


class Needs(NamedTuple):
    """Bytes that a query holds: embeddings of the pool, which may lie in a file, and
    what may not; and before these, while weights are ranked, what each weight takes.
    """

    embeddings: int
    matrices: int
    weights: int = 0

    @property
    def total(self) -> int:
        """What is held at once, at the most."""
        return max(self.weights, self.embeddings + self.matrices)

    def __str__(self) -> str:
        return (
            f"embeddings {readable(self.embeddings)}, "
            f"matrices {readable(self.matrices)}"
        )


def uses_rows(n_samples: int, n_rows: int, k: int) -> bool:
    """Whether the selection works on the kernel of all samples' rows instead of on k×k
    matrices.
    """
    return n_samples * n_rows <= ROWS_PER_WEIGHT * k


def needs(
    n_pool: int,
    n_labeled: int,
    n_rows: int,
    k: int,
    itemsize: int,
    n_reviewed: int = 0,
    in_rows: bool | None = None,
    on_cpu: bool = True,
) -> Needs:
    """What a query holds, for N + L samples with embeddings of (c, k), and so many
    picks that a backward pass reviews.

    The counts are those of `selection.select`; float64 but for the embeddings.
    `in_rows` says whether it works without k×k matrices, where `uses_rows` does not
    decide that.
    """
    row = k * itemsize
    entries = n_pool * n_rows**2
    # A and B, and beside them what B is copied from, or some that gains are found of.
    some = 5 * min(entries, ENTRIES_AT_A_TIME if on_cpu else ENTRIES_ON_DEVICE)
    of_candidates = 8 * (2 * entries + max(entries, some) + 10 * n_pool)
    block = min(n_pool * n_rows * k, max(BLOCK_NUMBERS["cpu"], n_rows * k))
    of_blocks = 8 * 3 * block
    if uses_rows(n_pool + n_labeled, n_rows, k) if in_rows is None else in_rows:
        of_pool, of_labeled = n_pool * n_rows, n_labeled * n_rows
        kernel = of_pool * (of_pool + of_labeled)
        at_start = of_labeled * (2 * of_pool + 4 * of_labeled)
        matrices = 8 * (kernel + at_start + 2 * entries) + of_labeled * row
    else:
        matrices = 8 * k * (4 * k + 3 * FOLDED_PICKS * n_rows)
    reviewed = n_reviewed * n_rows
    directions = min(k, reviewed)
    of_review = 8 * (reviewed * k + directions * (7 * reviewed + 6 * directions))
    return Needs(
        n_pool * n_rows * row, matrices + of_candidates + of_blocks + of_review
    )


class Budget:
    """How much a query may hold on its device; decides where embeddings go.

    Parameters
    ----------
    max_memory : int, str or None
    device : torch.device
    n_beside : int
        How many processes of this machine each take their part of what is free of its
        memory and its disk.
    n_on_card : int
        How many do so of the device, where it is an accelerator.
    """

    def __init__(
        self,
        max_memory: int | str | None,
        device: torch.device,
        n_beside: int = 1,
        n_on_card: int = 1,
    ) -> None:
        self.device, self.n_beside, self.n_on_card = device, n_beside, n_on_card
        self.given = None if max_memory is None else parse_memory(max_memory)
        self.n_bytes = self.given if self.given is not None else self._share(device)

    def check(
        self, needed: Needs, k: int, n_pool: int, cures: Callable[[], str]
    ) -> None:
        """Refuse a query whose matrices exceed the budget, or whose embeddings find no
        place at all; `cures` names settings that fit.

        Raises
        ------
        MemoryError
        """
        self.check_weights(needed.weights)
        size = f"(k={k} weights, {n_pool} samples)"
        if self._matrices_exceed(needed):
            raise MemoryError(
                f"This query needs about {readable(needed.matrices)} on top of "
                f"its embeddings {size} and {readable(self.n_bytes or 0)} "
                f"{self._limit}; "
                f"{cures()}{', or raise max_memory' if self.given is not None else ''}."
            )
        if self._embeddings_exceed(needed):
            raise MemoryError(
                f"The embeddings of this query {size} take "
                f"{readable(needed.embeddings)}: too much for memory, and for the "
                f"{readable(self._free_of_disk())} free in {tempfile.gettempdir()}; "
                f"{cures()}, or let TMPDIR name a larger disk."
            )

    def check_weights(self, n_bytes: int) -> None:
        """Refuse a net of which each weight's share does not leave room for a batch.

        Raises
        ------
        MemoryError
        """
        if self.n_bytes is None or n_bytes <= (1 - LEAST_SHARE) * self.n_bytes:
            return
        cures = ["use a smaller net", "or raise max_memory"][: 1 + bool(self.given)]
        raise MemoryError(
            f"A query on this net holds {readable(n_bytes)} on top of a batch, a copy "
            "of its weights, their gradients and their scores, and "
            f"{readable(self.n_bytes)} {self._limit}, of which a batch has "
            f"{LEAST_SHARE:.0%}; {', '.join(cures)}."
        )

    @property
    def _limit(self) -> str:
        if self.given is not None:
            return "max_memory allows"
        return "may be used of what is free"

    def fits(self, needed: Needs) -> bool:
        """Whether such a query is not refused."""
        return not self._matrices_exceed(needed) and not self._embeddings_exceed(needed)

    def _matrices_exceed(self, needed: Needs) -> bool:
        return self.n_bytes is not None and needed.matrices > self.n_bytes

    def _embeddings_exceed(self, needed: Needs) -> bool:
        on_disk = self.place(needed) == "file"
        return on_disk and needed.embeddings > self._free_of_disk()

    def _free_of_disk(self) -> int:
        return shutil.disk_usage(tempfile.gettempdir()).free // self.n_beside

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, needed: Needs
    ) -> Tensor:
        """Room for embeddings: on the device where they fit, else in main memory, else
        in a mapped file.
        """
        where = self.place(needed)
        if where == "file":
            return mapped(shape, dtype)
        if where == "host" and self.device.type == "cuda":
            return pinned(shape, dtype)
        return torch.empty(
            shape, dtype=dtype, device=self.device if where == "device" else "cpu"
        )

    def holds(self, needed: Needs) -> bool:
        """Whether embeddings lie on the device itself."""
        return self.place(needed) == "device"

    def beside(self, held: int) -> int | None:
        """Bytes that a batch may take while so many are held: what is left, but never
        less than a part of all; None where there is no limit.
        """
        if self.n_bytes is None:
            return None
        return max(self.n_bytes - held, int(LEAST_SHARE * self.n_bytes))

    def place(self, needed: Needs) -> str:
        """Where embeddings go: on the "device", in main memory ("host"), or in a
        "file".
        """
        if self.n_bytes is None or needed.embeddings + needed.matrices <= self.n_bytes:
            return "device"
        host = self._share(torch.device("cpu"))
        if self.device.type != "cpu" and (host is None or needed.embeddings <= host):
            return "host"
        return "file"

    def _share(self, device: torch.device) -> int | None:
        free = free_bytes(device)
        if free is None:
            return None
        n_sharing = self.n_beside if device.type == "cpu" else self.n_on_card
        return int(SHARE_OF_FREE * free / n_sharing)
