"""What queries by some parameters cost, and by cheaper ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from fishermask_sk.strategy.calibration import Costs, calibrate
from fishermask_sk.strategy.eligible import Eligible
from fishermask_sk.strategy.plan import Plan, changed_plan
from fishermask_sk.strategy.query import Query
from fishermask_sk.strategy.settings import Settings
from fishermask_sk.strategy.sizes import Sizes

# From so many classes on they are what costs.
MANY_CLASSES = 20
# Of a head of more weights so many are priced as well.
PART_OF_HEAD = 1000
# Changes of these leave the mask and its embeddings as they are.
OF_SAMPLES = {"candidates", "n_information_samples", "n_mask_samples"}


class Alternative(NamedTuple):
    """A cheaper setting, with what it would take here."""

    setting: str
    seconds: float
    bytes: int
    verdict: str

    @property
    def is_refused(self) -> bool:
        """Whether it would not run either."""
        return not self.verdict.startswith("runs")


class Price(NamedTuple):
    """What a query with such a mask costs, by its numbers of samples."""

    query: Query
    plan: Plan
    of_plan: float
    k: int
    costs: Costs

    def seconds(self, sizes: Sizes) -> dict[str, float]:
        """By step, and their sum."""
        found = self.costs.seconds(sizes)
        found["mask"] += self.of_plan
        return {**found, "total": sum(found.values())}

    def bytes(self, sizes: Sizes) -> dict[str, int]:
        """By what takes them, and what is held at the most."""
        needed, plan = sizes.needs(self.k, self.plan.n_rows), self.plan
        # The graph and the gradients of a batch, by a pass of one sample.
        n = min(sizes.params.batch_size, sizes.question.pool.n)
        example, _ = self.query.question.shared_example
        wanted = dict.fromkeys(plan.names)
        batch = plan.gradients.memory.bytes_of(example, wanted, n)
        return {**needed._asdict(), "batch": batch, "total": needed.total + batch}

    def verdict(self, sizes: Sizes) -> str:
        """What would become of the query, by the memory that it may use."""
        budget, n_rows = self.query.budget, self.plan.n_rows
        try:
            sizes.check_memory(budget, self.k, n_rows)
        except MemoryError as error:
            return f"would be refused: {error}"
        place = budget.place(sizes.needs(self.k, n_rows))
        if place == "device":
            return "runs"
        where = "main memory" if place == "host" else "a mapped file"
        return f"runs by streaming: the embeddings lie in {where}"

    def alternatives(
        self, of_size: Callable[[Settings, Plan], Sizes]
    ) -> tuple[Alternative, ...]:
        """Cheaper settings, by the sizes of a query with such parameters."""
        found = []
        for changes in _cheaper(self.query.params, self.plan):
            chosen = replace(self.query.params, **changes)
            own = self
            if not OF_SAMPLES.issuperset(changes):
                plan = changed_plan(self.plan, chosen)
                sizes = of_size(chosen, plan)
                own = priced(self.query.by(chosen), plan, sizes, self.of_plan)
            found.append(own._alternative(changes, of_size(chosen, own.plan)))
        return tuple(found)

    def _alternative(self, changes: dict[str, Any], sizes: Sizes) -> Alternative:
        """With its setting in words."""
        return Alternative(
            ", ".join(f"{name}={value!r}" for name, value in changes.items()),
            self.seconds(sizes)["total"],
            self.bytes(sizes)["total"],
            self.verdict(sizes),
        )


def priced(query: Query, plan: Plan, sizes: Sizes, of_plan: float = 0.0) -> Price:
    """A query's price, where its plan took some seconds, by a short calibration."""
    mask_indices, costs = calibrate(query, plan, sizes)
    return Price(query, plan, of_plan, len(mask_indices), costs)


def cheapest(query: Query, plan: Plan) -> tuple[str, float] | None:
    """Of the cheaper settings of a query that would run, that of fewest seconds, and
    these.
    """

    def of_size(chosen: Settings, plan: Plan) -> Sizes:
        question = query.question.by(chosen)
        eligible = query.eligible
        if chosen.candidates != query.params.candidates:
            eligible = Eligible(question, chosen.candidates)
        return Sizes(question, eligible, plan.head)

    price = priced(query, plan, query.sizes(plan))
    found = [each for each in price.alternatives(of_size) if not each.is_refused]
    least = min(found, key=lambda each: each.seconds, default=None)
    return least and (least.setting, least.seconds)


def _cheaper(params: Settings, plan: Plan) -> list[dict[str, Any]]:
    """Changes of the parameters that make a query cheaper; those that are in force
    already are left out.
    """
    two_stages = {"candidates": 10, "n_information_samples": 2048}
    of_mask: dict[str, Any] = {}
    if plan.n_rows >= MANY_CLASSES:
        of_mask = {"n_top_classes": 5}
    found = [{"candidates": 10}, two_stages | {"n_mask_samples": 256} | of_mask]
    parameters = plan.gradients.parameters
    head = [name for name in plan.layout.head if parameters[name].requires_grad]
    if head:
        last = {} if set(plan.names) == set(head) else {"layers": "last"}
        found += [last | of_mask]
        if sum(parameters[name].numel() for name in head) > PART_OF_HEAD:
            found += [{**last, "sparsity": PART_OF_HEAD, **of_mask}]
    return [
        changes
        for changes in found
        if any(getattr(params, name) != value for name, value in changes.items())
    ]
