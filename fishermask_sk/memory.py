"""What a query holds in memory, what it may hold, and where embeddings go that do not
fit.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import suppress
from math import prod
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask_sk.candidates import (
    ACTIVE_SHARE,
    EXACT_ENTRIES,
    MAX_AHEAD,
    MAX_WAITING,
    MIN_ACTIVE,
    UPDATE_ROWS,
)
from fishermask_sk.initial import FEW_WEIGHTS

# Of the free memory, the share that a query may take where `max_memory` is not given.
SHARE_OF_FREE = 0.8
# Beyond FEW_WEIGHTS, embeddings with at most this many rows a weight stand in for k×k
# matrices: the first gains then cost less from the rows.
ROWS_PER_WEIGHT = 4
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{name}i": 2 ** (10 * power) for power, name in enumerate("KMGT", start=1)}


class Needs(NamedTuple):
    """Bytes that a query holds: embeddings of the pool, which may lie in a file, and
    what may not.
    """

    embeddings: int
    matrices: int

    def __str__(self) -> str:
        return (
            f"embeddings {readable(self.embeddings)}, "
            f"matrices {readable(self.matrices)}"
        )


def uses_rows(n_samples: int, n_rows: int, k: int) -> bool:
    """Whether the selection works on the embeddings of all samples instead of on k×k
    matrices.
    """
    return k > FEW_WEIGHTS and n_samples * n_rows <= ROWS_PER_WEIGHT * k


def needs(
    n_pool: int,
    n_labeled: int,
    n_rows: int,
    k: int,
    itemsize: int,
    n_steps: int,
    in_rows: bool | None = None,
) -> Needs:
    """What a query holds, for N + L samples with embeddings of (c, k), and so many
    picks and removals.

    The counts are those of `selection.select`; float64 but for the embeddings.
    `in_rows` says whether it works without k×k matrices, where `uses_rows` does not
    decide that.
    """
    row = k * itemsize
    updated = min(n_pool, UPDATE_ROWS // n_rows + 1) * n_rows
    of_candidates = 8 * n_pool * (4 * n_rows**2 + 2 * MAX_AHEAD + 5)
    of_blocks = (
        8 * updated * n_rows * (8 + 3 * MAX_AHEAD)
    )  # products, and half as much for the bounds
    waiting = min(
        n_pool * n_rows, MAX_WAITING
    )  # those that no bound spares: their products, twice
    of_blocks += 8 * waiting * n_rows * 4 * MAX_AHEAD
    of_blocks += updated * row  # gathered, where some are left out
    of_blocks += 8 * min(max(EXACT_ENTRIES, n_rows * k), updated * k)
    active = min(n_pool, max(MIN_ACTIVE, int(ACTIVE_SHARE * n_pool) + 1)) * n_rows * row
    picking = of_candidates + of_blocks + active
    if uses_rows(n_pool + n_labeled, n_rows, k) if in_rows is None else in_rows:
        matrices = (
            n_labeled * n_rows * row
            + 8 * k * n_rows * (3 * n_labeled + n_steps)
            + picking
        )
    else:  # five at the start, of which four stay or come again
        matrices = max(8 * 5 * k * k, 8 * 4 * k * k + picking)
    return Needs(n_pool * n_rows * row, matrices)


def parse_memory(max_memory: int | str) -> int:
    """Bytes, from a number of them or a text like "2GiB" or "500 MB".

    Raises
    ------
    ValueError

    Examples
    --------
    >>> parse_memory("2GiB"), parse_memory("1.5 kB"), parse_memory(10)
    (2147483648, 1500, 10)
    """
    n_bytes = 0
    if isinstance(max_memory, Integral) and not isinstance(max_memory, bool):
        n_bytes = int(max_memory)
    elif isinstance(max_memory, str):
        found = re.fullmatch(
            r"\s*(\d+\.?\d*)\s*([KMGT]i?)?B?\s*", max_memory, re.IGNORECASE
        )
        if found:
            n_bytes = int(float(found[1]) * UNITS[(found[2] or "").capitalize()])
    if n_bytes < 1:
        raise ValueError(
            f"max_memory={max_memory!r} must be a number of bytes, or a text like "
            "'2GiB'."
        )
    return n_bytes


def readable(n_bytes: int) -> str:
    """Bytes in a unit that suits them.

    Examples
    --------
    >>> readable(3 * 2**29)
    '1.5 GiB'
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 2**10:.1f} KiB"


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


class Budget:
    """How much a query may hold on its device; decides where embeddings go.

    Parameters
    ----------
    max_memory : int, str or None
    device : torch.device
    n_beside : int
        How many processes of this machine each take their part of what is free of its
        memory and its disk.
    """

    def __init__(
        self, max_memory: int | str | None, device: torch.device, n_beside: int = 1
    ) -> None:
        self.device, self.n_beside = device, n_beside
        self.given = None if max_memory is None else parse_memory(max_memory)
        self.n_bytes = self.given if self.given is not None else self._share(device)

    def check(self, needed: Needs, k: int, n_pool: int) -> None:
        """Refuse a query whose matrices exceed the budget, or whose embeddings find no
        place at all.

        Raises
        ------
        MemoryError
        """
        where = self._place(needed)
        if self.n_bytes is not None and needed.matrices > self.n_bytes:
            limit = (
                "max_memory allows"
                if self.given is not None
                else "may be used of what is free"
            )
            raise MemoryError(
                f"This query needs about {readable(needed.matrices)} beside its "
                f"embeddings (k={k} weights, {n_pool} samples) and "
                f"{readable(self.n_bytes)} {limit}; lower sparsity or set "
                "n_components"
                f"{', or raise max_memory' if self.given is not None else ''}."
            )
        if where == "file":
            folder = tempfile.gettempdir()
            free = shutil.disk_usage(folder).free // self.n_beside
            if needed.embeddings > free:
                raise MemoryError(
                    f"The embeddings of this query (k={k} weights, {n_pool} samples) "
                    f"take {readable(needed.embeddings)}: too much for memory, and for "
                    f"the {readable(free)} free in {folder}; lower sparsity, set "
                    "n_components, or let TMPDIR name a larger disk."
                )

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, needed: Needs
    ) -> Tensor:
        """Room for embeddings: on the device where they fit, else in main memory, else
        in a mapped file.
        """
        where = self._place(needed)
        if where == "file":
            return _mapped(shape, dtype)
        return torch.empty(
            shape, dtype=dtype, device=self.device if where == "device" else "cpu"
        )

    def _place(self, needed: Needs) -> str:
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
        return int(
            SHARE_OF_FREE * free / (self.n_beside if device.type == "cpu" else 1)
        )


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file that only this process can open; it goes when the tensor
    goes.
    """
    n = prod(shape)
    folder = Path(tempfile.mkdtemp(prefix="fishermask-"))  # for this user alone
    try:
        path = folder / "embeddings"
        with path.open("wb") as file:
            file.truncate(n * dtype.itemsize)
        tensor = torch.from_file(str(path), shared=True, size=n, dtype=dtype).reshape(
            shape
        )
        with suppress(OSError):  # where open files cannot be unlinked, the folder stays
            path.unlink()
        return tensor
    finally:
        with suppress(OSError):
            folder.rmdir()
