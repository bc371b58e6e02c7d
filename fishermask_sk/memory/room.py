"""Room for embeddings that do not fit beside all else: main memory that a GPU reads
quickly, or a file.
"""

from __future__ import annotations

import errno
import os
import tempfile
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fishermask_sk.memory.units import readable

# Where a file system cannot reserve room, zeros are written, so many at a time.
NO_FALLOCATE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
ZEROS = 2**24


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Main memory that stays where it is, so that blocks of it are copied to a GPU
    while that computes; ordinary memory where the system does not give so much.
    """
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty(shape, dtype=dtype, device="cpu")


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file that only this process can open; it goes when the tensor
    goes.

    Raises
    ------
    MemoryError
        Where the disk does not hold it.
    """
    n = prod(shape)
    if n == 0:  # no system maps nothing
        return torch.empty(shape, dtype=dtype, device="cpu")
    # A folder for this user alone. Where open files cannot be unlinked, it stays.
    with tempfile.TemporaryDirectory(
        prefix="fishermask-", ignore_cleanup_errors=True
    ) as folder:
        path = Path(folder, "embeddings")
        with path.open("wb") as file:
            _reserve(file, n * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=n, dtype=dtype).reshape(
            shape
        )


def _reserve(file: BinaryIO, n_bytes: int) -> None:
    """Give a file its room on the disk now: a page that finds none later would end the
    process (SIGBUS).
    """
    try:
        if not _fallocated(file, n_bytes):
            zeros = memoryview(bytes(min(ZEROS, n_bytes)))
            for start in range(0, n_bytes, ZEROS):
                file.write(zeros[: n_bytes - start])
            file.flush()
    except OSError as error:
        raise MemoryError(
            f"The embeddings of this query take {readable(n_bytes)}, more than "
            f"{tempfile.gettempdir()} holds: {error.strerror}. Free some of that disk, "
            "lower sparsity, set n_components, or let TMPDIR name a larger disk."
        ) from error


def _fallocated(file: BinaryIO, n_bytes: int) -> bool:
    """Whether the file system could reserve room; macOS and Windows have no call."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        if error.errno in NO_FALLOCATE:
            return False
        raise
    return True
