"""What a query on a net would do and cost, told before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from time import perf_counter
from typing import Any, NamedTuple

import torch
from sklearn.base import clone

from fishermask_sk._types import Learner, Samples
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.memory import duration, free_bytes, readable
from fishermask_sk.nets.skorch_adapter import fitted_net, preserved_rng
from fishermask_sk.strategy.contract import check_n_instances
from fishermask_sk.strategy.eligible import Eligible
from fishermask_sk.strategy.fisher_mask import FisherMask
from fishermask_sk.strategy.net_checks import check_module
from fishermask_sk.strategy.plan import Plan
from fishermask_sk.strategy.prices import MANY_CLASSES, Alternative, priced
from fishermask_sk.strategy.query import Query
from fishermask_sk.strategy.question import Question
from fishermask_sk.strategy.settings import Settings
from fishermask_sk.strategy.sizes import Sizes


class ParameterReport(NamedTuple):
    """One parameter: its size, its place in the net, whether a mask may touch it, how
    its gradients are found.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    candidate: bool
    gradients: str

    @property
    def n_weights(self) -> int:
        """How many numbers it holds."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, repr=False)
class NetworkReport:
    """What `check_network` found; `print` shows it as a table.

    Attributes
    ----------
    parameters : tuple of ParameterReport
        Each with `name`, `shape`, `role` ("head", "stem" or "middle"), `candidate`
        (whether a mask may touch it) and `gradients` ("rule of Linear" and the like,
        "vmap", "one by one", or "frozen").
    head, stem : tuple of str
        Their parameters; empty where there are none.
    k : int
        How many weights the mask keeps.
    n_classes, n_pool, n_labeled, n_instances : int
        What the query would see, and pick.
    bytes : dict of str to int
        What "embeddings" and "matrices" take, what each weight's copy, gradient and
        score do while "weights" are ranked, what a "batch" takes while it is computed
        on, and what is held at once at the most, "total".
    free_bytes : int or None
        Memory that is free now, where the system says.
    seconds : dict of str to float
        Estimates for "mask", "embeddings" and "selection", and their sum, "total".
    verdict : str
        "runs", "runs by streaming" with where embeddings lie, or "would be refused"
        with what `select` would say.
    alternatives : tuple of Alternative
        Cheaper settings, each with `setting`, `seconds`, `bytes` and `verdict`. The
        first two change who may be picked, all others the mask.
    notes : tuple of str
        What may surprise.
    """

    parameters: tuple[ParameterReport, ...]
    head: tuple[str, ...]
    stem: tuple[str, ...]
    k: int
    n_classes: int
    n_pool: int
    n_labeled: int
    n_instances: int
    bytes: dict[str, int]
    free_bytes: int | None
    seconds: dict[str, float]
    verdict: str
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [
            f"{'role':8}{'gradients by':24}{'weights':>12}{'may be masked':>15}  "
            "parameters",
            *self._groups(),
            "",
            f"mask     k = {self.k:,} of {self._n_weights(candidates=True):,} "
            f"candidates, {self._n_weights():,} weights in all",
            f"query    {self.n_instances:,} of {self.n_pool:,} samples, "
            f"{self.n_labeled:,} labelled, {self.n_classes} classes",
            f"memory   about {readable(self.bytes['total'])} (embeddings "
            f"{readable(self.bytes['embeddings'])}, matrices "
            f"{readable(self.bytes['matrices'])}, weights "
            f"{readable(self.bytes['weights'])}, batch "
            f"{readable(self.bytes['batch'])})"
            + (
                ""
                if self.free_bytes is None
                else f"; {readable(self.free_bytes)} are free"
            ),
            f"time     about {duration(self.seconds['total'])} (mask "
            f"{duration(self.seconds['mask'])}, embeddings "
            f"{duration(self.seconds['embeddings'])}, selection "
            f"{duration(self.seconds['selection'])})",
            f"verdict  {self.verdict}",
            *(
                f"or       {other.setting}: about {duration(other.seconds)}, "
                f"{readable(other.bytes)}"
                + (", would be refused" if other.is_refused else "")
                for other in self.alternatives
            ),
            *(f"note     {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _groups(self) -> list[str]:
        """A line for the parameters of one role whose gradients are found in one
        way.
        """
        groups: dict[tuple[str, str], list[ParameterReport]] = {}
        for role in ("stem", "middle", "head"):
            for p in self.parameters:
                if p.role == role:
                    groups.setdefault((role, p.gradients), []).append(p)
        return [
            f"{role:8}{gradients:24}{sum(p.n_weights for p in group):>12,}"
            f"{sum(p.n_weights for p in group if p.candidate):>15,}  {_names(group)}"
            for (role, gradients), group in groups.items()
        ]

    def _n_weights(self, candidates: bool = False) -> int:
        return sum(
            p.n_weights for p in self.parameters if p.candidate or not candidates
        )


def check_network(
    estimator: Learner,
    X: Samples,
    n_instances: int = 1,
    *,
    query_strategy: FisherMask | None = None,
    X_labeled: Samples | None = None,
    n_pool: int | None = None,
    n_target: int | None = None,
) -> NetworkReport:
    """Tell what a query on this net would do and cost, from a short calibration.

    Parameters
    ----------
    estimator : fitted skorch net, pipeline or search around one, or modAL learner
    X : array of shape (n_samples, ...), tensor, DataFrame, dict of arrays or Dataset
        The pool, or some of it. A batch of it is enough, and no more than a batch is
        computed on.
    n_instances : int, default=1
        How many samples the query would pick.
    query_strategy : FisherMask, optional
        Whose parameters to use; by default the learner's own where that is a
        FisherMask, else ``FisherMask()``.
    X_labeled : like X, optional
        The samples that have labels; by default the learner's `X_training`, else none.
    n_pool : int, optional
        The pool's size where it is not that of `X`.
    n_target : int, optional
        How many samples `X_target` would hold; by default there is none.

    Returns
    -------
    NetworkReport
        Prints as a table.

    Raises
    ------
    sklearn.exceptions.NotFittedError
        Where the net is not fitted.
    TypeError, ValueError
        Where the net, the samples or a parameter would make a query raise.

    Notes
    -----
    The estimates hold for this machine as busy as it is now. How near they came is in
    the page "Any network".

    Examples
    --------
    >>> import numpy as np, torch
    >>> from skorch import NeuralNetClassifier
    >>> from fishermask_sk import FisherMask, check_network
    >>> X = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> module = torch.nn.Sequential(
    ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ... )
    >>> net = NeuralNetClassifier(module, criterion=torch.nn.CrossEntropyLoss)
    >>> report = check_network(
    ...     net.initialize(), X, 10, query_strategy=FisherMask(0.5), n_pool=10_000
    ... )
    >>> print(report)
    role    gradients by                 weights  may be masked  parameters
    stem    rule of Linear                    40             40  0.weight, 0.bias
    head    rule of Linear                    27             27  2.weight, 2.bias
    <BLANKLINE>
    mask     k = 33 of 67 candidates, 67 weights in all
    query    10 of 10,000 samples, 0 labelled, 3 classes
    memory   about ...
    time     about ...
    verdict  runs
    or       candidates=10: about ...
    >>> report.head
    ('2.weight', '2.bias')
    """
    # Of a copy: a RandomState in it is not drawn from.
    params = clone(_strategy(estimator, query_strategy)).settings()
    fitted = fitted_net(estimator)
    check_module(fitted.module)
    check_n_instances(n_instances)
    if n_pool is not None:
        check_n_instances(n_instances, _checked_size("n_pool", n_pool, "the pool"))
    if n_target is not None:
        _checked_size("n_target", n_target, "the target")
    if X_labeled is None:
        X_labeled = getattr(estimator, "X_training", None)
    with torch.inference_mode(False), preserved_rng(), undisturbed(fitted.module):
        pool, n_given = fitted.dataset(X, "X")
        check_n_instances(
            min(int(n_instances), n_given) if n_pool else n_instances, n_given
        )
        labeled, n_labeled = (
            (None, 0) if X_labeled is None else fitted.dataset(X_labeled, "X_labeled")
        )
        asked = Question(
            params, fitted, pool, labeled, n_given, n_labeled, int(n_instances)
        )
        query = Query(asked)
        start = perf_counter()
        plan = query.plan(within=params.batch_size)
        of_plan = perf_counter() - start

        def of_size(chosen: Settings, plan: Plan) -> Sizes:
            """The query that is asked about, by these parameters."""
            question = Question(
                chosen,
                fitted,
                None,
                None,
                int(n_pool or n_given),
                n_labeled,
                int(n_instances),
                target=None if n_target is None else (None, int(n_target)),
            )
            candidates = chosen.candidates
            if not isinstance(candidates, Integral):
                candidates = None
            return Sizes(question, Eligible(question, candidates), plan.head)

        sizes = of_size(params, plan)
        price = priced(query, plan, sizes, of_plan)
        alternatives = price.alternatives(of_size)
    return NetworkReport(
        parameters=_parameters(plan),
        head=plan.layout.head,
        stem=plan.layout.stem,
        k=price.k,
        n_classes=plan.n_classes,
        n_pool=sizes.question.pool.n,
        n_labeled=n_labeled,
        n_instances=int(n_instances),
        bytes=price.bytes(sizes),
        free_bytes=free_bytes(asked.device),
        seconds=price.seconds(sizes),
        verdict=price.verdict(sizes),
        alternatives=alternatives,
        notes=_notes(params, plan, price.k),
    )


def _strategy(estimator: Any, query_strategy: Any) -> FisherMask:
    chosen = (
        getattr(estimator, "query_strategy", None)
        if query_strategy is None
        else query_strategy
    )
    if isinstance(chosen, FisherMask):
        return chosen
    if query_strategy is None:
        return FisherMask()
    raise TypeError(
        f"query_strategy={query_strategy!r:.60} is no FisherMask; pass FisherMask(...) "
        "with the parameters to check."
    )


def _checked_size(name: str, n: Any, where: str) -> int:
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        raise ValueError(
            f"{name}={n!r} must be an int >= 1, the number of samples in {where}."
        )
    return int(n)


def _parameters(plan: Plan) -> tuple[ParameterReport, ...]:
    ways, candidates = plan.gradients.ways(), set(plan.names)
    roles = {
        **dict.fromkeys(plan.gradients.parameters, "middle"),
        **dict.fromkeys(plan.layout.stem, "stem"),
        **dict.fromkeys(plan.layout.head, "head"),
    }
    return tuple(
        ParameterReport(
            name,
            tuple(p.shape),
            roles[name],
            name in candidates,
            ways.get(name, "frozen"),
        )
        for name, p in plan.gradients.parameters.items()
    )


def _notes(params: Settings, plan: Plan, k: int) -> tuple[str, ...]:
    notes = []
    sizes = {name: p.numel() for name, p in plan.gradients.parameters.items()}
    n_head = sum(sizes[name] for name in plan.layout.head if name in plan.names)
    if not plan.layout.head:
        notes.append(
            "no layer's output dimension is the number of classes: name the head with "
            "head='...'."
        )
    elif (
        params.keep_head
        and k <= n_head < plan.n_candidates
        and params.mask in ("fisher", "random")
    ):
        notes.append(
            f"the head alone has {n_head:,} weights, so the mask is "
            f"{'all' if k == n_head else 'a part'} of it and no other layer is seen: "
            f"from sparsity={n_head} on it is whole, with more others are seen, and "
            "with keep_head=False all compete."
        )
    elif k < n_head == plan.n_candidates and params.mask in ("fisher", "random"):
        notes.append(
            f"the mask keeps {k:,} of the head's {n_head:,} weights: from "
            f"sparsity={n_head} on it is whole."
        )
    if (params.n_top_classes or plan.n_classes) > MANY_CLASSES:
        notes.append(
            f"{plan.n_rows} of {plan.n_rows + 1} passes a sample are backward, one for "
            "each class but one: n_top_classes=5 takes the most probable alone."
        )
    slow = [name for name, way in plan.gradients.ways().items() if way == "one by one"]
    if slow:
        notes.append(
            f"{sum(sizes[name] for name in slow):,} weights take a backward pass for "
            f"every sample and class, since {plan.gradients.reasons[slow[0]]}; layers= "
            "can leave them out."
        )
    return tuple(notes)


def _names(group: list[ParameterReport]) -> str:
    names = [p.name for p in group]
    return (
        ", ".join(names)
        if len(names) <= 3
        else f"{names[0]}, ... {names[-1]} ({len(names)})"
    )
