r"""The continuing check: whether per-sample gradients are autograd's, on every batch
that is used.

With v (n, rows, m) a parameter's gradients at m of its entries, and weights w (n, rows)
that differ from sample to sample, plain autograd gives

.. math:: \sum_n \sum_r w_{nr} v_{nr}

in one backward pass from the cotangents weighted by w. The per-sample gradients are
summed with the same weights, and `verification` compares.

Such a pass costs 1.5 to 2 forward passes. Where the graph itself shows that each
parameter is used by its own layer alone, and that nothing moves samples about for what
they hold (`own_operations`), less is enough: see `vouched`.

This file sees tensors and torch modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fishermask_sk.gradients.generic import dense
from fishermask_sk.gradients.modules import Batch
from fishermask_sk.gradients.own_operations import Graph, Seen, is_result_of
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
from fishermask_sk.gradients.vouched import Vouched

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
        if not all(is_result_of(logits, self._recorder.parameters[n]) for n in wanted):
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
        wrong = self._verification.wrong(*compared)
        self.seconds += perf_counter() - start
        return wrong

    def leave_wrong(self, *compared: dict[str, Comparison]) -> None:
        """Send parameters the next way whose gradients are not autograd's."""
        for name, apart in self.wrong(*compared).items():
            way = self.ways()[name]
            way = "torch.func" if way == VMAP else f"the {way}"
            self._verification.leave(
                name, f"{way} and autograd differ by {apart:.2g} of the largest"
            )

    def vouched(
        self,
        logits: Tensor,
        cotangents: Tensor,
        wanted: Iterable[str],
        places: Mapping[str, Tensor],
        recorded: Recorded,
        *,
        in_order: bool,
    ) -> Vouched | None:
        """The batch as one of whose parameters the graph vouches; None where it does
        not, or some of them have no rule.

        Parameters
        ----------
        logits : Tensor of shape (n, c)
        cotangents : Tensor of shape (n, rows, c)
        wanted : iterable of parameter name
        places : mapping of parameter name to Tensor of shape (m,)
            Entries, of those whose layer was seen.
        recorded : Recorded
        in_order : bool
            Whether it matters that the samples are not moved about.
        """
        start = perf_counter()
        unused = [name for name in wanted if name not in places]
        routes, parameters = self._recorder.routes, self._recorder.parameters
        found = None
        if all(self._verification.ways[name] == RULE for name in wanted):
            graph = Graph(logits)
            layers = {name: routes[name].module for name in places}
            used = (
                Seen(parameters[name], layer, recorded[layer][0].edge.node)
                for name, layer in layers.items()
            )
            if (graph.in_order or not in_order) and graph.vouches(
                used, (parameters[name] for name in unused)
            ):
                found = Vouched(
                    self._recorder, self._verification, places, recorded, cotangents
                )
        self.seconds += perf_counter() - start
        return found

    def holds(
        self,
        vouched: Vouched,
        batch: Batch,
        rows: Mapping[str, Tensor],
        squares: Mapping[str, Comparison] = MappingProxyType({}),
    ) -> bool:
        """See `Vouched.holds`."""
        holds = vouched.holds(batch, rows, squares)
        self.seconds += vouched.seconds
        return holds

    def sums(self, logits: Tensor, cotangents: Tensor, wanted: Wanted) -> Sums:
        """Plain autograd's sums over samples and rows, each with a weight of its own:
        what every way but one by one is compared with.
        """
        start = perf_counter()
        ways, sums = self._verification.ways, Sums()
        names = [name for name in wanted if ways[name] in (RULE, VMAP)]
        self._expect(sums, logits, cotangents, self._weights(cotangents), names, wanted)
        self.seconds += perf_counter() - start
        return sums

    def sums_of_row(
        self, logits: Tensor, cotangents: Tensor, wanted: Wanted, row: int
    ) -> Sums:
        """The same where all entries are wanted: what has a rule is compared on one
        row.
        """
        start = perf_counter()
        ways, sums = self._verification.ways, Sums()
        weights = self._weights(cotangents)
        of_row = torch.zeros_like(weights)
        of_row[:, row] = weights[:, row]
        for way, own in ((VMAP, weights), (RULE, of_row)):
            names = [name for name in wanted if ways[name] == way]
            self._expect(sums, logits, cotangents, own, names, wanted)
        sums.fetch_places()
        self.seconds += perf_counter() - start
        return sums

    def _weights(self, cotangents: Tensor) -> Tensor:
        weights = self._verification.weights(*cotangents.shape[:2])
        return weights.to(cotangents, non_blocking=True)

    def _expect(
        self,
        sums: Sums,
        logits: Tensor,
        cotangents: Tensor,
        weights: Tensor,
        names: Sequence[str],
        wanted: Wanted,
    ) -> None:
        """Put what autograd gives for these parameters into the sums."""
        cotangent = (weights[..., None] * cotangents).sum(1)
        gradients = self.plain(logits, names, cotangent)
        for name in names:
            flat, places = gradients.pop(name).flatten(), wanted[name]
            if places is None:
                places = self._verification.telling_entries(flat)
            sums.expect(name, places, flat[places], weights)

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
