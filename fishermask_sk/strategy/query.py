"""The steps of one query, from the fitted net to the picks: mask, embeddings,
selection.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import chain
from math import ceil
from numbers import Integral
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fishermask_sk._warnings import warn_user
from fishermask_sk.distributed import ALONE, Processes, Shard
from fishermask_sk.gradients.generic import samples as some_samples
from fishermask_sk.gradients.layers import Layout, candidate_names, find_layout
from fishermask_sk.gradients.per_sample import PerSampleGradients
from fishermask_sk.gradients.verification import ONE_BY_ONE
from fishermask_sk.memory import Budget, Needs, card_of, duration, needs, uses_rows
from fishermask_sk.nets.skorch_adapter import FittedNet
from fishermask_sk.scores.proposals import given_positions, least, margins, seeded
from fishermask_sk.selection.embeddings import DenseEmbeddings, Embeddings
from fishermask_sk.selection.greedy import FLOAT32_DAMPING, select
from fishermask_sk.selection.head_embeddings import (
    HeadEmbeddings,
    HeadMask,
    JoinedEmbeddings,
    head_mask,
    is_worth_it,
)
from fishermask_sk.strategy.cures import fitting_settings
from fishermask_sk.strategy.directions import (
    EXACT,
    MOST,
    SHARE,
    SPARE,
    leading,
    share_held,
)
from fishermask_sk.strategy.masks import (
    custom_mask,
    n_kept,
    per_layer_mask,
    ranked_mask,
    warn_if_head_fills_mask,
)
from fishermask_sk.strategy.net_checks import (
    check_candidates,
    check_real,
    check_samples_apart,
    reached_parameters,
    some_of,
)
from fishermask_sk.strategy.settings import Settings

logger = logging.getLogger(__name__)

# Samples that the net is tried on before any expensive work.
EXAMPLES = 8
# The head is a product where it differs from its gradients by no more of the largest
# than so many roundings.
PRODUCT_TOLERANCE = 2**12
# Of these, those with a graph of all layers.
GRAPHED = 2
# And of the pool, of the labelled ones and of the target each, on which the ways to its
# gradients are.
TRIED = 4
# After so many seconds of gradients their pace is known, and so many in all are long.
PACE_SECONDS, LONG_SECONDS = 10.0, 600.0


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


class Samples(NamedTuple):
    """Samples of one kind that this process holds, their place among those of all
    processes, and their weights (n,) in means where these differ.
    """

    name: str
    dataset: Any  # a Dataset, or None where there are none here
    n: int
    shard: Shard
    weights: Tensor | None = None


class Drawn(NamedTuple):
    """Samples of each kind here that a mean is over, by position, with their weights,
    and the sum of the weights of all that were drawn anywhere.
    """

    parts: list[tuple[Samples, list[int]]]
    weights: Tensor | None
    total_weight: float

    @property
    def n_own(self) -> int:
        """How many there are here."""
        return sum(len(positions) for _, positions in self.parts)


class Embedded(NamedTuple):
    """What the selection is given: matrices, or the embeddings of those that they are
    sums of where these cost less.
    """

    pool: Embeddings
    pool_information: Tensor | None
    labeled_information: Tensor | None
    labeled: Embeddings | None
    information: Embeddings | None


class Query:
    """One query: what `select` was given, and the steps from the mask to the picks.

    Of several processes each has a Query of its own, with the samples that it holds,
    and all take the same steps.
    """

    def __init__(
        self,
        params: Settings,
        fitted: FittedNet,
        pool: Dataset[Any] | None,
        labeled: Dataset[Any] | None,
        n_pool: int,
        n_labeled: int,
        n_instances: int,
        processes: Processes = ALONE,
        target: tuple[Dataset[Any] | None, int] | None = None,
        target_weight: np.ndarray | None = None,
        warn: Callable[..., None] | None = None,
    ) -> None:
        self.params, self.fitted, self.processes = params, fitted, processes
        self.warn = warn or (lambda message, about=None: warn_user(message))
        self.n_pool, self.n_labeled, self.n_instances = n_pool, n_labeled, n_instances
        weights = None
        if target_weight is not None:
            weights = torch.as_tensor(target_weight, device="cpu")
        self.pool = Samples("X_pool", pool, n_pool, processes.shard(n_pool))
        self.labeled = Samples(
            "X_labeled", labeled, n_labeled, processes.shard(n_labeled)
        )
        self.target = target and Samples(
            "X_target", *target, processes.shard(target[1]), weights
        )
        self.head: tuple[str, ...] = ()  # names of the head's parameters
        self.labeled_weight = 1.0  # of each labelled sample in means
        self.averaged = self._averaged(weights)
        self.proposed: np.ndarray | None = None
        self.n_candidates: int | None = None
        self.shard = self.pool.shard
        seed = params.random_state
        rng = np.random.RandomState() if seed is None else check_random_state(seed)
        self.rng = processes.object_of(0, rng)
        self.timings: dict[str, float] = {}
        self._said = False
        self.n_components: int | None = None  # directions, once they are found
        machine, card = socket.gethostname(), card_of(self.device)
        all_places = processes.objects((machine, card))
        n_beside = sum(each == machine for each, _ in all_places)
        n_on_card = all_places.count((machine, card))
        self.budget = Budget(params.max_memory, self.device, n_beside, n_on_card)

    def _averaged(self, weights: Tensor | None) -> list[Samples]:
        """What F̄ and the scores are means over: the target where there is one, else
        pool and labelled samples, of whom each counts as the mean of the pool.
        """
        if self.target is not None:
            return [self.target]
        if weights is None:
            return [self.pool, self.labeled]
        total = sum(self.processes.objects(float(weights.sum())))
        self.labeled_weight = total / self.pool.shard.total
        of_labeled = torch.full(
            (self.n_labeled,), self.labeled_weight, dtype=torch.float64, device="cpu"
        )
        return [
            self.pool._replace(weights=weights),
            self.labeled._replace(weights=of_labeled),
        ]

    def propose(self, candidates: Any, estimator: Any, X_pool: Any) -> None:
        """Note which samples may be picked: None for all, a multiple of `n_instances`,
        positions, or a callable that gives them.
        """
        if candidates is None:
            return
        if isinstance(candidates, Integral):
            n = min(int(candidates) * self.n_instances, self.pool.shard.total)
            self.n_candidates = n if n < self.pool.shard.total else None
            return
        with self.processes.together():
            if callable(candidates):
                proposal = seeded(candidates, self.rng, self.processes.rank)
                candidates = proposal(estimator, X_pool) if self.n_pool else []
            proposed = given_positions(candidates, self.n_pool)
        n_proposed = sum(self.processes.objects(len(proposed)))
        if self.n_instances > n_proposed:
            raise ValueError(
                f"n_instances={self.n_instances} exceeds the {n_proposed} candidates; "
                "lower n_instances, or propose more."
            )
        self._set_proposed(proposed)

    def _set_proposed(self, proposed: np.ndarray) -> None:
        self.proposed, self.shard = proposed, self.processes.shard(len(proposed))

    def _propose_most_uncertain(self, n: int) -> None:
        """Let the n samples of all processes be picked whose margin is smallest."""
        with (
            self.processes.together(),
            torch.no_grad(),
            self._progress("candidates", self.n_pool) as advance,
        ):

            def logits() -> Iterator[Tensor]:
                for batch in self._batches(self.pool):
                    yield (found := self.fitted.logits(batch))
                    advance(len(found))

            own = margins(logits())
            _check_complete(len(own), self.pool)
            broken = (~own.isfinite()).nonzero()[:, 0]
            if len(broken):
                raise ValueError(
                    f"The net's outputs on sample {int(broken[0])} of X_pool hold NaN "
                    "or infinite values; drop the sample, or scale the samples."
                )
        chosen = least(self.processes.concatenated(own), n)
        self._set_proposed(self.pool.shard.own(chosen).numpy())

    @property
    def device(self) -> torch.device:
        """Where the module's weights are."""
        return next(self.fitted.module.parameters()).device

    def run(self, random_tie_break: bool) -> dict[str, Any]:
        """All steps in turn; what `FisherMask` learns from them."""
        with self._timed("mask"):
            plan, mask_indices = self._find_mask()
        gradients = plan.gradients
        if self.n_candidates is not None:
            with self._timed("candidates"):
                self._propose_most_uncertain(self.n_candidates)
        gradients.memory.n_bytes = self._beside_embeddings(plan, len(mask_indices))
        with self._timed("embeddings"):
            embedded = self._embed(gradients, mask_indices, plan.n_rows)
        with (
            self._timed("selection"),
            self._picking() as on_pick,
        ):
            picks = select(
                embedded.pool,
                embedded.pool_information,
                self.n_instances,
                labeled_information=embedded.labeled_information,
                labeled_embeddings=embedded.labeled,
                information_embeddings=embedded.information,
                n_labeled=self.labeled.shard.total,
                damping=float(self.params.damping),
                oversample=float(self.params.oversample),
                choose=self._choose_at_random if random_tie_break else None,
                draw=self._choose_at_random,
                on_pick=on_pick,
                overwrite=True,
                shard=self.shard,
            )
        self._say_what_is_slow(plan)
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
            "n_components_": self.n_components or len(positions),
            "timings_": self.timings,
            "check_seconds_": gradients.check_seconds,
        }

    def plan(self, within: int | None = None) -> Plan:
        """What the net is, tried on a few samples (of the first `within`, or of all),
        and what a mask may touch.
        """
        example, n_example = self._shared_example
        with self.processes.together():
            if self.n_pool and self.pool.shard.start:
                self.fitted.check_outputs(self._example(self.pool))
            return self._plan(example, n_example, within)

    @cached_property
    def _shared_example(self) -> tuple[Any, int]:
        """The first samples of all, and how many: for the same layout everywhere, and
        for processes without any.
        """
        source = self.pool.shard.owner(0)
        with self.processes.together():
            own = self._example(self.pool) if self.processes.rank == source else None
        example, n, self.fitted.meaning = self.processes.object_of(
            source, (own, min(EXAMPLES, self.n_pool), self.fitted.meaning)
        )
        return example, n

    def _plan(self, example: Any, n_example: int, within: int | None) -> Plan:
        params, fitted = self.params, self.fitted
        n_outputs = fitted.check_outputs(example)
        check_samples_apart(fitted, example, n_example)
        for samples in (self.labeled, self.target):
            if samples is not None and samples.n:
                fitted.check_outputs(self._example(samples))
        trainable = [
            name for name, p in fitted.module.named_parameters() if p.requires_grad
        ]
        if not trainable:
            raise ValueError(
                "All weights of the net are frozen; FisherMask needs some with "
                "requires_grad=True."
            )
        few = some_samples(example, slice(GRAPHED))
        reached = reached_parameters(fitted, few, trainable)
        layout = self._layout(few, n_outputs)
        self.head = layout.head
        names = candidate_names(params.layers, layout, trainable)
        check_candidates(params.layers, names, reached)
        check_real(fitted.module, names)
        gradients = self._gradients(names, example, within)
        n_trainable = sum(gradients.parameters[name].numel() for name in trainable)
        k = n_kept(params.sparsity, n_trainable)
        candidates = _positions(gradients.slices, names).to(self.device)
        n_classes = max(2, n_outputs)  # one logit is two classes
        n_rows = min(n_classes, params.n_top_classes or n_classes) - 1
        return Plan(
            gradients, layout, names, candidates, k, n_trainable, n_classes, n_rows
        )

    def _gradients(
        self, names: list[str], example: Any, within: int | None
    ) -> PerSampleGradients:
        """Gradients whose ways were tried on samples from all over what is here."""
        module = self.fitted.module
        n_bytes = sum(p.numel() * p.itemsize for p in module.parameters())
        drawn = [
            self._drawn_example(samples, min(samples.n, within or samples.n))
            for samples in (self.pool, self.labeled, self.target)
            if samples is not None and samples.n
        ]
        gradients = PerSampleGradients(
            module,
            self.fitted.logits,
            drawn.pop(0) if drawn else example,
            names,
            self.budget.beside(3 * n_bytes),  # as it was found, and scores twice
        )
        for batch in drawn:
            gradients.verify(batch)
        return gradients

    def _drawn_example(self, samples: Samples, within: int) -> Any:
        """A few samples, by a generator of its own: `random_state` is left alone."""
        n = min(TRIED, within)
        drawn = np.random.default_rng(0).choice(within, n, replace=False)
        batches = self.fitted.batches(samples.dataset, n, np.sort(drawn).tolist())
        return next(batches)

    def _beside_embeddings(self, plan: Plan, k: int) -> int | None:
        """What a batch may take while embeddings are collected: they and sums of them
        are held, and the module's numbers twice.
        """
        needed = self.needs(k, plan.n_rows)
        n_bytes = sum(p.numel() * p.itemsize for p in self.fitted.module.parameters())
        in_memory = self.budget.holds(needed)
        return self.budget.beside(
            n_bytes + 2 * 8 * k**2 + (needed.embeddings if in_memory else 0)
        )

    def _say_what_is_slow(self, plan: Plan) -> None:
        """Warn, once, where gradients are taken one sample at a time, and why."""
        ways, reasons = plan.gradients.ways(), plan.gradients.reasons
        slow = [name for name in plan.names if ways[name] == ONE_BY_ONE]
        if slow and not self._said and self.processes.rank == 0:
            self._said = True
            n_weights = sum(plan.gradients.parameters[name].numel() for name in slow)
            warn_user(
                f"The gradients of {n_weights:,} weights ({some_of(slow)}) take a "
                "backward pass for every sample and class, which is slow: "
                f"{reasons[slow[0]]}. layers= can leave them out."
            )

    def _find_mask(self) -> tuple[Plan, Tensor]:
        """Steps 1 and 2: diagonal Fisher information, and the positions that are
        kept.
        """
        plan = self.plan()
        self._say_what_is_slow(plan)
        k = min(plan.k, len(plan.candidates))
        with self.processes.together():
            self.check_memory(k, plan.n_rows)
        if self.params.mask == "random":
            scores = torch.as_tensor(
                self.rng.uniform(size=plan.gradients.n_parameters),
                device=plan.candidates.device,
            )
        elif names := self.ranked(plan):
            scores = self._diagonal_fisher(plan, names)
        else:
            _ = self._drawn  # what is drawn after it stays the same
            scores = torch.zeros(plan.gradients.n_parameters, device=self.device)
        with self.processes.together():
            own = self.mask(plan, scores).cpu() if self.processes.rank == 0 else None
        mask_indices = self.processes.object_of(0, own).to(scores.device)
        with self.processes.together():
            self.check_memory(len(mask_indices), plan.n_rows)
        return plan, mask_indices

    def _example(self, samples: Samples) -> Any:
        """The first samples, for checks that read no more."""
        first = range(min(EXAMPLES, samples.n))
        return next(self.fitted.batches(samples.dataset, EXAMPLES, first))

    def ranked(self, plan: Plan) -> list[str]:
        """The parameters whose scores decide the mask: none where no choice is left."""
        if self.params.mask != "fisher":
            return plan.names
        sizes = {name: p.numel() for name, p in plan.gradients.parameters.items()}
        in_head = [name for name in plan.names if name in plan.layout.head]
        n_head = sum(sizes[name] for name in in_head) if self.params.keep_head else 0
        if plan.k == n_head or plan.k >= len(plan.candidates):
            return []
        return in_head if n_head > plan.k else plan.names

    def _diagonal_fisher(self, plan: Plan, names: list[str]) -> Tensor:
        """Step 1 for the weights that a mask may touch, over samples drawn from those
        that F̄ is a mean over.
        """
        drawn = _weighty(self._drawn, "n_mask_samples")
        with self.processes.together(), self._progress("mask", drawn.n_own) as advance:
            mean = plan.gradients.diagonal_fisher(
                chain.from_iterable(self._batches(*part) for part in drawn.parts),
                advance,
                names=names,
                n_top_classes=self.params.n_top_classes,
                weights=drawn.weights,
            )
        own = drawn.n_own if drawn.weights is None else float(drawn.weights.sum())
        scores = self.processes.add(mean * (own / drawn.total_weight))
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
            warn_if_head_fills_mask(plan.k, len(head), plan.n_trainable, self.warn)
        return ranked_mask(scores, plan.k, candidates, head)

    def _embed(
        self, gradients: PerSampleGradients, mask_indices: Tensor, n_rows: int
    ) -> Embedded:
        """Step 3: the candidates' embeddings, F̄, and what is known of the labelled
        samples.
        """
        components = self._components(gradients, mask_indices, n_rows)
        drawn = self._drawn_for_information()

        def dense(batch: Any) -> DenseEmbeddings:
            v = self._embeddings(gradients, batch, mask_indices)
            return DenseEmbeddings(v if components is None else v @ components)

        product = None
        if components is None:
            product = self._as_product(gradients, mask_indices, n_rows)
        with self.processes.together():
            try:
                embedded = self._embed_own(product or dense, n_rows, drawn)
            except _NoProductError:
                if self.processes.size > 1:
                    raise
                logger.info("The head is no product on every batch: taken as it is.")
                embedded = self._embed_own(dense, n_rows, drawn)
        for matrix in (embedded.pool_information, embedded.labeled_information):
            if matrix is not None:
                self.processes.add(matrix)
        return embedded

    def _as_product(
        self, gradients: PerSampleGradients, mask_indices: Tensor, n_rows: int
    ) -> Callable[[Any], Embeddings] | None:
        """What embeds a batch with the head as a product, where the head is one on
        drawn samples and this takes fewer multiplications.
        """
        head = self._head_in(gradients, mask_indices, n_rows)
        if head is None:
            return None
        names, in_head, mask = head
        rest = mask_indices[~in_head]
        places = in_head.nonzero()[:, 0], (~in_head).nonzero()[:, 0]
        uses_bias = bool(
            (mask.columns == gradients.parameters[names[0]].shape[1]).any()
        )

        def embedded(batch: Any) -> Embeddings:
            factors = gradients.head_factors(
                batch,
                names,
                self.params.weighting,
                n_top_classes=self.params.n_top_classes,
            )
            if factors is None:
                raise _NoProductError
            r, h = factors
            if uses_bias:
                h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
            of_head = HeadEmbeddings(r, h, mask)
            if not len(rest):
                return of_head
            of_rest = DenseEmbeddings(self._embeddings(gradients, batch, rest))
            return JoinedEmbeddings(of_head, of_rest, *places)

        with self.processes.together():
            batch = self._shared_example[0]
            try:
                found = embedded(batch)
                every = torch.arange(found.n, device=found.device)
                one, other = (
                    found.rows(every),
                    self._embeddings(gradients, batch, mask_indices),
                )
                size = PRODUCT_TOLERANCE * torch.finfo(other.dtype).eps
                same = bool((one - other).abs().max() <= size * other.abs().max())
            except _NoProductError:
                same = False
        return embedded if all(self.processes.objects(same)) else None

    def _head_in(
        self, gradients: PerSampleGradients, mask_indices: Tensor, n_rows: int
    ) -> tuple[list[str], Tensor, HeadMask] | None:
        """Names of the head's masked parameters, which masked weights they are, and
        what these are of the head; None where a product would not pay.
        """
        slices, head = gradients.slices, self.head
        weights = [n for n in head if gradients.parameters[n].ndim == 2]
        biases = [n for n in head if gradients.parameters[n].ndim == 1]
        if len(weights) != 1 or len(biases) > 1:
            return None
        n_classes, d = gradients.parameters[weights[0]].shape
        bias = slices[biases[0]] if biases else None
        in_head, mask = head_mask(mask_indices, slices[weights[0]], bias, d)
        k = len(mask.classes)
        trainable = all(gradients.parameters[n].requires_grad for n in head)
        if not trainable or not is_worth_it(k, n_rows, n_classes, d + 1):
            return None
        return weights + biases, in_head, mask

    def _embed_own(
        self, embed: Callable[[Any], Embeddings], n_rows: int, drawn: Drawn
    ) -> Embedded:
        """The same of the samples that this process holds: its part of all means."""
        none = embed(self._shared_example[0]).part(slice(0, 0))
        k = none.k
        in_rows = self._in_rows(n_rows, k)
        total: Tensor | None = None
        known: Tensor | None = None
        rows: list[Embeddings] = []  # of the labelled samples, for the kernel
        averaged: list[Embeddings] = []  # of what F̄ is a mean over, likewise
        if not in_rows:
            total = torch.zeros(k, k, dtype=torch.float64, device=none.device)
        whole = self._passes_are_the_mean
        dtype = self._sum_dtype(none.dtype)
        total_embedded = self.n_embedded(drawn.n_own)
        with self._progress("embeddings", total_embedded) as progress:
            advance = self._paced(progress, total_embedded, n_rows)

            def embedded(
                samples: Samples, positions: list[int] | None = None
            ) -> Iterator[Embeddings]:
                return self._embedded_batches(embed, none, samples, advance, positions)

            def average(v: Embeddings, weights: Tensor | None) -> None:
                if weights is not None:
                    v = v.scaled(weights.sqrt())
                if total is not None:
                    total.add_(v.information(dtype))
                elif not self._shares_rows:
                    averaged.append(v)

            if self.labeled.shard.total:
                for v in embedded(self.labeled):
                    if in_rows:
                        rows.append(v)
                    else:  # M_∅ is inverted: rounding must stay far below λ
                        of_batch = v.information()
                        known = of_batch if known is None else known.add_(of_batch)
                if whole and known is not None and total is not None:
                    total.add_(known, alpha=self.labeled_weight)
                elif whole:
                    for v in rows:
                        average(v, _equal(self.labeled_weight, v.n))
            if not whole:
                for part, weights in self._weighted_parts(drawn):
                    start = 0
                    for v in embedded(*part):
                        own = None if weights is None else weights[start:][: v.n]
                        average(v, own)
                        start += v.n
            stored, start = none, 0
            positions = None if whole or self.proposed is None else self.proposed
            for v in embedded(
                self.pool, None if positions is None else positions.tolist()
            ):
                if start == 0:
                    stored = self._room_for(v)
                if whole:
                    weights = self.averaged[0].weights
                    average(v, None if weights is None else weights[start:][: v.n])
                for to, tensor in zip(stored.tensors, v.tensors, strict=True):
                    if positions is None:
                        self._store(tensor, to, start)
                    else:
                        to[start : start + v.n] = tensor
                start += v.n
        if total is not None:
            total /= drawn.total_weight
        if known is not None:
            known /= self.labeled.shard.total
        scaled = _joined(averaged)
        if scaled is not None:
            share = _equal(1 / drawn.total_weight, scaled.n)
            scaled = scaled.scaled(share.sqrt())
        return Embedded(stored, total, known, _joined(rows), scaled)

    def _room_for(self, v: Embeddings) -> Embeddings:
        """Room for what is stored of the candidates."""
        needed = self._needs_of(v.k, v.c, v.dtype.itemsize)
        per_sample = sum(tensor[:1].nbytes for tensor in v.tensors)
        needed = needed._replace(embeddings=self.n_stored * per_sample)
        return v.of(
            [
                self.budget.empty((self.n_stored, *t.shape[1:]), t.dtype, needed)
                for t in v.tensors
            ]
        )

    def _store(self, v: Tensor, embeddings: Tensor, start: int) -> None:
        """Keep what is stored of samples start, start + 1, …: of those that may be
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
        positions = self.pool.shard.start + torch.as_tensor(self.proposed, device="cpu")
        return self.shard.take(picks, lambda own: positions[own])

    def n_embedded(self, n_information: int) -> int:
        """How many samples here have their gradients taken for the selection, where F̄
        is a mean over so many.
        """
        if self._passes_are_the_mean:
            return self.n_labeled + self.n_pool
        return self.n_labeled + self.n_stored + n_information

    @property
    def _passes_are_the_mean(self) -> bool:
        """Whether F̄ is a mean over all of pool and labelled samples, who are embedded
        one after the other anyway.
        """
        return self.target is None and self.n_information is None

    @property
    def _shares_rows(self) -> bool:
        """Whether F̄ is a plain mean over samples whose embeddings are all kept."""
        weighted = any(samples.weights is not None for samples in self.averaged)
        all_kept = self.n_candidates is None and self.proposed is None
        return self._passes_are_the_mean and all_kept and not weighted

    @property
    def n_information(self) -> int | None:
        """How many samples F̄ is a mean over, where not over all."""
        n, n_all = self.params.n_information_samples, self.n_averaged
        return None if n is None or n >= n_all else n

    @property
    def n_averaged(self) -> int:
        """How many samples there are that F̄ is a mean over."""
        return sum(samples.shard.total for samples in self.averaged)

    @property
    def _n_more_rows(self) -> int:
        """Samples whose rows are kept for F̄ alone, where matrices would cost more."""
        return 0 if self._shares_rows else self.n_information or self.n_averaged

    def _in_rows(self, n_rows: int, k: int) -> bool:
        """Whether the selection works on the embeddings of all samples, and no k×k
        matrix is made.
        """
        n_samples = self.n_stored + self.n_labeled + self._n_more_rows
        return self.processes.size == 1 and uses_rows(n_samples, n_rows, k)

    def n_directions(self, k: int, n_rows: int) -> int:
        """In how many directions of k weights the selection works, at most."""
        n = self.params.n_components
        if n == "auto":
            kinds = (self.pool, self.labeled, *self.averaged)
            n_samples = sum({each.name: each.shard.total for each in kinds}.values())
            few = n_samples * n_rows <= MOST  # who span no more directions than that
            return k if k <= EXACT or few else MOST
        return k if n is None else min(int(n), k)

    def _components(
        self, gradients: PerSampleGradients, mask_indices: Tensor, n_rows: int
    ) -> Tensor | None:
        """The leading principal directions (k, n_components) of the drawn samples'
        information, or None for all.
        """
        k = len(mask_indices)
        n = self.n_directions(k, n_rows)
        if n == k:
            return None
        auto = self.params.n_components == "auto"
        measures = np.zeros(self.n_averaged, dtype=bool)
        if auto:  # an eighth of them tells what the others' directions hold
            measures = self.rng.random_sample(self.n_averaged) < 1 / 8

        def dense(batch: Any) -> DenseEmbeddings:
            return DenseEmbeddings(self._embeddings(gradients, batch, mask_indices))

        nothing = DenseEmbeddings(self._none_of(gradients, mask_indices))

        def rows(of_measuring: bool) -> Iterator[Tensor]:
            yield self._none_of(gradients, mask_indices).flatten(0, 1)
            start = 0
            for (samples, positions), weights in self._weighted_parts(self._drawn):
                first = start + samples.shard.start
                chosen = measures[first + np.asarray(positions, int)] == of_measuring
                start += samples.shard.total
                here = np.asarray(positions, int)[chosen].tolist()
                of_own = None if weights is None else weights[chosen]
                done = 0
                for each in self._embedded_batches(
                    dense, nothing, samples, lambda n: None, here
                ):
                    v = each.tensors[0]
                    if of_own is not None:
                        v *= of_own[done : done + len(v)].to(v).sqrt()[:, None, None]
                    done += len(v)
                    yield v.flatten(0, 1)

        def times(basis: Tensor) -> Tensor:
            with self.processes.together():
                image = torch.zeros_like(basis)
                for v in rows(of_measuring=False):
                    image += v.T @ (v @ basis)
            return self.processes.add(image)

        n_start = min(n + SPARE, k)
        start = self.rng.standard_normal((k, n_start))
        like = self._none_of(gradients, mask_indices)
        found = leading(times, torch.as_tensor(start, device="cpu").to(like), n)

        def directions() -> list[Tensor]:
            missing = found.new_zeros(k, n - found.shape[1])
            return [torch.cat([found, missing], dim=1)]

        basis = self.shard.from_first(directions, found.new_empty(k, n))[0]
        # Samples without any information leave one direction, as good as any.
        basis = basis[:, basis.any(0)] if basis.any() else torch.eye(k, 1).to(basis)
        if auto:
            parts, total = basis.new_zeros(basis.shape[1]), basis.new_zeros(1)
            with self.processes.together():
                for v in rows(of_measuring=True):
                    parts += (v @ basis).square().sum(0)
                    total += v.square().sum()
            parts, total = self.processes.add(parts), self.processes.add(total)
            n, share = share_held(parts, float(total), SHARE)
            basis = basis[:, :n]
            if self.processes.rank == 0:
                self.warn(
                    f"The mask has {k} weights, more than the {EXACT} that are used "
                    f"exactly by default: the selection works in their {n} leading "
                    f"directions, which hold {100 * share:.4g} % of the information's "
                    "trace on samples that did not find them. Lower sparsity, set "
                    "n_components to keep so many, or n_components=None to keep all, "
                    "where memory allows."
                )
        self.n_components = basis.shape[1]
        return basis

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
        embed: Callable[[Any], Embeddings],
        none: Embeddings,
        samples: Samples,
        advance: Callable[[int], object],
        positions: list[int] | None = None,
    ) -> Iterator[Embeddings]:
        """Embeddings of all these samples, or of those at some positions."""
        if samples.dataset is None or positions == []:
            yield none
            return
        done = 0
        for batch in self._batches(samples, positions):
            v = embed(batch)
            finite = torch.stack([t.isfinite().flatten(1).all(1) for t in v.tensors])
            finite = finite.all(0)
            if not bool(finite.all()):
                i = done + int(finite.int().argmin())
                raise ValueError(
                    "The gradients of sample "
                    f"{i if positions is None else positions[i]} of {samples.name} "
                    "hold NaN or infinite values: the sample does, or the net's "
                    "outputs on it; drop it, or scale the samples."
                )
            done += v.n
            advance(v.n)
            yield v
        _check_complete(done, samples, positions)

    def _none_of(self, gradients: PerSampleGradients, mask_indices: Tensor) -> Tensor:
        """Embeddings of no samples."""
        return self._embeddings(gradients, self._shared_example[0], mask_indices)[:0]

    @cached_property
    def _drawn(self) -> Drawn:
        """The samples that rank the weights."""
        return self._draw(self.params.n_mask_samples)

    def _drawn_for_information(self) -> Drawn:
        """The samples that F̄ is a mean over: all, or so many."""
        n = self.n_information or self.n_averaged
        return _weighty(self._draw(n), "n_information_samples")

    def _draw(self, n_wanted: int) -> Drawn:
        """So many of those that F̄ is a mean over, without replacement; all where there
        are no more.
        """
        n = self.n_averaged
        n_drawn = min(n, n_wanted)
        drawn = torch.arange(n_drawn, device="cpu")
        if n_drawn < n:
            chosen = np.sort(self.rng.choice(n, n_drawn, replace=False))
            drawn = torch.as_tensor(chosen, device="cpu")
        parts, weights, start = [], [], 0
        for samples in self.averaged:
            end = start + samples.shard.total
            here = drawn[(drawn >= start) & (drawn < end)] - start
            own = samples.shard.own(here)
            parts.append((samples, own.tolist()))
            if samples.weights is not None:
                weights.append(samples.weights[own])
            start = end
        if not weights:
            return Drawn(parts, None, n_drawn)
        of_drawn = torch.cat(weights)
        total = sum(self.processes.objects(float(of_drawn.sum())))
        return Drawn(parts, of_drawn, total)

    def _weighted_parts(
        self, drawn: Drawn
    ) -> Iterator[tuple[tuple[Samples, list[int]], Tensor | None]]:
        """The samples of each kind that were drawn, with their weights."""
        for samples, positions in drawn.parts:
            weights = samples.weights
            yield (samples, positions), None if weights is None else weights[positions]

    def _batches(
        self, samples: Samples, positions: list[int] | None = None
    ) -> Iterator[Any]:
        """Batches of all these samples, or of those at some positions."""
        if samples.dataset is None or positions == []:
            return iter(())
        return self.fitted.batches(samples.dataset, self.params.batch_size, positions)

    def _layout(self, example: Any, n_outputs: int) -> Layout:
        return find_layout(
            self.fitted.module,
            lambda: self.fitted.outputs(example),
            n_outputs,
            self.params.head,
        )

    def _choose_at_random(self, tied: Tensor) -> Tensor:
        return tied[self.rng.randint(len(tied))]

    def _sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In what the products of F̄ are: float64 where λ is small."""
        small = float(self.params.damping) < FLOAT32_DAMPING
        return torch.float64 if small else dtype

    def _n_picks(self) -> int:
        n_candidates = self.n_candidates or self.shard.total
        return min(ceil(self.params.oversample * self.n_instances), n_candidates)

    def _n_steps(self) -> int:
        return 2 * self._n_picks() - self.n_instances

    @property
    def _n_reviewed(self) -> int:
        """Picks that a backward pass reviews."""
        n_picks = self._n_picks()
        return n_picks if n_picks > self.n_instances else 0

    @property
    def n_stored(self) -> int:
        """How many samples here have their embeddings kept: those that may be picked,
        or as many as there may be.
        """
        if self.proposed is not None:
            return len(self.proposed)
        return min(self.n_pool, self.n_candidates or self.n_pool)

    def check_memory(self, k: int, n_rows: int) -> None:
        """Refuse what does not fit, with settings that do."""
        cures = partial(
            fitting_settings,
            self.budget,
            self.needs,
            k,
            n_rows,
            self.n_directions(k, n_rows),
            exact_k=self.params.mask in ("fisher", "random"),
        )
        self.budget.check(self.needs(k, n_rows), k, self.n_pool, cures)

    def needs(self, k: int, n_rows: int, n_components: int | None = None) -> Needs:
        """What the query holds, with so many weights in the mask."""
        itemsize = max(
            4, *(p.itemsize for p in self.fitted.module.parameters() if p.requires_grad)
        )
        n = min(n_components or self.n_directions(k, n_rows), k)
        needed = self._needs_of(n, n_rows, itemsize)
        if n == k:
            return needed
        # A basis, its product with F, and their factors.
        return needed._replace(matrices=needed.matrices + 4 * n * k * itemsize)

    def _n_numbers(self, k: int, n_rows: int) -> int:
        """Numbers that are kept of a sample, of a mask that keeps the head first."""
        module = self.fitted.module
        shapes = [p.shape for n, p in module.named_parameters() if n in self.head]
        matrices = [shape for shape in shapes if len(shape) == 2]
        keeps = self.params.keep_head and self.params.mask == "fisher"
        if len(matrices) == 1 and len(shapes) <= 2 and keeps:
            n_classes, d = matrices[0]
            in_head = min(k, sum(shape.numel() for shape in shapes))
            if is_worth_it(in_head, n_rows, n_classes, d + 1):
                return n_rows * n_classes + d + 1 + n_rows * (k - in_head)
        return n_rows * k

    def _needs_of(self, k: int, n_rows: int, itemsize: int) -> Needs:
        in_rows = self._in_rows(n_rows, k)
        needed = needs(
            self.n_stored,
            self.n_labeled,
            n_rows,
            k,
            itemsize,
            self._n_reviewed,
            in_rows,
        )
        stored = self.n_stored * self._n_numbers(k, n_rows) * itemsize
        needed = needed._replace(embeddings=stored)
        if not in_rows:
            return needed
        for_information = 2 * self._n_more_rows * n_rows * k * itemsize
        for_information += 8 * self.n_stored * self._n_more_rows * n_rows**2
        return needed._replace(matrices=needed.matrices + for_information)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        self.processes.enter(step)
        start = perf_counter()
        yield
        self.timings[step] = perf_counter() - start
        logger.info("%s: %.3f s", step, self.timings[step])

    @contextmanager
    def _progress(self, step: str, total: int) -> Iterator[Callable[[int], object]]:
        silent = not self.params.verbose or self.processes.rank > 0
        with tqdm(total=total, desc=step, disable=silent, leave=False) as bar:
            yield bar.update
            bar.update(total - bar.n)  # what turned out not to be needed is done
            bar.refresh()

    @contextmanager
    def _picking(self) -> Iterator[Callable[[], object]]:
        """A bar for what comes before the first pick, which takes longer than any, and
        one for the picks.
        """
        with ExitStack() as bars:
            advance = bars.enter_context(self._progress("set-up", 1))
            n_picked = 0

            def on_pick() -> None:
                nonlocal advance, n_picked
                if not n_picked:
                    bars.close()
                    advance = bars.enter_context(
                        self._progress("picks", self._n_steps())
                    )
                n_picked += 1
                advance(1)

            yield on_pick

    def _paced(
        self, advance: Callable[[int], object], total: int, n_rows: int
    ) -> Callable[[int], object]:
        """`advance`, and one warning where the gradients will take long, with the
        cheapest documented setting and what it would take.
        """
        start, done = perf_counter(), 0

        def counted(n: int) -> None:
            nonlocal done
            advance(n)
            done += n
            spent = perf_counter() - start
            if not 0 < done < total or spent < PACE_SECONDS or self.processes.rank:
                return
            per_sample = spent / done
            if per_sample * total < LONG_SECONDS:
                return
            n_picked = min(10 * self.n_instances, self.n_pool)
            n_few = n_picked + min(2048, self.n_averaged) + self.n_labeled
            cheaper = per_sample * (n_few + self.n_pool / (1 + n_rows))
            cure = (
                "candidates=10 with n_information_samples=2048 needs gradients of "
                f"{n_few} samples and a forward pass over the pool, about "
                f"{duration(cheaper)}"
                if cheaper < per_sample * total / 2
                else "layers='last' needs the head's gradients alone"
            )
            self.warn(
                f"The gradients of {total} samples will take about "
                f"{duration(per_sample * total)}, by the first {done}; {cure}. See "
                "the page on choosing settings.",
                "pace",
            )

        return counted


def _positions(slices: dict[str, slice], names: list[str]) -> Tensor:
    """The positions of these parameters, in the network's order."""
    ends: list[list[int]] = []
    for place in (slices[name] for name in names):
        if ends and ends[-1][1] == place.start:
            ends[-1][1] = place.stop
        else:
            ends.append([place.start, place.stop])
    parts = [torch.arange(*pair, device="cpu") for pair in ends]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joined(parts: list[Embeddings]) -> Embeddings | None:
    """Those of all batches in one."""
    if not parts:
        return None
    tensors = zip(*(part.tensors for part in parts), strict=True)
    return parts[0].of([torch.cat(each) for each in tensors])


class _NoProductError(Exception):
    """The head's class scores are not the product of its input and weights."""


def _equal(weight: float, n: int) -> Tensor:
    """The same weight for each of n samples."""
    return torch.full((n,), weight, dtype=torch.float64, device="cpu")


def _weighty(drawn: Drawn, parameter: str) -> Drawn:
    """What was drawn, if any of it has a weight."""
    if not drawn.total_weight:
        raise ValueError(
            "All samples that were drawn have target_weight 0; leave samples without "
            f"weight out, or raise {parameter}."
        )
    return drawn


def _check_complete(
    n_found: int, samples: Samples, positions: list[int] | None = None
) -> None:
    expected = samples.n if positions is None else len(positions)
    if n_found != expected:
        raise ValueError(
            f"The net's iterator gave {n_found} of the {expected} samples of "
            f"{samples.name}; let iterator_valid give each of them once."
        )
