r"""The gradients of one part of a batch, small enough for memory: squares summed over
its samples, and rows of the entries that a mask keeps.

A forward pass is recorded, each row of the cotangents is pulled back, and each ruled
parameter's gradient taken as its layer's arrives. All of it is compared with autograd:
for little where the graph vouches for that (`vouched`), else in full
(`continuing_check`); what does not hold in the short comparison is done once more, and
compared in full. What no rule gives follows when the graph is gone (`ways`).

This file sees tensors and torch modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask_sk.gradients.continuing_check import ContinuingCheck, Sums
from fishermask_sk.gradients.fisher import (
    Weighting,
    class_cotangents,
    reduced_cotangents,
)
from fishermask_sk.gradients.layer_rules import FromOutputGradient, FromSeen
from fishermask_sk.gradients.masked import Masked
from fishermask_sk.gradients.modules import Batch, parameter_slices
from fishermask_sk.gradients.recording import (
    Recorded,
    Recorder,
    Route,
    Wanted,
)
from fishermask_sk.gradients.verification import Comparison, Verification
from fishermask_sk.gradients.ways import Ways, summed_squares
from fishermask_sk.gradients.working_memory import WorkingMemory


class Rows(NamedTuple):
    """Embeddings, and what is left to do for them when the graph is gone: it says
    whether they hold, or the part is to be taken once more.
    """

    rows: Tensor
    finish: Callable[[], bool]


class PartGradients:
    """Gradients of a part of a batch.

    Parameters
    ----------
    recorder : Recorder
    verification : Verification
    check : ContinuingCheck
    ways : Ways
    memory : WorkingMemory

    Attributes
    ----------
    slices : dict from parameter name to slice of the flat vector of all parameters
    n_parameters : int
    few : dict of parameter name to (Tensor of shape (m,), rule for these)
        Entries whose squares are compared where the graph vouches.
    """

    def __init__(
        self,
        recorder: Recorder,
        verification: Verification,
        check: ContinuingCheck,
        ways: Ways,
        memory: WorkingMemory,
    ) -> None:
        self.slices = parameter_slices(recorder.module)
        self.n_parameters = sum(p.numel() for p in recorder.parameters.values())
        self.few: dict[str, tuple[Tensor, FromSeen]] = {}
        self._recorder, self._verification = recorder, verification
        self._check, self._ways, self._memory = check, ways, memory

    def squares(
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
        total = self.zeros(self.n_parameters)
        everything: Wanted = dict.fromkeys(names)
        n_together = self._memory.together(batch, everything)
        with self._recorder.recorded(batch, names) as (logits, recorded):
            cotangents = reduced_cotangents(logits, n_top_classes=n_top_classes)
            cotangents = cotangents.to(logits.dtype)
            if weights is not None:  # in the squares the root is the weight
                roots = weights[: len(logits)].to(cotangents).sqrt()
                cotangents = cotangents * roots[:, None, None]
            ruled, unused = self._ways.split(names, recorded, len(logits))
            few = {name: self.few[name] for name in ruled if name in self.few}
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
                if vouched is None:  # which counts what its row takes longer
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
            return self.squares(batch, names, n_top_classes, weights, surely=True)

        def clear(name: str) -> None:
            total[self.slices[name]] = 0

        def put(name: str, part: slice, of_rows: slice, rows: Tensor) -> None:
            total[self.slices[name]] += rows.flatten(0, 1).square().sum(0)

        self._ways.go_generic(
            batch, cotangents, everything, compared, put, clear, self._memory.n_bytes
        )
        return len(cotangents), total

    def embeddings(
        self,
        batch: Batch,
        mask: Masked,
        weighting: Weighting,
        reduced: bool,
        n_top_classes: int | None,
        *,
        surely: bool = False,
    ) -> tuple[int, Tensor]:
        """Embeddings of a part of a batch; `surely` where neither the graph's word
        counts nor a product of the head.
        """
        make = reduced_cotangents if reduced else class_cotangents
        with self._recorder.recorded(batch, mask.wanted) as (logits, recorded):
            cotangents = make(logits, weighting, n_top_classes).to(logits.dtype)
            found = self.by_rules(batch, mask, logits, recorded, cotangents, surely)
        if not found.finish():
            return self.embeddings(
                batch, mask, weighting, reduced, n_top_classes, surely=True
            )
        return len(cotangents), found.rows

    def by_rules(
        self,
        batch: Batch,
        mask: Masked,
        logits: Tensor,
        recorded: Recorded,
        cotangents: Tensor,
        surely: bool,
    ) -> Rows:
        """Embeddings of a part of a batch, from its recorded pass."""
        wanted, columns = mask.wanted, mask.columns
        result = self.zeros(*cotangents.shape[:2], len(mask.mask_indices))
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
                return Rows(result, lambda: True)
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
            return Rows(
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
                self._memory.n_bytes,
            )
            return True

        return Rows(result, finish)

    def zeros(self, *shape: int) -> Tensor:
        """In the dtype of gradients, where the module is."""
        first = next(iter(self._recorder.parameters.values()))
        dtype = torch.float32
        for p in self._recorder.parameters.values():
            if p.requires_grad and p.is_floating_point():
                dtype = torch.promote_types(dtype, p.dtype)
        return torch.zeros(shape, dtype=dtype, device=first.device)
