r"""Per-sample gradients of a torch module's class scores, for the weights that are
wanted and no others.

One forward pass records what each layer saw (a); one backward pass per class, through
activations only, gives the gradient at its output (g); `layer_rules` turns the two into
weight gradients. A parameter that no rule explains (tied weights, a module called
twice, direct use, an unknown layer) goes the generic way: a vmapped vector-Jacobian
product where that works, else one sample at a time. Which way is right is not read off
names: every batch has one more backward pass, to the wanted parameters, of all rows
together and with a weight of its own for every sample, and `verification` compares.

This file sees tensors and torch modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from fishermask_sk.gradients.fisher import (
    Weighting,
    class_cotangents,
    reduced_cotangents,
)
from fishermask_sk.gradients.generic import (
    VMAP_ERRORS,
    GenericGradients,
    dense,
    is_out_of_memory,
    samples,
)
from fishermask_sk.gradients.layer_rules import (
    FromOutputGradient,
    FromSeen,
    Rule,
    find_rule,
    held_numbers,
)
from fishermask_sk.gradients.modules import Batch, map_tensors, parameter_slices
from fishermask_sk.gradients.verification import (
    ONE_BY_ONE,
    RULE,
    VMAP,
    Comparison,
    Verification,
)

logger = logging.getLogger(__name__)

Forward = Callable[[Batch], Tensor]

# What a rule may raise where a layer is not laid out as its class says.
RULE_ERRORS = (*VMAP_ERRORS, AssertionError, ArithmeticError, LookupError)
# The samples that are tried first are pulled back along this many rows at most.
MAX_TRIED_ROWS = 32
# A head's product may differ from the class scores by this many roundings.
PRODUCT_ROUNDINGS = 64
# What rules make of their inputs is kept from row to row where this many samples at a
# time are left; else it is made layer by layer, for each row again, in parts of
# samples, and the graph has this share of the working memory.
FEW_SAMPLES, GRAPH_SHARE = 16, 0.75


class _Use(NamedTuple):
    """One call of a layer: what it saw, and where in the graph its output's gradient
    arrives.
    """

    seen: Tensor
    edge: GradientEdge
    n_outputs: int


class _Route(NamedTuple):
    """A parameter that a layer rule explains."""

    module: nn.Module
    rule: Rule


Recorded = dict[nn.Module, list[_Use]]
Wanted = Mapping[str, Tensor | None]
Made = TypeVar("Made")
_Both = tuple[FromOutputGradient, FromOutputGradient]


class _Load(NamedTuple):
    """Bytes that one sample takes: in the graph and its gradients, in what all rules
    make of their inputs, and in what the largest makes.
    """

    graph: float
    held: float
    largest: float


class _Mask(NamedTuple):
    """What depends on the mask alone: each masked parameter's own entries, there and
    on the CPU, the columns of the embedding that they fill, and its prepared rules.
    """

    mask_indices: Tensor
    wanted: dict[str, Tensor]
    on_host: dict[str, Tensor]
    columns: dict[str, slice]
    prepared: dict[str, FromSeen]


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
    max_samples : int or None
        Larger batches are taken in parts; halved whenever a part runs out of memory.
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
        self.module, self.forward = module, forward
        self.max_samples: int | None = None
        self.working_bytes = working_bytes
        self.check_seconds = 0.0
        self.parameters = dict(module.named_parameters())
        self.slices = parameter_slices(module)
        self.n_parameters = sum(p.numel() for p in self.parameters.values())
        self.names = self._trainable() if names is None else list(names)
        self._routes = self._find_routes()
        self._any = GenericGradients(module, forward)
        self._loads: dict[Any, _Load] = {}
        self._mask: _Mask | None = None  # the last
        self._verification = Verification(
            {name: RULE if name in self._routes else VMAP for name in self._trainable()}
        )
        self.verify(example)

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
        return {
            name: f"rule of {type(self._routes[name].module).__name__}"
            if way == RULE
            else way
            for name, way in self._verification.ways.items()
        }

    def verify(self, batch: Batch) -> None:
        """Try every way on a few samples, as a query would go it, on a bounded number
        of entries of each parameter that may be wanted.

        Parameters
        ----------
        batch : batch of a few samples
        """
        names = [name for name in self.names if self.parameters[name].requires_grad]
        n, start = _length(batch), 0
        while start < n:
            size = min(n, self._affordable(batch, dict.fromkeys(names)))
            self._try(samples(batch, slice(start, start + size)), names)
            start += size

    def _try(self, batch: Batch, names: list[str]) -> None:
        """Go every way on a batch once, and take note of the dtypes on it."""
        note = self._verification.see
        with (
            saved_tensors_hooks(lambda t: note(t.dtype) or t, lambda t: t),
            self._recorded(batch, names) as (logits, _),
        ):
            weights = self._verification.weights(*logits.shape).to(logits)
            gradients = self._plain(logits, names, weights)
        n_classes = logits.shape[1]
        del logits  # and with it the graph
        telling = []
        for name in names:
            entries = self._verification.telling_entries(gradients.pop(name))
            telling.append(self.slices[name].start + entries)
        if telling:
            m = min(n_classes, MAX_TRIED_ROWS + 1)
            self._embedded(batch, torch.cat(telling), "fisher", True, m, tried=False)

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
            names = self._trainable()
        total: Tensor | None = None
        n_samples = 0

        def squares(part: Batch) -> tuple[int, Tensor]:
            left = None if weights is None else weights[n_samples:]
            return self._squares(part, names, n_top_classes, left)

        for batch in batches:
            for n, of_part in self._in_parts(batch, dict.fromkeys(names), squares):
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
        parts = self._in_parts(
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
    ) -> tuple[Tensor, Tensor] | None:
        r"""What the gradients of a linear head are the products of: R and h with
        :math:`V_x = R_x \otimes h_x`, without any backward pass.

        Parameters
        ----------
        batch : batch of n samples
        names : sequence of str
            The head's weight, or its weight and bias.
        weighting : {"fisher", "uniform"}
        n_top_classes : int, optional

        Returns
        -------
        cotangents : Tensor of shape (n, c - 1, C)
            At the head's output; m rows for c where `n_top_classes` is m.
        inputs : Tensor of shape (n, d)
            What the head saw.

        None where the product of that with its weights is not the class scores: where
        something lies between, or another layer is named.
        """
        width = None

        def factors(part: Batch) -> tuple[int, Tensor]:
            nonlocal width
            with self._recorded(part, names) as (logits, recorded):
                n = len(logits)
                _, unused = self._split(names, recorded, n)
                if not self._is_product(logits, names, unused, recorded):
                    return n, logits.new_empty(n, 0)
                r = reduced_cotangents(logits.detach(), weighting, n_top_classes)
                seen = recorded[self._routes[names[0]].module][0].seen
                width = r.shape[1:]
                return n, torch.cat([r.flatten(1), seen.to(r)], dim=1)

        wanted = dict.fromkeys(names)
        found = [part for _, part in self._in_parts(batch, wanted, factors)]
        if width is None or not all(part.shape[1] for part in found):
            return None
        both = torch.cat(found)
        r, inputs = both.tensor_split([width.numel()], dim=1)
        return r.unflatten(1, width), inputs

    def _in_parts(
        self,
        batch: Batch,
        wanted: Wanted,
        compute: Callable[[Batch], tuple[int, Tensor]],
    ) -> Iterator[tuple[int, Tensor]]:
        """Number of samples and result of one part of the batch after the other, as
        large as memory allows.
        """
        n, start = _length(batch), 0
        bound = self._affordable(batch, wanted)
        while start < n:
            size = min(n, bound, self.max_samples or n)
            whole = size == n
            part = batch if whole else samples(batch, slice(start, start + size))
            result = _unless_out_of_memory(compute, part)
            if result is None:
                self.max_samples = size
                self._halve()
                continue
            yield result
            start += size

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

    def _affordable(self, batch: Batch, wanted: Wanted) -> int:
        """How many samples of this batch fit into the working memory, at least one."""
        n = _length(batch)
        if self.working_bytes is None or n == 1:
            return n
        load = self._load(batch, wanted)
        if self._holds_inputs(load, n):
            return max(1, int(self.working_bytes / (load.graph + load.held)))
        return max(1, int(self.working_bytes * GRAPH_SHARE / load.graph))

    def _holds_inputs(self, load: _Load, n: int) -> bool:
        """Whether all that rules make of their inputs is kept from row to row: where
        that leaves room for a batch worth its name.
        """
        assert self.working_bytes is not None  # for the type checker
        return self.working_bytes >= (load.graph + load.held) * min(n, FEW_SAMPLES)

    def _load(self, batch: Batch, wanted: Wanted) -> _Load:
        """What a sample of this shape takes, seen on the first of the batch."""
        shapes: list[torch.Size] = []

        def measure(tensor: Tensor) -> Tensor:
            shapes.append(tensor.shape[1:])
            return tensor

        map_tensors(measure, batch)
        sizes = {name: None if e is None else len(e) for name, e in wanted.items()}
        key = (*shapes, *sizes.items())
        if key in self._loads:
            return self._loads[key]
        few = samples(batch, slice(1))
        n, stored = _length(few), dict[int, int]()
        own = {p.untyped_storage().data_ptr() for p in self.parameters.values()}

        def note(tensor: Tensor) -> Tensor:
            if tensor.layout == torch.strided:
                memory = tensor.untyped_storage()
                stored[memory.data_ptr()] = memory.nbytes()
            return tensor

        with (
            saved_tensors_hooks(note, lambda t: t),
            self._recorded(few, list(wanted)) as (_, recorded),
        ):
            pass
        held = dict[nn.Module, float]()
        graph = float(sum(size for place, size in stored.items() if place not in own))
        for module, uses in recorded.items():
            for use in uses:
                itemsize = max(4, use.seen.itemsize)
                graph += use.n_outputs * itemsize
                most = [
                    sizes[name]
                    for name in wanted
                    if name in self._routes and self._routes[name].module is module
                ]
                largest = None if None in most else max(filter(None, most), default=1)
                held[module] = itemsize * held_numbers(module, use.seen, largest)
        load = _Load(
            max(1.0, graph / n),
            sum(held.values()) / n,
            max(held.values(), default=0) / n,
        )
        self._loads[key] = load
        return load

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
        everything: Wanted = dict.fromkeys(names)
        n_together = self._together(batch, everything)
        with self._recorded(batch, names) as (logits, recorded):
            cotangents = reduced_cotangents(logits, n_top_classes=n_top_classes)
            cotangents = cotangents.to(logits.dtype)
            if weights is not None:  # in the squares the root is the weight
                roots = weights[: len(logits)].to(cotangents).sqrt()
                cotangents = cotangents * roots[:, None, None]
            ruled, unused = self._split(names, recorded, len(logits))
            # Of the rules' rows one is compared: a rule does the same to all.
            checked = self._verification.row(cotangents.shape[1])
            compared = self._plain_sums(logits, cotangents, everything, checked)
            squared = _Squares(compared.expected)

            def functions_of(route: _Route, seen: Tensor, name: str) -> _Both:
                entries = route.rule.entries(route.module, compared.on_host[name])
                return _summed(route, seen, n_together(route, seen)), entries(seen)

            functions = self._prepared(ruled, recorded, functions_of)

            def take(name: str, row: int, g: Tensor) -> None:
                squares, entries = functions[name]
                of_row = squares(g).flatten()
                total[self.slices[name]] += of_row
                if row != checked:
                    return
                start = perf_counter()
                rows = entries(g)
                compared.add(name, slice(None), slice(row, row + 1), rows[:, None])
                squared.add(name, rows, of_row[compared.places[name]])
                self.check_seconds += perf_counter() - start

            self._pull_back(logits, cotangents, functions, recorded, take)
            self._leave_wrong(compared.of([*ruled, *unused]), squared.of(functions))

        def clear(name: str) -> None:
            total[self.slices[name]] = 0

        def put(name: str, part: slice, of_rows: slice, rows: Tensor) -> None:
            total[self.slices[name]] += rows.flatten(0, 1).square().sum(0)

        self._go_generic(batch, cotangents, everything, compared, put, clear)
        return len(cotangents), total

    def _embedded(
        self,
        batch: Batch,
        mask_indices: Tensor,
        weighting: Weighting,
        reduced: bool,
        n_top_classes: int | None,
        *,
        tried: bool = True,
    ) -> tuple[int, Tensor]:
        """Embeddings of a part of a batch; before its ways were tried, no product of
        the head stands in for a backward pass.
        """
        mask = self._entries(mask_indices)
        wanted, columns = mask.wanted, mask.columns
        make = reduced_cotangents if reduced else class_cotangents
        with self._recorded(batch, list(wanted)) as (logits, recorded):
            cotangents = make(logits, weighting, n_top_classes).to(logits.dtype)
            result = self._zeros(*cotangents.shape[:2], len(mask_indices))
            ruled, unused = self._split(list(wanted), recorded, len(logits))

            def function_of(
                route: _Route, seen: Tensor, name: str
            ) -> FromOutputGradient:
                if name not in mask.prepared:
                    mask.prepared[name] = route.rule.entries(
                        route.module, mask.on_host[name]
                    )
                return mask.prepared[name](seen)

            functions = self._prepared(ruled, recorded, function_of)

            def take(name: str, row: int, g: Tensor) -> None:
                result[:, row, columns[name]] = functions[name](g).to(result.dtype)

            if tried and self._is_product(logits, wanted, unused, recorded):
                for row in range(cotangents.shape[1]):
                    for name in functions:
                        take(name, row, cotangents[:, row])
                return len(cotangents), result
            compared = self._plain_sums(logits, cotangents, wanted)
            self._pull_back(logits, cotangents, functions, recorded, take)
            for name in ruled:
                rows = result[:, :, columns[name]]
                compared.add(name, slice(None), slice(None), rows)
            self._leave_wrong(compared.of([*ruled, *unused]))

        def put(name: str, part: slice, of_rows: slice, rows: Tensor) -> None:
            result[part, of_rows, columns[name]] = rows.to(result.dtype)

        self._go_generic(batch, cotangents, wanted, compared, put, lambda name: None)
        return len(cotangents), result

    def _go_generic(
        self,
        batch: Batch,
        cotangents: Tensor,
        wanted: Wanted,
        compared: _Sums,
        put: Callable[[str, slice, slice, Tensor], None],
        clear: Callable[[str], None],
    ) -> None:
        """Rows of the parameters that no rule explains: vmapped as long as that gives
        what plain autograd does, else sample by sample.
        """
        ways, generic = self._verification.ways, self._any
        chunk = None if self.working_bytes is None else self.working_bytes // 2
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
            self._leave_wrong(compared.of(some))
            break
        alone = {name: e for name, e in wanted.items() if ways[name] == ONE_BY_ONE}
        for name in alone:
            clear(name)
        if alone:
            for part, rows in generic.one_by_one(batch, cotangents, alone):
                for name, r in rows.items():
                    put(name, part, slice(None), r)

    def _together(
        self, batch: Batch, wanted: Wanted
    ) -> Callable[[_Route, Tensor], int | None]:
        """How many samples' inputs a rule takes apart at a time: None for all, which
        are then kept from row to row.
        """
        memory = self.working_bytes
        if memory is None:
            return lambda route, seen: None
        if self._holds_inputs(self._load(batch, wanted), _length(batch)):
            return lambda route, seen: None
        room = (1 - GRAPH_SHARE) * memory

        def n_samples(route: _Route, seen: Tensor) -> int:
            size = seen.itemsize * held_numbers(route.module, seen, None)
            return max(1, int(room * len(seen) / size))

        return n_samples

    def _split(
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
            uses = recorded[self._routes[name].module]
            if len(uses) > 1:
                self._verification.leave(name, "its layer is called more than once")
            elif any(len(u.seen) != n for u in uses):
                self._verification.leave(
                    name, "what its layer sees does not have the samples in front"
                )
            else:
                (ruled if uses else unused).append(name)
        return ruled, unused

    def _prepared(
        self,
        names: list[str],
        recorded: Recorded,
        make: Callable[[_Route, Tensor, str], Made],
    ) -> dict[str, Made]:
        """What rules make of their layers' inputs; a rule that cannot is left."""
        functions = {}
        for name in names:
            route = self._routes[name]
            seen = recorded[route.module][0].seen
            function = self._attempt(name, make, route, seen, name)
            if function is not None:
                functions[name] = function
        return functions

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

    def _pull_back(
        self,
        logits: Tensor,
        cotangents: Tensor,
        names: Iterable[str],
        recorded: Recorded,
        take: Callable[[str, int, Tensor], None],
    ) -> None:
        """Hand the gradient at the output of every ruled layer to `take`, for each row
        of the cotangents (n, rows, c).
        """
        by_layer: dict[nn.Module, list[str]] = {}
        for name in names:
            by_layer.setdefault(self._routes[name].module, []).append(name)
        edges = [recorded[layer][0].edge for layer in by_layer]
        if not edges or not logits.requires_grad:
            return  # the scores may depend on none of these layers
        for row in range(cotangents.shape[1]):
            gradients = torch.autograd.grad(
                logits,
                edges,
                cotangents[:, row],
                retain_graph=row < cotangents.shape[1] - 1,
                allow_unused=True,
            )
            for layer, g in zip(by_layer, gradients, strict=True):
                for name in by_layer[layer] if g is not None else ():
                    if self._verification.ways[name] == RULE:
                        fine = _at_least_float32(g, g.dtype)
                        self._attempt(name, take, name, row, fine)

    def _is_product(
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
        layers = {self._routes[n].module for n in wanted if ways[n] == RULE}
        exact = self._verification.coarsest == logits.dtype
        if (
            unused
            or not exact
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
        self.check_seconds += perf_counter() - start
        return same

    def _leave_wrong(self, *compared: dict[str, Comparison]) -> None:
        """Send parameters the next way whose gradients are not autograd's."""
        start = perf_counter()
        wrong: dict[str, float] = {}
        for comparisons in compared:
            wrong |= self._verification.wrong(comparisons.items())
        for name, apart in wrong.items():
            way = self.ways()[name]
            way = "torch.func" if way == VMAP else f"the {way}"
            self._verification.leave(
                name, f"{way} and autograd differ by {apart:.2g} of the largest"
            )
        self.check_seconds += perf_counter() - start

    def _plain_sums(
        self,
        logits: Tensor,
        cotangents: Tensor,
        wanted: Wanted,
        row: int | None = None,
    ) -> _Sums:
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
        sums = _Sums()
        apart = [(weights, (VMAP,)), (of_row, (RULE,))]
        for own, kinds in [(weights, (RULE, VMAP))] if row is None else apart:
            names = [name for name in wanted if ways[name] in kinds]
            cotangent = (own[..., None] * cotangents).sum(1)
            gradients = self._plain(logits, names, cotangent)
            for name in names:
                flat, places = gradients.pop(name).flatten(), wanted[name]
                if places is None:
                    places = self._verification.telling_entries(flat)
                sums.expect(name, places, flat[places], own)
        if None in wanted.values():
            sums.fetch_places()
        self.check_seconds += perf_counter() - start
        return sums

    def _plain(
        self, logits: Tensor, names: Sequence[str], cotangent: Tensor
    ) -> dict[str, Tensor]:
        """Plain autograd's gradients of these parameters."""
        parameters = [self.parameters[name] for name in names]
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

    def _entries(self, mask_indices: Tensor) -> _Mask:
        """What depends on this mask alone, looked up once for all batches."""
        if self._mask is not None and self._mask.mask_indices is mask_indices:
            return self._mask
        on_host = mask_indices.cpu()
        starts = [place.start for place in self.slices.values()]
        ends = torch.tensor([*starts, self.n_parameters], device="cpu")
        firsts = torch.searchsorted(on_host, ends).tolist()
        self._mask = _Mask(mask_indices, {}, {}, {}, {})
        for i, (name, start) in enumerate(zip(self.slices, starts, strict=True)):
            columns = slice(firsts[i], firsts[i + 1])
            if columns.stop > columns.start:
                self._mask.columns[name] = columns
                self._mask.wanted[name] = mask_indices[columns] - start
                self._mask.on_host[name] = on_host[columns] - start
        return self._mask

    def _zeros(self, *shape: int) -> Tensor:
        first = next(iter(self.parameters.values()))
        dtype = torch.float32
        for p in self.parameters.values():
            if p.requires_grad and p.is_floating_point():
                dtype = torch.promote_types(dtype, p.dtype)
        return torch.zeros(shape, dtype=dtype, device=first.device)

    def _trainable(self) -> list[str]:
        return [name for name, p in self.parameters.items() if p.requires_grad]

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
        self, batch: Batch, names: Iterable[str]
    ) -> Iterator[tuple[Tensor, Recorded]]:
        """A forward pass: the logits, and every use of the layers that hold these
        parameters.

        Until the end parameters that are not wanted are frozen: the graph starts at the
        first layer that is, and checkpointed parts, which the backward passes compute
        again, are frozen as they were.
        """
        wanted = set(names)
        recorded: Recorded = {
            self._routes[name].module: [] for name in wanted if name in self._routes
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
                self._verification.see(seen.dtype, output.dtype)
                # The edge, not the tensor: an in-place ReLU overwrites the tensor and
                # moves its gradient.
                seen = (
                    _at_least_float32(seen.detach(), output.dtype)
                    if seen.is_floating_point()
                    else seen
                )
                edge = get_gradient_edge(output)
                recorded[module].append(_Use(seen, edge, output.numel()))

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
                    logits = self.forward(batch)
            finally:
                for handle in handles:
                    handle.remove()
            yield logits, recorded
        finally:
            for p in frozen:
                p.requires_grad_(True)


class _Sums:
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
        self.expected[name] = _at_least_float32(expected, expected.dtype)

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


class _Squares:
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


def _summed(route: _Route, seen: Tensor, n_together: int | None) -> FromOutputGradient:
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
