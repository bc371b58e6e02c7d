"""How a batch becomes embeddings: as a tensor, or with the head as a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fishermask_sk.gradients.per_sample import PerSampleGradients
from fishermask_sk.selection.embeddings import DenseEmbeddings, Embeddings
from fishermask_sk.selection.head_embeddings import (
    Head,
    HeadEmbeddings,
    JoinedEmbeddings,
    cheapest_form,
    head_mask,
)
from fishermask_sk.selection.top_head_embeddings import TopHeadEmbeddings
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


class HeadProduct:
    """A mask's part of the head as a product, and its other weights as they are, or in
    some directions.

    Attributes
    ----------
    n : int
        How many masked weights are the head's.
    rest : Tensor of shape (k - n,)
        The positions of the others.
    form : str
        See `cheapest_form`.
    n_left_out : int
        How many directions embeddings are made without, for nothing lies in them.
    """

    def __init__(
        self,
        question: Question,
        gradients: PerSampleGradients,
        names: list[str],
        mask_indices: Tensor,
        n_rows: int,
    ) -> None:
        self.question, self.gradients = question, gradients
        self.names, self.mask_indices = names, mask_indices
        slices = gradients.slices
        bias = slices[names[1]] if len(names) > 1 else None
        n_classes, d = gradients.parameters[names[0]].shape
        own, self.mask = head_mask(mask_indices, slices[names[0]], bias, d)
        is_rest = torch.ones_like(mask_indices, dtype=torch.bool)
        is_rest[own] = False
        self.n, self.rest = len(own), mask_indices[is_rest]
        self._order = torch.cat([own, is_rest.nonzero()[:, 0]])
        self._uses_bias = bool((self.mask.columns == d).any())
        self._n_classes = n_classes
        self._is_centred = False
        on_cpu = question.device.type == "cpu"
        self.form = cheapest_form(self.n, n_rows, n_classes, d + 1, on_cpu)

    def embed(self, batch: Any, directions: Tensor | None = None) -> Embeddings:
        """The embeddings of a batch.

        Parameters
        ----------
        batch : batch of n samples
        directions : Tensor of shape (k - n, r), optional
            Of the other weights, behind the head's; by default all.

        Raises
        ------
        NoProductError
        """
        question = self.question
        factors = self.gradients.head_factors(
            batch,
            self.names,
            question.params.weighting,
            n_top_classes=question.params.n_top_classes,
            beside=self.rest if len(self.rest) else None,
        )
        if factors is None:
            raise NoProductError
        r, h, v = factors
        if self._uses_bias:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        of_head = self._in_form(HeadEmbeddings(r, h, self.mask))
        if v is None:
            return of_head
        v = v if directions is None else v @ directions
        return JoinedEmbeddings(of_head, DenseEmbeddings(v))

    def _in_form(self, whole: HeadEmbeddings) -> Head:
        found: Head | None = whole
        if self.form == "tops":
            found = TopHeadEmbeddings.of_whole(whole, whole.c + 1)
        elif self._is_centred:
            found = whole.centred()
        if found is None:
            raise NoProductError
        return found

    @property
    def n_left_out(self) -> int:
        """See the class."""
        return self.n // self._n_classes if self._is_centred else 0

    def is_right(self) -> bool:
        """Whether embeddings of the first samples are those that gradients give, on all
        processes.
        """
        processes = self.question.processes
        with processes.together():
            found = self._tried()
        all_found = processes.objects(found)
        self._is_centred = all(may_be_centred for _, may_be_centred in all_found)
        return all(same for same, _ in all_found)

    def _tried(self) -> tuple[bool, bool]:
        """On the first samples: whether it is right, and whether nothing lies along
        what all classes of a whole head share.
        """
        batch = self.question.shared_example[0]
        try:
            found = self.embed(batch)
        except NoProductError:
            return False, False
        one = found.rows(torch.arange(found.n, device=found.device))
        other = plain(self.question, self.gradients, batch, self.mask_indices)
        other = other[..., self._order]
        size = PRODUCT_TOLERANCE * torch.finfo(other.dtype).eps
        same = bool((one - other).abs().max() <= size * other.abs().max())
        head = found.head if isinstance(found, JoinedEmbeddings) else found
        if not isinstance(head, HeadEmbeddings) or not head.is_whole:
            return same, False
        return same, head.centred() is not None


def head_as_product(
    question: Question,
    gradients: PerSampleGradients,
    head: tuple[str, ...],
    mask_indices: Tensor,
    n_rows: int,
) -> HeadProduct | None:
    """The head as a product, where this takes fewer multiplications."""
    parameters = gradients.parameters
    names = sorted(head, key=lambda name: -parameters[name].ndim)
    if [parameters[name].ndim for name in names] not in ([2], [2, 1]):
        return None
    product = HeadProduct(question, gradients, names, mask_indices, n_rows)
    return None if product.form == "dense" else product
