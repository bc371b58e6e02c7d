"""The leading directions of a mask that is too large for all of them, from the drawn
samples' information as it streams past.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishermask_sk.gradients.per_sample import PerSampleGradients
from fishermask_sk.selection.embeddings import DenseEmbeddings
from fishermask_sk.strategy.directions import SPARE, Auto, leading, share_held
from fishermask_sk.strategy.embedding import in_batches, none_of, plain
from fishermask_sk.strategy.question import Question


def leading_directions(
    question: Question,
    gradients: PerSampleGradients,
    mask_indices: Tensor,
    n: int,
    is_beside_head: bool,
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
    """
    k, processes = len(mask_indices), question.processes
    auto = question.params.components
    measures = np.zeros(question.n_averaged, dtype=bool)
    if isinstance(auto, Auto):
        # An eighth of them tells what the others' directions hold.
        measures = question.rng.random_sample(question.n_averaged) < 1 / 8
    none = none_of(question, gradients, mask_indices)

    def rows(of_measuring: bool) -> Iterator[Tensor]:
        yield none.flatten(0, 1)
        yield from _rows(question, gradients, mask_indices, measures == of_measuring)

    def times(basis: Tensor) -> Tensor:
        with processes.together():
            image = torch.zeros_like(basis)
            for v in rows(of_measuring=False):
                image += v.T @ (v @ basis)
        return processes.add(image)

    start = question.rng.standard_normal((k, min(n + SPARE, k)))
    found = leading(times, torch.as_tensor(start, device="cpu").to(none), n)

    def directions() -> list[Tensor]:
        missing = found.new_zeros(k, n - found.shape[1])
        return [torch.cat([found, missing], dim=1)]

    basis = question.pool.shard.from_first(directions, found.new_empty(k, n))[0]
    # Samples without any information leave one direction, as good as any.
    basis = basis[:, basis.any(0)] if basis.any() else torch.eye(k, 1).to(basis)
    if not isinstance(auto, Auto):
        return basis
    parts, total = basis.new_zeros(basis.shape[1]), basis.new_zeros(1)
    with processes.together():
        for v in rows(of_measuring=True):
            parts += (v @ basis).square().sum(0)
            total += v.square().sum()
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
            "where memory allows."
        )
    return basis[:, :n]


def _rows(
    question: Question,
    gradients: PerSampleGradients,
    mask_indices: Tensor,
    is_wanted: np.ndarray,
) -> Iterator[Tensor]:
    """Rows (m, k) of the samples that rank the weights, of those that are wanted, by
    position among all that F̄ is a mean over; each times the root of its weight.
    """

    def dense(batch: Any) -> DenseEmbeddings:
        return DenseEmbeddings(plain(question, gradients, batch, mask_indices))

    nothing = DenseEmbeddings(none_of(question, gradients, mask_indices))
    start = 0
    for (samples, positions), weights in question.ranking_samples.weighted_parts():
        places = np.asarray(positions, int)
        chosen = is_wanted[start + samples.shard.start + places]
        start += samples.shard.total
        of_own = None if weights is None else weights[chosen]
        done = 0
        for each in in_batches(
            question, dense, nothing, samples, lambda n: None, places[chosen].tolist()
        ):
            v = each.tensors[0]
            if of_own is not None:
                v *= of_own[done : done + len(v)].to(v).sqrt()[:, None, None]
            done += len(v)
            yield v.flatten(0, 1)
