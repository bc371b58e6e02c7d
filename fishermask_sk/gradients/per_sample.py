r"""Per-sample gradients of a torch module's class scores, for the weights that are
wanted and no others: diagonal Fisher information and embeddings.

With p (n, c) the class probabilities and θ the weights, row c of sample x is

.. math:: V_{x,c} = \sqrt{p_c(x)}\, \partial \log p_c(x) / \partial\theta,
    \qquad F = \frac{1}{n} \sum_x \sum_c V_{x,c}^2

One forward pass records what each layer saw; one backward pass per row, through
activations only, gives the gradient at its output (`recording`). A layer's rule turns
the two into weight gradients, and what no rule explains (tied weights, a module called
twice, direct use, an unknown layer) goes the generic way (`ways`). Which way is right
is not read off names: every batch is compared with plain autograd
(`continuing_check`). Batches are as large as memory allows (`working_memory`).

Axes are n (samples), c (rows) and k (weights). This file sees tensors and torch
modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fishermask_sk.gradients.continuing_check import ContinuingCheck
from fishermask_sk.gradients.fisher import (
    Weighting,
    reduced_cotangents,
)
from fishermask_sk.gradients.generic import samples
from fishermask_sk.gradients.head import HeadFactors, factors_of_head
from fishermask_sk.gradients.masked import Masked, masked
from fishermask_sk.gradients.modules import Batch
from fishermask_sk.gradients.part_gradients import PartGradients, Rows
from fishermask_sk.gradients.recording import (
    Forward,
    Recorder,
)
from fishermask_sk.gradients.verification import RULE, VMAP, Verification
from fishermask_sk.gradients.ways import Ways
from fishermask_sk.gradients.working_memory import WorkingMemory, length

# The samples that are tried first are pulled back along this many rows at most.
MAX_TRIED_ROWS = 32
# Of so many of a parameter's entries, the largest on these, the squares are compared.
FEW_ENTRIES = 2


class PerSampleGradients:
    """Gradients of √p_c log p_c with respect to single weights, for every sample of a
    batch.

    Parameters
    ----------
    module : Module
        In evaluation mode (see `fishermask_sk.gradients.modules.undisturbed`).
    forward : callable batch -> logits of shape (n, c)
        Runs `module` on a batch; softmax of the result is p(y|x).
    example : batch of at least one sample
        On these samples every way is tried first, see `verify`: a few suffice.
    names : sequence of str, optional
        The parameters whose gradients may be wanted, by default all that are trainable.
        No other is looked at beforehand.
    working_bytes : int, optional
        What a batch may take beside what is returned. Larger batches are taken in
        parts, whose size is known before they run.

    Attributes
    ----------
    slices : dict from parameter name to slice of the flat vector of all parameters
    generic : set of parameter names that no layer rule explains
    reasons : dict from parameter name to str
        Why its gradients are not found by the way that was thought of first.
    memory : WorkingMemory
        How many samples are computed on at a time; its `n_bytes` may be changed.
    check_seconds : float
        Time spent on comparing with plain autograd so far.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> net, batch = nn.Linear(3, 2).eval(), torch.randn(5, 3)
    >>> gradients = PerSampleGradients(net, net, batch)
    >>> gradients.embeddings(batch, torch.tensor([0, 7])).shape
    torch.Size([5, 2, 2])
    >>> gradients.diagonal_fisher([batch]).shape
    torch.Size([8])
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        example: Batch,
        names: Sequence[str] | None = None,
        working_bytes: int | None = None,
    ) -> None:
        self._verification = Verification()
        self._recorder = Recorder(module, forward, self._verification.see)
        self.parameters = self._recorder.parameters
        trainable = self._recorder.trainable()
        self.names = trainable if names is None else list(names)
        self._routes = self._recorder.routes
        for name in trainable:
            self._verification.ways[name] = RULE if name in self._routes else VMAP
        self.memory = WorkingMemory(self._recorder, working_bytes)
        self._check = ContinuingCheck(self._recorder, self._verification)
        self._ways = Ways(self._recorder, self._verification, self._check)
        self._parts = PartGradients(
            self._recorder, self._verification, self._check, self._ways, self.memory
        )
        self.slices, self.n_parameters = self._parts.slices, self._parts.n_parameters
        self._mask: Masked | None = None  # the last
        self.verify(example)

    @property
    def check_seconds(self) -> float:
        """Time spent on comparing with plain autograd so far."""
        return self._check.seconds

    @property
    def generic(self) -> set[str]:
        """Parameters whose gradients no layer rule gives."""
        return {name for name, way in self._verification.ways.items() if way != RULE}

    @property
    def reasons(self) -> dict[str, str]:
        """Why parameters left the way that was thought of first."""
        return self._verification.reasons

    def ways(self) -> dict[str, str]:
        """How each trainable parameter's gradients are found: by its layer's rule, by
        vmap, or one by one, sample after sample.
        """
        return self._check.ways()

    def verify(self, batch: Batch) -> None:
        """Try every way on a few samples, as a query would go it, on a bounded number
        of entries of each parameter that may be wanted.

        Parameters
        ----------
        batch : batch of a few samples
        """
        names = [name for name in self.names if self.parameters[name].requires_grad]
        n, start = length(batch), 0
        while start < n:
            size = min(n, self.memory.affordable(batch, dict.fromkeys(names)))
            self._try(samples(batch, slice(start, start + size)), names)
            start += size

    def _try(self, batch: Batch, names: list[str]) -> None:
        """Go every way on a batch once, and take note of the dtypes on it."""

        def note(saved: Tensor) -> None:
            self._verification.see(saved.dtype)

        with self._recorder.recorded(batch, names, note) as (logits, _):
            weights = self._verification.weights(*logits.shape).to(logits)
            gradients = self._check.plain(logits, names, weights)
        n_classes = logits.shape[1]
        del logits  # and with it the graph
        telling = []
        for name in names:
            gradient = gradients.pop(name)
            entries = self._verification.telling_entries(gradient)
            sizes = gradient.flatten()[entries].abs()
            entries = entries[sizes.argsort(descending=True)]
            telling.append(self.slices[name].start + entries)
        if telling:
            m = min(n_classes, MAX_TRIED_ROWS + 1)
            mask = self._entries(torch.cat(telling))
            self._parts.embeddings(batch, mask, "fisher", True, m, surely=True)
            for name in mask.prepared:
                route = self._recorder.routes[name]
                few = mask.on_host[name][:FEW_ENTRIES]
                self._parts.few[name] = (
                    mask.wanted[name][:FEW_ENTRIES],
                    route.rule.entries(route.module, few),
                )

    def diagonal_fisher(
        self,
        batches: Iterable[Batch],
        on_batch: Callable[[int], object] | None = None,
        *,
        names: Sequence[str] | None = None,
        n_top_classes: int | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        r"""Diagonal Fisher information under the model's own predictions.

        .. math:: F_j = \frac{1}{\sum_x w_x} \sum_x w_x
            \sum_c p_c(x) \left(\partial \log p_c(x)/\partial\theta_j\right)^2

        Parameters
        ----------
        batches : iterable of batches
        on_batch : callable, called with each batch's number of samples when it is done
        names : sequence of str, optional
            The parameters whose scores are wanted, by default all that are trainable.
            No gradient is taken below the first layer that holds one.
        n_top_classes : int, optional
            Of each sample only this many most probable classes count, as if there were
            no others.
        weights : Tensor of shape (n,), optional
            w, of the samples of all batches in turn; by default all are 1.

        Returns
        -------
        scores : Tensor of shape (P,)
            In the module's dtype, at least float32; zero for weights that are frozen or
            not wanted, and where there are no samples, or none with a weight.
        """
        if names is None:
            names = self._recorder.trainable()
        total: Tensor | None = None
        n_samples = 0

        def squares(part: Batch) -> tuple[int, Tensor]:
            left = None if weights is None else weights[n_samples:]
            return self._parts.squares(part, names, n_top_classes, left)

        for batch in batches:
            for n, of_part in self.memory.in_parts(
                batch, dict.fromkeys(names), squares
            ):
                total = of_part if total is None else total.add_(of_part)
                n_samples += n
                if on_batch is not None:
                    on_batch(n)
        if total is None:
            return self._parts.zeros(self.n_parameters)
        sum_of_weights = n_samples if weights is None else float(weights.sum())
        return total.div_(sum_of_weights) if sum_of_weights else total

    def embeddings(
        self,
        batch: Batch,
        mask_indices: Tensor,
        weighting: Weighting = "fisher",
        *,
        reduced: bool = False,
        n_top_classes: int | None = None,
    ) -> Tensor:
        r"""Masked gradient embeddings V_x, with :math:`V_x^\top V_x` the sample's
        Fisher information.

        Parameters
        ----------
        batch : batch of n samples
        mask_indices : Tensor of shape (k,), int64, sorted
            Positions among all parameters; none of a frozen weight.
        weighting : {"fisher", "uniform"}
            Whether row c is √p_c ∂log p_c/∂θ, or without the root.
        reduced : bool
            Rotate the c dependent rows into c − 1 with the same :math:`V_x^\top V_x`.
        n_top_classes : int, optional
            m: of each sample only the m most probable classes count, as if there were
            no others.

        Returns
        -------
        Tensor of shape (n, c, k), or (n, c - 1, k) if `reduced`, with m for c where it
        is given; the module's dtype, at least float32.
        """
        mask = self._entries(mask_indices)
        parts = self.memory.in_parts(
            batch,
            mask.wanted,
            lambda part: self._parts.embeddings(
                part, mask, weighting, reduced, n_top_classes
            ),
        )
        found = [v for _, v in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def head_factors(
        self,
        batch: Batch,
        names: Sequence[str],
        weighting: Weighting = "fisher",
        *,
        n_top_classes: int | None = None,
        beside: Tensor | None = None,
    ) -> HeadFactors | None:
        r"""What the gradients of a linear head are the products of, R and h with
        :math:`V_x = R_x \otimes h_x`, without a backward pass to anything below it.

        Parameters
        ----------
        batch : batch of n samples
        names : sequence of str
            The head's weight, or its weight and bias.
        weighting : {"fisher", "uniform"}
        n_top_classes : int, optional
        beside : Tensor of shape (k,), int64, sorted, optional
            Positions of other weights, whose embeddings are wanted of the same pass.

        Returns
        -------
        HeadFactors
            `cotangents` R of shape (n, c - 1, C) at the head's output, with m for c
            where `n_top_classes` is m; `inputs` h of shape (n, d); `rest` of shape
            (n, c - 1, k), or None.

        None where the head's gradients are no such product.
        """
        rest = None if beside is None else self._entries(beside)
        wanted = dict.fromkeys(names) | (rest.wanted if rest else {})
        widths: list[torch.Size] = []

        def factors(part: Batch, surely: bool = False) -> tuple[int, Tensor]:
            others: Rows | None = None
            with self._recorder.recorded(part, wanted) as (logits, recorded):
                n = len(logits)
                cotangents = reduced_cotangents(logits, weighting, n_top_classes)
                cotangents = cotangents.to(logits.dtype)
                found = factors_of_head(
                    names,
                    logits,
                    cotangents,
                    recorded,
                    self._recorder,
                    self._ways,
                    self._check,
                )
                if found is None:
                    return n, logits.new_empty(n, 0)
                r, seen = found
                tensors = [r, seen.to(r)]
                if rest is not None:
                    others = self._parts.by_rules(
                        part, rest, logits, recorded, cotangents, surely
                    )
                    tensors.append(others.rows)
            if others is not None and not others.finish():
                return factors(part, surely=True)
            widths[:] = [tensor.shape[1:] for tensor in tensors]
            dtype = tensors[-1].dtype
            return n, torch.cat([t.flatten(1).to(dtype) for t in tensors], dim=1)

        found = [part for _, part in self.memory.in_parts(batch, wanted, factors)]
        if not all(part.shape[1] for part in found):
            return None
        together = found[0] if len(found) == 1 else torch.cat(found)
        split = together.split([width.numel() for width in widths], dim=1)
        r, h, *others = (
            part.unflatten(1, width) for part, width in zip(split, widths, strict=True)
        )
        return HeadFactors(r, h, others[0] if others else None)

    def _entries(self, mask_indices: Tensor) -> Masked:
        if self._mask is None or self._mask.mask_indices is not mask_indices:
            self._mask = masked(mask_indices, self.slices)
        return self._mask
