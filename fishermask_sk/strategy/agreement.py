"""Whether the processes of a group ask the same question, of the same net."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fishermask_sk._describe import describe
from fishermask_sk.distributed import Processes

# What each process may set for itself; of random_state the first process's holds.
OWN = {"batch_size", "max_memory", "random_state", "verbose"}
# Sums of the same weights, with another number of threads.
ROUNDING = 1e-9


def check_same_question(
    processes: Processes,
    params: dict[str, Any],
    module: nn.Module,
    settings: dict[str, Any],
) -> None:
    """Refuse a query whose processes have other parameters, other settings or another
    net.

    Parameters
    ----------
    processes : Processes
    params : dict
        Of the strategy.
    module : Module
    settings : dict
        Of the call.

    Raises
    ------
    ValueError
        On every process alike, with what differs.
    """
    if processes.size == 1:
        return
    own = {
        name: describe(value) for name, value in params.items() if name not in OWN
    } | settings
    question = own, _sums(module.state_dict())
    (expected, weights), *others = processes.objects(question)
    for rank, (found, found_weights) in enumerate(others, start=1):
        for name, value in expected.items():
            if found[name] != value:
                raise ValueError(
                    f"{name} is {value!r:.80} on rank 0 and {found[name]!r:.80} on "
                    f"rank {rank}; every rank must ask the same question: give all the "
                    "same parameters."
                )
        for name in {**weights, **found_weights}:
            if not _alike(weights.get(name), found_weights.get(name)):
                raise ValueError(
                    f"{name} of the net differs between rank 0 and rank {rank}; every "
                    "rank must hold the same net, buffers included: train it once and "
                    "load it everywhere, or broadcast its state."
                )


def _sums(state: Mapping[str, Any]) -> dict[str, tuple[float, float] | None]:
    """Sum and norm of each tensor, fetched in one go, for an accelerator is waited for;
    None for what is no tensor of floats.
    """
    numbers = {
        name: torch.stack(
            [
                tensor.sum(dtype=torch.float64),
                torch.linalg.vector_norm(tensor, dtype=torch.float64),
            ]
        )
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }
    found: dict[str, tuple[float, float] | None] = dict.fromkeys(state)
    if numbers:
        device = next(iter(numbers.values())).device
        together = torch.stack([pair.to(device) for pair in numbers.values()])
        found |= dict(zip(numbers, map(tuple, together.tolist()), strict=True))
    return found


def _alike(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    if a is None or b is None:
        return a == b
    return a == b or (
        all(map(math.isfinite, a + b))
        and abs(a[0] - b[0]) <= ROUNDING * (1 + a[1])
        and math.isclose(a[1], b[1], rel_tol=ROUNDING)
    )
