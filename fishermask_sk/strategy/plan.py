"""What is known of a query before any expensive work: the net tried on a few samples,
and what a mask may touch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fishermask_sk.gradients.generic import samples as some_samples
from fishermask_sk.gradients.layers import Layout, candidate_names, find_layout
from fishermask_sk.gradients.per_sample import PerSampleGradients
from fishermask_sk.gradients.verification import ONE_BY_ONE
from fishermask_sk.memory import Budget
from fishermask_sk.strategy.masks import merged, n_kept, n_positions
from fishermask_sk.strategy.net_checks import (
    check_candidates,
    check_real,
    check_samples_apart,
    reached_parameters,
    some_of,
)
from fishermask_sk.strategy.question import Question, Samples
from fishermask_sk.strategy.settings import Settings
from fishermask_sk.strategy.sizes import bytes_of_weights

# Of the examples, those with a graph of all layers.
GRAPHED = 2
# And of the pool, of the labelled ones and of the target each, on which the ways to its
# gradients are.
TRIED = 4


class Plan(NamedTuple):
    """Per-sample gradients, layout, names and positions of the weights that a mask may
    touch, k, and the rows of an embedding.
    """

    gradients: PerSampleGradients
    layout: Layout
    names: list[str]
    candidates: list[slice]
    k: int
    n_trainable: int
    n_classes: int
    n_rows: int

    @property
    def n_candidates(self) -> int:
        """How many weights a mask may touch."""
        return n_positions(self.candidates)

    @property
    def head(self) -> tuple[str, ...]:
        """The head's parameters that a mask may touch."""
        return tuple(name for name in self.layout.head if name in self.names)

    @property
    def slow(self) -> list[str]:
        """Parameters whose gradients are taken one sample at a time."""
        ways = self.gradients.ways()
        return [name for name in self.names if ways[name] == ONE_BY_ONE]


def make_plan(question: Question, budget: Budget, within: int | None = None) -> Plan:
    """Try the net on a few samples, of the first `within` or of all, and refuse what
    no query can work on.
    """
    example, n_example = question.shared_example
    with question.processes.together():
        if question.pool.n and question.pool.shard.start:
            question.fitted.check_outputs(question.example(question.pool))
        return _made(question, budget, example, n_example, within)


def _made(
    question: Question, budget: Budget, example: Any, n_example: int, within: int | None
) -> Plan:
    params, fitted = question.params, question.fitted
    n_outputs = fitted.check_outputs(example)
    check_samples_apart(fitted, example, n_example)
    fitted.lay_out(example)
    example = fitted.laid_out(example)
    for samples in (question.labeled, question.target):
        if samples is not None and samples.n:
            fitted.check_outputs(question.example(samples))
    trainable = [
        name for name, p in fitted.module.named_parameters() if p.requires_grad
    ]
    if not trainable:
        raise ValueError(
            "All weights of the net are frozen; FisherMask needs some with "
            "requires_grad=True."
        )
    few = some_samples(example, slice(GRAPHED))
    reached = reached_parameters(fitted, few, trainable)
    layout = find_layout(
        fitted.module, lambda: fitted.outputs(few), n_outputs, params.head
    )
    names = candidate_names(params.layers, layout, trainable)
    check_candidates(params.layers, names, reached)
    check_real(fitted.module, names)
    gradients = _gradients(question, budget, names, example, within)
    n_trainable = sum(gradients.parameters[name].numel() for name in trainable)
    n_classes = max(2, n_outputs)  # one logit is two classes
    plan = Plan(gradients, layout, names, [], 0, n_trainable, n_classes, 0)
    return changed_plan(plan, params)


def changed_plan(plan: Plan, params: Settings) -> Plan:
    """The plan by these parameters, of which `layers` may allow other weights."""
    parameters = plan.gradients.parameters
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    names = candidate_names(params.layers, plan.layout, trainable)
    return plan._replace(
        names=names,
        candidates=merged(plan.gradients.slices[name] for name in names),
        k=n_kept(params.sparsity, plan.n_trainable),
        n_rows=min(plan.n_classes, params.n_top_classes or plan.n_classes) - 1,
    )


def _gradients(
    question: Question,
    budget: Budget,
    names: list[str],
    example: Any,
    within: int | None,
) -> PerSampleGradients:
    """Gradients whose ways were tried on samples from all over what is here."""
    module = question.fitted.module
    drawn = [
        _drawn_example(question, samples, min(samples.n, within or samples.n))
        for samples in (question.pool, question.labeled, question.target)
        if samples is not None and samples.n
    ]
    gradients = PerSampleGradients(
        module,
        question.fitted.logits,
        drawn.pop(0) if drawn else example,
        names,
        budget.beside(bytes_of_weights(question.params, module)),
    )
    for batch in drawn:
        gradients.verify(batch)
    return gradients


def _drawn_example(question: Question, samples: Samples, within: int) -> Any:
    """A few samples, by a generator of its own: `random_state` is left alone."""
    n = min(TRIED, within)
    drawn = np.random.default_rng(0).choice(within, n, replace=False)
    batches = question.fitted.batches(samples.dataset, n, np.sort(drawn).tolist())
    return next(batches)


def say_what_is_slow(question: Question, plan: Plan) -> None:
    """Warn once in a loop where gradients are taken one sample at a time, and why."""
    slow = plan.slow
    if slow and question.processes.rank == 0:
        n_weights = sum(plan.gradients.parameters[name].numel() for name in slow)
        question.warn(
            f"The gradients of {n_weights:,} weights ({some_of(slow)}) take a "
            "backward pass for every sample and class, which is slow: "
            f"{plan.gradients.reasons[slow[0]]}. layers= can leave them out.",
            "slow gradients",
        )
