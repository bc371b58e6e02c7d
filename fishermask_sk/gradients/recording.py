r"""What every layer saw (a), and the gradient at its output (g): a forward pass that
records the one, and backward passes to activations alone that give the other.

A *use* is one call of a layer: `seen` (n, ...), what it was given, and `edge`, where
in the graph the gradient of its output arrives. g has the shape of the output, samples
first. Of cotangents (n, rows, c) at the class scores, one backward pass pulls back one
row of all samples.

This file sees tensors and torch modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import (
    GradientEdge,
    Node,
    get_gradient_edge,
    saved_tensors_hooks,
)

from fishermask_sk.gradients.layer_rules import Rule, find_rule
from fishermask_sk.gradients.modules import Batch

Forward = Callable[[Batch], Tensor]


class Use(NamedTuple):
    """One call of a layer: what it saw, and where in the graph its output's gradient
    arrives.
    """

    seen: Tensor
    edge: GradientEdge
    n_outputs: int


class Route(NamedTuple):
    """A parameter that a layer rule explains."""

    module: nn.Module
    rule: Rule


Recorded = dict[nn.Module, list[Use]]
Wanted = Mapping[str, Tensor | None]


class Recorder:
    """Runs a module and records what its layers see.

    Parameters
    ----------
    module : Module
    forward : callable batch -> logits of shape (n, c)
        Runs `module` on a batch.
    note_dtypes : callable
        Called with the dtypes of what layers take and give.

    Attributes
    ----------
    parameters : dict of parameter name to Parameter
    routes : dict of parameter name to Route
        Of the parameters that one layer alone owns, and that a rule covers.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        note_dtypes: Callable[..., None],
    ) -> None:
        self.module, self.forward = module, forward
        self.parameters = dict(module.named_parameters())
        self.routes = self._find_routes()
        self._note_dtypes = note_dtypes

    def trainable(self) -> list[str]:
        """Names of the parameters that are not frozen."""
        return [name for name, p in self.parameters.items() if p.requires_grad]

    def _find_routes(self) -> dict[str, Route]:
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.module.modules():
            for name, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append((module, name))
        routes = {}
        for full_name, parameter in self.parameters.items():
            if not parameter.requires_grad or len(owners[id(parameter)]) != 1:
                continue
            owner, name = owners[id(parameter)][0]
            rule = find_rule(owner, name)
            if rule is not None:
                routes[full_name] = Route(owner, rule)
        return routes

    @contextmanager
    def recorded(
        self,
        batch: Batch,
        names: Iterable[str],
        note_saved: Callable[[Tensor], object] | None = None,
    ) -> Iterator[tuple[Tensor, Recorded]]:
        """A forward pass: the logits, and every use of the layers that hold these
        parameters.

        Until the end parameters that are not wanted are frozen: the graph starts at the
        first layer that is, and checkpointed parts, which the backward passes compute
        again, are frozen as they were.

        `note_saved` sees what operations keep for the backward pass, where the module
        allows that: `torch.func` within it does not.
        """
        wanted = set(names)
        recorded: Recorded = {
            self.routes[name].module: [] for name in wanted if name in self.routes
        }

        def note(
            module: nn.Module,
            called: nn.Module,  # the module, or a replica that has its hooks
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
        ) -> None:
            seen = args[0] if args else kwargs.get("input")
            if (
                isinstance(seen, Tensor)
                and isinstance(output, Tensor)
                and output.requires_grad
            ):
                self._note_dtypes(seen.dtype, output.dtype)
                # The edge, not the tensor: an in-place ReLU overwrites the tensor and
                # moves its gradient.
                seen = (
                    at_least_float32(seen.detach(), output.dtype)
                    if seen.is_floating_point()
                    else seen
                )
                edge = get_gradient_edge(output)
                recorded[module].append(Use(seen, edge, output.numel()))

        handles = [
            m.register_forward_hook(partial(note, m), with_kwargs=True)
            for m in recorded
        ]
        frozen = [
            p
            for name, p in self.parameters.items()
            if p.requires_grad and name not in wanted
        ]
        try:
            for p in frozen:
                p.requires_grad_(False)
            try:
                with torch.enable_grad():
                    logits = self._run(batch, note_saved)
                    if logits is None:
                        for uses in recorded.values():
                            uses.clear()
                        logits = self.forward(batch)
            finally:
                for handle in handles:
                    handle.remove()
            yield logits, recorded
        finally:
            for p in frozen:
                p.requires_grad_(True)

    def _run(
        self, batch: Batch, note_saved: Callable[[Tensor], object] | None
    ) -> Tensor | None:
        """The logits; None where what is saved cannot be noted, or was not asked for.

        Undetached, what an operation saves of its own output would hold the operation,
        and that the output: for ever, as Python sees no such circle.
        """
        if note_saved is None:
            return None

        def keep(saved: Tensor) -> Tensor:
            note_saved(saved)
            return saved.detach()

        try:
            with saved_tensors_hooks(keep, lambda saved: saved):
                return self.forward(batch)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            return None


class Outputs:
    """The outputs of some layers in a graph, and backward passes that end there.

    A gradient is handed on as it arrives, and goes before the next one comes: all of
    them at once would be as large as the graph.

    Parameters
    ----------
    layers : iterable of Module
        Each with one use in `recorded`.
    recorded : Recorded
    """

    def __init__(self, layers: Iterable[nn.Module], recorded: Recorded) -> None:
        edges = {layer: recorded[layer][0].edge for layer in layers}
        inner = _on_the_way({edge.node for edge in edges.values()})
        self._ends = {m: edge for m, edge in edges.items() if edge.node not in inner}
        self._passed = {m: edge for m, edge in edges.items() if edge.node in inner}

    def pull_back(
        self,
        logits: Tensor,
        cotangent: Tensor,
        take: Callable[[nn.Module, Tensor], None],
        parameters: Sequence[Tensor] = (),
        *,
        retain_graph: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """One backward pass: hand each layer and the gradient at its output to `take`,
        where the scores depend on it, and return the gradients of these parameters.
        """
        if not self._ends or not logits.requires_grad:
            return (None,) * len(parameters)

        def arrived(
            layer: nn.Module, number: int, gradients: tuple[Tensor | None, ...]
        ) -> None:
            if (g := gradients[number]) is not None:
                take(layer, at_least_float32(g, g.dtype))

        handles = [
            edge.node.register_prehook(partial(arrived, layer, edge.output_nr))
            for layer, edge in self._passed.items()
        ]
        inputs: list[Any] = [*self._ends.values(), *parameters]
        try:
            found = torch.autograd.grad(
                logits,
                inputs,
                cotangent,
                retain_graph=retain_graph,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        for layer, g in zip(self._ends, found, strict=False):
            arrived(layer, 0, (g,))
        return found[len(self._ends) :]


def _on_the_way(nodes: set[Node]) -> set[Node]:
    """Those of the nodes below which another one lies: who comes to that one has come
    past these by every path, with their whole gradient.
    """
    leads: dict[Node, bool] = {}
    for start in nodes:
        stack = [start]
        while stack:
            node = stack[-1]
            below = [n for n, _ in node.next_functions if n is not None]
            missing = [n for n in below if n not in leads]
            if missing and node not in leads:
                leads[node] = False  # till all below are known
                stack += missing
                continue
            leads[node] = any(n in nodes or leads[n] for n in below)
            stack.pop()
    return {node for node in nodes if leads[node]}


def at_least_float32(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype or float32, whichever is finer: float16 overflows in squares, and
    autocast mixes dtypes.
    """
    return tensor.to(torch.promote_types(dtype, torch.float32))
