"""The incremental selection against dense inverses of every candidate's M, in
float64.
"""

import numpy as np
import pytest
import reference
import torch

from fishermask_sk import candidates, initial
from fishermask_sk.fisher import information
from fishermask_sk.gains import reductions_and_bounds
from fishermask_sk.operators import FactoredInformation
from fishermask_sk.selection import select


def random_embeddings(n, c=3, k=6, seed=0):
    rng = np.random.default_rng(seed)
    # Lengths that differ, so that the best is well apart from the second.
    return rng.normal(size=(n, c, k)) * rng.uniform(0.2, 2, size=(n, 1, 1))


def run(pool, labeled, n_instances, device="cpu", dtype=torch.float64, **kwargs):
    pool_, labeled_ = (
        torch.as_tensor(v, dtype=dtype, device=device) for v in (pool, labeled)
    )
    known = information(labeled_.double())
    picks, gains = select(
        pool_,
        (information(pool_.double()) + known) / (len(pool) + len(labeled)),
        n_instances,
        labeled_information=known / len(labeled) if len(labeled) else None,
        n_labeled=len(labeled),
        **kwargs,
    )
    return picks.tolist(), gains.tolist()


@pytest.mark.parametrize("oversample", [1, 2, 1.3])
@pytest.mark.parametrize("n_labeled", [0, 1, 7])
@pytest.mark.parametrize("n_instances", [1, 2, 10, 25])
@pytest.mark.parametrize("damping", [1.0, 0.01])
def test_picks_and_gains_equal_the_slow_twin(
    n_instances, n_labeled, oversample, damping, device
):
    pool, labeled = random_embeddings(25), random_embeddings(n_labeled, seed=1)
    picks, gains = run(
        pool, labeled, n_instances, device, damping=damping, oversample=oversample
    )
    expected, expected_gains = reference.naive_selection(
        pool, labeled, n_instances, damping, oversample
    )
    assert picks == expected
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("oversample", [1, 2])
@pytest.mark.parametrize("n_active", [1, 2, 3])
def test_picks_ahead_that_are_not_the_best_are_made_anew(
    n_active, oversample, monkeypatch, device
):
    taken_back = []
    keep = candidates.Candidates.keep

    def noted(self, steps, n_added, n_kept):
        taken_back.append(n_added - n_kept)
        return keep(self, steps, n_added, n_kept)

    monkeypatch.setattr(candidates.Candidates, "keep", noted)
    monkeypatch.setattr(candidates, "MIN_ACTIVE", n_active)
    pool, labeled = random_embeddings(30), random_embeddings(4, seed=1)
    picks, gains = run(pool, labeled, 14, device, oversample=oversample)
    expected, expected_gains = reference.naive_selection(
        pool, labeled, 14, oversample=oversample
    )
    assert picks == expected
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-7)
    assert taken_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e2])
def test_no_gain_is_above_its_bound(scale, dtype):
    n, c, k, n_picks = 60, 3, 8, 5
    v = scale * np.random.default_rng(0).normal(size=(n, c, k))
    total = np.einsum("ncj,nck->jk", v, v) / n
    m, ys, vhs, gains = np.eye(k), [], [], []
    for pick in v[:n_picks]:
        inverse = np.linalg.inv(m)
        factor = np.linalg.cholesky(np.eye(c) + pick @ inverse @ pick.T)
        u = inverse @ pick.T @ np.linalg.inv(factor).T
        h = inverse @ total @ u - u @ u.T @ total @ u / 2
        ys.append(v @ u)
        vhs.append(v @ h)
        m = m + pick.T @ pick
        gains.append(
            [
                np.trace(total @ (np.linalg.inv(m) - np.linalg.inv(m + x.T @ x)))
                for x in v
            ]
        )
    inverse = np.linalg.inv(m)
    a, b, a_before = (
        torch.as_tensor(v @ middle @ v.swapaxes(1, 2))
        for middle in (inverse, inverse @ total @ inverse, np.eye(k))
    )
    y, vh = (
        torch.as_tensor(np.concatenate(parts, axis=2), dtype=dtype)
        for parts in (ys, vhs)
    )
    last, bounds = reductions_and_bounds(a, b, y, vh, a_before)
    np.testing.assert_allclose(last, gains[-1], rtol=1e-9)
    assert bounds.shape == (n, n_picks - 1)
    rounding = {torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
    for bound, exact in zip(bounds.T, gains, strict=False):
        assert (bound.numpy() >= np.array(exact) * (1 - rounding)).all()
    if scale < 1:  # A is nearly nothing, and so is what the bound gives away
        np.testing.assert_allclose(bounds[:, 0], gains[0], rtol=1e-3)


def test_there_is_no_bound_where_rounding_could_spoil_it():
    small, large, lost = torch.eye(2), 1e7 * torch.eye(2), -2 * torch.eye(2)
    a = torch.stack([small, large, lost, small]).double()
    a_before = torch.stack([small, large, small, large]).double()
    y, vh = torch.ones(2, 4, 2, 4).double()
    gains, bounds = reductions_and_bounds(a, a, y, vh, a_before)
    assert bounds.isinf().tolist() == [[False], [True], [True], [True]]
    np.testing.assert_allclose(gains[[0, 1, 3]], [1, 2, 1], rtol=1e-6)


def test_bounds_spare_candidates_and_change_no_pick(monkeypatch, device):
    eliminated = []
    reductions = candidates.trace_reductions

    def counted(a, b):
        eliminated.append(len(a))
        return reductions(a, b)

    pool, labeled = steep_embeddings(150), steep_embeddings(10, seed=1)
    monkeypatch.setattr(candidates, "trace_reductions", counted)
    picks, gains = run(pool, labeled, 60, device)
    with_bounds = sum(eliminated)
    eliminated.clear()

    def no_bounds(a, b, y, vh, a_before):
        gains = reductions(a, b)
        return gains, gains.new_full(
            (len(gains), y.shape[2] // y.shape[1] - 1), torch.inf
        )

    monkeypatch.setattr(candidates, "reductions_and_bounds", no_bounds)
    every, every_gains = run(pool, labeled, 60, device)
    assert picks == every
    np.testing.assert_allclose(gains, every_gains, rtol=1e-9)
    assert with_bounds < sum(eliminated)


def steep_embeddings(n, c=4, k=40, seed=0):
    """As of a trained net: a few directions hold nearly everything, and gains fall by
    orders of magnitude.
    """
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(k, k)))[0]
    return (
        100
        * rng.normal(size=(n, c, k))
        * np.geomspace(1, 1e-4, k)
        * rng.uniform(0.2, 2, (n, 1, 1))
        @ rotation
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ERROR_LIMIT", candidates.ERROR_LIMIT),  # as it is
        ("ERROR_LIMIT", 0.0),  # a fresh A and B for every pick
        ("EXACT_ENTRIES", 40 * 50),  # a dozen samples at a time in float64
        ("EXACT_ENTRIES", 1),
    ],
)
def test_float32_gives_the_gains_of_float64_on_a_steep_spectrum(
    name, value, monkeypatch, device
):
    monkeypatch.setattr(candidates, name, value)
    pool, labeled = (
        v.astype("float32")
        for v in (steep_embeddings(150), steep_embeddings(10, seed=1))
    )
    exact, exact_gains = run(pool, labeled, 100, device)
    assert exact_gains[0] > 1e5 * exact_gains[-1]
    picks, gains = run(pool, labeled, 100, device, dtype=torch.float32)
    assert picks == exact
    np.testing.assert_allclose(gains, exact_gains, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial.MAX_ROTATED", 1),
        ("candidates.UPDATE_ROWS", 7),
        ("gains.MAX_UNROLLED_CLASSES", 0),
        ("gains.MIN_UNROLLED", 0),
        ("gains.ENTRIES_AT_A_TIME", 20),
    ],
)
@pytest.mark.parametrize("n_labeled", [0, 5])
def test_large_problems_take_the_same_picks(
    name, value, n_labeled, monkeypatch, device
):
    pool, labeled = random_embeddings(25), random_embeddings(n_labeled, seed=1)
    expected, expected_gains = reference.naive_selection(
        pool, labeled, 8, oversample=1.5
    )
    monkeypatch.setattr(f"fishermask_sk.{name}", value)
    picks, gains = run(pool, labeled, 8, device, oversample=1.5)
    assert picks == expected
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-7)


def test_float64_does_not_lose_late_gains_beside_huge_early_ones():
    """Condition 1e8: M⁻¹, A and B that were only ever updated would hold little but
    rounding by then.
    """
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(30, 2, 12)) * np.geomspace(1e4, 1, 12)
    picks, gains = run(pool, random_embeddings(0, c=2, k=12), 20)
    expected, expected_gains = reference.naive_selection(pool, np.zeros((0, 2, 12)), 20)
    assert picks[:12] == expected[:12]
    np.testing.assert_allclose(gains[:12], expected_gains[:12], rtol=1e-3)
    assert min(gains) >= 0


@pytest.mark.parametrize("form", ["eigenvectors", "embeddings"])
def test_where_float32_would_ask_for_a_refresh_after_every_pick_it_is_not_used(
    form, monkeypatch, device
):
    refreshed = []
    refresh = candidates.Candidates.refresh

    def counted(self):
        refreshed.append(len(self.picked))
        refresh(self)

    monkeypatch.setattr(candidates.Candidates, "refresh", counted)
    rng = np.random.default_rng(0)
    v = (
        100
        * rng.normal(size=(200, 3, 200))
        * np.geomspace(1, 1e-2, 200)
        * rng.uniform(0.2, 2, (200, 1, 1))
    )
    v = torch.as_tensor(v, dtype=torch.float32, device=device)
    exact, exact_gains = run(v.cpu(), v[:0].cpu(), 60)

    def refreshes():
        refreshed.clear()
        target = information(v.double()) / 200 if form == "eigenvectors" else None
        picks, gains = select(v, target, 60)
        assert picks.tolist() == exact
        np.testing.assert_allclose(gains.cpu(), exact_gains, rtol=1e-4)
        return len(refreshed) - 1  # the first is the start

    assert refreshes() <= 2
    monkeypatch.setattr(candidates, "PASS_LIMIT", np.inf)
    assert refreshes() > 10


def gains_from_scratch(v, target, picked):
    """Of all samples, λ = 1 and nothing labelled, by triangular solves: good to the
    condition of a Cholesky factor.
    """
    m = torch.eye(v.shape[2], dtype=v.dtype) + information(v[picked])
    factor = torch.linalg.cholesky(m)
    half = torch.linalg.solve_triangular(factor, v.mT, upper=False)
    p = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    a, b = half.mT @ half, p.mT @ target @ p
    return (
        torch.linalg.solve(torch.eye(v.shape[1], dtype=v.dtype) + a, b)
        .diagonal(dim1=1, dim2=2)
        .sum(1)
    )


@pytest.mark.filterwarnings("ignore:damping=1 is")
@pytest.mark.parametrize(
    "form", ["eigenvectors", "factor", "singular factor", "embeddings"]
)
@pytest.mark.parametrize("seed", [0, 1, 2, 8, 12, 27])
def test_what_rounding_leaves_of_huge_gains_is_not_taken_for_a_gain(
    seed, form, monkeypatch, device
):
    """Eight clusters with norms over four decades: B falls by sixteen orders of
    magnitude when theirs is picked.
    """
    rng = np.random.default_rng(seed)
    clusters = rng.normal(size=(8, 2, 30)) * 10 ** rng.uniform(2, 6, size=(8, 1, 1))
    v = clusters[rng.integers(0, 8, 200)] + 10 * rng.normal(
        size=(200, 2, 30)
    ) * np.geomspace(1, 1e-3, 30)
    if form == "singular factor":
        v[..., -1] = 0
        v[..., -2] = -v[..., 0]
    v = torch.as_tensor(v)
    target = information(v) / 200
    if form.endswith("factor"):
        monkeypatch.setattr(initial, "MAX_ROTATED", 1)
    picks, gains = select(
        v.to(device),
        None if form == "embeddings" else target.to(device),
        12,
        damping=1.0,
    )
    for t, (pick, gain) in enumerate(zip(picks.tolist(), gains.tolist(), strict=True)):
        expected = gains_from_scratch(v, target, picks[:t].cpu())
        assert expected[pick] >= expected.max() * (1 - 1e-3)
        assert gain == pytest.approx(float(expected[pick]), rel=1e-2)


@pytest.mark.parametrize("rank", [0, 3, 12])
def test_information_that_is_singular_has_a_factor(rank, device):
    rows = np.random.default_rng(0).normal(size=(rank, 12)) * np.geomspace(1, 1e9, 12)
    matrix = torch.as_tensor(rows.T @ rows, device=device)
    factored = FactoredInformation(matrix)
    # Every entry beside its own row and column, not beside the largest.
    scale = matrix.diagonal().sqrt()
    error = (factored.times(torch.eye(12).to(matrix)) - matrix).abs()
    assert bool((error <= 1e-13 * scale * scale[:, None]).all())
    v = torch.as_tensor(random_embeddings(4, k=12), device=device)
    expected = v @ matrix @ v.mT
    torch.testing.assert_close(
        factored.quadratic(v), expected, rtol=0, atol=1e-12 * float(expected.amax())
    )


@pytest.mark.parametrize(
    ("n_rows", "n_weights", "expected"),
    [
        (1, 6_000, True),
        (41_999, 7_000, False),
        (42_000, 7_000, True),
        (10**9, 40_000, False),
    ],
)
def test_the_basis_is_changed_where_that_is_cheap(n_rows, n_weights, expected):
    assert initial._is_rotated(n_rows, n_weights) is expected


def test_embeddings_are_overwritten_only_when_asked():
    v = torch.as_tensor(random_embeddings(9))
    before = v.clone()
    select(v, information(v) / 9, 2)
    assert torch.equal(v, before)
    select(v, information(v) / 9, 2, overwrite=True)
    assert not torch.equal(v, before)


def test_hardly_damped_labelled_information_of_low_rank():
    """λ far below rounding of the labelled information: M_∅ is no longer numerically
    positive definite.
    """
    labeled = random_embeddings(1, c=1, k=12) * 1e3
    with pytest.warns(
        UserWarning,
        match=r"damping=1e-12 is .* of the trace of the information.*Raise damping",
    ):
        picks, gains = run(random_embeddings(10, k=12), labeled, 10, damping=1e-12)
    assert sorted(picks) == list(range(10))
    assert np.isfinite(gains).all()


@pytest.mark.parametrize("seed", range(5))
def test_float32_gives_the_picks_of_float64(seed):
    pool, labeled = (
        random_embeddings(60, k=20, seed=seed),
        random_embeddings(5, k=20, seed=99),
    )
    exact, _ = run(pool, labeled, 30)
    assert run(pool, labeled, 30, dtype=torch.float32)[0] == exact


def test_more_classes_than_weights():
    pool, labeled = (
        random_embeddings(12, c=7, k=2),
        random_embeddings(3, c=7, k=2, seed=1),
    )
    assert run(pool, labeled, 4)[0] == reference.naive_selection(pool, labeled, 4)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_samples_the_lowest_index_goes_first(dtype):
    pool = np.tile(random_embeddings(5), (3, 1, 1))
    picks, _ = run(pool, random_embeddings(0), 15, dtype=dtype)
    assert sorted(picks) == list(range(15))
    for i in range(5):  # of the three copies of a sample
        order = [p for p in picks if p % 5 == i]
        assert order == sorted(order)


def test_zero_embeddings_are_picked_in_order_with_zero_gain():
    picks, gains = run(np.zeros((4, 2, 3)), np.zeros((0, 2, 3)), 3)
    assert picks == [0, 1, 2]
    assert gains == [0, 0, 0]


def test_choose_settles_ties():
    picks, _ = run(np.zeros((4, 2, 3)), np.zeros((0, 2, 3)), 2, choose=torch.amax)
    assert picks == [3, 2]


def test_fewer_picks_are_not_the_first_of_more():
    """The weight of a pick depends on b, so that a larger batch is another problem."""
    pool, labeled = random_embeddings(25), random_embeddings(40, seed=1)
    assert (
        reference.naive_selection(pool, labeled, 5)[1]
        != reference.naive_selection(pool, labeled, 10)[1][:5]
    )


def test_infinite_embeddings_are_refused():
    with pytest.raises(
        FloatingPointError, match=r"information has the trace (inf|nan)"
    ):
        run(np.full((3, 1, 2), np.inf), np.zeros((0, 1, 2)), 1)


def test_on_pick_is_called_for_picks_and_removals():
    calls = []
    run(
        random_embeddings(10),
        random_embeddings(0),
        3,
        oversample=2,
        on_pick=lambda: calls.append(1),
    )
    assert len(calls) == 6 + 3
