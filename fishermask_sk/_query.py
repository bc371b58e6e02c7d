"""The steps of one query, from the fitted net to the picks: mask, embeddings,
selection.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from math import ceil
from numbers import Integral
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.extmath import randomized_svd
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fishermask_sk._collectives import ALONE, Processes
from fishermask_sk._net_checks import (
    check_candidates,
    check_real,
    check_samples_apart,
    reached_parameters,
)
from fishermask_sk.fisher import information
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.layers import Layout, candidate_names, find_layout
from fishermask_sk.masks import (
    custom_mask,
    n_kept,
    per_layer_mask,
    ranked_mask,
    warn_if_head_fills_mask,
)
from fishermask_sk.memory import Budget, Needs, card_of, needs, uses_rows
from fishermask_sk.selection import select
from fishermask_sk.skorch_adapter import FittedNet

if TYPE_CHECKING:
    from fishermask_sk.query_strategy import FisherMask

logger = logging.getLogger(__name__)

# Samples that the net is tried on before any expensive work.
EXAMPLES = 8


class Plan(NamedTuple):
    """What is known of a query before any expensive work: per-sample gradients, layout,
    candidates, k, rows.
    """

    gradients: PerSampleGradients
    layout: Layout
    names: list[str]
    candidates: Tensor
    k: int
    n_trainable: int
    n_classes: int
    n_rows: int


class Embedded(NamedTuple):
    """What the selection is given: matrices, or the labelled samples' embeddings where
    these cost less.
    """

    pool: Tensor
    pool_information: Tensor | None
    labeled_information: Tensor | None
    labeled: Tensor | None


class Query:
    """One query: what `select` was given, and the steps from the mask to the picks.

    Of several processes each has a Query of its own, with the samples that it holds,
    and all take the same steps.
    """

    def __init__(
        self,
        params: FisherMask,
        fitted: FittedNet,
        pool: Dataset,
        labeled: Dataset | None,
        n_pool: int,
        n_labeled: int,
        n_instances: int,
        proposed: np.ndarray | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.params, self.fitted, self.pool, self.labeled = (
            params,
            fitted,
            pool,
            labeled,
        )
        self.n_pool, self.n_labeled, self.n_instances = n_pool, n_labeled, n_instances
        self.proposed, self.processes = proposed, processes
        self.pool_shard, self.labeled_shard = (
            processes.shard(n_pool),
            processes.shard(n_labeled),
        )
        self.shard = (
            self.pool_shard if proposed is None else processes.shard(len(proposed))
        )
        seed = params.random_state
        rng = np.random.RandomState() if seed is None else check_random_state(seed)
        self.rng = processes.object_of(0, rng)
        self.timings: dict[str, float] = {}
        machine, card = socket.gethostname(), card_of(self.device)
        all_places = processes.objects((machine, card))
        n_beside = sum(each == machine for each, _ in all_places)
        n_on_card = all_places.count((machine, card))
        self.budget = Budget(params.max_memory, self.device, n_beside, n_on_card)

    @property
    def device(self) -> torch.device:
        """Where the module's weights are."""
        return next(self.fitted.module.parameters()).device

    def run(self, random_tie_break: bool) -> dict[str, Any]:
        """All steps in turn; what `FisherMask` learns from them."""
        with self._timed("mask"):
            gradients, mask_indices = self._find_mask()
        with self._timed("embeddings"):
            embedded = self._embed(gradients, mask_indices)
        with (
            self._timed("selection"),
            self._progress("picks", self._n_steps()) as advance,
        ):
            picks = select(
                embedded.pool,
                embedded.pool_information,
                self.n_instances,
                labeled_information=embedded.labeled_information,
                labeled_embeddings=embedded.labeled,
                n_labeled=self.labeled_shard.total,
                damping=float(self.params.damping),
                oversample=float(self.params.oversample),
                choose=self._choose_at_random if random_tie_break else None,
                on_pick=lambda: advance(1),
                overwrite=True,
                shard=self.shard,
            )
        positions = mask_indices.cpu()
        return {
            "mask_indices_": positions.numpy(),
            "weights_per_layer_": {
                name: int(((positions >= place.start) & (positions < place.stop)).sum())
                for name, place in gradients.slices.items()
                if gradients.parameters[name].requires_grad
            },
            "query_idx_": self._positions_in_pool(picks.indices.cpu()).numpy(),
            "trace_reductions_": picks.trace_reductions.cpu().numpy(),
            "timings_": self.timings,
        }

    def plan(self) -> Plan:
        """What the net is, tried on its first samples, and what a mask may touch."""
        example, n_example = self._shared_example
        with self.processes.together():
            if self.n_pool and self.pool_shard.start:
                self.fitted.check_outputs(self._example(self.pool))
            return self._plan(example, n_example)

    @cached_property
    def _shared_example(self) -> tuple[Any, int]:
        """The first samples of all, and how many: for the same layout everywhere, and
        for processes without any.
        """
        source = self.pool_shard.owner(0)
        with self.processes.together():
            own = self._example(self.pool) if self.processes.rank == source else None
        return self.processes.object_of(source, (own, min(EXAMPLES, self.n_pool)))

    def _plan(self, example: Any, n_example: int) -> Plan:
        params, fitted = self.params, self.fitted
        n_outputs = fitted.check_outputs(example)
        check_samples_apart(fitted, example, n_example)
        if self.labeled is not None:
            fitted.check_outputs(self._example(self.labeled))
        trainable = [
            name for name, p in fitted.module.named_parameters() if p.requires_grad
        ]
        if not trainable:
            raise ValueError(
                "All weights of the net are frozen; FisherMask needs some with "
                "requires_grad=True."
            )
        reached = reached_parameters(fitted, example, trainable)
        layout = self._layout(example, n_outputs)
        names = candidate_names(params.layers, layout, trainable)
        check_candidates(params.layers, names, reached)
        check_real(fitted.module, names)
        gradients = PerSampleGradients(fitted.module, fitted.logits, example)
        n_trainable = sum(gradients.parameters[name].numel() for name in trainable)
        k = n_kept(params.sparsity, n_trainable)
        candidates = _positions(gradients.slices, names).to(self.device)
        n_classes = max(2, n_outputs)  # one logit is two classes
        n_rows = min(n_classes, params.n_top_classes or n_classes) - 1
        return Plan(
            gradients, layout, names, candidates, k, n_trainable, n_classes, n_rows
        )

    def _find_mask(self) -> tuple[PerSampleGradients, Tensor]:
        """Steps 1 and 2: diagonal Fisher information, and the positions that are
        kept.
        """
        plan = self.plan()
        k = min(plan.k, len(plan.candidates))
        with self.processes.together():
            self.budget.check(self.needs(k, plan.n_rows), k, self.n_pool)
        if self.params.mask == "random":
            scores = torch.as_tensor(
                self.rng.uniform(size=plan.gradients.n_parameters),
                device=plan.candidates.device,
            )
        else:
            scores = self._diagonal_fisher(plan)
        with self.processes.together():
            own = self.mask(plan, scores).cpu() if self.processes.rank == 0 else None
        mask_indices = self.processes.object_of(0, own).to(scores.device)
        with self.processes.together():
            self.budget.check(
                self.needs(len(mask_indices), plan.n_rows),
                len(mask_indices),
                self.n_pool,
            )
        return plan.gradients, mask_indices

    def _example(self, dataset: Dataset) -> Any:
        """The first samples, for checks that read no more."""
        n = self.n_pool if dataset is self.pool else self.n_labeled
        return next(self.fitted.batches(dataset, EXAMPLES, range(min(EXAMPLES, n))))

    def _diagonal_fisher(self, plan: Plan) -> Tensor:
        """Step 1 for the weights that a mask may touch, over samples drawn from pool
        and labelled together.
        """
        of_pool, of_labeled, n_drawn = self._drawn
        n_own = len(of_pool) + len(of_labeled)
        with self.processes.together(), self._progress("mask", n_own) as advance:
            batches = chain(
                self._batches(self.pool, of_pool),
                self._batches(self.labeled, of_labeled),
            )
            mean = plan.gradients.diagonal_fisher(
                batches,
                advance,
                names=plan.names,
                n_top_classes=self.params.n_top_classes,
            )
        scores = self.processes.add(mean * (n_own / n_drawn))
        if not bool(torch.isfinite(scores).all()):
            raise FloatingPointError(
                "The diagonal Fisher information holds NaN or infinite values: samples "
                "do, or the net's weights."
            )
        return scores

    def mask(self, plan: Plan, scores: Tensor) -> Tensor:
        """Step 2, from scores of all weights that it may touch."""
        params, candidates, slices = self.params, plan.candidates, plan.gradients.slices
        allowed = {name: slices[name] for name in plan.names}
        if callable(params.mask):
            return custom_mask(
                params.mask, scores, min(plan.k, len(candidates)), allowed, candidates
            )
        in_head = [name for name in plan.names if name in plan.layout.head]
        head = (
            _positions(slices, in_head).to(scores.device)
            if params.keep_head and in_head
            else None
        )
        if params.mask == "per_layer":
            fraction = (
                plan.k / plan.n_trainable
                if isinstance(params.sparsity, Integral)
                else params.sparsity
            )
            return per_layer_mask(scores, fraction, allowed, candidates, head)
        if head is not None and len(head) < len(candidates):
            warn_if_head_fills_mask(plan.k, len(head), plan.n_trainable)
        return ranked_mask(scores, plan.k, candidates, head)

    def _embed(self, gradients: PerSampleGradients, mask_indices: Tensor) -> Embedded:
        """Step 3: the pool's embeddings, F̄, and what is known of the labelled
        samples.
        """
        components = self._components(gradients, mask_indices)
        with self.processes.together():
            embedded = self._embed_own(gradients, mask_indices, components)
        for matrix in (embedded.pool_information, embedded.labeled_information):
            if matrix is not None:
                self.processes.add(matrix)
        return embedded

    def _embed_own(
        self,
        gradients: PerSampleGradients,
        mask_indices: Tensor,
        components: Tensor | None,
    ) -> Embedded:
        """The same of the samples that this process holds: its part of all means."""
        k = len(mask_indices) if components is None else components.shape[1]
        rows: Tensor | None = (
            None  # of the labelled samples, where matrices would cost more
        )
        labeled_mean, total, embeddings = None, None, torch.empty(0)
        n_labeled, start = self.labeled_shard.total, 0
        with self._progress("embeddings", self.n_pool + self.n_labeled) as advance:

            def embedded(dataset: Dataset | None) -> Iterator[Tensor]:
                for v in self._embedded_batches(
                    gradients, dataset, mask_indices, advance
                ):
                    yield v if components is None else v @ components

            if n_labeled:
                parts = embedded(self.labeled)
                first = next(parts)
                if self._in_rows(first.shape[1], k):
                    rows = torch.cat([first, *parts])
                else:
                    total = torch.zeros(
                        k, k, dtype=torch.float64, device=mask_indices.device
                    )
                    for v in chain([first], parts):
                        total += information(
                            v.double()
                        )  # M_∅ is inverted: rounding must stay far below λ
                    labeled_mean = total / n_labeled
            for v in embedded(self.pool):
                if start == 0:
                    needed = self._needs_of(k, v.shape[1], v.itemsize)
                    embeddings = self.budget.empty(
                        (self._n_stored, *v.shape[1:]), v.dtype, needed
                    )
                    if total is None and not self._in_rows(v.shape[1], k):
                        total = torch.zeros(
                            k, k, dtype=torch.float64, device=mask_indices.device
                        )
                if total is not None:
                    total += information(v)
                self._store(v, embeddings, start)
                start += len(v)
        if total is not None:
            total /= self.pool_shard.total + n_labeled
        return Embedded(embeddings, total, labeled_mean, rows)

    def _store(self, v: Tensor, embeddings: Tensor, start: int) -> None:
        """Keep the embeddings of samples start, start + 1, …: of those that may be
        picked.
        """
        if self.proposed is None:
            embeddings[start : start + len(v)] = v
            return
        first, last = np.searchsorted(self.proposed, [start, start + len(v)])
        chosen = torch.as_tensor(self.proposed[first:last] - start, device=v.device)
        embeddings[first:last] = v[chosen].to(embeddings.device)

    def _positions_in_pool(self, picks: Tensor) -> Tensor:
        """Picks, counted among those that may be picked, as positions in the whole
        pool.
        """
        if self.proposed is None:
            return picks
        positions = self.pool_shard.start + torch.as_tensor(self.proposed)
        return self.shard.take(picks, lambda own: positions[own])

    def _in_rows(self, n_rows: int, k: int) -> bool:
        """Whether the selection works on the embeddings of all samples, and no k×k
        matrix is made.
        """
        has_all = self.processes.size == 1 and self.proposed is None
        return has_all and uses_rows(self.n_pool + self.n_labeled, n_rows, k)

    def _components(
        self, gradients: PerSampleGradients, mask_indices: Tensor
    ) -> Tensor | None:
        """The leading principal directions (k, n_components) of the drawn samples'
        information, or None for all.
        """
        n_components = self.params.n_components
        if n_components is None or n_components >= len(mask_indices):
            return None
        of_pool, of_labeled, _ = self._drawn
        parts = []
        for dataset, positions in ((self.pool, of_pool), (self.labeled, of_labeled)):
            with self.processes.together():
                own = [
                    self._embeddings(gradients, batch, mask_indices).flatten(0, 1)
                    for batch in self._batches(dataset, positions)
                ] or [self._none_of(gradients, mask_indices).flatten(0, 1)]
            parts.append(self.processes.concatenated(torch.cat(own)))
        rows = torch.cat(parts)
        seed = self.rng.randint(2**31 - 1)
        n_components = min(n_components, len(rows))

        def directions() -> list[Tensor]:
            _, _, found = randomized_svd(
                rows.cpu().numpy(), n_components, random_state=seed
            )
            return [torch.as_tensor(found.T.copy()).to(rows)]

        return self.shard.from_first(
            directions, rows.new_empty(rows.shape[1], n_components)
        )[0]

    def _embeddings(
        self, gradients: PerSampleGradients, batch: Any, mask_indices: Tensor
    ) -> Tensor:
        params = self.params
        return gradients.embeddings(
            batch,
            mask_indices,
            params.weighting,
            reduced=True,
            n_top_classes=params.n_top_classes,
        )

    def _embedded_batches(
        self,
        gradients: PerSampleGradients,
        dataset: Dataset | None,
        mask_indices: Tensor,
        advance: Callable[[int], object],
    ) -> Iterator[Tensor]:
        name, expected = (
            ("X_pool", self.n_pool)
            if dataset is self.pool
            else ("X_labeled", self.n_labeled)
        )
        if dataset is None:
            yield self._none_of(gradients, mask_indices)
            return
        done = 0
        for batch in self.fitted.batches(dataset, self.params.batch_size):
            v = self._embeddings(gradients, batch, mask_indices)
            finite = torch.isfinite(v).flatten(1).all(1)
            if not bool(finite.all()):
                raise ValueError(
                    f"The gradients of sample {done + int(finite.int().argmin())} of "
                    f"{name} hold NaN or infinite values: the sample does, or the "
                    "net's outputs on it; drop it, or scale the samples."
                )
            done += len(v)
            advance(len(v))
            yield v
        if done != expected:
            raise ValueError(
                f"The net's iterator gave {done} of the {expected} samples of {name}; "
                "set iterator_valid__drop_last=False."
            )

    def _none_of(self, gradients: PerSampleGradients, mask_indices: Tensor) -> Tensor:
        """Embeddings of no samples."""
        return self._embeddings(gradients, self._shared_example[0], mask_indices)[:0]

    @cached_property
    def _drawn(self) -> tuple[list[int], list[int], int]:
        """The pool's and the labelled samples here that rank the weights, and how many
        do so everywhere.
        """
        n_pool = self.pool_shard.total
        n = n_pool + self.labeled_shard.total
        n_drawn = min(n, self.params.n_mask_samples)
        drawn = torch.arange(n_drawn)
        if n_drawn < n:
            drawn = torch.as_tensor(np.sort(self.rng.choice(n, n_drawn, replace=False)))
        of_labeled = self.labeled_shard.own(drawn[drawn >= n_pool] - n_pool)
        return (
            self.pool_shard.own(drawn[drawn < n_pool]).tolist(),
            of_labeled.tolist(),
            n_drawn,
        )

    def _batches(self, dataset: Dataset | None, positions: list[int]) -> Iterator[Any]:
        if dataset is None or not positions:
            return iter(())
        return self.fitted.batches(dataset, self.params.batch_size, positions)

    def _layout(self, example: Any, n_outputs: int) -> Layout:
        return find_layout(
            self.fitted.module,
            lambda: self.fitted.outputs(example),
            n_outputs,
            self.params.head,
        )

    def _choose_at_random(self, tied: Tensor) -> Tensor:
        return tied[self.rng.randint(len(tied))]

    def _n_steps(self) -> int:
        n_elsewhere = self.shard.total - self.shard.n
        n_picks = min(
            ceil(self.params.oversample * self.n_instances),
            self._n_stored + n_elsewhere,
        )
        return n_picks + n_picks - self.n_instances

    @property
    def _n_stored(self) -> int:
        """How many samples here have their embeddings kept: those that may be
        picked.
        """
        return self.n_pool if self.proposed is None else len(self.proposed)

    def needs(self, k: int, n_rows: int) -> Needs:
        """What the query holds, with so many weights in the mask."""
        itemsize = max(
            4, *(p.itemsize for p in self.fitted.module.parameters() if p.requires_grad)
        )
        n_components = min(self.params.n_components or k, k)
        needed = self._needs_of(n_components, n_rows, itemsize)
        if n_components == k:
            return needed
        n_drawn = min(self.n_pool + self.n_labeled, self.params.n_mask_samples)
        return needed._replace(
            matrices=needed.matrices + 2 * n_drawn * n_rows * k * itemsize
        )

    def _needs_of(self, k: int, n_rows: int, itemsize: int) -> Needs:
        in_rows = self._in_rows(n_rows, k)
        return needs(
            self._n_stored,
            self.n_labeled,
            n_rows,
            k,
            itemsize,
            self._n_steps(),
            in_rows,
        )

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        self.processes.enter(step)
        start = perf_counter()
        yield
        self.timings[step] = perf_counter() - start
        logger.debug("%s: %.3f s", step, self.timings[step])

    @contextmanager
    def _progress(self, step: str, total: int) -> Iterator[Callable[[int], object]]:
        silent = not self.params.verbose or self.processes.rank > 0
        with tqdm(total=total, desc=step, disable=silent, leave=False) as bar:
            yield bar.update


def _positions(slices: dict[str, slice], names: list[str]) -> Tensor:
    return torch.cat(
        [torch.arange(slices[name].start, slices[name].stop) for name in names]
    )
