"""The leading directions of a mask that is too large for all of them, from the drawn
samples' information as it streams past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishermask_sk.gradients.per_sample import PerSampleGradients
from fishermask_sk.selection.embeddings import DenseEmbeddings
from fishermask_sk.strategy.directions import (
    PRODUCTS,
    SPARE,
    Auto,
    leading,
    share_held,
)
from fishermask_sk.strategy.embedding import in_batches, none_of, plain
from fishermask_sk.strategy.progress import Paced, Progress, logged
from fishermask_sk.strategy.question import Question, Samples

# Samples of one kind, by position, and their weights.
Chosen = tuple[Samples, list[int], Tensor | None]


def leading_directions(
    question: Question,
    gradients: PerSampleGradients,
    mask_indices: Tensor,
    n: int,
    is_beside_head: bool,
    progress: Progress,
    paced: Paced,
) -> Tensor:
    """At most n principal directions (k, n), the same on all processes; by default no
    more than hold their share of the trace.

    Parameters
    ----------
    question, gradients
    mask_indices : Tensor of shape (k,)
        Which weights.
    n : int
    is_beside_head : bool
        Whether these are a mask without its head, for the warning.
    progress, paced
        As in `find_mask`.
    """
    k, processes = len(mask_indices), question.processes
    auto = question.params.components
    measures = np.zeros(question.n_averaged, dtype=bool)
    if isinstance(auto, Auto):
        # An eighth of them tells what the others' directions hold.
        measures = question.rng.random_sample(question.n_averaged) < 1 / 8
    none = none_of(question, gradients, mask_indices)
    finding, measuring = (
        list(_chosen(question, each)) for each in (~measures, measures)
    )
    n_finding, n_measuring = (
        sum(len(positions) for _, positions, _ in each) for each in (finding, measuring)
    )
    start = question.rng.standard_normal((k, min(n + SPARE, k)))
    n_passed = PRODUCTS * n_finding + n_measuring
    with logged("directions"), progress.bar("directions", n_passed) as bar:
        advance = paced(bar, n_passed)

        def rows(chosen: list[Chosen]) -> Iterator[Tensor]:
            yield none.flatten(0, 1)
            yield from _rows(question, gradients, mask_indices, chosen, advance)

        def times(basis: Tensor) -> Tensor:
            with processes.together():
                image = torch.zeros_like(basis)
                for v in rows(finding):
                    image += v.T @ (v @ basis)
            return processes.add(image)

        found = leading(times, torch.as_tensor(start, device="cpu").to(none), n)

        def directions() -> list[Tensor]:
            missing = found.new_zeros(k, n - found.shape[1])
            return [torch.cat([found, missing], dim=1)]

        basis = question.pool.shard.from_first(directions, found.new_empty(k, n))[0]
        # Samples without any information leave one direction, as good as any.
        basis = basis[:, basis.any(0)] if basis.any() else torch.eye(k, 1).to(basis)
        parts, total = basis.new_zeros(basis.shape[1]), basis.new_zeros(1)
        with processes.together():
            for v in rows(measuring):
                parts += (v @ basis).square().sum(0)
                total += v.square().sum()
    if not isinstance(auto, Auto):
        return basis
    parts, total = processes.add(parts), processes.add(total)
    n, share = share_held(parts, float(total), auto.share)
    if processes.rank == 0:
        question.warn(
            (
                f"Besides the head, which is kept whole, the mask has {k} weights, "
                "more than"
                if is_beside_head
                else f"The mask has {k} weights, more than the {auto.exact} that"
            )
            + f" are used exactly by default: the selection works in their {n} leading "
            f"directions, which hold {100 * share:.4g} % of the information's "
            "trace on samples that did not find them. Lower sparsity, set "
            "n_components to keep so many, or n_components=None to keep all, "
            "where memory allows.",
            f"the directions of {k} weights",
        )
    return basis[:, :n]


def n_searched(n_drawn: int) -> int:
    """How often gradients are taken for directions: of an eighth of these samples once,
    and of all others for each product.
    """
    return (7 * PRODUCTS + 1) * n_drawn // 8


def _chosen(question: Question, is_wanted: np.ndarray) -> Iterator[Chosen]:
    """Of each kind the samples that rank the weights and are wanted, by position among
    all that F̄ is a mean over.
    """
    start = 0
    for (samples, positions), weights in question.ranking_samples.weighted_parts():
        places = np.asarray(positions, int)
        chosen = is_wanted[start + samples.shard.start + places]
        start += samples.shard.total
        own = None if weights is None else weights[chosen]
        yield samples, places[chosen].tolist(), own


def _rows(
    question: Question,
    gradients: PerSampleGradients,
    mask_indices: Tensor,
    chosen: list[Chosen],
    advance: Callable[[int], object],
) -> Iterator[Tensor]:
    """Rows (m, k) of these samples, each times the root of its weight."""

    def dense(batch: Any) -> DenseEmbeddings:
        return DenseEmbeddings(plain(question, gradients, batch, mask_indices))

    nothing = DenseEmbeddings(none_of(question, gradients, mask_indices))
    for samples, positions, weights in chosen:
        done = 0
        for each in in_batches(question, dense, nothing, samples, advance, positions):
            v = each.tensors[0]
            if weights is not None:
                v *= weights[done : done + len(v)].to(v).sqrt()[:, None, None]
            done += len(v)
            yield v.flatten(0, 1)
