"""How many samples, rows, directions and bytes a query works with, known before any
expensive work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from math import ceil

import torch
from torch import nn

from fishermask_sk.memory import Budget, Needs, needs, uses_rows
from fishermask_sk.selection.greedy import FLOAT32_DAMPING
from fishermask_sk.selection.head_embeddings import cheapest_form
from fishermask_sk.strategy.cures import fitting_settings
from fishermask_sk.strategy.directions import n_kept_directions
from fishermask_sk.strategy.eligible import Eligible
from fishermask_sk.strategy.question import Question
from fishermask_sk.strategy.settings import Settings


def bytes_of_weights(params: Settings, module: nn.Module) -> int:
    """What a query holds for each weight of a net, beside a batch: the module's numbers
    as they were found, gradients of a backward pass to all, and two vectors of scores,
    of all samples and of a batch.
    """
    parameters = list(module.parameters())
    as_found = sum(t.numel() * t.itemsize for t in (*parameters, *module.buffers()))
    trainable = [p for p in parameters if p.requires_grad]
    gradients = sum(p.numel() * p.itemsize for p in trainable)
    n = sum(p.numel() for p in parameters)
    scores = 2 * n * max([4, *(p.itemsize for p in trainable)])
    if params.mask == "random":  # drawn as float64
        scores = 8 * n
    return as_found + gradients + scores


class Sizes:
    """Counts of a query.

    Parameters
    ----------
    question : Question
    eligible : Eligible
    head : sequence of str
        Names of the head's parameters that a mask may touch.
    """

    def __init__(
        self, question: Question, eligible: Eligible, head: Sequence[str]
    ) -> None:
        self.question, self.eligible, self.head = question, eligible, head
        self.params = question.params

    @property
    def passes_are_the_mean(self) -> bool:
        """Whether F̄ is a mean over all of pool and labelled samples, who are embedded
        one after the other anyway.
        """
        return self.question.target is None and self.question.n_information is None

    @property
    def shares_rows(self) -> bool:
        """Whether F̄ is a plain mean over samples whose embeddings are all kept."""
        weighted = any(
            samples.weights is not None for samples in self.question.averaged
        )
        return self.passes_are_the_mean and self.eligible.is_all and not weighted

    def n_embedded(self, n_information: int) -> int:
        """How many samples here have their gradients taken for the selection, where F̄
        is a mean over so many.
        """
        n_labeled = self.question.labeled.n
        if self.passes_are_the_mean:
            return n_labeled + self.question.pool.n
        return n_labeled + self.eligible.n_here + n_information

    @property
    def _n_more_rows(self) -> int:
        """Samples whose rows are kept for F̄ alone, where matrices would cost more."""
        if self.shares_rows:
            return 0
        return self.question.n_information or self.question.n_averaged

    def in_rows(self, n_rows: int, k: int) -> bool:
        """Whether the selection works on the embeddings of all samples, and no k×k
        matrix is made.
        """
        n_samples = self.eligible.n_here + self.question.labeled.n + self._n_more_rows
        alone = self.question.processes.size == 1
        return alone and uses_rows(n_samples, n_rows, k)

    @property
    def n_in_kernel(self) -> tuple[int, int, int]:
        """Of whom the kernel's rows are, who has columns besides, and how many of all
        are labelled, where the selection works without k×k matrices.
        """
        n_labeled = self.question.labeled.n
        n_others = self._n_more_rows or n_labeled
        return self.eligible.n_here, n_others, n_labeled

    def directions(
        self, k: int, n_rows: int, n_head: int | None = None
    ) -> tuple[int, int]:
        """In which directions of k weights the selection works, see
        `n_kept_directions`; by default with as many of the head as a mask has that
        keeps it.
        """
        if n_head is None:
            n_head = self._n_in_product(k, n_rows)
        question = self.question
        kinds = (question.pool, question.labeled, *question.averaged)
        n_samples = sum({each.name: each.shard.total for each in kinds}.values())
        n_rows_in_all = n_samples * n_rows
        return n_kept_directions(k, n_head, self.params.components, n_rows_in_all)

    def _n_in_product(self, k: int, n_rows: int) -> int:
        """How many of k weights a product with the head stands for."""
        n_head = self._n_of_head(k)
        is_dense = not n_head or self._form(n_head, n_rows) == "dense"
        return 0 if is_dense else n_head

    def _n_of_head(self, k: int) -> int:
        """How many of k weights are the head's, where a mask keeps it."""
        keeps = self.params.keep_head and not callable(self.params.mask)
        n_head = sum(shape.numel() for shape in self._shapes_of_head)
        return min(k, n_head) if keeps else 0

    def _n_left_out(self, n_head: int, n_rows: int) -> int:
        """How many directions of a whole head go, where its classes' cotangents sum to
        zero: those of one class.
        """
        n_classes = self._shapes_of_head[0][0] if n_head else 1
        is_whole = n_head == sum(shape.numel() for shape in self._shapes_of_head)
        if n_classes == 1 or not is_whole or self._form(n_head, n_rows) != "whole":
            return 0
        return n_head // n_classes

    def _form(self, n_head: int, n_rows: int) -> str:
        """See `cheapest_form`."""
        return cheapest_form(n_head, n_rows, *self._of_head)

    @property
    def _of_head(self) -> tuple[int, int, bool]:
        """Classes, inputs, and whether it is on the CPU."""
        n_classes, d = self._shapes_of_head[0]
        return n_classes, d + 1, self.question.device.type == "cpu"

    @cached_property
    def _shapes_of_head(self) -> list[torch.Size]:
        """Of a linear head's weight, and of its bias; none where a mask may not touch
        it, or it is another.
        """
        parameters = dict(self.question.fitted.module.named_parameters())
        found = sorted((parameters[n].shape for n in self.head), key=len, reverse=True)
        return found if [len(shape) for shape in found] in ([2], [2, 1]) else []

    @property
    def sums_in_float64(self) -> bool:
        """Whether the products of F̄ are float64: where λ is small."""
        return float(self.params.damping) < FLOAT32_DAMPING

    @property
    def n_picks(self) -> int:
        """How many samples are picked first."""
        n = ceil(self.params.oversample * self.question.n_instances)
        return min(n, self.eligible.n_total)

    @property
    def n_steps(self) -> int:
        """Picks and removals."""
        return 2 * self.n_picks - self.question.n_instances

    @property
    def _n_reviewed(self) -> int:
        """Picks that a backward pass reviews."""
        return self.n_picks if self.n_picks > self.question.n_instances else 0

    def check_memory(self, budget: Budget, k: int, n_rows: int) -> None:
        """Refuse what does not fit, with settings that do."""
        cures = partial(
            fitting_settings,
            budget,
            self.needs,
            k,
            n_rows,
            sum(self.directions(k, n_rows)),
            exact_k=self.params.mask in ("fisher", "random"),
        )
        budget.check(self.needs(k, n_rows), k, self.question.pool.n, cures)

    def needs(self, k: int, n_rows: int, n_components: int | None = None) -> Needs:
        """What the query holds, with so many weights in the mask."""
        module = self.question.fitted.module
        itemsize = max(4, *(p.itemsize for p in module.parameters() if p.requires_grad))
        n_head, n = self.directions(k, n_rows)
        if n_components is not None and n_components < n_head + n:
            n_head, n = 0, n_components
        n_left_out = self._n_left_out(n_head, n_rows)
        needed = self.needs_of(n_head - n_left_out + n, n_rows, itemsize)
        stored = n_rows * n
        if n_head:
            n_classes, d = self._shapes_of_head[0]
            tops = self._form(n_head, n_rows) == "tops"
            columns = n_rows + 1 if tops else n_classes - bool(n_left_out)
            stored += n_rows * columns + d + 1 + tops * columns
        stored *= self.eligible.n_here * itemsize
        needed = needed._replace(
            embeddings=stored, weights=bytes_of_weights(self.params, module)
        )
        k -= n_head
        if n == k:
            return needed
        # A basis, its product with F, and their factors.
        return needed._replace(matrices=needed.matrices + 4 * n * k * itemsize)

    def needs_of(self, k: int, n_rows: int, itemsize: int) -> Needs:
        """What the selection holds, with so many directions of embeddings as they
        are.
        """
        in_rows, n_stored = self.in_rows(n_rows, k), self.eligible.n_here
        needed = needs(
            n_stored,
            self.question.labeled.n,
            n_rows,
            k,
            itemsize,
            self._n_reviewed,
            in_rows,
            self.question.device.type == "cpu",
        )
        if not in_rows:
            return needed
        for_information = 2 * self._n_more_rows * n_rows * k * itemsize
        for_information += 8 * n_stored * self._n_more_rows * n_rows**2
        return needed._replace(matrices=needed.matrices + for_information)
