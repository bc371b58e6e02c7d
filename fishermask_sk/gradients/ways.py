r"""The ways to per-sample gradients: by the rule of a layer, vmapped, or one by one,
and what sends a parameter from one to the next.

A rule takes a (what its layer saw, samples first) and g (the gradient at its output, of
one row of the cotangents) and gives entries (n, m) of the parameter's gradients, or
their squares (m,) summed over samples: see `layer_rules`. A rule that does not fit how
a layer is laid out raises, and the parameter is vmapped; what cannot be, or comes out
wrong, is taken one sample at a time: see `generic`.

This file sees tensors and torch modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fishermask_sk.gradients.continuing_check import ContinuingCheck, Sums
from fishermask_sk.gradients.generic import (
    VMAP_ERRORS,
    GenericGradients,
    is_out_of_memory,
)
from fishermask_sk.gradients.layer_rules import FromOutputGradient
from fishermask_sk.gradients.modules import Batch
from fishermask_sk.gradients.recording import (
    Outputs,
    Recorded,
    Recorder,
    Route,
    Wanted,
)
from fishermask_sk.gradients.verification import (
    ONE_BY_ONE,
    RULE,
    VMAP,
    Comparison,
    Verification,
)
from fishermask_sk.gradients.vouched import Vouched

Made = TypeVar("Made")

# What a rule raises where a layer is not laid out as its class says: shapes and axes
# that do not match, settings that are of another kind or missing. Anything else is a
# mistake in the rule, and passes.
RULE_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, AttributeError)


class Ways:
    """Rows of gradients, each parameter's by the way that it has.

    Parameters
    ----------
    recorder : Recorder
    verification : Verification
        Told where a way does not fit.
    check : ContinuingCheck
    """

    def __init__(
        self, recorder: Recorder, verification: Verification, check: ContinuingCheck
    ) -> None:
        self._recorder, self._verification = recorder, verification
        self._check = check
        self._generic = GenericGradients(recorder.module, recorder.forward)

    def split(
        self, names: Iterable[str], recorded: Recorded, n: int
    ) -> tuple[list[str], list[str]]:
        """Parameters whose rule applies to this batch, and those whose layer was not
        seen, so that their gradients should be zero.
        """
        ruled: list[str] = []
        unused: list[str] = []
        for name in names:
            if self._verification.ways[name] != RULE:
                continue
            uses = recorded[self._recorder.routes[name].module]
            if len(uses) > 1:
                self._verification.leave(name, "its layer is called more than once")
            elif any(len(u.seen) != n for u in uses):
                self._verification.leave(
                    name, "what its layer sees does not have the samples in front"
                )
            else:
                (ruled if uses else unused).append(name)
        return ruled, unused

    def still_ruled(self, names: Iterable[str]) -> list[str]:
        """Those of them whose rule has not turned out not to fit."""
        return [name for name in names if self._verification.ways[name] == RULE]

    def prepared(
        self,
        names: list[str],
        recorded: Recorded,
        make: Callable[[Route, Tensor, str], Made],
    ) -> dict[str, Made]:
        """What rules make of their layers' inputs; a rule that cannot is left."""
        functions = {}
        for name in names:
            route = self._recorder.routes[name]
            seen = recorded[route.module][0].seen
            function = self._attempt(name, make, route, seen, name)
            if function is not None:
                functions[name] = function
        return functions

    def pull_back(
        self,
        logits: Tensor,
        cotangents: Tensor,
        names: Iterable[str],
        recorded: Recorded,
        take: Callable[[str, int, Tensor], None],
        vouched: Vouched | None = None,
    ) -> None:
        """Hand the gradient at the output of every ruled layer to `take`, for each row
        of the cotangents (n, rows, c), and what `vouched` compares on one to that.
        """
        by_layer: dict[nn.Module, list[str]] = {}
        for name in names:
            by_layer.setdefault(self._recorder.routes[name].module, []).append(name)
        outputs, n_rows = Outputs(by_layer, recorded), cotangents.shape[1]
        seconds: list[float] = []
        for row in range(n_rows):
            compared = vouched if vouched and row == vouched.row else None

            def arrived(
                layer: nn.Module,
                g: Tensor,
                row: int = row,
                compared: Vouched | None = compared,
            ) -> None:
                if compared:
                    compared.arrived(layer, g)
                for name in self.still_ruled(by_layer[layer]):
                    self._attempt(name, take, name, row, g)

            start = perf_counter()
            gradients = outputs.pull_back(
                logits,
                cotangents[:, row],
                arrived,
                compared.parameters if compared else (),
                retain_graph=row < n_rows - 1,
            )
            if compared:
                compared.expect(gradients)
            seconds.append(perf_counter() - start)
        if vouched:
            vouched.note(seconds)

    def go_generic(
        self,
        batch: Batch,
        cotangents: Tensor,
        wanted: Wanted,
        compared: Sums,
        put: Callable[[str, slice, slice, Tensor], None],
        clear: Callable[[str], None],
        n_bytes: int | None,
    ) -> None:
        """Rows of the parameters that no rule explains: vmapped as long as that gives
        what plain autograd does, else sample by sample. `put` is given name, samples,
        rows and their gradients, and `clear` the name where they are to come again.
        """
        ways, generic = self._verification.ways, self._generic
        chunk = None if n_bytes is None else n_bytes // 2
        while some := {name: e for name, e in wanted.items() if ways[name] == VMAP}:
            for name in some:
                clear(name)
            compared.clear()
            try:
                for part, of_rows, rows in generic.vmapped(
                    batch, cotangents, some, chunk
                ):
                    for name, r in rows.items():
                        put(name, part, of_rows, r)
                        if some[name] is None:
                            r = r[..., compared.places[name]]
                        compared.add(name, part, of_rows, r)
            except VMAP_ERRORS as error:
                if is_out_of_memory(error):
                    raise
                culprits = generic.culprits(batch, cotangents, some, error)
                for name, reason in culprits.items():
                    self._verification.leave(name, reason)
                continue
            self._check.leave_wrong(compared.of(some))
            break
        alone = {name: e for name, e in wanted.items() if ways[name] == ONE_BY_ONE}
        for name in alone:
            clear(name)
        if alone:
            self._go_one_by_one(batch, cotangents, alone, put)

    def _go_one_by_one(
        self,
        batch: Batch,
        cotangents: Tensor,
        alone: Wanted,
        put: Callable[[str, slice, slice, Tensor], None],
    ) -> None:
        """Plain autograd, of which one thing is asked: that a weighted sum of rows of
        the cotangents gives that sum of the rows.
        """
        weights = self._verification.weights(*cotangents.shape[:2])
        weights = weights.to(cotangents, non_blocking=True)
        combined = (weights[..., None] * cotangents).sum(1, keepdim=True)
        found: dict[str, list[Comparison]] = {name: [] for name in alone}
        for part, rows in self._generic.one_by_one(
            batch, torch.cat([cotangents, combined], dim=1), alone
        ):
            for name, r in rows.items():
                put(name, part, slice(None), r[:, :-1])
                places = self._verification.telling_entries(r[0, -1])
                some, w = r[0, :, places], weights[part.start].to(r.dtype)
                summed, squared = w @ some[:-1], w.square() @ some[:-1].square()
                found[name].append(Comparison(summed, squared, some[-1]))
        together = {
            name: Comparison(*map(torch.cat, zip(*each, strict=True)))
            for name, each in found.items()
        }
        if wrong := self._check.wrong(together):
            raise ValueError(
                f"The gradients of {', '.join(wrong)} are not linear in the gradient "
                "at the scores, as Fisher information needs them: that of a sum "
                f"differs from the sum by {max(wrong.values()):.2g} of the largest. "
                "Look for a hook, or the backward of a torch.autograd.Function, that "
                "clips, rounds or normalises gradients: leave it out of queries, or "
                "these weights out by layers=..."
            )

    def _attempt(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives; None where the parameter's rule cannot be applied,
        which is left.
        """
        try:
            return function(*args)
        except RULE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            kind, message = type(error).__name__, str(error).split("\n")[0]
            self._verification.leave(
                name, f"its layer's rule does not fit its layout ({kind}: {message})"
            )
            return None


def summed_squares(
    route: Route, seen: Tensor, n_together: int | None
) -> FromOutputGradient:
    """The rule's squares, summed over samples; where given, over so many at a time,
    with nothing kept between.
    """
    if n_together is None:
        return route.rule.squares(route.module, seen)

    def in_parts(g: Tensor) -> Tensor:
        parts = zip(seen.split(n_together), g.split(n_together), strict=True)
        of_parts = (route.rule.squares(route.module, a)(some) for a, some in parts)
        total = next(of_parts)
        for squares in of_parts:
            total += squares
        return total

    return in_parts
