"""The steps of one query, from the fitted net to the picks: mask, embeddings, selection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from math import ceil
from numbers import Integral
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fishermask_sk._net_checks import check_candidates, check_samples_apart, reached_parameters
from fishermask_sk.fisher import information
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.layers import Layout, candidate_names, find_layout
from fishermask_sk.masks import custom_mask, n_kept, per_layer_mask, ranked_mask, warn_if_head_fills_mask
from fishermask_sk.modules import undisturbed
from fishermask_sk.selection import select
from fishermask_sk.skorch_adapter import FittedNet

if TYPE_CHECKING:
    from fishermask_sk.query_strategy import FisherMask

logger = logging.getLogger(__name__)

# Samples that the net is tried on before any expensive work.
EXAMPLES = 8


class Plan(NamedTuple):
    """What is known of a query before any expensive work: per-sample gradients, layout, candidates, k, rows."""

    gradients: PerSampleGradients
    layout: Layout
    names: list[str]
    candidates: Tensor
    k: int
    n_trainable: int
    n_rows: int


class Query:
    """One query: what `select` was given, and the steps from the mask to the picks."""

    def __init__(
        self,
        params: FisherMask,
        fitted: FittedNet,
        pool: Dataset,
        labeled: Dataset | None,
        n_pool: int,
        n_labeled: int,
        n_instances: int,
    ) -> None:
        self.params, self.fitted, self.pool, self.labeled = params, fitted, pool, labeled
        self.n_pool, self.n_labeled, self.n_instances = n_pool, n_labeled, n_instances
        seed = params.random_state
        self.rng = np.random.RandomState() if seed is None else check_random_state(seed)
        self.timings: dict[str, float] = {}

    def run(self, random_tie_break: bool) -> dict[str, Any]:
        """All steps in turn; what `FisherMask` learns from them."""
        with self._timed("mask"):
            gradients, mask_indices = self._find_mask()
        with self._timed("embeddings"):
            embeddings, pool_information, labeled_information = self._embed(gradients, mask_indices)
        with self._timed("selection"), self._progress("picks", self._n_steps()) as advance:
            picks = select(
                embeddings,
                pool_information,
                self.n_instances,
                labeled_information=labeled_information,
                n_labeled=self.n_labeled,
                damping=float(self.params.damping),
                oversample=float(self.params.oversample),
                choose=self._choose_at_random if random_tie_break else None,
                on_pick=lambda: advance(1),
                overwrite=True,
            )
        positions = mask_indices.cpu()
        return {
            "mask_indices_": positions.numpy(),
            "weights_per_layer_": {
                name: int(((positions >= place.start) & (positions < place.stop)).sum())
                for name, place in gradients.slices.items()
                if gradients.parameters[name].requires_grad
            },
            "query_idx_": picks.indices.cpu().numpy(),
            "trace_reductions_": picks.trace_reductions.cpu().numpy(),
            "timings_": self.timings,
        }

    def plan(self) -> Plan:
        """What the net is, tried on its first samples, and what a mask may touch."""
        params, fitted = self.params, self.fitted
        example = self._example(self.pool)
        n_outputs = fitted.check_outputs(example)
        check_samples_apart(fitted, example, min(EXAMPLES, self.n_pool))
        if self.labeled is not None:
            fitted.check_outputs(self._example(self.labeled))
        trainable = [name for name, p in fitted.module.named_parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(
                "All weights of the net are frozen; FisherMask needs some with requires_grad=True."
            )
        reached = reached_parameters(fitted, example, trainable)
        layout = self._layout(example, n_outputs)
        names = candidate_names(params.layers, layout, trainable)
        check_candidates(params.layers, names, reached)
        gradients = PerSampleGradients(fitted.module, fitted.logits, example)
        n_trainable = sum(gradients.parameters[name].numel() for name in trainable)
        k = n_kept(params.sparsity, n_trainable)
        device = next(fitted.module.parameters()).device
        candidates = _positions(gradients.slices, names).to(device)
        return Plan(gradients, layout, names, candidates, k, n_trainable, max(1, n_outputs - 1))

    def _find_mask(self) -> tuple[PerSampleGradients, Tensor]:
        """Steps 1 and 2: diagonal Fisher information, and the positions that are kept."""
        plan = self.plan()
        self._refuse_what_does_not_fit(min(plan.k, len(plan.candidates)), plan.n_rows)
        if self.params.mask == "random":
            scores = torch.as_tensor(
                self.rng.uniform(size=plan.gradients.n_parameters), device=plan.candidates.device
            )
        else:
            scores = self._diagonal_fisher(plan.gradients)
        mask_indices = self.mask(plan, scores)
        self._refuse_what_does_not_fit(len(mask_indices), plan.n_rows)
        return plan.gradients, mask_indices

    def _example(self, dataset: Dataset) -> Any:
        """The first samples, for checks that read no more."""
        n = self.n_pool if dataset is self.pool else self.n_labeled
        return next(self.fitted.batches(dataset, EXAMPLES, range(min(EXAMPLES, n))))

    def _diagonal_fisher(self, gradients: PerSampleGradients) -> Tensor:
        """Step 1, over samples drawn from pool and labelled together."""
        drawn, size = self._mask_samples(), self.params.batch_size
        batches = self.fitted.batches(self.pool, size, [i for i in drawn if i < self.n_pool])
        known = [i - self.n_pool for i in drawn if i >= self.n_pool]
        if self.labeled is not None and known:
            batches = chain(batches, self.fitted.batches(self.labeled, size, known))
        with self._progress("mask", len(drawn)) as advance:
            scores = gradients.diagonal_fisher(batches, advance)
        if not bool(torch.isfinite(scores).all()):
            raise FloatingPointError(
                "The diagonal Fisher information holds NaN or infinite values: samples do, or the net's weights."
            )
        return scores

    def mask(self, plan: Plan, scores: Tensor) -> Tensor:
        """Step 2, from scores of all weights."""
        params, candidates, slices = self.params, plan.candidates, plan.gradients.slices
        allowed = {name: slices[name] for name in plan.names}
        if callable(params.mask):
            return custom_mask(params.mask, scores, min(plan.k, len(candidates)), allowed, candidates)
        in_head = [name for name in plan.names if name in plan.layout.head]
        head = _positions(slices, in_head).to(scores.device) if params.keep_head and in_head else None
        if params.mask == "per_layer":
            fraction = plan.k / plan.n_trainable if isinstance(params.sparsity, Integral) else params.sparsity
            return per_layer_mask(scores, fraction, allowed, candidates, head)
        if head is not None and len(head) < len(candidates):
            warn_if_head_fills_mask(plan.k, len(head), plan.n_trainable)
        return ranked_mask(scores, plan.k, candidates, head)

    def _embed(
        self, gradients: PerSampleGradients, mask_indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Step 3: the pool's embeddings, F̄, and the labelled samples' mean information."""
        k = len(mask_indices)
        total = torch.zeros(k, k, dtype=torch.float64, device=mask_indices.device)
        labeled_mean, embeddings, start = None, torch.empty(0), 0
        with self._progress("embeddings", self.n_pool + self.n_labeled) as advance:
            if self.labeled is not None:
                for v in self._embedded_batches(gradients, self.labeled, mask_indices, advance):
                    total += information(v.double())  # M_∅ is inverted: rounding must stay far below λ
                labeled_mean = total / self.n_labeled
            for v in self._embedded_batches(gradients, self.pool, mask_indices, advance):
                if start == 0:
                    embeddings = v.new_empty(self.n_pool, *v.shape[1:])
                embeddings[start : start + len(v)] = v
                total += information(v)
                start += len(v)
        return embeddings, total / (self.n_pool + self.n_labeled), labeled_mean

    def _embedded_batches(
        self,
        gradients: PerSampleGradients,
        dataset: Dataset,
        mask_indices: Tensor,
        advance: Callable[[int], object],
    ) -> Iterator[Tensor]:
        name, expected = ("X_pool", self.n_pool) if dataset is self.pool else ("X_labeled", self.n_labeled)
        done = 0
        for batch in self.fitted.batches(dataset, self.params.batch_size):
            v = gradients.embeddings(batch, mask_indices, self.params.weighting, reduced=True)
            finite = torch.isfinite(v).flatten(1).all(1)
            if not bool(finite.all()):
                raise ValueError(
                    f"The gradients of sample {done + int(finite.int().argmin())} of {name} hold NaN or infinite "
                    "values: the sample does, or the net's outputs on it; drop it, or scale the samples."
                )
            done += len(v)
            advance(len(v))
            yield v
        if done != expected:
            raise ValueError(
                f"The net's iterator gave {done} of the {expected} samples of {name}; set "
                "iterator_valid__drop_last=False."
            )

    def _mask_samples(self) -> list[int]:
        """Positions among pool and labelled together, the labelled last."""
        n = self.n_pool + self.n_labeled
        if n <= self.params.n_mask_samples:
            return list(range(n))
        return sorted(self.rng.choice(n, self.params.n_mask_samples, replace=False).tolist())

    def _layout(self, example: Any, n_outputs: int) -> Layout:
        with undisturbed(self.fitted.module):
            return find_layout(
                self.fitted.module, lambda: self.fitted.outputs(example), n_outputs, self.params.head
            )

    def _choose_at_random(self, tied: Tensor) -> Tensor:
        return tied[self.rng.randint(len(tied))]

    def _n_steps(self) -> int:
        n_picks = min(ceil(self.params.oversample * self.n_instances), self.n_pool)
        return n_picks + n_picks - self.n_instances

    def needed_bytes(self, k: int, rows: int) -> tuple[int, int]:
        """What the embeddings and the matrices of the selection take."""
        itemsize = max(4, *(p.itemsize for p in self.fitted.module.parameters() if p.requires_grad))
        embeddings = itemsize * self.n_pool * rows * k
        return embeddings, 8 * (6 * k * k + 6 * self.n_pool * rows * rows)

    def _refuse_what_does_not_fit(self, k: int, rows: int) -> None:
        """Compare what the query will hold with what is free."""
        embeddings, matrices = self.needed_bytes(k, rows)
        needed = embeddings + matrices
        free = free_bytes(next(self.fitted.module.parameters()).device)
        if free is not None and needed > free:
            raise MemoryError(
                f"This query needs about {needed / 2**30:.1f} GiB (k={k} weights, {self.n_pool} samples: embeddings "
                f"{embeddings / 2**30:.1f} GiB, matrices {matrices / 2**30:.1f} GiB) and {free / 2**30:.1f} GiB are "
                "free; lower sparsity or the pool."
            )

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.timings[step] = perf_counter() - start
        logger.debug("%s: %.3f s", step, self.timings[step])

    @contextmanager
    def _progress(self, step: str, total: int) -> Iterator[Callable[[int], object]]:
        with tqdm(total=total, desc=step, disable=not self.params.verbose, leave=False) as bar:
            yield bar.update


def _positions(slices: dict[str, slice], names: list[str]) -> Tensor:
    return torch.cat([torch.arange(slices[name].start, slices[name].stop) for name in names])


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
