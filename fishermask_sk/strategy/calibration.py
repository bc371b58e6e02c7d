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

from fishermask_sk.gradients.fisher import information
from fishermask_sk.selection.greedy import select
from fishermask_sk.strategy.directions import PRODUCTS
from fishermask_sk.strategy.embedding import plain
from fishermask_sk.strategy.plan import Plan
from fishermask_sk.strategy.question import EXAMPLES, Question
from fishermask_sk.strategy.ranking import mask_by_scores, ranked_names
from fishermask_sk.strategy.sizes import Sizes

# Each step may take about this many seconds, and the selection's embeddings this many
# bytes, on this many weights and rows.
STEP_SECONDS, SELECTION_BYTES = 1.0, 2**26
SELECTION_WEIGHTS, SELECTION_ROWS = 1500, 20
# Picks that are timed: early ones, many of which are float64, and later ones.
EARLY_PICKS, PICKS = 8, 24
# The share of all picks that cost what early ones do.
EARLY_SHARE = 1 / 8


class SelectionTimes(NamedTuple):
    """Seconds until the first pick, of an early pick, and of a later one."""

    setup: float
    early: float
    late: float


class Costs(NamedTuple):
    """Seconds a sample of each step of a query, and what its selection takes.

    Everything but the forward pass grows with the rows of an embedding: one backward
    pass for each.
    """

    per_ranked: float
    per_embedded: float
    per_classified: float
    per_projected: float
    embeddings: Tensor
    n_weights: int
    n_rows: int
    timed: dict[tuple[int, int], SelectionTimes]  # by samples and rows, once each

    def seconds(self, sizes: Sizes, n_rows: int) -> dict[str, float]:
        """Seconds by step, for a query's numbers of samples: "mask", "embeddings" and
        "selection"; "candidates", where the pool is passed through the net to find
        them.
        """
        params, question = sizes.params, sizes.question
        passes = (1 + n_rows) / (1 + self.n_rows)
        n_drawn = min(params.n_mask_samples, question.n_averaged)
        n_embedded = sizes.n_embedded(question.n_information or question.n_averaged)
        n_head, n_rest = sizes.directions(self.n_weights, n_rows)
        n_directions = n_head + n_rest
        n_projected = 0
        if n_directions < self.n_weights:
            n_projected = n_embedded + 2 * PRODUCTS * n_drawn
            n_embedded += PRODUCTS * n_drawn
        found = {
            "mask": 0.0
            if params.mask == "random"
            else self.per_ranked * passes * n_drawn,
            "embeddings": self.per_embedded * passes * n_embedded
            + self.per_projected * n_rest * n_rows * n_projected,
            "selection": _scaled_selection(self, n_directions, n_rows, sizes),
        }
        if sizes.eligible.n_most_uncertain is not None:
            found["candidates"] = question.pool.n * self.per_classified
        return found


def calibrate(question: Question, plan: Plan) -> tuple[Tensor, Costs]:
    """Time each step of a query on some of its samples.

    Returns
    -------
    mask_indices : Tensor of shape (k,)
        From the few samples.
    costs : Costs
    """
    n_samples = _affordable(question, plan)
    scores = _rank(question, plan, n_samples)
    # The query ranks those alone between which there is a choice.
    ranked = plan._replace(names=ranked_names(question, plan))
    per_ranked = 0.0
    if ranked.names:
        per_ranked = _seconds(lambda: _rank(question, ranked, n_samples), scores.device)
    with (
        warnings.catch_warnings()
    ):  # the report says what the warning about the head says
        warnings.simplefilter("ignore", UserWarning)
        mask_indices = mask_by_scores(question, plan, scores)
    k = len(mask_indices)
    batch = _first(question, n_samples)

    def embed() -> Tensor:
        return plain(question, plan.gradients, batch, mask_indices)

    per_embedded = _seconds(embed, scores.device)
    embeddings = embed()
    row, directions = embeddings[0, :1], embeddings.new_ones(k, 64)
    return mask_indices, Costs(
        per_ranked / n_samples,
        per_embedded / n_samples,
        _seconds(lambda: _classify(question, n_samples), scores.device) / n_samples,
        _seconds(lambda: row.expand(256, k) @ directions, scores.device) / 256 / 64,
        embeddings,
        k,
        plan.n_rows,
        {},
    )


def _affordable(question: Question, plan: Plan) -> int:
    """How many samples fit into a step's time, by the time of the first few; at most a
    batch.
    """
    few = min(EXAMPLES, question.pool.n)
    _rank(question, plan, few)  # whatever is only slow once
    seconds = _seconds(lambda: _rank(question, plan, few), question.device)
    in_time = int(few * STEP_SECONDS / max(seconds, 1e-6))
    return min(question.pool.n, question.params.batch_size, max(few, in_time))


def _first(question: Question, n: int) -> Any:
    """The first n samples of the pool, as a batch."""
    return next(question.fitted.batches(question.pool.dataset, n, range(n)))


def _rank(question: Question, plan: Plan, n_samples: int) -> Tensor:
    return plan.gradients.diagonal_fisher(
        [_first(question, n_samples)],
        names=plan.names,
        n_top_classes=question.params.n_top_classes,
    )


def _classify(question: Question, n_samples: int) -> None:
    with torch.no_grad():
        question.fitted.logits(_first(question, n_samples))


def _scaled_selection(costs: Costs, n_weights: int, n_rows: int, sizes: Sizes) -> float:
    """Seconds of the selection: linear in N; for k that is too large to try, setup as
    k³ + N·k², picks as k² + N·k; for c rows that are too many, setup as 1 + N·c, picks
    as c + N·c². Of a pick that is less where the head is held as a product.
    """
    embeddings, n_pool = costs.embeddings, sizes.eligible.n_here
    question = sizes.question
    k_tried = min(embeddings.shape[2], SELECTION_WEIGHTS)
    rows_tried = min(n_rows, embeddings.shape[1], SELECTION_ROWS)
    most = SELECTION_BYTES // (rows_tried * k_tried * embeddings.itemsize)
    large = min(n_pool, max(64, most))
    small = max(1, large // 4)
    tried = embeddings[:, :rows_tried, :k_tried]
    for n in {small, large}:
        if (n, rows_tried) not in costs.timed:
            of_n = _time_selection(_like(tried, n), question)
            costs.timed[n, rows_tried] = of_n
    times = {n: costs.timed[n, rows_tried] for n in (small, large)}
    wider = n_rows / rows_tried
    share = sizes.share_of_dense(costs.n_weights, n_rows)
    growth = n_weights / k_tried
    n_picks = min(ceil(sizes.params.oversample * question.n_instances), n_pool)
    n_early = min(n_picks, max(EARLY_PICKS, ceil(EARLY_SHARE * n_picks)))

    def at_n_pool(
        step: str, fixed_power: int, per_sample_power: int, rows_power: int
    ) -> float:
        of_fixed = growth**fixed_power * wider**rows_power
        of_sample = growth**per_sample_power * wider ** (1 + rows_power)
        if small == large:
            return getattr(times[large], step) * of_fixed
        slope = max(
            0.0,
            (getattr(times[large], step) - getattr(times[small], step))
            / (large - small),
        )
        fixed = max(0.0, getattr(times[large], step) - slope * large)
        if step != "setup":
            of_sample *= share
        return fixed * of_fixed + slope * n_pool * of_sample

    return (
        at_n_pool("setup", 3, 2, 0)
        + n_early * at_n_pool("early", 2, 1, 1)
        + (n_picks - n_early) * at_n_pool("late", 2, 1, 1)
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


def _time_selection(embeddings: Tensor, question: Question) -> SelectionTimes:
    n, params = len(embeddings), question.params
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
