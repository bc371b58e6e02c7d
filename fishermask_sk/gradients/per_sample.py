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
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fishermask_sk.gradients.continuing_check import ContinuingCheck, Sums
from fishermask_sk.gradients.fisher import (
    Weighting,
    class_cotangents,
    reduced_cotangents,
)
from fishermask_sk.gradients.generic import samples
from fishermask_sk.gradients.head import HeadFactors, factors_of_head
from fishermask_sk.gradients.layer_rules import FromOutputGradient, FromSeen
from fishermask_sk.gradients.masked import Masked, masked
from fishermask_sk.gradients.modules import Batch, parameter_slices
from fishermask_sk.gradients.recording import (
    Forward,
    Recorded,
    Recorder,
    Route,
    Wanted,
)
from fishermask_sk.gradients.verification import RULE, VMAP, Comparison, Verification
from fishermask_sk.gradients.ways import Ways, summed_squares
from fishermask_sk.gradients.working_memory import WorkingMemory, length

# The samples that are tried first are pulled back along this many rows at most.
MAX_TRIED_ROWS = 32
# Of so many of a parameter's entries, the largest on these, the squares are compared.
FEW_ENTRIES = 2


class _Rows(NamedTuple):
    """Embeddings, and what is left to do for them when the graph is gone: it says
    whether they hold, or the batch is to be taken once more.
    """

    rows: Tensor
    finish: Callable[[], bool]


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
        self.slices = parameter_slices(module)
        self.n_parameters = sum(p.numel() for p in self.parameters.values())
        trainable = self._recorder.trainable()
        self.names = trainable if names is None else list(names)
        self._routes = self._recorder.routes
        for name in trainable:
            self._verification.ways[name] = RULE if name in self._routes else VMAP
        self.memory = WorkingMemory(self._recorder, working_bytes)
        self._check = ContinuingCheck(self._recorder, self._verification)
        self._ways = Ways(self._recorder, self._verification, self._check)
        self._mask: Masked | None = None  # the last
        # Entries whose gradients were large on the samples that were tried first.
        self._few: dict[str, tuple[Tensor, FromSeen]] = {}
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
        note = self._verification.see
        with (
            saved_tensors_hooks(lambda t: note(t.dtype) or t, lambda t: t),
            self._recorder.recorded(batch, names) as (logits, _),
        ):
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
            places = torch.cat(telling)
            self._embedded(batch, places, "fisher", True, m, surely=True)
            mask = self._entries(places)
            for name in mask.prepared:
                route = self._recorder.routes[name]
                few = mask.on_host[name][:FEW_ENTRIES]
                self._few[name] = (
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
            return self._squares(part, names, n_top_classes, left)

        for batch in batches:
            for n, of_part in self.memory.in_parts(
                batch, dict.fromkeys(names), squares
            ):
                total = of_part if total is None else total.add_(of_part)
                n_samples += n
                if on_batch is not None:
                    on_batch(n)
        if total is None:
            return self._zeros(self.n_parameters)
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
        parts = self.memory.in_parts(
            batch,
            self._entries(mask_indices).wanted,
            lambda part: self._embedded(
                part, mask_indices, weighting, reduced, n_top_classes
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
            others: _Rows | None = None
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
                    others = self._by_rules(
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

    def _squares(
        self,
        batch: Batch,
        names: Sequence[str],
        n_top_classes: int | None,
        weights: Tensor | None,
        *,
        surely: bool = False,
    ) -> tuple[int, Tensor]:
        """Σ_x w_x Σ_c p_c (∂ log p_c/∂θ)² of a batch (P,), whose samples have the first
        of these weights; `surely` where the graph's word does not count.
        """
        total = self._zeros(self.n_parameters)
        everything: Wanted = dict.fromkeys(names)
        n_together = self.memory.together(batch, everything)
        with self._recorder.recorded(batch, names) as (logits, recorded):
            cotangents = reduced_cotangents(logits, n_top_classes=n_top_classes)
            cotangents = cotangents.to(logits.dtype)
            if weights is not None:  # in the squares the root is the weight
                roots = weights[: len(logits)].to(cotangents).sqrt()
                cotangents = cotangents * roots[:, None, None]
            ruled, unused = self._ways.split(names, recorded, len(logits))
            few = {name: self._few[name] for name in ruled if name in self._few}
            places = {name: entries for name, (entries, _) in few.items()}
            vouched, compared = None, Sums()
            if not surely:
                vouched = self._check.vouched(
                    logits, cotangents, names, places, recorded, in_order=False
                )
            if vouched is None:
                row = self._verification.row(cotangents.shape[1])
                compared = self._check.sums_of_row(logits, cotangents, everything, row)
                places = compared.places
            else:
                row = vouched.row

            def entries_of(route: Route, seen: Tensor, name: str) -> FromOutputGradient:
                if vouched is not None:
                    return few[name][1](seen)
                rule = route.rule.entries(route.module, compared.on_host[name])
                return rule(seen)

            def squares_of(route: Route, seen: Tensor, name: str) -> FromOutputGradient:
                return summed_squares(route, seen, n_together(route, seen))

            entries = self._ways.prepared(ruled, recorded, entries_of)
            squares = self._ways.prepared(list(entries), recorded, squares_of)
            rows, squared = dict[str, Tensor](), dict[str, Comparison]()

            def take(name: str, at_row: int, g: Tensor) -> None:
                of_row = squares[name](g).flatten()
                total[self.slices[name]] += of_row
                if at_row != row:
                    return
                # Of the rules' rows one is compared: a rule does the same to all.
                start = perf_counter()
                rows[name] = entries[name](g)
                found = of_row[places[name]]
                squared[name] = Comparison(found, found**2, rows[name].square().sum(0))
                self._check.seconds += perf_counter() - start

            self._ways.pull_back(logits, cotangents, squares, recorded, take, vouched)
            still = self._ways.still_ruled([*ruled, *unused])
            squared = {name: squared[name] for name in still if name in squared}
            if vouched is None:
                for name, found in rows.items():
                    only = slice(row, row + 1)
                    compared.add(name, slice(None), only, found[:, None])
                self._check.leave_wrong(compared.of(still), squared)
        if vouched is not None:
            holds = len(still) == len(names)
            if holds and self._check.holds(vouched, batch, rows, squared):
                return len(cotangents), total
            return self._squares(batch, names, n_top_classes, weights, surely=True)

        def clear(name: str) -> None:
            total[self.slices[name]] = 0

        def put(name: str, part: slice, of_rows: slice, rows: Tensor) -> None:
            total[self.slices[name]] += rows.flatten(0, 1).square().sum(0)

        self._ways.go_generic(
            batch, cotangents, everything, compared, put, clear, self.memory.n_bytes
        )
        return len(cotangents), total

    def _embedded(
        self,
        batch: Batch,
        mask_indices: Tensor,
        weighting: Weighting,
        reduced: bool,
        n_top_classes: int | None,
        *,
        surely: bool = False,
    ) -> tuple[int, Tensor]:
        """Embeddings of a part of a batch; `surely` where neither the graph's word
        counts nor a product of the head.
        """
        mask = self._entries(mask_indices)
        make = reduced_cotangents if reduced else class_cotangents
        with self._recorder.recorded(batch, mask.wanted) as (logits, recorded):
            cotangents = make(logits, weighting, n_top_classes).to(logits.dtype)
            found = self._by_rules(batch, mask, logits, recorded, cotangents, surely)
        if not found.finish():
            return self._embedded(
                batch, mask_indices, weighting, reduced, n_top_classes, surely=True
            )
        return len(cotangents), found.rows

    def _by_rules(
        self,
        batch: Batch,
        mask: Masked,
        logits: Tensor,
        recorded: Recorded,
        cotangents: Tensor,
        surely: bool,
    ) -> _Rows:
        """Embeddings of a part of a batch, from its recorded pass."""
        wanted, columns = mask.wanted, mask.columns
        result = self._zeros(*cotangents.shape[:2], len(mask.mask_indices))
        ruled, unused = self._ways.split(wanted, recorded, len(logits))

        def function_of(route: Route, seen: Tensor, name: str) -> FromOutputGradient:
            if name not in mask.prepared:
                mask.prepared[name] = route.rule.entries(
                    route.module, mask.on_host[name]
                )
            return mask.prepared[name](seen)

        functions = self._ways.prepared(ruled, recorded, function_of)

        def take(name: str, row: int, g: Tensor) -> None:
            result[:, row, columns[name]] = functions[name](g).to(result.dtype)

        vouched, compared = None, Sums()
        if not surely:
            if self._check.is_product(logits, wanted, unused, recorded):
                for row in range(cotangents.shape[1]):
                    for name in functions:
                        take(name, row, cotangents[:, row])
                return _Rows(result, lambda: True)
            places = {name: wanted[name] for name in ruled}
            vouched = self._check.vouched(
                logits, cotangents, wanted, places, recorded, in_order=True
            )
        if vouched is None:
            compared = self._check.sums(logits, cotangents, wanted)
        self._ways.pull_back(logits, cotangents, functions, recorded, take, vouched)
        still = self._ways.still_ruled([*ruled, *unused])
        if vouched is not None:
            of_row = result[:, vouched.row]
            rows = {name: of_row[:, columns[name]] for name in ruled}
            return _Rows(
                result,
                lambda: (
                    len(still) == len(wanted)
                    and self._check.holds(vouched, batch, rows)
                ),
            )
        for name in ruled:
            rows_of_name = result[:, :, columns[name]]
            compared.add(name, slice(None), slice(None), rows_of_name)
        self._check.leave_wrong(compared.of(still))

        def put(name: str, part: slice, of_rows: slice, rows: Tensor) -> None:
            result[part, of_rows, columns[name]] = rows.to(result.dtype)

        def finish() -> bool:
            self._ways.go_generic(
                batch,
                cotangents,
                wanted,
                compared,
                put,
                lambda name: None,
                self.memory.n_bytes,
            )
            return True

        return _Rows(result, finish)

    def _entries(self, mask_indices: Tensor) -> Masked:
        if self._mask is None or self._mask.mask_indices is not mask_indices:
            self._mask = masked(mask_indices, self.slices)
        return self._mask

    def _zeros(self, *shape: int) -> Tensor:
        first = next(iter(self.parameters.values()))
        dtype = torch.float32
        for p in self.parameters.values():
            if p.requires_grad and p.is_floating_point():
                dtype = torch.promote_types(dtype, p.dtype)
        return torch.zeros(shape, dtype=dtype, device=first.device)
