"""Seconds and bytes of a query, from small pieces of one: each step is timed on few
samples and scaled up.

What scales, and with which power of samples N, weights k and picks, is written in
`_scaled_selection`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import ceil
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset

from fishermask_sk._query import EXAMPLES, Plan, Query
from fishermask_sk.fisher import information
from fishermask_sk.selection import select

# Each step may take about this many seconds, and the selection's embeddings this many
# bytes, on this many weights.
STEP_SECONDS, SELECTION_BYTES, SELECTION_WEIGHTS = 1.0, 2**26, 1500
# Picks that are timed: early ones, many of which are float64, and later ones.
EARLY_PICKS, PICKS = 8, 24
# The share of all picks that cost what early ones do.
EARLY_SHARE = 1 / 8


class SelectionTimes(NamedTuple):
    """Seconds until the first pick, of an early pick, and of a later one."""

    setup: float
    early: float
    late: float


def calibrate(
    query: Query, sized: Query, plan: Plan
) -> tuple[Tensor, dict[str, float]]:
    """Time each step of the query on some of its samples, and scale to the numbers of
    samples of `sized`, the query that is asked about.

    Returns
    -------
    mask_indices : Tensor of shape (k,)
        From the few samples.
    seconds : dict of step to float
        "mask", "embeddings" and "selection"; "candidates", where the pool is passed
        through the net to find them.
    """
    n_pool = sized.n_pool
    n_samples = _affordable(query, plan)
    scores = _rank(query, plan, n_samples)
    n_drawn = min(query.params.n_mask_samples, sized.n_averaged)
    per_ranked = (
        _seconds(lambda: _rank(query, plan, n_samples), scores.device) / n_samples
    )
    with (
        warnings.catch_warnings()
    ):  # the report says what the warning about the head says
        warnings.simplefilter("ignore", UserWarning)
        mask_indices = query.mask(plan, scores)
    sub = Query(
        query.params,
        query.fitted,
        Subset(query.pool.dataset, range(n_samples)),
        None,
        n_samples,
        0,
        query.n_instances,
    )
    per_embedded = (
        _seconds(
            lambda: sub._embed(plan.gradients, mask_indices, plan.n_rows), scores.device
        )
        / n_samples
    )
    embeddings = sub._embed(plan.gradients, mask_indices, plan.n_rows).pool
    n_embedded = sized.n_embedded(sized.n_information or sized.n_averaged)
    n_weights = sized.n_directions(len(mask_indices), plan.n_rows)
    if n_weights < len(
        mask_indices
    ):  # all of `sub` were embedded twice, once to find the directions
        per_embedded, n_embedded = per_embedded / 2, n_embedded + n_drawn
    seconds = {
        "mask": 0.0 if query.params.mask == "random" else per_ranked * n_drawn,
        "embeddings": per_embedded * n_embedded,
        "selection": _scaled_selection(embeddings, sized.n_stored, n_weights, query),
    }
    if sized.n_candidates is not None:
        seconds["candidates"] = n_pool * (
            _seconds(lambda: _classify(query, n_samples), scores.device) / n_samples
        )
    return mask_indices, seconds


def _affordable(query: Query, plan: Plan) -> int:
    """How many samples fit into a step's time, by the time of the first few; at most a
    batch.
    """
    few = min(EXAMPLES, query.n_pool)
    _rank(query, plan, few)  # whatever is only slow once
    seconds = _seconds(lambda: _rank(query, plan, few), plan.candidates.device)
    in_time = int(few * STEP_SECONDS / max(seconds, 1e-6))
    return min(query.n_pool, query.params.batch_size, max(few, in_time))


def _rank(query: Query, plan: Plan, n_samples: int) -> Tensor:
    batch = next(query.fitted.batches(query.pool.dataset, n_samples, range(n_samples)))
    return plan.gradients.diagonal_fisher(
        [batch], names=plan.names, n_top_classes=query.params.n_top_classes
    )


def _classify(query: Query, n_samples: int) -> None:
    batch = next(query.fitted.batches(query.pool.dataset, n_samples, range(n_samples)))
    with torch.no_grad():
        query.fitted.logits(batch)


def _scaled_selection(
    embeddings: Tensor, n_pool: int, n_weights: int, query: Query
) -> float:
    """Seconds of the selection: linear in N; for k that is too large to try, setup as
    k³ + N·k², picks as k² + N·k.
    """
    n_rows, k = embeddings.shape[1:]
    k_tried = min(k, SELECTION_WEIGHTS)
    most = SELECTION_BYTES // (n_rows * k_tried * embeddings.itemsize)
    large = min(n_pool, max(64, most))
    small = max(1, large // 4)
    times = {
        n: _time_selection(_like(embeddings[..., :k_tried], n), query)
        for n in {small, large}
    }
    growth = n_weights / k_tried
    n_picks = min(ceil(query.params.oversample * query.n_instances), n_pool)
    n_early = min(n_picks, max(EARLY_PICKS, ceil(EARLY_SHARE * n_picks)))

    def at_n_pool(step: str, fixed_power: int, per_sample_power: int) -> float:
        if small == large:
            return getattr(times[large], step) * growth**fixed_power
        slope = max(
            0.0,
            (getattr(times[large], step) - getattr(times[small], step))
            / (large - small),
        )
        fixed = max(0.0, getattr(times[large], step) - slope * large)
        return fixed * growth**fixed_power + slope * n_pool * growth**per_sample_power

    return (
        at_n_pool("setup", 3, 2)
        + n_early * at_n_pool("early", 2, 1)
        + (n_picks - n_early) * at_n_pool("late", 2, 1)
    )


def _like(embeddings: Tensor, n: int) -> Tensor:
    """As many as are wanted that resemble the few that there are, no two the same:
    mixtures of pairs.
    """
    drawn: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
    first, second = (
        torch.randint(len(embeddings), (n,), **drawn).to(embeddings.device)
        for _ in range(2)
    )
    angle = torch.rand((n, 1, 1), **drawn).to(embeddings)
    return embeddings[first] * angle.cos() + embeddings[second] * angle.sin()


def _time_selection(embeddings: Tensor, query: Query) -> SelectionTimes:
    n, params = len(embeddings), query.params
    n_picks, early = min(PICKS, n), min(EARLY_PICKS, n)
    pool_information = information(embeddings.double()) / n
    times: list[float] = []
    _wait(embeddings.device)
    start = perf_counter()

    def on_pick() -> None:
        _wait(embeddings.device)
        times.append(perf_counter())

    with (
        warnings.catch_warnings()
    ):  # about a damping that is lost in rounding: the query itself will say so
        warnings.simplefilter("ignore", UserWarning)
        select(
            embeddings,
            pool_information,
            n_picks,
            damping=float(params.damping),
            on_pick=on_pick,
            overwrite=True,
        )
    _wait(embeddings.device)
    end = perf_counter()
    return SelectionTimes(
        setup=times[0] - start,
        early=(times[early - 1] - times[0]) / max(1, early - 1),
        late=(end - times[early - 1]) / max(1, n_picks - early),
    )


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a few runs."""
    spent: list[float] = []
    while len(spent) < 3 and sum(spent) < STEP_SECONDS / 2:
        _wait(device)
        start = perf_counter()
        function()
        _wait(device)
        spent.append(perf_counter() - start)
    return min(spent)


def _wait(device: torch.device) -> None:
    """Until an accelerator has done what it was told."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
