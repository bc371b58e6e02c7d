r"""Per-sample gradients of a torch module's class scores, for the weights that are
wanted and no others.

One forward pass records what each layer saw (a); one backward pass per class, through
activations only, gives the gradient at its output (g); `layer_rules` turns the two into
weight gradients. A parameter that no rule explains (tied weights, a module called
twice, direct use, an unknown layer) goes the generic way: a vmapped vector-Jacobian
product where that works, else one sample at a time. Which way is decided by comparing
with plain autograd on a few samples, not by trusting names.

This file sees tensors and torch modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fishermask_sk.fisher import Weighting, class_cotangents, reduced_cotangents
from fishermask_sk.generic import GenericGradients, is_out_of_memory, samples
from fishermask_sk.layer_rules import Rule, find_rule
from fishermask_sk.modules import Batch, map_tensors, parameter_slices

logger = logging.getLogger(__name__)

Forward = Callable[[Batch], Tensor]

# What plain autograd and the rules may differ by, relative to the size of the summands.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class _Use(NamedTuple):
    """One call of a layer: what it saw, and where in the graph its output's gradient
    arrives.
    """

    seen: Tensor
    edge: GradientEdge


class _Route(NamedTuple):
    """A parameter that a layer rule explains."""

    module: nn.Module
    rule: Rule


class PerSampleGradients:
    """Gradients of √p_c log p_c with respect to single weights, for every sample of a
    batch.

    Parameters
    ----------
    module : Module
        In evaluation mode (see `fishermask_sk.modules.undisturbed`).
    forward : callable batch -> logits of shape (n, c)
        Runs `module` on a batch; softmax of the result is p(y|x).
    example : batch of at least one sample
        On its first samples every rule is compared with plain autograd.

    Attributes
    ----------
    slices : dict from parameter name to slice of the flat vector of all parameters
    generic : set of parameter names that no layer rule explains
    max_samples : int or None
        Larger batches are taken in parts; halved whenever a part runs out of memory.

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

    def __init__(self, module: nn.Module, forward: Forward, example: Batch) -> None:
        self.module, self.forward = module, forward
        self.max_samples: int | None = None
        self.parameters = dict(module.named_parameters())
        self.slices = parameter_slices(module)
        self.n_parameters = sum(p.numel() for p in self.parameters.values())
        self._routes = self._find_routes()
        self._any = GenericGradients(module, forward)
        self.generic = {
            name for name, p in self.parameters.items() if p.requires_grad
        } - set(self._routes)
        self._compare_with_autograd(samples(example, slice(4)))

    def ways(self) -> dict[str, str]:
        """How each trainable parameter's gradients are found: by its layer's rule, by
        vmap, or sample by sample.
        """
        generic = "vmap" if self._any.vmap_works else "one by one"
        return {
            name: generic
            if name in self.generic
            else f"rule of {type(self._routes[name].module).__name__}"
            for name, p in self.parameters.items()
            if p.requires_grad
        }

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
            names = [name for name, p in self.parameters.items() if p.requires_grad]
        total = self._zeros(self.n_parameters)
        n_samples = 0

        def squares(part: Batch) -> tuple[int, Tensor]:
            left = None if weights is None else weights[n_samples:]
            return self._squares(part, names, n_top_classes, left)

        for batch in batches:
            for n, of_part in self._in_parts(batch, squares):
                total += of_part
                n_samples += n
                if on_batch is not None:
                    on_batch(n)
        sum_of_weights = n_samples if weights is None else float(weights.sum())
        return total / sum_of_weights if sum_of_weights else total

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
        parts = self._in_parts(
            batch,
            lambda part: self._embedded(
                part, mask_indices, weighting, reduced, n_top_classes
            ),
        )
        found = [v for _, v in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _in_parts(
        self, batch: Batch, compute: Callable[[Batch], tuple[int, Tensor]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Number of samples and result of one part of the batch after the other, as
        large as memory allows.
        """
        if self.max_samples is None:
            whole = _unless_out_of_memory(compute, batch)
            if whole is not None:
                yield whole
                return
            self.max_samples = _length(batch)
            self._halve()
        n, start = _length(batch), 0
        while start < n:
            part = samples(batch, slice(start, start + self.max_samples))
            result = _unless_out_of_memory(compute, part)
            if result is None:
                self._halve()
                continue
            yield result
            start += self.max_samples

    def _halve(self) -> None:
        assert self.max_samples is not None  # for the type checker
        if self.max_samples == 1:
            raise MemoryError(
                "Memory ran out on a single sample; free some, or lower sparsity, or "
                "use a larger machine."
            )
        self.max_samples //= 2
        logger.info(
            "Out of memory; going on with %d samples at a time.", self.max_samples
        )

    def _squares(
        self,
        batch: Batch,
        names: Sequence[str],
        n_top_classes: int | None,
        weights: Tensor | None,
    ) -> tuple[int, Tensor]:
        """Σ_x w_x Σ_c p_c (∂ log p_c/∂θ)² of a batch (P,), whose samples have the first
        of these weights.
        """
        total = self._zeros(self.n_parameters)
        with self._recorded(batch, names) as (logits, recorded):
            cotangents = reduced_cotangents(logits, n_top_classes=n_top_classes).to(
                logits.dtype
            )
            if weights is not None:  # in the squares the root is the weight
                roots = weights[: len(logits)].to(cotangents).sqrt()
                cotangents = cotangents * roots[:, None, None]
            ruled, generic = self._split(names, recorded, len(logits))
            functions = {
                name: route.rule.squares(route.module, recorded[route.module][0].seen)
                for name, route in ruled.items()
            }
            for gradients in self._output_gradients(
                logits, cotangents, ruled, recorded
            ):
                for name, squares in functions.items():
                    g = gradients.get(ruled[name].module)
                    if g is not None:
                        total[self.slices[name]] += squares(g).flatten()
        if generic:
            for _, rows in self._any.rows(batch, cotangents, dict.fromkeys(generic)):
                for name, r in rows.items():
                    total[self.slices[name]] += r.flatten(0, 1).square().sum(0)
        return len(logits), total

    def _embedded(
        self,
        batch: Batch,
        mask_indices: Tensor,
        weighting: Weighting,
        reduced: bool,
        n_top_classes: int | None,
    ) -> tuple[int, Tensor]:
        wanted, columns = self._entries(mask_indices)
        make = reduced_cotangents if reduced else class_cotangents
        with self._recorded(batch, list(wanted)) as (logits, recorded):
            cotangents = make(logits, weighting, n_top_classes).to(logits.dtype)
            ruled, generic = self._split(list(wanted), recorded, len(logits))
            functions = {
                name: route.rule.entries(
                    route.module, recorded[route.module][0].seen, wanted[name]
                )
                for name, route in ruled.items()
            }
            result = self._zeros(*cotangents.shape[:2], len(mask_indices))
            for c, gradients in enumerate(
                self._output_gradients(logits, cotangents, ruled, recorded)
            ):
                for name, entries in functions.items():
                    g = gradients.get(ruled[name].module)
                    if g is not None:
                        result[:, c, columns[name]] = entries(g).to(result.dtype)
        if generic:
            for part, rows in self._any.rows(
                batch, cotangents, {name: wanted[name] for name in generic}
            ):
                for name, r in rows.items():
                    result[part, :, columns[name]] = r.to(result.dtype)
        return len(logits), result

    def _entries(
        self, mask_indices: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, slice]]:
        """Each masked parameter's own entries, and the columns of the embedding that
        they fill.
        """
        wanted, columns = {}, {}
        for name, place in self.slices.items():
            ends = torch.tensor([place.start, place.stop], device=mask_indices.device)
            first, last = torch.searchsorted(mask_indices, ends).tolist()
            if last > first:
                columns[name] = slice(first, last)
                wanted[name] = mask_indices[first:last] - place.start
        return wanted, columns

    def _zeros(self, *shape: int) -> Tensor:
        first = next(iter(self.parameters.values()))
        dtype = torch.float32
        for p in self.parameters.values():
            if p.requires_grad and p.is_floating_point():
                dtype = torch.promote_types(dtype, p.dtype)
        return torch.zeros(shape, dtype=dtype, device=first.device)

    def _find_routes(self) -> dict[str, _Route]:
        """The parameters that one layer alone owns, and that a rule covers."""
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
                routes[full_name] = _Route(owner, rule)
        return routes

    @contextmanager
    def _recorded(
        self, batch: Batch, names: Sequence[str]
    ) -> Iterator[tuple[Tensor, dict[nn.Module, list[_Use]]]]:
        """A forward pass: the logits, and every use of the layers that hold these
        parameters.

        Until the end parameters that are not wanted are frozen: the graph starts at the
        first layer that is, and checkpointed parts, which the backward passes compute
        again, are frozen as they were.
        """
        recorded: dict[nn.Module, list[_Use]] = {
            self._routes[name].module: [] for name in names if name in self._routes
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
                # The edge, not the tensor: an in-place ReLU overwrites the tensor and
                # moves its gradient.
                seen = (
                    _at_least_float32(seen.detach(), output.dtype)
                    if seen.is_floating_point()
                    else seen
                )
                recorded[module].append(_Use(seen, get_gradient_edge(output)))

        handles = [
            m.register_forward_hook(partial(note, m), with_kwargs=True)
            for m in recorded
        ]
        frozen = [
            p
            for name, p in self.parameters.items()
            if p.requires_grad and name not in set(names)
        ]
        try:
            for p in frozen:
                p.requires_grad_(False)
            try:
                with torch.enable_grad():
                    logits = self.forward(batch)
            finally:
                for handle in handles:
                    handle.remove()
            yield logits, recorded
        finally:
            for p in frozen:
                p.requires_grad_(True)

    def _split(
        self, names: Sequence[str], recorded: dict[nn.Module, list[_Use]], n: int
    ) -> tuple[dict[str, _Route], list[str]]:
        """Parameters whose rule applies to this batch, and those that go the generic
        way.
        """
        ruled, generic = {}, []
        for name in names:
            route = self._routes.get(name)
            uses = recorded.get(route.module, []) if route is not None else []
            if (
                name in self.generic
                or route is None
                or len(uses) > 1
                or any(len(u.seen) != n for u in uses)
            ):
                generic.append(name)
            elif uses:
                ruled[name] = route
        return ruled, generic

    def _output_gradients(
        self,
        logits: Tensor,
        cotangents: Tensor,
        ruled: dict[str, _Route],
        recorded: dict[nn.Module, list[_Use]],
    ) -> Iterator[dict[nn.Module, Tensor]]:
        """For each row of the cotangents (n, rows, c), the gradient at the output of
        every ruled layer that has one.
        """
        layers = list(dict.fromkeys(route.module for route in ruled.values()))
        edges = [recorded[layer][0].edge for layer in layers]
        if (
            not edges or not logits.requires_grad
        ):  # the scores may depend on none of these layers
            return
        for row in range(cotangents.shape[1]):
            gradients = torch.autograd.grad(
                logits,
                edges,
                cotangents[:, row],
                retain_graph=row < cotangents.shape[1] - 1,
                allow_unused=True,
            )
            yield {
                layer: _at_least_float32(g, g.dtype)
                for layer, g in zip(layers, gradients, strict=True)
                if g is not None
            }

    def _compare_with_autograd(self, batch: Batch) -> None:
        """Send what the rules do not explain the generic way; see whether vmap explains
        the rest.

        Every sample has its own random cotangent and its own weight: a layer whose
        first axis is not the samples' has the right sum and the wrong weighted sum.
        """
        names = [name for name, p in self.parameters.items() if p.requires_grad]
        with self._recorded(batch, names) as (logits, recorded):
            pass  # nothing is frozen
        drawn: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
        cotangents = torch.randn((*logits.shape,), **drawn).to(logits)[:, None]
        weights = (1 + torch.rand(len(logits), **drawn)).to(logits)
        plain = torch.autograd.grad(
            logits,
            [self.parameters[name] for name in names],
            weights[:, None] * cotangents[:, 0],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        expected = dict(zip(names, plain, strict=True))
        ruled, generic = self._split(names, recorded, len(logits))
        gradients = next(
            self._output_gradients(logits, cotangents, ruled, recorded), {}
        )
        for name in names:
            if name in generic:
                self.generic.add(name)
                continue
            if name in ruled and ruled[name].module in gradients:
                route = ruled[name]
                every = torch.arange(
                    self.parameters[name].numel(), device=logits.device
                )
                entries = route.rule.entries(
                    route.module, recorded[route.module][0].seen, every
                )
                rows = entries(gradients[route.module])
            else:
                rows = expected[name].new_zeros(
                    len(logits), self.parameters[name].numel()
                )
            if not _agree(rows, weights, expected[name], logits.dtype):
                self.generic.add(name)
        if self.generic and self._any.vmap_works:
            wanted: dict[str, Tensor | None] = {
                name: None for name in names if name in self.generic
            }
            parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
            for _, some in self._any.rows(batch, cotangents, wanted):
                for name, r in some.items():
                    parts[name].append(r[:, 0])
            self._any.vmap_works = self._any.vmap_works and all(
                _agree(torch.cat(r), weights, expected[name], logits.dtype)
                for name, r in parts.items()
            )


def _length(batch: Batch) -> int:
    """How many samples a batch holds: the length of its first tensor."""
    lengths: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        lengths.append(len(tensor) if tensor.ndim else 1)
        return tensor

    map_tensors(note, batch)
    return lengths[0]


def _unless_out_of_memory(
    compute: Callable[[Batch], tuple[int, Tensor]], batch: Batch
) -> tuple[int, Tensor] | None:
    """None where memory ran out."""
    try:
        return compute(batch)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def _at_least_float32(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype or float32, whichever is finer: float16 overflows in squares, and
    autocast mixes dtypes.
    """
    return tensor.to(torch.promote_types(dtype, torch.float32))


def _agree(rows: Tensor, weights: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether Σ_n w_n·rows_n (n, m) is the expected gradient, to the rounding of
    `dtype` or the parameter's own.
    """
    weighted = (weights.to(rows.dtype)[:, None] * rows).to(expected.dtype)
    scale = weighted.abs().sum(0).max() + expected.abs().max()
    difference = (weighted.sum(0) - expected.flatten()).abs().max()
    tolerance = max(TOLERANCE.get(each, 5e-2) for each in (expected.dtype, dtype))
    return bool(difference <= tolerance * scale)
