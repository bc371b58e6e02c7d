"""Seconds of a query, from small pieces of one: each step is timed on few samples and
scaled up.

A batch takes what it takes for each sample, and something of its own: a net's weights
are read however few samples there are. So each step is timed on two numbers of samples.
Backward passes are timed along some rows of an embedding; all take the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishermask_sk.selection.embeddings import DenseEmbeddings, Embeddings
from fishermask_sk.strategy.components import n_searched
from fishermask_sk.strategy.directions import PRODUCTS
from fishermask_sk.strategy.embedding import plain
from fishermask_sk.strategy.plan import Plan
from fishermask_sk.strategy.query import Query
from fishermask_sk.strategy.question import EXAMPLES, Question
from fishermask_sk.strategy.ranking import mask_by_scores, ranked_names
from fishermask_sk.strategy.selection_costs import SelectionCosts, seconds_of
from fishermask_sk.strategy.sizes import Sizes

# Each step may take about this many seconds, on at least EXAMPLES samples; the fewer of
# its two numbers of samples, and rows that are pulled back.
STEP_SECONDS, FEW_SAMPLES, TIMED_ROWS = 1.0, 2, 16


class Pace(NamedTuple):
    """Seconds of a batch, and of each of its samples."""

    per_batch: float
    per_sample: float

    def seconds(self, n: int, batch_size: int) -> float:
        """Of so many samples."""
        return ceil(n / batch_size) * self.per_batch + n * self.per_sample


class Costs(NamedTuple):
    """What each step of a query takes, with such weights and such rows."""

    ranked: Pace
    embedded: Pace
    classified: Pace
    per_projected: float  # a number of an embedding, in a direction
    n_weights: int
    n_directions: int  # of those weights that are no product
    is_cut: bool
    selection: SelectionCosts

    def seconds(self, sizes: Sizes) -> dict[str, float]:
        """Seconds by step, for a query's numbers of samples: "mask", "embeddings" and
        "selection"; "candidates", where the pool is passed through the net to find
        them.
        """
        params, question = sizes.params, sizes.question
        n_drawn = min(params.n_mask_samples, question.n_averaged)
        n_averaged = question.n_information or question.n_averaged
        n_embedded = sizes.n_embedded(n_averaged)
        of_directions = 0.0
        if self.is_cut:
            n_taken = n_searched(n_drawn)
            n_embedded += n_taken
            numbers = self.n_weights * self.n_directions
            rows = 2 * n_taken * self.selection.example.c
            # QR of k×r takes 4·k·r² multiplications.
            orthonormal = 4 * PRODUCTS * self.n_directions
            of_directions = self.per_projected * numbers * (rows + orthonormal)
        found = {
            "mask": 0.0
            if params.mask == "random"
            else self.ranked.seconds(n_drawn, params.batch_size),
            "embeddings": self.embedded.seconds(n_embedded, params.batch_size)
            + of_directions
            + self.selection.information_seconds(sizes, n_averaged),
            "selection": self.selection.seconds(sizes),
        }
        if sizes.eligible.n_most_uncertain is not None:
            n_pool = question.pool.n
            found["candidates"] = self.classified.seconds(n_pool, params.batch_size)
        return found


def calibrate(query: Query, plan: Plan, sizes: Sizes) -> tuple[Tensor, Costs]:
    """Time each step of a query on some of its samples.

    Parameters
    ----------
    query : Query
        With samples.
    plan : Plan
    sizes : Sizes
        Of the query that is asked about.

    Returns
    -------
    mask_indices : Tensor of shape (k,)
        From the few samples.
    costs : Costs
    """
    question, device = query.question, query.question.device
    ranked, scores = Pace(0.0, 0.0), None
    few_classes = min(plan.n_rows, TIMED_ROWS) + 1
    passes = (1 + plan.n_rows) / few_classes
    if question.params.mask == "random":
        scores = torch.rand(plan.gradients.n_parameters, device=device)
    elif names := ranked_names(question, plan):

        def rank(n: int) -> Tensor:
            return plan.gradients.diagonal_fisher(
                [_first(question, n)], names=names, n_top_classes=few_classes
            )

        ranked, scores = _paced(rank, question, passes)
    else:
        scores = torch.zeros(plan.gradients.n_parameters, device=device)
    with warnings.catch_warnings():  # the report says what one about the head says
        warnings.simplefilter("ignore", UserWarning)
        mask_indices = mask_by_scores(question, plan, scores)
    k = len(mask_indices)
    product, n_directions = query.product(plan, mask_indices, sizes)
    others = mask_indices if product is None else product.rest
    basis = None
    if n_directions < len(others):
        basis = torch.ones(len(others), n_directions, device=device)

    def embed(asked: Question, n: int) -> Embeddings:
        batch = _first(asked, n)
        if product is not None:
            of_head = copy(product)
            of_head.question = asked
            return of_head.embed(batch, basis)
        v = plain(asked, plan.gradients, batch, mask_indices)
        return DenseEmbeddings(v if basis is None else v @ basis.to(v))

    if passes == 1 or not len(others):
        embedded, example = _paced(partial(embed, question), question)
    else:
        fewer = question.by(replace(question.params, n_top_classes=few_classes))
        embedded, _ = _paced(partial(embed, fewer), question, passes)
        example = embed(question, 1)
    rows = torch.ones(256, min(k, 1024), dtype=example.dtype, device=device)
    columns = rows.new_ones(rows.shape[1], 64)
    per_column = min(seconds_of(lambda: rows @ columns, device) for _ in range(3))
    classified, _ = _paced(partial(_classify, question), question)
    return mask_indices, Costs(
        ranked,
        embedded,
        classified,
        per_column / rows.numel() / 64,
        len(others),
        n_directions,
        basis is not None,
        SelectionCosts(example, float(question.params.damping)),
    )


def _paced(
    function: Callable[[int], Any], question: Question, passes: float = 1.0
) -> tuple[Pace, Any]:
    """The pace of a function of a number of samples, where the query takes so many
    times as much, and what it gives for the larger of two numbers.
    """
    most = min(question.pool.n, question.params.batch_size)
    few = min(FEW_SAMPLES, most)
    function(few)  # whatever is only slow once
    of_few, _ = _seconds(partial(function, few), question.device)
    in_time = int(few * STEP_SECONDS / max(of_few, 1e-6))
    many = min(most, max(EXAMPLES, in_time))
    of_many, result = _seconds(partial(function, many), question.device)
    if many == few:
        return Pace(0.0, passes * of_many / many), result
    per_sample = max(0.0, (of_many - of_few) / (many - few))
    per_batch = max(0.0, of_many - many * per_sample)
    return Pace(passes * per_batch, passes * per_sample), result


def _first(question: Question, n: int) -> Any:
    """The first n samples of the pool, as a batch."""
    return next(question.fitted.batches(question.pool.dataset, n, range(n)))


def _classify(question: Question, n: int) -> None:
    with torch.no_grad():
        question.fitted.logits(_first(question, n))


def _seconds(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The shortest of a few runs, and what the last gave."""
    spent: list[float] = []
    result = None

    def run() -> None:
        nonlocal result
        result = function()

    while len(spent) < 3 and sum(spent) < STEP_SECONDS / 2:
        spent.append(seconds_of(run, device))
    return min(spent), result
