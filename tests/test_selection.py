"""The incremental selection against dense inverses of every candidate's M, in
float64.
"""

import numpy as np
import pytest
import reference
import torch

from fishermask_sk.gradients.fisher import information
from fishermask_sk.selection import select
from fishermask_sk.selection.candidates import cholesky
from fishermask_sk.selection.embeddings import DenseEmbeddings, first_copies
from fishermask_sk.selection.gains import trace_reductions


def random_embeddings(n, c=3, k=6, seed=0):
    rng = np.random.default_rng(seed)
    # Lengths that differ, so that the best is well apart from the second.
    return rng.normal(size=(n, c, k)) * rng.uniform(0.2, 2, size=(n, 1, 1))


def run(
    pool,
    labeled,
    n_instances,
    device="cpu",
    dtype=torch.float64,
    form=None,
    width=None,
    **kw,
):
    """Picks and gains, from matrices or, in the form "kernel", from rows; in blocks,
    where a sample is said to have so many numbers.
    """
    pool_, labeled_ = (
        torch.as_tensor(v, dtype=dtype, device=device) for v in (pool, labeled)
    )
    known = information(labeled_.double())
    if form == "kernel":
        target, kw["labeled_embeddings"] = None, labeled_
    else:
        target = (information(pool_.double()) + known) / (len(pool) + len(labeled))
        kw["labeled_information"] = known / len(labeled) if len(labeled) else None
    if width is not None:
        pool_ = DenseEmbeddings(pool_)
        pool_.width = width
    picks, gains = select(pool_, target, n_instances, n_labeled=len(labeled), **kw)
    return picks.tolist(), gains.tolist()


FORMS = pytest.mark.parametrize("form", ["matrices", "kernel"])


@FORMS
@pytest.mark.parametrize("oversample", [1, 2, 1.3])
@pytest.mark.parametrize("n_labeled", [0, 1, 7])
@pytest.mark.parametrize("n_instances", [1, 2, 10, 25])
@pytest.mark.parametrize("damping", [1.0, 0.01])
def test_picks_and_gains_equal_the_slow_twin(
    n_instances, n_labeled, oversample, damping, form, device
):
    pool, labeled = random_embeddings(25), random_embeddings(n_labeled, seed=1)
    settings = {"damping": damping, "oversample": oversample}
    picks, gains = run(pool, labeled, n_instances, device, form=form, **settings)
    expected, expected_gains = reference.naive_selection(
        pool, labeled, n_instances, damping, oversample
    )
    assert picks == expected
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-7, atol=1e-12)


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


def test_float32_gives_the_gains_of_float64_on_a_steep_spectrum(device):
    pool, labeled = (
        v.astype("float32")
        for v in (steep_embeddings(150), steep_embeddings(10, seed=1))
    )
    exact, exact_gains = run(pool, labeled, 100, device)
    assert exact_gains[0] > 1e5 * exact_gains[-1]
    picks, gains = run(pool, labeled, 100, device, dtype=torch.float32)
    assert picks == exact
    np.testing.assert_allclose(gains, exact_gains, rtol=1e-3)


@FORMS
@pytest.mark.parametrize("n_labeled", [0, 5])
def test_a_pool_in_blocks_gives_the_same_picks(n_labeled, form, device):
    pool, labeled = random_embeddings(25), random_embeddings(n_labeled, seed=1)
    expected, expected_gains = reference.naive_selection(
        pool, labeled, 8, oversample=1.5
    )
    settings = {"form": form, "oversample": 1.5}
    for width in (2**18, 2**40):  # eight samples in a block, and one
        picks, gains = run(pool, labeled, 8, device, width=width, **settings)
        assert picks == expected
        np.testing.assert_allclose(gains, expected_gains, rtol=1e-7)


@pytest.mark.parametrize(("n", "c"), [(30, 3), (2_500, 3), (2_100, 32), (2_100, 33)])
def test_gains_of_few_and_many_candidates_and_rows(n, c, device):
    rng = np.random.default_rng(0)
    a, b = (
        torch.as_tensor(v @ v.swapaxes(1, 2))
        for v in (rng.normal(size=(n, c, c + 1)) for _ in range(2))
    )
    found = trace_reductions(a.to(device), b.to(device)).cpu()
    inverse = torch.linalg.inv(torch.eye(c, dtype=a.dtype) + a)
    torch.testing.assert_close(found, (inverse * b).sum((1, 2)))


@pytest.mark.parametrize("spread", [1e-3, 3e-5])
def test_float32_tells_near_copies_apart(spread, device):
    """Many candidates whose gains float32 has no digits for: they are looked at one by
    one, or all are float64 in the end.
    """
    rng = np.random.default_rng(0)
    originals = 30 * rng.normal(size=(3, 2, 30)) * np.geomspace(1, 1e-3, 30)
    pool = originals[rng.integers(0, 3, 300)]
    pool = (pool * (1 + spread * rng.normal(size=pool.shape))).astype("float32")
    picks, gains = run(pool, pool[:0], 40, device, dtype=torch.float32)
    v = torch.as_tensor(pool).double()
    target = information(v) / len(v)
    for t, (pick, gain) in enumerate(zip(picks, gains, strict=True)):
        expected = gains_from_scratch(v, target, torch.tensor(picks[:t], dtype=int))
        assert gain == pytest.approx(float(expected[pick]), rel=1e-6)
        expected[picks[:t]] = 0
        assert gain >= float(expected.max()) * (1 - 2e-6)


def problem(seed, information_over_damping, n=24):
    """A pool, labelled samples and λ: few weights or many, spectra flat or steep."""
    rng = np.random.default_rng(seed)
    c, k, n_labeled = rng.integers([1, 6, 0], [4, 25, 6])
    rotation = np.linalg.qr(rng.normal(size=(k, k)))[0]
    spectrum = np.geomspace(1, 10 ** -rng.uniform(0, 3), k)
    pool, labeled = (
        rng.normal(size=(n, c, k)) * spectrum @ rotation * rng.uniform(0.2, 2)
        for n in (n, n_labeled)
    )
    return pool, labeled, (pool**2).sum((1, 2)).max() / information_over_damping


RATIOS = pytest.mark.parametrize("ratio", [1, 1e4, 1e7, 1e9, 6e10, 1e12])
AT_ITS_EDGE = pytest.mark.filterwarnings("ignore:damping=")


@AT_ITS_EDGE
@FORMS
@RATIOS
def test_gains_are_right_however_small_damping_is(ratio, form):
    for seed in range(4):
        pool, labeled, damping = problem(seed, ratio)
        picks, gains = run(pool, labeled, 10, form=form, damping=damping)
        twin = reference.PreciseObjective(pool, labeled, 10, damping)
        for t, (pick, gain) in enumerate(zip(picks, gains, strict=True)):
            exact = twin.gains(picks[:t])
            assert exact[pick] >= max(exact.values()) * (1 - 2e-6)
            assert gain == pytest.approx(exact[pick], rel=max(1e-4, 1e-15 * ratio))


@AT_ITS_EDGE
@FORMS
@RATIOS
def test_the_backward_pass_drops_what_is_least_missed(ratio, form):
    for seed in range(4):
        check_backward_pass(seed, ratio, form, n_instances=5)


@FORMS
@pytest.mark.parametrize("ratio", [1, 1e7])
def test_a_backward_pass_of_many_removals(ratio, form):
    """All is made afresh on the way."""
    check_backward_pass(4, ratio, form, n_instances=20)


def check_backward_pass(seed, ratio, form, n_instances):
    pool, labeled, damping = problem(seed, ratio, max(24, 2 * n_instances + 2))
    first, _ = run(pool, labeled, n_instances, form=form, damping=damping, oversample=2)
    picks = picks_first(pool, labeled, n_instances, damping, form)
    twin = reference.PreciseObjective(pool, labeled, n_instances, damping)
    while len(picks) > n_instances:
        left = {i: twin.value([j for j in picks if j != i]) for i in picks}
        picks.remove(min(left, key=left.get))
    assert first == picks


def picks_first(pool, labeled, n_instances, damping, form):
    """The 2·b picks before a backward pass: with each labelled sample counted twice, a
    pick of 2·b has the weight of one of b.
    """
    pool, labeled = torch.as_tensor(pool), torch.as_tensor(labeled)
    every, twice = torch.cat([pool, labeled]), torch.cat([labeled, labeled])
    target, kw = None, {"n_labeled": len(twice), "damping": damping}
    if form == "kernel":
        kw["labeled_embeddings"] = twice
        kw["information_embeddings"] = every / len(every) ** 0.5
    else:
        target = information(every) / len(every)
        kw["labeled_information"] = information(labeled) / max(1, len(labeled))
    return select(pool, target, 2 * n_instances, **kw).indices.tolist()


def test_a_backward_pass_that_cannot_decide_raises():
    pool = random_embeddings(10, c=1, k=12)
    with (
        pytest.warns(UserWarning, match=r"damping=1e-17 is"),
        pytest.raises(
            FloatingPointError,
            match=r"cannot tell which pick is least missed.*\de\+1. times the damping.*"
            r"oversample=1",
        ),
    ):
        run(pool, pool[:0], 3, damping=1e-17, oversample=2)


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


def test_float32_whose_early_gains_drown_late_ones(device):
    rng = np.random.default_rng(0)
    v = (
        100
        * rng.normal(size=(200, 3, 100))
        * np.geomspace(1, 1e-2, 100)
        * rng.uniform(0.2, 2, (200, 1, 1))
    ).astype("float32")
    exact, exact_gains = run(v, v[:0], 60)
    picks, gains = run(v, v[:0], 60, device, dtype=torch.float32)
    assert picks == exact
    np.testing.assert_allclose(gains, exact_gains, rtol=1e-4)


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
@pytest.mark.parametrize("form", ["matrices", "singular matrices", "kernel"])
@pytest.mark.parametrize("seed", [0, 1, 2, 8, 12, 27])
def test_what_rounding_leaves_of_huge_gains_is_not_taken_for_a_gain(seed, form, device):
    """Eight clusters with norms over four decades: B falls by sixteen orders of
    magnitude when theirs is picked.
    """
    rng = np.random.default_rng(seed)
    clusters = rng.normal(size=(8, 2, 30)) * 10 ** rng.uniform(2, 6, size=(8, 1, 1))
    v = clusters[rng.integers(0, 8, 200)] + 10 * rng.normal(
        size=(200, 2, 30)
    ) * np.geomspace(1, 1e-3, 30)
    if form == "singular matrices":
        v[..., -1] = 0
        v[..., -2] = -v[..., 0]
    v = torch.as_tensor(v)
    target = information(v) / 200
    picks, gains = select(
        v.to(device),
        None if form == "kernel" else target.to(device),
        12,
        damping=1.0,
    )
    for t, (pick, gain) in enumerate(zip(picks.tolist(), gains.tolist(), strict=True)):
        expected = gains_from_scratch(v, target, picks[:t].cpu())
        assert expected[pick] >= expected.max() * (1 - 1e-3)
        assert gain == pytest.approx(float(expected[pick]), rel=1e-2)


@pytest.mark.filterwarnings("ignore:damping=1 is")
@pytest.mark.parametrize(("scale", "rtol"), [(1e5, 1e-4), (1e7, 5e-2)])
@pytest.mark.parametrize("n", [1, 300])
def test_float32_of_one_weight_has_the_gain_of_arithmetic(n, scale, rtol, device):
    """With one weight, of mean information f, a sample of information s lowers f/λ to
    f/(λ + s). The last digit of float32 is far more than λ here.
    """
    rng = np.random.default_rng(0)
    pool = (scale * rng.normal(size=(n, 2, 1))).astype("float32").astype(float)
    each = np.square(pool).sum((1, 2))
    (pick,), gains = run(pool, pool[:0], 1, device, torch.float32)
    expected = each.mean() * each / (1 + each)
    np.testing.assert_allclose(gains, expected[pick], rtol=rtol)
    assert expected[pick] >= (1 - rtol) * expected.max()


@pytest.mark.filterwarnings("ignore:damping=1e-10 is")
def test_nobody_is_picked_twice_where_rounding_leaves_no_number(device):
    """Lengths from 1e-8 to 1e8, and λ = 1e-10: all are picked, or it is refused."""
    n_picked = 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        pool = rng.normal(size=(2 + seed // 4, 32, 10))
        pool *= 10 ** rng.uniform(-8, 8, (len(pool), 1, 1))
        asked = len(pool), device, torch.float32
        try:
            picks, gains = run(pool, pool[:0], *asked, damping=1e-10)
        except FloatingPointError:
            continue
        assert sorted(picks) == list(range(len(pool)))
        assert np.isfinite(gains).all()
        n_picked += 1
    assert n_picked > 3


def test_nothing_is_overwritten_but_matrices_when_asked():
    v = torch.as_tensor(random_embeddings(9))
    before, target = v.clone(), information(v) / 9
    kept = target.clone()
    select(v, target, 2, n_labeled=3, labeled_information=target)
    assert torch.equal(v, before)
    assert torch.equal(target, kept)
    select(v, target, 2, n_labeled=3, labeled_information=kept, overwrite=True)
    assert torch.equal(v, before)
    assert not torch.equal(target, before)


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


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_samples_the_lowest_index_goes_first(dtype, form):
    pool = np.tile(random_embeddings(5), (3, 1, 1))
    picks, _ = run(pool, random_embeddings(0), 15, dtype=dtype, form=form)
    assert sorted(picks) == list(range(15))
    for i in range(5):  # of the three copies of a sample
        order = [p for p in picks if p % 5 == i]
        assert order == sorted(order)


@AT_ITS_EDGE
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1.0, 1e-3, 1e-5, 1e-8, 1e-11])
def test_of_copies_the_lowest_index_goes_first_at_any_damping(damping, dtype, form):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        c, k, n = rng.integers([1, 3, 4], [5, 40, 12])
        v = rng.normal(size=(n, c, k)) * rng.uniform(0.2, 2, size=(n, 1, 1))
        pool = np.tile(v * 10 ** rng.uniform(0, 2), (4, 1, 1))
        labeled = rng.normal(size=(rng.integers(0, 4), c, k))
        settings = {"damping": damping, "dtype": dtype, "form": form}
        picks, _ = run(pool, labeled, min(4 * n, 20), **settings)
        for i in range(n):
            order = [p for p in picks if p % n == i]
            assert order == list(range(i, i + n * len(order), n))


@pytest.mark.parametrize("width", [1, 2**19])
def test_the_first_of_each_copies(width):
    """Also of values that differ in their signs alone, and of whole numbers."""
    rng = np.random.default_rng(0)
    values = torch.as_tensor(rng.integers(-1, 2, size=(200, 1, 4)), dtype=torch.float32)
    for dtype in (torch.float32, torch.float64):
        found = DenseEmbeddings(values.to(dtype))
        found.width = width
        rows = [tuple(row) for row in values.flatten(1).tolist()]
        assert first_copies(found).tolist() == [rows.index(row) for row in rows]
        found = DenseEmbeddings(values.repeat(1, 1, 2)[..., ::2].to(dtype)[:, :, ::2])
        rows = [row[::4] for row in (2 * row for row in rows)]
        assert first_copies(found).tolist() == [rows.index(row) for row in rows]


def test_zeros_of_either_sign_are_copies():
    values = torch.tensor([[1.0, 0.0], [1.0, -0.0], [-0.0, 0.0], [0.0, -0.0]])
    for dtype in (torch.float32, torch.float64):
        found = first_copies(DenseEmbeddings(values.to(dtype)[:, None]))
        assert found.tolist() == [0, 0, 2, 2]


@FORMS
@pytest.mark.parametrize("damping", [1.0, 0.1, 0.01])
def test_copies_of_one_sample_are_picked_from_the_first_on(damping, form):
    for seed in range(45):
        rng = np.random.default_rng(seed)
        n, c, k = rng.integers([5, 1, 5], [40, 5, 60])
        v = rng.normal(size=(1, c, k)).repeat(n, axis=0)
        picks, _ = run(v, v[:0], 5, damping=damping, form=form)
        assert picks == [0, 1, 2, 3, 4]


def copies(n, *shape):
    return np.random.default_rng(0).normal(size=(1, *shape)).repeat(n, axis=0)


@FORMS
@pytest.mark.parametrize(
    ("pool", "n_before"),
    [
        (np.zeros((12, 2, 3)), 0),
        (copies(12, 2, 3), 0),
        (np.concatenate([random_embeddings(3, 2, 3), np.zeros((9, 2, 3))]), 3),
        (np.concatenate([9 * random_embeddings(2, 2, 3), copies(10, 2, 3)]), 2),
    ],
)
def test_who_is_picked_is_drawn_where_nothing_tells_samples_apart(pool, n_before, form):
    def drawn(seed):
        rng = np.random.default_rng(seed)
        with pytest.warns(UserWarning, match="no sample would") as said:
            found = run(
                pool,
                pool[:0],
                6,
                form=form,
                draw=lambda open_: open_[rng.integers(len(open_))],
            )
        assert len(said) == 1
        assert f"After {n_before} of 6 picks no sample would teach" in str(
            said[0].message
        )
        return found

    picks, gains = drawn(0)
    assert (picks, gains) == drawn(0)
    ordered, gains_in_order = run(pool, pool[:0], 6, form=form)
    assert picks[:n_before] == ordered[:n_before]
    np.testing.assert_allclose(gains, gains_in_order, rtol=1e-9, atol=1e-15)
    assert len({tuple(drawn(seed)[0]) for seed in range(4)}) > 1


def test_nobody_is_drawn_where_some_are_better_or_all_are_picked():
    tied = np.tile(random_embeddings(5), (3, 1, 1))
    for pool, n_instances in ((tied, 5), (tied, 15), (np.zeros((4, 2, 3)), 4)):
        ordered = run(pool, pool[:0], n_instances)
        assert run(pool, pool[:0], n_instances, draw=lambda open_: open_[-1]) == ordered


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


def test_a_factor_of_m_is_never_singular():
    """Where rounding leaves nothing of the smallest eigenvalues, they are λ."""
    v = 1e10 * torch.ones(6, 1, dtype=torch.float64)
    factor = cholesky(v @ v.mT, damping=1e-10)
    assert (factor.diagonal().abs() >= 1e-5).all()
    torch.testing.assert_close(factor @ factor.mT, v @ v.mT, rtol=1e-12, atol=0)
