"""Candidates that are left out of the updates: their bounds, and the picks, which do
not change.
"""

import numpy as np
import pytest
import reference
import torch
from test_selection import random_embeddings, run, steep_embeddings

from fishermask_sk import candidates, screening
from fishermask_sk.gains import effective_dimensions
from fishermask_sk.operators import DiagonalInformation, InverseInformation


def confident(n, seed=0, **kwargs):
    """Embeddings of which nearly all are small, as those of samples that a net is sure
    of.
    """
    lengths = np.random.default_rng(seed).uniform(size=(n, 1, 1)) ** 4
    return steep_embeddings(n, seed=seed, **kwargs) * lengths


@pytest.fixture
def eager(monkeypatch):
    """As many left out as early as can be, so that they have to come back."""
    for name, value in [
        ("FIRST_SCREENING", 1),
        ("NEXT_SCREENING", 1.0),
        ("SCREENED_SHARE", 0.95),
        ("READMITTED_SHARE", 0.999),
        ("MIN_SCREENED", 0.0),
    ]:
        monkeypatch.setattr(screening, name, value)
    monkeypatch.setattr(candidates, "MIN_ACTIVE", 3)


@pytest.fixture
def seen(monkeypatch):
    """How many are left out before they are picked and brought back, and the rows that
    picks are multiplied with.
    """
    counts = {"out": 0, "back": 0, "rows": 0}
    set_, products = screening.Screen._set, candidates.Candidates._products

    def counted(self, out):
        counts["out"] += int((out & ~self.out & (self._dimensions > 0)).sum())
        counts["back"] += int((~out & self.out).sum())
        set_(self, out)

    def multiplied(self, v, steps, n_exact):
        counts["rows"] += len(v) * len(steps)
        return products(self, v, steps, n_exact)

    monkeypatch.setattr(screening.Screen, "_set", counted)
    monkeypatch.setattr(candidates.Candidates, "_products", multiplied)
    return counts


def test_no_later_gain_is_above_the_bound():
    rng = np.random.default_rng(0)
    n, c, k = 40, 3, 8
    v = (
        rng.normal(size=(n, c, k))
        * np.geomspace(3, 0.1, k)
        * rng.uniform(0.1, 3, size=(n, 1, 1))
    )
    target = np.diag(np.geomspace(10, 1e-3, k))
    m, bounds, gains, rose = np.eye(k), [], [], False
    for pick in v[:12]:  # in an order that is not greedy
        inverse = np.linalg.inv(m)
        now = np.array(
            [np.trace(target @ (inverse - np.linalg.inv(m + x.T @ x))) for x in v]
        )
        rose |= bool(gains) and (now > gains[-1]).any()
        gains.append(now)
        a = torch.as_tensor(v @ inverse @ v.swapaxes(1, 2))
        largest = np.linalg.eigvals(target @ inverse).real.max()
        bounds.append(effective_dimensions(a).numpy() * largest)
        assert all((gains[-1] <= bound * (1 + 1e-9)).all() for bound in bounds)
        m = m + pick.T @ pick
    assert rose  # else the gains themselves would be bounds
    assert (bounds[0] < 20 * gains[0]).all()


@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.1, 1e3])
def test_the_largest_eigenvalue_is_bounded_from_above(tolerance):
    rng = np.random.default_rng(0)
    k, values = 30, np.geomspace(50, 1e-5, 30)
    inverse = InverseInformation(torch.eye(k, dtype=torch.float64), k, 4)
    m = np.eye(k)
    first, *others = rng.normal(size=(4, 2, k))
    for rows, sign in [(first, 1), *((rows, 1) for rows in others), (first, -1)]:
        m = m + sign * rows.T @ rows
        before = inverse.times(torch.eye(k, dtype=torch.float64)).numpy()
        root = np.linalg.cholesky(
            np.linalg.inv(np.eye(2) + sign * rows @ before @ rows.T)
        )
        inverse.subtract(torch.as_tensor(before @ rows.T @ root), sign)
    np.testing.assert_allclose(inverse.diagonal(), np.diag(np.linalg.inv(m)), rtol=1e-9)
    np.testing.assert_allclose(
        inverse.leading(7), np.linalg.inv(m)[:7, :7], rtol=1e-9, atol=1e-12
    )
    exact = np.linalg.eigvals(np.diag(values) @ np.linalg.inv(m)).real.max()
    found = screening.largest_eigenvalue(
        inverse, DiagonalInformation(torch.as_tensor(values)), tolerance
    )
    assert exact * (1 - 1e-12) <= found <= exact + tolerance + 1e-9


def test_the_dimensions_that_a_sample_informs():
    a = torch.as_tensor(
        np.stack([np.diag([1.0, 3.0]), np.zeros((2, 2)), 1e5 * np.eye(2)])
    )
    assert effective_dimensions(a).tolist() == [pytest.approx(1.25), 0, np.inf]


@pytest.mark.parametrize("oversample", [1, 2])
@pytest.mark.parametrize("n_labeled", [0, 6])
@pytest.mark.parametrize("make", [random_embeddings, confident, steep_embeddings])
def test_candidates_leave_and_return_and_the_slow_twin_picks_the_same(
    make, n_labeled, oversample, eager, seen, device
):
    pool, labeled = make(40), make(n_labeled, seed=1)
    picks, gains = run(pool, labeled, 18, device, oversample=oversample)
    expected, expected_gains = reference.naive_selection(
        pool, labeled, 18, oversample=oversample
    )
    assert picks == expected
    np.testing.assert_allclose(
        gains, expected_gains, rtol=1e-4
    )  # the twin's own rounding
    assert seen["out"] > 0
    assert seen["back"] > 0 or make is random_embeddings


def test_a_refresh_leaves_bounds_where_nothing_is_computed(eager, monkeypatch):
    """Old gains would not do: they are no bounds."""
    n_left_out = []
    reductions = candidates.Candidates.reductions

    def checked(self):
        gains, out = reductions(self), self.screen.out
        n_left_out.append(int(out.sum()))
        assert torch.equal(gains[out], self.screen.bounds()[out])
        return gains

    monkeypatch.setattr(candidates.Candidates, "reductions", checked)
    monkeypatch.setattr(candidates, "ERROR_LIMIT", 0.0)  # a refresh for every pick
    pool, labeled = confident(40), confident(6, seed=1)
    picks, _ = run(pool, labeled, 18)
    assert picks == reference.naive_selection(pool, labeled, 18)[0]
    assert sum(n > 0 for n in n_left_out) > 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tight_bound_is_none_too_low(seed, eager, seen, device):
    """One row a sample and little information: there a bound of 0.7 times λ₁ would
    already change picks.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(0.2, 2, size=(120, 1, 1)) ** 3
    pool = rng.normal(size=(120, 1, 6)) * np.geomspace(1, 0.1, 6) * 0.03 * lengths
    picks, _ = run(pool, pool[:0], 60, device)
    expected, _ = reference.naive_selection(pool, pool[:0], 60)
    assert picks == expected
    assert seen["out"] > 0


def test_equal_candidates_leave_and_return_together(eager, seen, device):
    pool = np.repeat(confident(12), 3, axis=0)
    picks, _ = run(pool, confident(4, seed=1), 20, device)
    expected, _ = reference.naive_selection(pool, confident(4, seed=1), 20)
    assert picks == expected
    assert seen["out"] > 0
    assert seen["back"] > 0
    drawn, _ = run(pool, confident(4, seed=1), 20, device, choose=lambda tied: tied[-1])
    assert [i // 3 for i in drawn] == [i // 3 for i in expected]
    assert drawn != expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_most_of_a_confident_pool_is_left_out(dtype, seen, monkeypatch, device):
    pool, labeled = (
        v.astype("float32") for v in (confident(400), confident(40, seed=1))
    )
    picks, gains = run(pool, labeled, 80, device, dtype=dtype)
    assert seen["out"] > 0.5 * len(pool)
    with_screening = seen["rows"]
    seen.update(rows=0, out=0)
    monkeypatch.setattr(screening, "FIRST_SCREENING", 10**6)
    every, every_gains = run(pool, labeled, 80, device, dtype=dtype)
    assert seen["out"] == 0
    assert picks == every
    np.testing.assert_allclose(gains, every_gains, rtol=1e-4)
    assert with_screening < 0.7 * seen["rows"]


def test_nobody_is_left_out_where_all_have_much_to_tell(seen, device):
    run(
        np.random.default_rng(0).normal(size=(400, 3, 40)),
        random_embeddings(5, k=40),
        60,
        device,
    )
    assert seen["out"] == 0
