"""Seconds of a selection, from pieces of one.

With N candidates of c rows, k weights and b picks, it takes

* before the first pick k³, and N·k² where embeddings are multiplied with k×k matrices:
  these products are timed on a block of samples, and k³ by a triangular solve;
* for each pick k²·c, and N times what a product of an embedding with 2c columns takes,
  which grows with k but for what a head as a product spares: a selection of the same
  form is timed on few weights and on two numbers of samples;
* without k×k matrices (N·c)²·k before, and N times what the rows of a sample take,
  which no count of weights tells: both are timed on two numbers of samples, with all
  weights; and (N·c)²·c for each pick, timed on few weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from math import ceil
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishermask_sk.selection.candidates import FOLDED_PICKS
from fishermask_sk.selection.embeddings import (
    BLOCK_NUMBERS,
    DenseEmbeddings,
    Embeddings,
)
from fishermask_sk.selection.greedy import FLOAT32_DAMPING, select
from fishermask_sk.selection.head_embeddings import (
    Head,
    HeadEmbeddings,
    HeadMask,
    JoinedEmbeddings,
)
from fishermask_sk.selection.top_head_embeddings import TopHeadEmbeddings
from fishermask_sk.strategy.sizes import Sizes

# Picks are tried on so many weights, and on so many samples at the most: fewer where
# the few picks that are tried would take more multiplications.
TRIED_WEIGHTS, TRIED_SAMPLES, TRIED_MULTIPLICATIONS = 640, 1024, 2**31
FEWEST_PICKS, FEWEST_SAMPLES = 3, 32
# Products with k×k matrices are tried with so many weights, solves with so many, and
# picks from a kernel of so many rows with so many.
TRIED_SIDE, SOLVED_SIDE, TRIED_ROWS, PICKED_WEIGHTS = 2048, 1024, 2048, 64
# A Cholesky factor, four triangular solves and an inverse of k×k matrices come to so
# many solves at the pace of smaller ones, as was measured for k = 5,130.
SOLVES = 4
# Gains and changes of A and B, beside a product with a column, in multiplications a
# sample: so many times c².
BESIDE = 3


class SelectionCosts:
    """What selections from embeddings of one form take.

    Parameters
    ----------
    example : Embeddings
        Of a few samples, in the form and with the weights of the query.
    damping : float
    n_weights : int, optional
        How many weights are tried at the most.
    """

    def __init__(
        self, example: Embeddings, damping: float, n_weights: int = TRIED_WEIGHTS
    ) -> None:
        self.example, self.damping = example, damping
        self.c, self.k = example.c, example.k
        self._few = _of_fewer_weights(example, n_weights)
        side = TRIED_SIDE * n_weights // TRIED_WEIGHTS
        self._wide = _of_fewer_weights(example, side)
        self._timed: dict[int, _Timed] = {}

    def seconds(self, sizes: Sizes) -> float:
        """Of the whole selection of a query."""
        n, has_labeled = sizes.eligible.n_here, bool(sizes.question.labeled.n)
        if sizes.in_rows(self.c, self.k):
            return self._by_kernel(sizes)
        fixed, per_sample = self._of_pick(sizes)
        per_pick = fixed + n * per_sample * self._of_product
        # M⁻¹ and Z are multiplied with a few rows, and picks are folded into them.
        per_pick += 2 * (self.k**2 - self._few.k**2) * self._of_products.look
        per_pick += 3 * self.c * self.k**2 * self._of_products.solve
        n_products = 1 + has_labeled  # with Z, and with M⁻¹
        before = n * n_products * self._of_products.quadratic
        if has_labeled:
            before += SOLVES * self.k**3 * self._of_products.solve
        return before + sizes.n_steps * per_pick

    def information_seconds(self, sizes: Sizes, n_averaged: int) -> float:
        """Of the sums that F̄ and M_∅ are, over so many samples and the labelled."""
        if sizes.in_rows(self.c, self.k):
            return 0.0
        # Those of labelled samples are float64.
        n = n_averaged + 2 * sizes.question.labeled.n
        return n * self._of_products.information

    def _by_kernel(self, sizes: Sizes) -> float:
        n_own, n_others, n_labeled = sizes.n_in_kernel
        n_all, c = n_own + n_others, self.c
        per_sample, per_pair = self._of_kernel
        n_pairs = n_own * n_all + n_labeled * (n_all + n_labeled)
        before = per_sample * (n_all + n_labeled) + per_pair * n_pairs
        n = min(n_own, max(FEWEST_PICKS, TRIED_ROWS // c))
        some = _mixed(_of_fewer_weights(self.example, PICKED_WEIGHTS), n)
        n_picks = min(n, FOLDED_PICKS)
        per_pick = _time_picks(some, n_picks, self.damping, True).pick
        return before + sizes.n_steps * per_pick * n_own * n_all / n**2

    @cached_property
    def _of_kernel(self) -> tuple[float, float]:
        """Seconds until the first pick from a kernel: for each sample, and for each
        pair of samples.
        """
        n = round((TRIED_MULTIPLICATIONS / self.k) ** 0.5) // self.c
        n = 2 * max(2, min(n, TRIED_ROWS // self.c) // 2)
        few, many = (
            _time_picks(_mixed(self.example, each), 1, self.damping, True).setup / each
            for each in (n // 2, n)
        )
        per_pair = max(0.0, (many - few) / (n - n // 2))
        return max(0.0, many - n * per_pair), per_pair

    def _of_pick(self, sizes: Sizes) -> tuple[float, float]:
        """Seconds of a pick, and of it for each sample, by two numbers of these."""
        large = self._n_tried(sizes.eligible.n_here)
        small = max(1, large // 8)
        few, many = (self._of(n).pick for n in (small, large))
        if small == large:
            return 0.0, many / large
        per_sample = max(0.0, (many - few) / (large - small))
        return max(0.0, many - large * per_sample), per_sample

    def _n_tried(self, n_here: int) -> int:
        affordable = TRIED_MULTIPLICATIONS // (FEWEST_PICKS * self._per_sample)
        return min(n_here, TRIED_SAMPLES, max(FEWEST_SAMPLES, affordable))

    @property
    def _per_sample(self) -> int:
        """Multiplications of a pick for a sample, where few weights are tried."""
        beside = BESIDE * self.c**2
        return 2 * self.c * (multiplications(self._few) + beside)

    @property
    def _of_product(self) -> float:
        """How many times as much a pick of a sample takes with all weights."""
        beside = BESIDE * self.c**2
        return 2 * self.c * (multiplications(self.example) + beside) / self._per_sample

    @cached_property
    def _of_products(self) -> _Products:
        """Seconds of the products with k×k matrices: for each sample, with all weights;
        of a few rows and a triangular solve, for each number and multiplication.
        """
        n_in_block = BLOCK_NUMBERS["cpu"] // self._wide.width
        v = _mixed(self._wide, max(1, min(TRIED_SAMPLES, n_in_block)))
        growth = (self.k / v.k) ** 2 / v.n
        exact = torch.float64 if self.damping < FLOAT32_DAMPING else v.dtype
        m = torch.zeros(v.k, v.k, dtype=torch.float64, device=v.device)
        m.diagonal().fill_(1.0)
        of_information = seconds_of(lambda: v.information(exact), v.device)
        of_quadratic = seconds_of(lambda: v.quadratic(m, exact), v.device)
        side = min(self.k, SOLVED_SIDE)
        factor, columns = m[:side, :side].contiguous(), torch.ones_like(m[:side, :side])

        def solve() -> None:
            torch.linalg.solve_triangular(factor, columns, upper=False)

        of_solve = min(seconds_of(solve, v.device) for _ in range(2))
        rows = m.new_ones(2 * self.c, v.k)
        of_look = min(seconds_of(lambda: rows @ m.mT, v.device) for _ in range(2))
        return _Products(
            growth * of_information,
            growth * of_quadratic,
            of_look / v.k**2,
            of_solve / side**3,
        )

    def _of(self, n: int) -> _Timed:
        """Timed once for so many samples."""
        if n not in self._timed:
            n_picks = TRIED_MULTIPLICATIONS // max(1, n * self._per_sample)
            n_picks = min(n, FOLDED_PICKS, max(FEWEST_PICKS, n_picks))
            some = _mixed(self._few, n)
            self._timed[n] = _time_picks(some, n_picks, self.damping, False)
        return self._timed[n]


class _Timed(NamedTuple):
    """Seconds until the first pick, and of a later one."""

    setup: float
    pick: float


class _Products(NamedTuple):
    information: float
    quadratic: float
    look: float
    solve: float


def multiplications(v: Embeddings) -> int:
    """Of a product of one sample's embedding with one column."""
    if isinstance(v, JoinedEmbeddings):
        return multiplications(v.head) + multiplications(v.rest)
    if isinstance(v, HeadEmbeddings):
        return v.n_classes * (v.inputs.shape[1] + v.c)
    if isinstance(v, TopHeadEmbeddings):
        return v.m * (ceil(v.k / v.n_classes) + v.c)
    return v.c * v.k


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Of one run."""
    wait_for(device)
    start = perf_counter()
    function()
    wait_for(device)
    return perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Until an accelerator has done what it was told."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def _of_fewer_weights(v: Embeddings, most: int) -> Embeddings:
    """The same form with no more than so many weights; of a head and others beside it
    in proportion.
    """
    if v.k <= most:
        return v
    if isinstance(v, JoinedEmbeddings):
        n_head = max(1, most * v.head.k // v.k)
        head, rest = _head_of_fewer(v.head, n_head), _dense(v.rest, most - n_head)
        return JoinedEmbeddings(head, rest)
    if isinstance(v, DenseEmbeddings):
        return _dense(v, most)
    assert isinstance(v, (HeadEmbeddings, TopHeadEmbeddings))  # for the type checker
    return _head_of_fewer(v, most)


def _dense(v: DenseEmbeddings, most: int) -> DenseEmbeddings:
    return DenseEmbeddings(v.values[..., :most].contiguous(), v.device)


def _head_of_fewer(v: Head, most: int) -> Head:
    chosen = torch.linspace(0, v.k - 1, most).long().to(v.mask.classes.device)
    mask = HeadMask(
        v.mask.classes[chosen], v.mask.columns[chosen], v.mask.places[chosen]
    )
    r, *_, h = v.tensors
    if isinstance(v, TopHeadEmbeddings):
        return TopHeadEmbeddings(r, v.tops, h, mask, v.n_classes, v.device)
    return HeadEmbeddings(r, h, mask, v.device)


def _mixed(v: Embeddings, n: int) -> Embeddings:
    """As many as are wanted that resemble the few that there are, no two the same:
    mixtures of pairs.
    """
    drawn: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
    first, second = (torch.randint(v.n, (n,), **drawn) for _ in range(2))
    angle = torch.rand(n, **drawn)

    def mixture(tensor: Tensor) -> Tensor:
        one, other = (tensor[which.to(tensor.device)] for which in (first, second))
        if not tensor.is_floating_point():  # the classes that count
            return one
        shape = (n, *[1] * (tensor.ndim - 1))
        of_one, of_other = angle.cos().to(tensor), angle.sin().to(tensor)
        return one * of_one.view(shape) + other * of_other.view(shape)

    return v.of([mixture(tensor) for tensor in v.tensors])


def _time_picks(v: Embeddings, n_picks: int, damping: float, in_rows: bool) -> _Timed:
    """The first picks, of which none is folded into M⁻¹ and Z."""
    information = None if in_rows else v.information(v.dtype) / v.n
    times: list[float] = []

    def on_pick() -> None:
        wait_for(v.device)
        times.append(perf_counter())

    with warnings.catch_warnings():  # the query itself will say what is to be said
        warnings.simplefilter("ignore", UserWarning)
        wait_for(v.device)
        start = perf_counter()
        select(
            v,
            information,
            n_picks,
            labeled_information=information,
            n_labeled=0 if in_rows else v.n,
            damping=damping,
            on_pick=on_pick,
        )
    n_later = max(1, n_picks - 1)
    return _Timed(times[0] - start, (times[-1] - times[0]) / n_later)
