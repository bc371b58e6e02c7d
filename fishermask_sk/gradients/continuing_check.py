r"""The continuing check: whether per-sample gradients are autograd's, on every batch
that is used.

With v (n, rows, m) a parameter's gradients at m of its entries, and weights w (n, rows)
that differ from sample to sample, plain autograd gives

.. math:: \sum_n \sum_r w_{nr} v_{nr}

in one backward pass from the cotangents weighted by w. The per-sample gradients are
summed with the same weights, and `verification` compares. Where scores are made, the
squares that a rule gives are compared with those of its entries as well.

This file sees tensors and torch modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter

import torch
from torch import Tensor, nn

from fishermask_sk.gradients.generic import dense
from fishermask_sk.gradients.recording import (
    Recorded,
    Recorder,
    Wanted,
    at_least_float32,
)
from fishermask_sk.gradients.verification import (
    RULE,
    VMAP,
    Comparison,
    Verification,
)

# A head's product may differ from the class scores by this many roundings.
PRODUCT_ROUNDINGS = 64


class ContinuingCheck:
    """Compares with plain autograd, and sends what is wrong another way.

    Parameters
    ----------
    recorder : Recorder
    verification : Verification

    Attributes
    ----------
    seconds : float
        Time spent on comparing so far.
    """

    def __init__(self, recorder: Recorder, verification: Verification) -> None:
        self.seconds = 0.0
        self._recorder, self._verification = recorder, verification

    def ways(self) -> dict[str, str]:
        """How each parameter's gradients are found, in words."""
        routes = self._recorder.routes
        return {
            name: f"rule of {type(routes[name].module).__name__}"
            if way == RULE
            else way
            for name, way in self._verification.ways.items()
        }

    def is_product(
        self,
        logits: Tensor,
        wanted: Iterable[str],
        unused: list[str],
        recorded: Recorded,
    ) -> bool:
        """Whether only a linear layer is masked whose product h·Wᵀ + b is the logits:
        then the cotangents are the gradients at its output, and no pass is needed.
        """
        ways = self._verification.ways
        layers = {self._recorder.routes[n].module for n in wanted if ways[n] == RULE}
        if (
            unused
            or not self.is_exact(logits.dtype)
            or len(layers) != 1
            or any(ways[name] != RULE for name in wanted)
        ):
            return False
        (layer,) = layers
        seen = recorded[layer][0].seen
        if not isinstance(layer, nn.Linear) or seen.ndim != 2:
            return False
        start = perf_counter()
        with torch.no_grad():
            product = nn.functional.linear(seen, layer.weight, layer.bias)
            same = product.shape == logits.shape and bool(
                (product - logits).abs().max()
                <= PRODUCT_ROUNDINGS
                * torch.finfo(logits.dtype).eps
                * logits.abs().max()
            )
        self.seconds += perf_counter() - start
        return same

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether nothing in the net, as far as seen, is coarser than this dtype."""
        return self._verification.coarsest == dtype

    def wrong(self, *compared: dict[str, Comparison]) -> dict[str, float]:
        """Which parameters' gradients are not autograd's, and by how much."""
        start = perf_counter()
        wrong: dict[str, float] = {}
        for comparisons in compared:
            wrong |= self._verification.wrong(comparisons.items())
        self.seconds += perf_counter() - start
        return wrong

    def leave_wrong(self, *compared: dict[str, Comparison]) -> None:
        """Send parameters the next way whose gradients are not autograd's."""
        wrong = self.wrong(*compared)
        for name, apart in wrong.items():
            way = self.ways()[name]
            way = "torch.func" if way == VMAP else f"the {way}"
            self._verification.leave(
                name, f"{way} and autograd differ by {apart:.2g} of the largest"
            )

    def plain_sums(
        self,
        logits: Tensor,
        cotangents: Tensor,
        wanted: Wanted,
        row: int | None = None,
    ) -> Sums:
        """Plain autograd's sums over samples and rows, each with a weight of its own:
        what every way but one by one is compared with. Where a row is given, what has a
        rule is compared on that row alone.
        """
        start = perf_counter()
        weights = self._verification.weights(*cotangents.shape[:2])
        weights = weights.to(cotangents, non_blocking=True)
        of_row = weights
        if row is not None:
            of_row = torch.zeros_like(weights)
            of_row[:, row] = weights[:, row]
        ways = self._verification.ways
        sums = Sums()
        apart = [(weights, (VMAP,)), (of_row, (RULE,))]
        for own, kinds in [(weights, (RULE, VMAP))] if row is None else apart:
            names = [name for name in wanted if ways[name] in kinds]
            cotangent = (own[..., None] * cotangents).sum(1)
            gradients = self.plain(logits, names, cotangent)
            for name in names:
                flat, places = gradients.pop(name).flatten(), wanted[name]
                if places is None:
                    places = self._verification.telling_entries(flat)
                sums.expect(name, places, flat[places], own)
        if None in wanted.values():
            sums.fetch_places()
        self.seconds += perf_counter() - start
        return sums

    def plain(
        self, logits: Tensor, names: Sequence[str], cotangent: Tensor
    ) -> dict[str, Tensor]:
        """Plain autograd's gradients of these parameters."""
        parameters = [self._recorder.parameters[name] for name in names]
        if not names or not logits.requires_grad:
            return {
                n: torch.zeros_like(p) for n, p in zip(names, parameters, strict=True)
            }
        found = torch.autograd.grad(
            logits,
            parameters,
            cotangent,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return {name: dense(g) for name, g in zip(names, found, strict=True)}


class Sums:
    """Sums over samples and rows, each with a weight of its own, of some entries of
    every parameter's gradients: what they should be, and what has come so far.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}  # (n, rows)
        self.places: dict[str, Tensor] = {}
        self.on_host: dict[str, Tensor] = {}
        self.expected: dict[str, Tensor] = {}
        self.clear()

    def expect(
        self, name: str, places: Tensor, expected: Tensor, weights: Tensor
    ) -> None:
        """These entries of a parameter, and the weighted sum that autograd gives
        there.
        """
        self.places[name], self.weights[name] = places, weights
        self.expected[name] = at_least_float32(expected, expected.dtype)

    def fetch_places(self) -> None:
        """All places to the CPU in one copy, where rules look at them."""
        if self.places:
            lengths = [len(places) for places in self.places.values()]
            together = torch.cat(list(self.places.values())).cpu()
            self.on_host = dict(zip(self.places, together.split(lengths), strict=True))

    def clear(self) -> None:
        """Nothing has come yet."""
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, part: slice, of_rows: slice, rows: Tensor) -> None:
        """Rows (n_part, n_rows, m) of one parameter."""
        weights = self.weights[name][part, of_rows].flatten().to(rows.dtype)
        rows = rows.flatten(0, 1)
        summed, squared = weights @ rows, weights.square() @ rows.square()
        if name in self.found:
            summed, squared = (
                summed + self.found[name][0],
                squared + self.found[name][1],
            )
        self.found[name] = summed, squared

    def of(self, names: Iterable[str]) -> dict[str, Comparison]:
        """What has come against what should, nothing being zero."""
        zeros = {name: torch.zeros_like(self.expected[name]) for name in names}
        return {
            name: Comparison(*self.found.get(name, (zero, zero)), self.expected[name])
            for name, zero in zeros.items()
        }


class Squares:
    """Sums of squares as a rule gives them, and as they are from its entries."""

    def __init__(self, like: dict[str, Tensor]) -> None:
        self.sums = {name: torch.zeros_like(t) for name, t in like.items()}
        self.expected = {name: torch.zeros_like(t) for name, t in like.items()}

    def add(self, name: str, rows: Tensor, squares: Tensor) -> None:
        """Of one row: entries (n, m), and their squares (m,) summed over samples."""
        self.expected[name] += rows.square().sum(0)
        self.sums[name] += squares

    def of(self, names: Iterable[str]) -> dict[str, Comparison]:
        """The one against the other."""
        return {
            name: Comparison(
                self.sums[name], self.sums[name].square(), self.expected[name]
            )
            for name in names
        }
