"""What memory is free, to the best of what the system says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class _ControlGroup(NamedTuple):
    """The files of a kind of control groups, and its name in /proc/self/cgroup."""

    controller: str
    limit: str
    used: str
    cached: str


CONTROL_GROUPS = (
    _ControlGroup("", "memory.max", "memory.current", "inactive_file"),
    _ControlGroup(
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Memory that is free on a device, to the best of what the system says, in its
    files below `root` as well; None where it says nothing.

    On CUDA this counts what torch's allocator has reserved and nothing uses. Main
    memory is what `psutil` calls available, or less where a container has a limit of
    its own.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    available = psutil.virtual_memory().available
    return min([available, *_left_to_container(root)])


def _left_to_container(root: Path) -> Iterator[int]:
    """What each Linux control group around this process leaves it; none without limits.

    Files that were read lately count as used there, and go when memory is wanted: see
    `inactive_file` in https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    membership = root / "proc/self/cgroup"
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        for names in CONTROL_GROUPS:
            if names.controller not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / names.controller
            # Inside a container the path may be the host's, and only the root be seen.
            own = mount / place.lstrip("/")
            for folder in [own, *own.parents]:
                if not folder.is_relative_to(mount):
                    break
                with suppress(OSError, ValueError, KeyError):  # "max" is no limit
                    limit = int((folder / names.limit).read_text())
                    used = int((folder / names.used).read_text())
                    rows = (folder / "memory.stat").read_text().splitlines()
                    cached = int(dict(map(str.split, rows))[names.cached])
                    yield max(0, limit - used + cached)


def card_of(device: torch.device) -> str | None:
    """What tells one CUDA device of this machine from the others, whatever each process
    numbers it; None for the CPU.
    """
    if device.type != "cuda":
        return None
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))
