"""How a batch becomes embeddings: as a tensor, or with the head as a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fishermask_sk.gradients.per_sample import PerSampleGradients
from fishermask_sk.selection.embeddings import DenseEmbeddings, Embeddings
from fishermask_sk.selection.head_embeddings import (
    HeadEmbeddings,
    HeadMask,
    JoinedEmbeddings,
    head_mask,
    is_worth_it,
)
from fishermask_sk.strategy.question import Question, Samples, check_complete

Embed = Callable[[Any], Embeddings]

# The head is a product where it differs from its gradients by no more of the largest
# than so many roundings.
PRODUCT_TOLERANCE = 2**12


class NoProductError(Exception):
    """The head's class scores are not the product of its input and weights."""


def plain(
    question: Question, gradients: PerSampleGradients, batch: Any, mask_indices: Tensor
) -> Tensor:
    """V of a batch (n, c, k) as a tensor."""
    return gradients.embeddings(
        batch,
        mask_indices,
        question.params.weighting,
        reduced=True,
        n_top_classes=question.params.n_top_classes,
    )


def none_of(
    question: Question, gradients: PerSampleGradients, mask_indices: Tensor
) -> Tensor:
    """Embeddings of no samples."""
    return plain(question, gradients, question.shared_example[0], mask_indices)[:0]


def in_batches(
    question: Question,
    embed: Embed,
    none: Embeddings,
    samples: Samples,
    advance: Callable[[int], object],
    positions: list[int] | None = None,
) -> Iterator[Embeddings]:
    """Embeddings of all these samples, or of those at some positions."""
    if samples.dataset is None or positions == []:
        yield none
        return
    done = 0
    for batch in question.batches(samples, positions):
        v = embed(batch)
        finite = torch.stack([t.isfinite().flatten(1).all(1) for t in v.tensors])
        finite = finite.all(0)
        if not bool(finite.all()):
            i = done + int(finite.int().argmin())
            raise ValueError(
                "The gradients of sample "
                f"{i if positions is None else positions[i]} of {samples.name} "
                "hold NaN or infinite values: the sample does, or the net's "
                "outputs on it; drop it, or scale the samples."
            )
        done += v.n
        advance(v.n)
        yield v
    check_complete(done, samples, positions)


def with_head_as_product(
    question: Question,
    gradients: PerSampleGradients,
    head: tuple[str, ...],
    mask_indices: Tensor,
    n_rows: int,
) -> Embed | None:
    """What embeds a batch with the head as a product, where the head is one on drawn
    samples and this takes fewer multiplications.
    """
    found = _head_in(gradients, head, mask_indices, n_rows)
    if found is None:
        return None
    names, in_head, mask = found
    rest = mask_indices[~in_head]
    places = in_head.nonzero()[:, 0], (~in_head).nonzero()[:, 0]
    uses_bias = bool((mask.columns == gradients.parameters[names[0]].shape[1]).any())

    def embed(batch: Any) -> Embeddings:
        factors = gradients.head_factors(
            batch,
            names,
            question.params.weighting,
            n_top_classes=question.params.n_top_classes,
        )
        if factors is None:
            raise NoProductError
        r, h = factors
        if uses_bias:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        of_head = HeadEmbeddings(r, h, mask)
        if not len(rest):
            return of_head
        of_rest = DenseEmbeddings(plain(question, gradients, batch, rest))
        return JoinedEmbeddings(of_head, of_rest, *places)

    with question.processes.together():
        same = _is_same(question, gradients, embed, mask_indices)
    return embed if all(question.processes.objects(same)) else None


def _is_same(
    question: Question,
    gradients: PerSampleGradients,
    embed: Embed,
    mask_indices: Tensor,
) -> bool:
    """Whether embeddings of the first samples are those that gradients give."""
    batch = question.shared_example[0]
    try:
        found = embed(batch)
    except NoProductError:
        return False
    one = found.rows(torch.arange(found.n, device=found.device))
    other = plain(question, gradients, batch, mask_indices)
    size = PRODUCT_TOLERANCE * torch.finfo(other.dtype).eps
    return bool((one - other).abs().max() <= size * other.abs().max())


def _head_in(
    gradients: PerSampleGradients,
    head: tuple[str, ...],
    mask_indices: Tensor,
    n_rows: int,
) -> tuple[list[str], Tensor, HeadMask] | None:
    """Names of the head's parameters, which masked weights are its, and what these are
    of it; None where a product would not pay.
    """
    slices, parameters = gradients.slices, gradients.parameters
    weights = [n for n in head if parameters[n].ndim == 2]
    biases = [n for n in head if parameters[n].ndim == 1]
    if len(weights) != 1 or len(biases) > 1:
        return None
    n_classes, d = parameters[weights[0]].shape
    bias = slices[biases[0]] if biases else None
    in_head, mask = head_mask(mask_indices, slices[weights[0]], bias, d)
    k = len(mask.classes)
    trainable = all(parameters[n].requires_grad for n in head)
    if not trainable or not is_worth_it(k, n_rows, n_classes, d + 1):
        return None
    return weights + biases, in_head, mask
