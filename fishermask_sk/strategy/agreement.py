"""Whether the processes of a group ask the same question, of the same net."""

from __future__ import annotations

import math
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
    question = (
        own,
        {name: _sums(tensor) for name, tensor in module.state_dict().items()},
    )
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


def _sums(tensor: Any) -> tuple[float, float] | None:
    """Sum and norm; None for what is no tensor of floats."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return None
    return (
        float(tensor.sum(dtype=torch.float64)),
        float(torch.linalg.vector_norm(tensor, dtype=torch.float64)),
    )


def _alike(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    if a is None or b is None:
        return a == b
    return a == b or (
        all(map(math.isfinite, a + b))
        and abs(a[0] - b[0]) <= ROUNDING * (1 + a[1])
        and math.isclose(a[1], b[1], rel_tol=ROUNDING)
    )
