"""Steps 1 and 2 of a query: diagonal Fisher information, and the positions that are
kept.
"""

from __future__ import annotations

from itertools import chain
from numbers import Integral

import torch
from torch import Tensor

from fishermask_sk.strategy.masks import (
    custom_mask,
    merged,
    n_positions,
    per_layer_mask,
    ranked_mask,
    warn_if_head_fills_mask,
)
from fishermask_sk.strategy.plan import Plan
from fishermask_sk.strategy.progress import Paced, Progress, unpaced
from fishermask_sk.strategy.question import Question, weighty


def find_mask(
    question: Question,
    plan: Plan,
    progress: Progress,
    paced: Paced = unpaced,
) -> Tensor:
    """The positions (k,) that are kept, the same on all processes.

    `paced` is told how many samples are ranked.
    """
    processes, gradients = question.processes, plan.gradients
    device = question.device
    if question.params.mask == "random":
        uniform = question.rng.uniform(size=gradients.n_parameters)
        scores = torch.as_tensor(uniform, device=device)
    elif names := ranked_names(question, plan):
        scores = _diagonal_fisher(question, plan, names, progress, paced)
    else:
        _ = question.ranking_samples  # what is drawn after it stays the same
        scores = torch.zeros(gradients.n_parameters, device=device)
    with processes.together():
        own = None
        if processes.rank == 0:
            own = mask_by_scores(question, plan, scores).cpu()
    return processes.object_of(0, own).to(device)


def ranked_names(question: Question, plan: Plan) -> list[str]:
    """The parameters whose scores decide the mask: none where no choice is left."""
    if question.params.mask != "fisher":
        return plan.names
    sizes = {name: p.numel() for name, p in plan.gradients.parameters.items()}
    in_head = [name for name in plan.names if name in plan.layout.head]
    n_head = sum(sizes[name] for name in in_head) if question.params.keep_head else 0
    if plan.k == n_head or plan.k >= plan.n_candidates:
        return []
    return in_head if n_head > plan.k else plan.names


def _diagonal_fisher(
    question: Question,
    plan: Plan,
    names: list[str],
    progress: Progress,
    paced: Paced,
) -> Tensor:
    """Step 1 for the weights that a mask may touch, over samples drawn from those that
    F̄ is a mean over.
    """
    processes = question.processes
    drawn = weighty(question.ranking_samples, "n_mask_samples")
    with processes.together(), progress.bar("mask", drawn.n_own) as advance:
        mean = plan.gradients.diagonal_fisher(
            chain.from_iterable(question.batches(*part) for part in drawn.parts),
            paced(advance, drawn.n_own),
            names=names,
            n_top_classes=question.params.n_top_classes,
            weights=drawn.weights,
        )
    own = drawn.n_own if drawn.weights is None else float(drawn.weights.sum())
    scores = processes.add(mean.mul_(own / drawn.total_weight))
    # The largest of all is NaN where any is; torch.isfinite would copy them.
    if not bool(scores.amax().isfinite()):
        raise FloatingPointError(
            "The diagonal Fisher information holds NaN or infinite values: samples "
            "do, or the net's weights."
        )
    return scores


def mask_by_scores(question: Question, plan: Plan, scores: Tensor) -> Tensor:
    """Step 2, from scores of all weights that it may touch."""
    params, candidates = question.params, plan.candidates
    slices = plan.gradients.slices
    allowed = {name: slices[name] for name in plan.names}
    if callable(params.mask):
        return custom_mask(
            params.mask, scores, min(plan.k, plan.n_candidates), allowed, candidates
        )
    in_head = [name for name in plan.names if name in plan.layout.head]
    head = merged(slices[name] for name in in_head) if params.keep_head else []
    if params.mask == "per_layer":
        fraction = (
            plan.k / plan.n_trainable
            if isinstance(params.sparsity, Integral)
            else params.sparsity
        )
        return per_layer_mask(scores, fraction, allowed, candidates, head)
    if head and (n_head := n_positions(head)) < plan.n_candidates:
        warn_if_head_fills_mask(plan.k, n_head, plan.n_trainable, question.warn)
    return ranked_mask(scores, plan.k, candidates, head)
