"""Bytes and seconds, as people write and read them."""

from __future__ import annotations

import re
from numbers import Integral

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{name}i": 2 ** (10 * power) for power, name in enumerate("KMGT", start=1)}


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


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them.

    Examples
    --------
    >>> duration(12.3), duration(600), duration(7200)
    ('12 s', '10 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
