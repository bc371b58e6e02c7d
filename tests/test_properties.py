"""Adversarial inputs to the mathematics of a query, from hypothesis; and the same picks
whatever the batching.

Cases are small and many. Arrays come from a drawn seed, so that a failing case is a
handful of numbers.
"""

import re
import sys
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.gradients.fisher import (
    class_cotangents,
    class_logits,
    information,
    reduced_cotangents,
)
from fishermask_sk.memory import needs
from fishermask_sk.selection import select
from fishermask_sk.strategy.masks import (
    merged,
    n_kept,
    per_layer_mask,
    ranked_mask,
    warn_if_head_fills_mask,
)

EPS = torch.finfo(torch.float64).eps
# A gain may be off by this many units in the last place of tr(M⁻¹F̄), times M's
# condition number ...
ROUNDING = 100
# ... and where the condition number alone eats all but three digits, nothing is asked
# of its size.
WORST_CONDITION = 1e-3 / EPS
DTYPES = st.sampled_from([torch.float32, torch.float64])
SEEDS = st.integers(0, 2**32 - 1)


def powers_of_ten(low, high):
    return st.floats(low, high, allow_subnormal=False).map(
        lambda x: 10**x
    )  # conftest flushes them


# Embeddings: each kind breaks another assumption.

KINDS = {
    "normal": lambda rng, n, c, k: (
        rng.normal(size=(n, c, k)) * rng.uniform(0.2, 2, (n, 1, 1))
    ),
    "constant": lambda rng, n, c, k: np.repeat(rng.normal(size=(1, c, k)), n, axis=0),
    "duplicated": lambda rng, n, c, k: rng.normal(size=(3, c, k))[
        rng.integers(0, 3, n)
    ],
    "mostly zero": lambda rng, n, c, k: (
        rng.normal(size=(n, c, k)) * (rng.random((n, 1, 1)) < 0.3)
    ),
    "zero": lambda rng, n, c, k: np.zeros((n, c, k)),
    "one weight": lambda rng, n, c, k: np.eye(c * k)[rng.integers(0, c * k, n)].reshape(
        n, c, k
    ),
    "low rank": lambda rng, n, c, k: rng.normal(size=(n, c, 1)) * rng.normal(size=k),
    "steep": lambda rng, n, c, k: rng.normal(size=(n, c, k)) * np.geomspace(1, 1e-8, k),
    "outliers": lambda rng, n, c, k: (
        rng.normal(size=(n, c, k)) * 10 ** rng.uniform(-8, 8, (n, 1, 1))
    ),
    "softmax": lambda rng, n, c, k: softmax_embeddings(rng, n, c, k),
}


def softmax_embeddings(rng, n, c, k):
    """Of a linear net whose probabilities run from even to exactly 0 and 1."""
    logits = torch.as_tensor(
        rng.normal(size=(n, c + 1)) * 10 ** rng.uniform(-2, 4, (n, 1))
    )
    pulled = reduced_cotangents(logits) @ torch.as_tensor(rng.normal(size=(c + 1, k)))
    return pulled.numpy() * rng.normal(size=(n, 1, 1))


class Problem(NamedTuple):
    """What `select` is given."""

    seed: int
    kind: str
    n: int
    c: int
    k: int
    dtype: torch.dtype
    scale: float
    n_labeled: int
    labeled_scale: float
    damping: float
    n_instances: int
    oversample: float

    def embeddings(self):
        rng = np.random.default_rng(self.seed)
        pool, labeled = (
            KINDS[self.kind](rng, n, self.c, self.k) * self.scale
            for n in (self.n, self.n_labeled)
        )
        return tuple(
            torch.as_tensor(v, dtype=self.dtype)
            for v in (pool, labeled * self.labeled_scale)
        )

    def solve(self, pool, labeled, **kwargs):
        known = information(labeled.double())
        return select(
            pool,
            (information(pool.double()) + known) / (self.n + self.n_labeled),
            self.n_instances,
            labeled_information=known / self.n_labeled if self.n_labeled else None,
            n_labeled=self.n_labeled,
            damping=self.damping,
            oversample=self.oversample,
            **kwargs,
        )

    def start(self, pool, labeled):
        """M_∅, F̄, the weight of a pick, and the largest condition number that M gets
        by one pick.
        """
        pool, labeled = pool.double(), labeled.double()
        weight = self.n_instances / (self.n_labeled + self.n_instances)
        target = (information(pool) + information(labeled)) / (self.n + self.n_labeled)
        known = information(labeled) / (self.n_labeled + self.n_instances)
        largest = known.trace() + weight * pool.square().sum((1, 2)).max()
        m = self.damping * torch.eye(self.k, dtype=torch.float64) + known
        return m, target, weight, 1 + float(largest) / self.damping


@st.composite
def problems(draw):
    c = draw(st.sampled_from([1, 2, 3, 4, 9, 32, 33, 99, 199, 200]))
    n = draw(st.integers(1, max(3, min(30, 200 // c))))
    return Problem(
        seed=draw(SEEDS),
        kind=draw(st.sampled_from(list(KINDS))),
        n=n,
        c=c,
        k=draw(st.integers(1, 12)),
        dtype=draw(DTYPES),
        scale=draw(powers_of_ten(-12, 12) | powers_of_ten(-1, 1)),
        n_labeled=draw(st.sampled_from([0, 0, 1, 6])),
        labeled_scale=draw(powers_of_ten(-6, 6) | st.just(1.0)),
        damping=draw(powers_of_ten(-12, 12)),
        n_instances=draw(st.integers(1, n) | st.just(n)),
        oversample=draw(st.sampled_from([1, 1.3, 2, 3])),
    )


@contextmanager
def overflow_is_said(allowed, kinds=FloatingPointError):
    """An error is fine where it is due, and where it says what happened."""
    try:
        yield
    except kinds as error:
        if not allowed or not re.match(
            r"The .*(trace|cost|information|outputs|gradients) .*\.$", str(error)
        ):
            raise
        event("refused")


def check_picks(picks, gains, n_instances, n_pool):
    assert len(picks) == len(gains) == n_instances
    assert len(set(picks)) == n_instances, "a sample was picked twice"
    assert min(picks) >= 0
    assert max(picks) < n_pool
    assert np.isfinite(gains).all()


def selection_survives(problem):
    pool, labeled = problem.embeddings()
    m, target, _, condition = problem.start(pool, labeled)
    resolved = condition <= WORST_CONDITION
    with overflow_is_said(allowed=not resolved):
        picks, gains = problem.solve(pool, labeled)
        assert picks.dtype == torch.int64
        assert gains.dtype == torch.float64
        check_picks(picks.tolist(), gains.numpy(), problem.n_instances, problem.n)
        if resolved:
            total = float(torch.linalg.solve(m, target).trace())
            slack = ROUNDING * EPS * condition * total
            assert gains.min() >= -slack, "a pick raised the error"
            if problem.oversample == 1:  # the rest of tr(M⁻¹F̄) cannot be negative
                of_dtype = 10 * torch.finfo(problem.dtype).eps * total
                assert gains.sum() <= total + slack + of_dtype
        event("resolved" if resolved else "beyond float64")


@st.composite
def small_problems(draw):
    n = draw(st.integers(1, 10))
    return draw(problems())._replace(
        n=n,
        c=draw(st.integers(1, 4)),
        k=draw(st.integers(1, 6)),
        kind=draw(st.sampled_from([kind for kind in KINDS if kind != "outliers"])),
        dtype=torch.float64,
        scale=draw(powers_of_ten(-1, 0.5)),
        labeled_scale=draw(powers_of_ten(-0.5, 0.5)),
        damping=draw(powers_of_ten(-3, 3)),
        n_instances=draw(st.integers(1, n)),
    )


def smallest_margin(problem, pool, labeled, choices, gains, tolerance):
    """Repeat picks and removals by dense inverses: every choice is a best one; by how
    much, at the least.
    """
    m, target, weight, _ = problem.start(pool, labeled)
    pieces = weight * pool.mT @ pool
    n_picks = (len(choices) + problem.n_instances) // 2  # the others are removals
    margins, picked = [np.inf], []
    for t, chosen in enumerate(choices):
        sign = 1 if t < n_picks else -1
        others = [i for i in range(len(pool)) if (i in picked) == (sign < 0)]
        inverses = torch.linalg.inv(m + sign * pieces[others])
        after = (inverses * target).sum((1, 2))
        of_chosen = after[others.index(chosen)]
        assert of_chosen <= after.min() + tolerance, "another sample was better"
        if sign > 0:
            gain = float((torch.linalg.inv(m) * target).sum() - of_chosen)
            assert gains.get(chosen, gain) == pytest.approx(gain, 1e-6, tolerance)
            picked.append(chosen)
        else:
            picked.remove(chosen)
        margins += [
            abs(float(a - of_chosen))
            for i, a in zip(others, after, strict=True)
            if i != chosen
        ]
        m = m + sign * pieces[chosen]
    assert picked == list(gains)
    return min(margins)


def selection_equals_the_slow_twin(problem):
    pool, labeled = problem.embeddings()
    asked, choices = [], []

    def choose(tied):
        asked.append(tied.amin())
        return asked[-1]

    picks, gains = problem.solve(
        pool, labeled, choose=choose, on_pick=lambda: choices.append(int(asked[-1]))
    )
    found = dict(zip(picks.tolist(), gains.tolist(), strict=True))
    m, target, _, condition = problem.start(pool, labeled)
    tolerance = (
        ROUNDING * EPS * condition * float(torch.linalg.solve(m, target).trace())
    )
    tie = (
        smallest_margin(problem, pool, labeled, choices, found, tolerance)
        <= 1e3 * tolerance
    )
    event("tie" if tie else "no tie")
    if not tie:
        expected, expected_gains = reference.naive_selection(
            pool.numpy(),
            labeled.numpy(),
            problem.n_instances,
            problem.damping,
            problem.oversample,
        )
        assert list(found) == expected
        np.testing.assert_allclose(
            list(found.values()), expected_gains, rtol=1e-6, atol=tolerance
        )


# Probabilities and cotangents.


class Outputs(NamedTuple):
    """A module's outputs on some samples."""

    seed: int
    n: int
    c: int
    dtype: torch.dtype
    magnitude: float
    kind: str

    def tensor(self):
        rng = np.random.default_rng(self.seed)
        if self.kind == "logits":
            # Halved, so that a difference of logits does not overflow.
            largest = float(torch.finfo(self.dtype).max) / 2
            values = (rng.normal(size=(self.n, self.c)) * self.magnitude).clip(
                -largest, largest
            )
        elif self.kind == "certain":
            values = np.eye(self.c)[rng.integers(0, self.c, self.n)]
        elif self.kind == "equal logits":
            values = np.full((self.n, self.c), self.magnitude)
        else:  # probabilities from 1 down to the smallest numbers and exact zeros
            values = 10 ** (-rng.uniform(0, 320, (self.n, self.c))) * (
                rng.random((self.n, self.c)) < 0.7
            )
            values[np.arange(self.n), rng.integers(0, self.c, self.n)] = 1
            values /= values.sum(1, keepdims=True)
        return torch.as_tensor(values, dtype=self.dtype)


OUTPUTS = st.builds(
    Outputs,
    seed=SEEDS,
    n=st.integers(1, 5),
    c=st.integers(2, 6) | st.integers(2, 200),
    dtype=st.sampled_from(
        [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    ),
    magnitude=powers_of_ten(-3, 4) | powers_of_ten(-30, 38),
    kind=st.sampled_from(["logits", "equal logits", "certain", "probabilities"]),
)


def cotangents_are_fisher_information(outputs):
    scores = "logits" if "logits" in outputs.kind else "probabilities"
    logits = class_logits(
        outputs.tensor().nan_to_num(), scores
    )  # float16 ends at 65,504
    assert logits.dtype == torch.promote_types(outputs.dtype, torch.float32)
    assert torch.isfinite(logits).all()
    p = logits.softmax(1)
    eye = torch.eye(outputs.c, dtype=p.dtype)
    # Σ_c w_c² (e_c − p)(e_c − p)ᵀ, with w² = p or 1
    expected = {
        "fisher": torch.diag_embed(p) - p[:, :, None] * p[:, None, :],
        "uniform": eye
        - p[:, :, None]
        - p[:, None, :]
        + outputs.c * p[:, :, None] * p[:, None, :],
    }
    tolerance = 50 * outputs.c * torch.finfo(p.dtype).eps
    for weighting, fisher in expected.items():
        full, reduced = (
            class_cotangents(logits, weighting),
            reduced_cotangents(logits, weighting),
        )
        assert full.shape == (outputs.n, outputs.c, outputs.c)
        assert reduced.shape == (outputs.n, outputs.c - 1, outputs.c)
        for rows in (full, reduced):
            assert rows.dtype == logits.dtype
            torch.testing.assert_close(rows.mT @ rows, fisher, rtol=0, atol=tolerance)
            assert (
                rows.sum(2).abs().max() <= tolerance
            )  # a shift of all logits changes nothing
    assert (class_cotangents(logits)[p == 0] == 0).all()


# Masks.


class Scores(NamedTuple):
    """Scores of a network's weights, split into parameters; some frozen, some of the
    head.
    """

    seed: int
    sizes: list
    levels: int
    k: int
    percent: int
    dtype: torch.dtype


SCORES = st.builds(
    Scores,
    seed=SEEDS,
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    k=st.integers(1, 160),
    percent=st.integers(1, 100),
    dtype=DTYPES,
)


def ranges_of(positions):
    return merged(slice(i, i + 1) for i in positions.tolist())


def masks_are_ranked(case):
    rng = np.random.default_rng(case.seed)
    n = sum(case.sizes)
    scores = torch.as_tensor(
        10 ** rng.uniform(-300, 300, case.levels)[rng.integers(0, case.levels, n)]
    )
    scores = (scores * torch.as_tensor(rng.random(n) < 0.8)).to(case.dtype)
    scores.clamp_(max=torch.finfo(case.dtype).max)
    candidates = torch.as_tensor(np.sort(rng.permutation(n)[: rng.integers(1, n + 1)]))
    head = candidates[torch.as_tensor(rng.random(len(candidates)) < rng.uniform())]
    rest = candidates[~torch.isin(candidates, head)]

    def best(among, k):
        return {int(among[j]) for j in reference.naive_top_k(scores[among], k)}

    k = min(case.k, len(candidates))
    plain, with_head = (
        ranked_mask(scores, case.k, ranges_of(candidates)),
        ranked_mask(scores, case.k, ranges_of(candidates), ranges_of(head)),
    )
    assert plain.tolist() == sorted(best(candidates, k))
    n_head = min(k, len(head))
    assert with_head.tolist() == sorted(best(head, n_head) | best(rest, k - n_head))

    ends = np.cumsum([0, *case.sizes])
    slices = {str(i): slice(int(a), int(b)) for i, (a, b) in enumerate(pairwise(ends))}
    expected = set(head.tolist())
    for place in slices.values():
        inside = candidates[(candidates >= place.start) & (candidates < place.stop)]
        expected |= best(inside, -(-case.percent * len(inside) // 100))
    found = per_layer_mask(
        scores,
        case.percent / 100,
        slices,
        ranges_of(candidates),
        ranges_of(head),
    )
    assert found.tolist() == sorted(expected)
    assert found.dtype == plain.dtype == with_head.dtype == torch.int64
    assert n_kept(case.percent / 100, n) == max(1, case.percent * n // 100)
    with pytest.warns(UserWarning, match="sparsity=") as caught:
        warn_if_head_fills_mask(1, len(case.sizes), n)
    smallest = re.search(r"sparsity=(\S+)", str(caught[0].message))[1]
    assert n_kept(float(smallest), n) >= len(case.sizes), (
        "the sparsity that is named does not keep the head"
    )


# The whole query on small nets.


class Net(NamedTuple):
    """A net, its samples and the strategy's settings."""

    seed: int
    c: int
    hidden: int
    dtype: torch.dtype
    weights: float
    inputs: float
    n: int
    n_labeled: int
    same: bool
    n_instances: int
    params: dict


@st.composite
def nets(draw):
    n = draw(st.integers(1, 12))
    return Net(
        seed=draw(SEEDS),
        c=draw(st.integers(2, 5) | st.sampled_from([10, 33, 60])),
        hidden=draw(st.sampled_from([0, 3])),
        dtype=draw(DTYPES),
        weights=draw(st.just(0.0) | powers_of_ten(-2, 4) | powers_of_ten(-15, 15)),
        inputs=draw(st.just(0.0) | powers_of_ten(-2, 2) | powers_of_ten(-15, 15)),
        n=n,
        n_labeled=draw(st.integers(0, 4)),
        same=draw(st.booleans()),
        n_instances=draw(st.integers(1, n)),
        params={
            "sparsity": draw(st.sampled_from([1, 5, 0.3, 1.0])),
            "keep_head": draw(st.booleans()),
            "mask": draw(st.sampled_from(["fisher", "per_layer", "random"])),
            "weighting": draw(st.sampled_from(["fisher", "uniform"])),
            "damping": draw(powers_of_ten(-3, 12)),
            "oversample": draw(st.sampled_from([1, 1.3, 2])),
            "batch_size": draw(st.sampled_from([1, 5, 128])),
            "random_state": 0,
        },
    )


def queries_survive(case):
    rng = np.random.default_rng(case.seed)
    torch.manual_seed(case.seed)
    layers = [nn.Linear(4, case.hidden), nn.ReLU()] if case.hidden else []
    module = nn.Sequential(*layers, nn.Linear(case.hidden or 4, case.c)).to(case.dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(case.weights)
    net = NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, verbose=0, train_split=None
    ).initialize()
    X = rng.normal(size=(case.n + case.n_labeled, 4)) * case.inputs
    X = torch.as_tensor(
        X[:1].repeat(len(X), axis=0) if case.same else X, dtype=case.dtype
    )
    strategy = FisherMask(**case.params)
    largest = max(1.0, case.inputs, case.weights, case.inputs * case.weights)
    overflows = largest**2 / case.params["damping"] > 1e8
    with overflow_is_said(overflows, (FloatingPointError, ValueError)):
        picks = strategy.select(
            net, X[: case.n], case.n_instances, X_labeled=X[case.n :]
        )
        check_picks(
            picks.tolist(), strategy.trace_reductions_, case.n_instances, case.n
        )
        mask = strategy.mask_indices_
        assert (np.diff(mask) > 0).all()
        assert mask[0] >= 0
        assert mask[-1] < sum(p.numel() for p in module.parameters())
        event("answered")


# Property, its strategy, and how many cases of it run in `make test` and in `make
# test-full`.
PROPERTIES = {
    "selection": (selection_survives, problems(), 80, 5_000),
    "slow twin": (selection_equals_the_slow_twin, small_problems(), 40, 2_500),
    "cotangents": (cotangents_are_fisher_information, OUTPUTS, 30, 1_500),
    "masks": (masks_are_ranked, SCORES, 30, 1_500),
    "queries": (queries_survive, nets(), 20, 300),
}


def run_cases(name, n_cases):
    """Run a property on `n_cases` cases, the same every time; how many ran."""
    holds, strategy, *_ = PROPERTIES[name]
    n_ran = 0

    @settings(
        max_examples=n_cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def counted(case):
        nonlocal n_ran
        n_ran += 1
        holds(case)

    counted()
    return n_ran


SAID = pytest.mark.filterwarnings(
    "ignore:The mask keeps k", "ignore:damping=", "ignore:After . of"
)


@SAID
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    run_cases(name, PROPERTIES[name][2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@SAID
def test_properties_in_ten_thousand_cases(capsys):
    counts = {
        name: run_cases(name, n_cases) for name, (*_, n_cases) in PROPERTIES.items()
    }
    with (
        capsys.disabled()
    ):  # to stderr, which a worker of pytest-xdist shares with the terminal
        sys.stderr.write(f"\n{sum(counts.values()):,} cases: {counts}\n")
    assert sum(counts.values()) >= 10_000


# The same picks on every road.

# Runs agree while gains do to this relative distance, and part only where the two best
# are closer than it.
SAME_GAIN = 1e-5


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conv_net(seed, device="cpu"):
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    net = NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        max_epochs=5,
        lr=0.1,
        batch_size=10,
        verbose=0,
        train_split=None,
        device="cpu",
    )
    X = np.random.default_rng(seed).normal(size=(20, 1, 8, 8)).astype("float32")
    net.fit(X, np.arange(20) % 5)
    net.module_.to(device)
    net.device = device
    return net


def queried(net, seed, batch_size, **params):
    X = np.random.default_rng(seed + 1).normal(size=(26, 1, 8, 8)).astype("float32")
    X[14:20] = X[:6]  # ties, too
    strategy = FisherMask(random_state=0, batch_size=batch_size, **params)
    strategy.select(net, X[:20], 8, X_labeled=X[20:])
    return strategy


def assert_same_answer(found, expected):
    assert found.mask_indices_.tolist() == expected.mask_indices_.tolist()
    same = found.query_idx_ == expected.query_idx_
    # Of the first pick that differs, the gain is as good; after it, the runs are two
    # problems.
    until = len(same) if same.all() else int(np.argmin(same)) + 1
    gains, expected_gains = (s.trace_reductions_[:until] for s in (found, expected))
    np.testing.assert_allclose(gains, expected_gains, rtol=SAME_GAIN)


@pytest.mark.parametrize(
    "n_threads", [1, pytest.param(2, marks=pytest.mark.slow)]
)  # crawls on busy cores
@pytest.mark.parametrize(
    "params", [{"sparsity": 0.5}, {"sparsity": 1.0, "damping": 0.01}], ids=str
)
def test_picks_do_not_depend_on_batches_and_threads(params, n_threads):
    net = conv_net(0)
    expected = queried(net, 0, 128, **params)
    with threads(n_threads):
        for batch_size in (1, 7, 128):
            assert_same_answer(queried(net, 0, batch_size, **params), expected)
    with threads(2):
        assert_same_answer(queried(net, 0, 128, **params), expected)


@pytest.mark.parametrize(
    "params", [{"sparsity": 0.5}, {"sparsity": 1.0, "damping": 0.01}], ids=str
)
def test_picks_do_not_depend_on_the_memory_that_there_is(params):
    net = conv_net(0)
    expected = queried(net, 0, 128, **params)
    least = needs(20, 6, 4, len(expected.mask_indices_), 4, 8).matrices
    for batch_size in (1, 7, 128):
        assert_same_answer(
            queried(net, 0, batch_size, max_memory=least, **params), expected
        )


@pytest.mark.parametrize("seed", [0, 1])
def test_picks_do_not_depend_on_the_device(seed, device, monkeypatch):
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # float32 means float32
    expected = queried(conv_net(seed), seed, 128, sparsity=1.0)
    for batch_size in (1, 7, 128):
        assert_same_answer(
            queried(conv_net(seed, device), seed, batch_size, sparsity=1.0), expected
        )
