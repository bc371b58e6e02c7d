"""The steps of one query, from the fitted net to the picks.

====================  ==============================================================
`question`            what is asked, and the samples that are drawn
`eligible`            which samples may be picked
`plan`                the net tried on a few samples, and what a mask may touch
`sizes`               counts and bytes; too many are refused before any work
`ranking`             steps 1 and 2: scores of weights, and the mask
`components`          leading directions, where a mask is too large for all
`embedding`           how a batch becomes embeddings
`collecting`          step 3: embeddings of all samples, and F̄
`progress`, `pace`    bars, seconds, and a warning that it will take long
`prices`              what cheaper settings would take, for that warning
====================  ==============================================================

Step 4 is `fishermask_sk.selection.select`. `FisherMask.select` makes a Query and runs
it, inside `gradients.modules.undisturbed`, which puts the net into evaluation mode and
leaves it afterwards as it was.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor

from fishermask_sk.gradients.per_sample import PerSampleGradients
from fishermask_sk.memory import Budget, card_of
from fishermask_sk.selection.embeddings import DenseEmbeddings
from fishermask_sk.selection.greedy import Selection, select
from fishermask_sk.strategy.collecting import Embedded, collect
from fishermask_sk.strategy.components import leading_directions, n_searched
from fishermask_sk.strategy.eligible import Eligible
from fishermask_sk.strategy.embedding import (
    Embed,
    HeadProduct,
    NoProductError,
    head_as_product,
    plain,
)
from fishermask_sk.strategy.pace import RANKED, Pace
from fishermask_sk.strategy.plan import Plan, make_plan, say_what_is_slow
from fishermask_sk.strategy.progress import Progress
from fishermask_sk.strategy.question import Question
from fishermask_sk.strategy.ranking import find_mask
from fishermask_sk.strategy.settings import Settings
from fishermask_sk.strategy.sizes import Sizes, bytes_of_weights

logger = logging.getLogger(__name__)


class Query:
    """One query: the steps from what `select` was asked to the picks.

    Of several processes each has a Query of its own, with the samples that it holds,
    and all take the same steps.

    Parameters
    ----------
    question : Question
    cheapest : callable (query, plan) -> (setting, seconds) or None
        Asked, where the query will take long, for a setting that would not.
    """

    def __init__(
        self,
        question: Question,
        cheapest: Callable[[Query, Plan], tuple[str, float] | None] | None = None,
    ) -> None:
        self.question, self.cheapest = question, cheapest
        self.params = params = question.params
        self.processes = processes = question.processes
        self.eligible = Eligible(question)
        self.progress = Progress(params.verbose, processes)
        device = question.device
        machine, card = socket.gethostname(), card_of(device)
        all_places = processes.objects((machine, card))
        n_beside = sum(each == machine for each, _ in all_places)
        n_on_card = all_places.count((machine, card))
        self.budget = Budget(params.max_memory, device, n_beside, n_on_card)
        self.pace = Pace(question)

    def by(self, params: Settings) -> Query:
        """The same query by other parameters."""
        other = copy(self)
        other.params, other.question = params, self.question.by(params)
        return other

    def propose(self, candidates: Any, estimator: Any, X_pool: Any) -> None:
        """Note which samples may be picked; see `Eligible`."""
        self.eligible = Eligible(self.question, candidates, estimator, X_pool)

    def plan(self, within: int | None = None) -> Plan:
        """See `make_plan`."""
        return make_plan(self.question, self.budget, within)

    def sizes(self, plan: Plan) -> Sizes:
        """Counts of this query on this net."""
        return Sizes(self.question, self.eligible, plan.head)

    def run(self, random_tie_break: bool) -> dict[str, Any]:
        """All steps in turn; what `FisherMask` learns from them."""
        timed, module = self.progress.timed, self.question.fitted.module
        with self.processes.together():
            self.budget.check_weights(bytes_of_weights(self.params, module))
        with timed("mask"):
            plan = self.plan()
            if self.cheapest and self.processes.size == 1:  # pieces are timed here
                self.pace = Pace(self.question, partial(self.cheapest, self, plan))
            say_what_is_slow(self.question, plan)
            mask_indices = self._find_mask(plan)
        if self.eligible.n_most_uncertain is not None:
            with timed("candidates"):
                self.eligible.find_most_uncertain(self.progress)
        with timed("embeddings"):
            embedded = self.embed(plan, mask_indices)
        with timed("selection"):
            picks = self._select(embedded, self.sizes(plan), random_tie_break)
        say_what_is_slow(self.question, plan)  # or were found to be
        positions = mask_indices.cpu()
        gradients = plan.gradients
        return {
            "mask_indices_": positions.numpy(),
            "weights_per_layer_": {
                name: int(((positions >= place.start) & (positions < place.stop)).sum())
                for name, place in gradients.slices.items()
                if gradients.parameters[name].requires_grad
            },
            "query_idx_": self.eligible.positions_in_pool(picks.indices.cpu()).numpy(),
            "trace_reductions_": picks.trace_reductions.cpu().numpy(),
            "n_components_": embedded.n_components,
            "timings_": self.progress.timings,
            "check_seconds_": gradients.check_seconds,
        }

    def _find_mask(self, plan: Plan) -> Tensor:
        """Steps 1 and 2, and before and after them a look at the memory."""
        sizes, n_rows = self.sizes(plan), plan.n_rows
        with self.processes.together():
            k = min(plan.k, plan.n_candidates)
            sizes.check_memory(self.budget, k, n_rows)
        later = self._n_embedded(sizes)
        if sum(sizes.directions(k, n_rows)) < k:
            later += n_searched(self.question.ranking_samples.n_own)
        paced = partial(self.pace.counted, later=later / RANKED)
        mask_indices = find_mask(self.question, plan, self.progress, paced)
        with self.processes.together():
            sizes.check_memory(self.budget, len(mask_indices), n_rows)
        return mask_indices

    def _n_embedded(self, sizes: Sizes) -> int:
        """How many samples have their gradients taken for the selection."""
        question = self.question
        return sizes.n_embedded(question.n_information or question.n_averaged)

    def embed(self, plan: Plan, mask_indices: Tensor) -> Embedded:
        """Step 3: the candidates' embeddings, F̄, and what is known of the labelled
        samples.
        """
        gradients, n_rows = plan.gradients, plan.n_rows
        question, sizes = self.question, self.sizes(plan)
        gradients.memory.n_bytes = self._beside_embeddings(
            sizes, len(mask_indices), n_rows
        )
        product, n = self.product(plan, mask_indices, sizes)
        if product is not None:
            embed = self._beside_head(product, n, sizes)
        else:
            embed = self._dense(gradients, mask_indices, n, sizes)
        drawn = question.information_samples()
        of_all = sizes, self.budget, self.progress, drawn, n_rows, self.pace
        with self.processes.together():
            try:
                embedded = collect(embed, *of_all)
            except NoProductError:
                embedded = None
        if not all(self.processes.objects(embedded is not None)):
            logger.info("The head is no product on every batch: taken as it is.")
            n = sum(sizes.directions(len(mask_indices), n_rows, 0))
            embed = self._dense(gradients, mask_indices, n, sizes)
            with self.processes.together():
                embedded = collect(embed, *of_all)
            product = None
        assert embedded is not None  # for the type checker
        if product is not None:
            n = embedded.n_components + product.n_left_out
            embedded = embedded._replace(n_components=n)
        for matrix in (embedded.pool_information, embedded.labeled_information):
            if matrix is not None:
                self.processes.add(matrix)
        return embedded

    def product(
        self, plan: Plan, mask_indices: Tensor, sizes: Sizes
    ) -> tuple[HeadProduct | None, int]:
        """The head as a product, where it is one that pays, and in how many directions
        all other weights are.
        """
        k, n_rows = len(mask_indices), plan.n_rows
        found = head_as_product(
            self.question, plan.gradients, plan.head, mask_indices, n_rows
        )
        n_head, n = sizes.directions(k, n_rows, found.n if found else 0)
        if found and n_head and found.is_right():
            return found, n
        return None, sum(sizes.directions(k, n_rows, 0))

    def _dense(
        self, gradients: PerSampleGradients, mask_indices: Tensor, n: int, sizes: Sizes
    ) -> Embed:
        """What embeds a batch as a tensor, in so many directions."""
        question = self.question
        directions = None
        if n < len(mask_indices):
            directions = self._directions(gradients, mask_indices, n, sizes, False)

        def dense(batch: Any) -> DenseEmbeddings:
            v = plain(question, gradients, batch, mask_indices)
            return DenseEmbeddings(v if directions is None else v @ directions)

        return dense

    def _beside_head(self, product: HeadProduct, n: int, sizes: Sizes) -> Embed:
        """What embeds a batch with the head as a product, and the rest of a mask in so
        many directions.
        """
        if n == len(product.rest):
            return product.embed
        directions = self._directions(
            product.gradients, product.rest, n, sizes, is_beside_head=True
        )
        return partial(product.embed, directions=directions)

    def _directions(
        self,
        gradients: PerSampleGradients,
        positions: Tensor,
        n: int,
        sizes: Sizes,
        is_beside_head: bool,
    ) -> Tensor:
        """See `leading_directions`."""
        paced = partial(self.pace.counted, later=self._n_embedded(sizes))
        return leading_directions(
            self.question, gradients, positions, n, is_beside_head, self.progress, paced
        )

    def _beside_embeddings(self, sizes: Sizes, k: int, n_rows: int) -> int | None:
        """What a batch may take while embeddings are collected: they and sums of them
        are held, and the module's numbers twice.
        """
        needed = sizes.needs(k, n_rows)
        module = self.question.fitted.module
        n_bytes = sum(p.numel() * p.itemsize for p in module.parameters())
        in_memory = self.budget.holds(needed)
        return self.budget.beside(
            n_bytes + 2 * 8 * k**2 + (needed.embeddings if in_memory else 0)
        )

    def _select(
        self, embedded: Embedded, sizes: Sizes, random_tie_break: bool
    ) -> Selection:
        """Step 4."""
        rng = self.question.rng

        def draw(tied: Tensor) -> Tensor:
            return tied[rng.randint(len(tied))]

        with self.progress.picking(sizes.n_steps, self.pace.counted) as on_pick:
            return select(
                embedded.pool,
                embedded.pool_information,
                self.question.n_instances,
                labeled_information=embedded.labeled_information,
                labeled_embeddings=embedded.labeled,
                information_embeddings=embedded.information,
                n_labeled=self.question.labeled.shard.total,
                damping=float(self.params.damping),
                oversample=float(self.params.oversample),
                choose=draw if random_tie_break else None,
                draw=draw,
                on_pick=on_pick,
                overwrite=True,
                shard=self.eligible.shard,
            )
