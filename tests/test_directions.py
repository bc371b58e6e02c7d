"""Leading directions of a mask that is too large for all of them, and what the default
says of it.
"""

import copy
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.baselines import bait_sampling
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.selection import select
from fishermask_sk.strategy.directions import (
    Auto,
    leading,
    n_kept_directions,
    share_held,
)

RNG = np.random.default_rng(0)
# Most of what there is lies in few directions.
X = (RNG.normal(size=(90, 12)) * 0.6 ** np.arange(12)).astype("float64")
Y = (X[:, 0] > 0) + (X[:, 1] > 0).astype(np.int64)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    return NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        classes=range(3),
        lr=0.1,
        max_epochs=3,
        train_split=None,
        verbose=0,
    ).fit(X[:30], Y[:30])


# Of a net as small as this one "auto" would cut nothing.
SMALL = Auto(exact=40, most=25)


def embeddings(net, mask_indices, samples):
    gradients = PerSampleGradients(
        net.module_, lambda batch: net.infer(batch), torch.tensor(samples[:2])
    )
    positions = torch.tensor(mask_indices)
    return gradients.embeddings(torch.tensor(samples), positions, reduced=True)


def products(rows):
    return lambda basis: rows.T @ (rows @ basis)


def test_leading_directions_are_the_eigenvectors():
    rows = torch.tensor(RNG.normal(size=(50, 30)) * 0.6 ** np.arange(30))
    found = leading(products(rows), torch.tensor(RNG.normal(size=(30, 16))), 6)
    _, _, v = torch.linalg.svd(rows)
    torch.testing.assert_close(found.T @ found, torch.eye(6).double())
    aligned = (found.T @ v[:6].T).abs()
    torch.testing.assert_close(aligned, torch.eye(6).double(), atol=1e-6, rtol=0)


def test_where_the_spectrum_is_flat_little_is_lost():
    rows = torch.tensor(RNG.normal(size=(600, 80)) * 0.98 ** np.arange(80))
    found = leading(products(rows), torch.tensor(RNG.normal(size=(80, 25))), 15)
    best = torch.linalg.svdvals(rows)[:15].square().sum()
    assert (rows @ found).square().sum() > 0.95 * best


def test_float32_finds_directions_far_below_its_rounding_of_the_largest():
    """One holds 1e5 times what each of the others does; where there is nothing, none is
    found.
    """
    rows = torch.tensor(RNG.normal(size=(900, 200)))
    rows[:, 120:] = 0
    rows[:, 0] *= 10**2.5
    rows = rows.float()
    start = torch.tensor(RNG.normal(size=(200, 160))).float()
    found = leading(products(rows), start, 150)
    assert found.shape == (200, 120)
    torch.testing.assert_close(rows @ found @ found.T, rows, atol=1e-3, rtol=1e-4)


def test_matrices_of_low_rank_or_none_give_no_false_directions():
    rows, start = torch.ones(5, 4), torch.tensor(RNG.normal(size=(4, 3))).float()
    assert leading(products(rows), start, 3).shape == (4, 1)
    assert leading(products(rows * 0), start, 3).shape == (4, 0)


def test_the_share_counts_up_to_what_is_asked_for():
    parts = torch.tensor([6.0, 3.0, 0.5])
    assert share_held(parts, 10.0, 0.6) == (1, pytest.approx(0.6))
    assert share_held(parts, 10.0, 0.99) == (3, pytest.approx(0.95))
    assert share_held(parts, 0.0, 0.9) == (3, 0.0)
    assert share_held(parts[:0], 1.0, 0.9) == (0, 0.0)


def test_auto_is_exact_for_masks_of_the_documented_size(net):
    for parameters in ({}, {"n_components": None}, {"n_components": 10**6}):
        strategy = FisherMask(60, random_state=0, **parameters)
        picks = strategy.select(net, X[30:], 8, X_labeled=X[:30])
        assert strategy.n_components_ == 60
        if not parameters:
            expected = picks
        assert np.array_equal(picks, expected)


def test_auto_cuts_larger_ones_once_and_says_what_they_hold(net):
    strategy = FisherMask(
        60, layers="0.*", n_mask_samples=64, n_components=SMALL, random_state=0
    )
    message = (
        r"The mask has 60 weights, more than the 40 that .*: the selection works in "
        r"their (\d+) leading directions, which hold ([\d.]+) % of the information's "
        r"trace on samples that did not find them\. .*n_components=None to keep all"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        first = strategy.select(net, X[30:], 8, X_labeled=X[:30])

    n, percent = re.search(message, str(caught[0].message)).groups()
    assert len(caught) == 1
    assert strategy.n_components_ == int(n) <= 25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(first, strategy.select(net, X[30:], 8, X_labeled=X[:30]))
        strategy.select(net, X[40:], 8, X_labeled=X[:40])  # a later round of a loop
    with pytest.warns(UserWarning, match="The mask has 50 weights"):
        strategy.set_params(sparsity=50).select(net, X[30:], 8, X_labeled=X[:30])
    # What they hold, of all samples, in float64 from the best subspace of that size.
    v = embeddings(net, strategy.mask_indices_, X).flatten(0, 1)
    sigma = torch.linalg.svdvals(v).square()
    assert float(percent) / 100 <= sigma[: int(n)].sum() / sigma.sum() + 0.05
    assert float(percent) > 99


def test_few_samples_span_few_directions_and_stay_exact(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy = FisherMask(60, n_components=SMALL, random_state=0)
        strategy.select(net, X[:9], 2, X_labeled=X[20:23])
    assert strategy.n_components_ == 60


WIDE = np.random.default_rng(1).normal(size=(700, 600)) * 0.9 ** np.arange(600)


def wide_net(n_classes=11, n_hidden=None):
    """Of 601 weights a class, or with a layer in front."""
    torch.manual_seed(0)
    layers = [nn.Linear(n_hidden or 600, n_classes)]
    if n_hidden:
        layers = [nn.Linear(600, n_hidden), nn.Tanh(), *layers]
    return NeuralNetClassifier(
        nn.Sequential(*layers).double(),
        criterion=nn.CrossEntropyLoss,
        classes=range(n_classes),
        verbose=0,
    ).initialize()


def test_a_head_that_is_a_product_is_never_cut():
    """6,611 weights, more than are used exactly otherwise."""
    asked = {"n_instances": 3, "X_labeled": WIDE[:20]}
    net = wide_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut = FisherMask(1.0, candidates=2, n_information_samples=110, random_state=0)
        picks = cut.select(net, WIDE[20:], **asked)
        assert cut.n_components_ == 11 * 601
        exact = clone(cut).set_params(n_components=None)
        assert np.array_equal(picks, exact.select(net, WIDE[20:], **asked))
        np.testing.assert_allclose(
            cut.trace_reductions_, exact.trace_reductions_, rtol=1e-9
        )


def test_beside_a_head_only_the_others_are_cut(net):
    asked = {"n_instances": 6, "X_labeled": X[:30]}
    limits = Auto(exact=20, most=12)
    strategy = FisherMask(80, n_components=limits, random_state=0)
    said = "Besides the head, which is kept whole, the mask has 47 weights, more than"
    with pytest.warns(UserWarning, match=said):
        picks = strategy.select(net, X[30:], **asked)
    assert 33 < strategy.n_components_ <= 33 + 12
    exact = FisherMask(80, n_components=None, random_state=0)
    assert np.array_equal(picks, exact.select(net, X[30:], **asked))


def test_the_directions_beside_a_head_are_those_of_its_embeddings(net):
    """F̄ and all that is made of it, against a dense form in the same directions."""
    limits = Auto(exact=20, most=12, share=1.0)
    strategy = FisherMask(80, n_mask_samples=90, n_components=limits, random_state=0)
    with pytest.warns(UserWarning, match="Besides the head"):
        strategy.select(net, X[30:], 6, X_labeled=X[:30])
    v = embeddings(net, strategy.mask_indices_, X)
    head = strategy.mask_indices_ >= 130
    rest = v[..., ~head].flatten(0, 1)
    found = torch.linalg.svd(rest, full_matrices=False).Vh[:12].T
    v = torch.cat([v[..., head], v[..., ~head] @ found], dim=2)
    information = v.flatten(0, 1).T @ v.flatten(0, 1) / 90
    known = v[:30].flatten(0, 1).T @ v[:30].flatten(0, 1) / 30
    picks, gains = select(
        v[30:], information, 6, labeled_information=known, n_labeled=30
    )
    assert picks.tolist() == strategy.query_idx_.tolist()
    # An eighth of the samples found none of the directions.
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-3)


def test_a_number_of_directions_is_obeyed_where_the_head_could_be_a_product(net):
    strategy = FisherMask(layers="last", sparsity=33, n_components=9, random_state=0)
    strategy.select(net, X[30:], 4, X_labeled=X[:30])
    assert strategy.n_components_ == 9


def test_a_net_that_tells_nothing_leaves_one_direction(net):
    silent = copy.deepcopy(net)
    with torch.no_grad():
        silent.module_[2].bias[:] = torch.tensor([1e4, 0.0, 0.0])
    strategy = FisherMask(60, layers="0.*", n_components=SMALL, random_state=0)
    with pytest.warns(UserWarning, match="which hold 0 %"):
        strategy.select(silent, X[30:], 2, X_labeled=X[:30])
    assert strategy.n_components_ == 1


def test_the_picks_of_enough_directions_are_those_of_all(net):
    with pytest.warns(UserWarning, match="which hold 99"):
        cut = FisherMask(60, layers="0.*", n_components=SMALL, random_state=0).select(
            net, X[30:], 6, X_labeled=X[:30]
        )
    exact = FisherMask(60, layers="0.*", n_components=None, random_state=0)
    assert np.array_equal(cut, exact.select(net, X[30:], 6, X_labeled=X[:30]))


def test_bait_is_exact_whatever_its_size():
    """A head that "auto" would cut, and say so."""
    k, n_classes, n_samples = 21 * 601, 21, 60
    assert n_kept_directions(k, k, Auto(), n_samples * (n_classes - 1)) == (0, 1000)
    net, samples = wide_net(n_classes), WIDE[:n_samples]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bait_sampling(net, samples[10:], 5, X_labeled=samples[:10])


def test_the_warning_about_the_head_comes_once_for_a_loop(net):
    strategy = FisherMask(20, random_state=0)
    with pytest.warns(UserWarning, match="the head alone has 33") as caught:
        strategy.select(net, X[30:], 2, X_labeled=X[:30])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy.select(net, X[30:], 2, X_labeled=X[:30])
    with pytest.warns(UserWarning, match="k=10 weights and the head alone"):
        strategy.set_params(sparsity=10).select(net, X[30:], 2, X_labeled=X[:30])


@pytest.mark.parametrize("value", ["all", "Auto", 0, 2.5, True])
def test_other_numbers_of_components_are_refused(net, value):
    with pytest.raises(ValueError, match=rf"n_components={value!r} must be"):
        FisherMask(60, n_components=value).select(net, X[30:], 2, X_labeled=X[:30])


def test_the_search_for_directions_has_a_bar_that_closes_full(net, capfd):
    FisherMask(50, n_components=5, verbose=1, random_state=0).select(
        net, X[30:], 2, X_labeled=X[:30]
    )
    shown = capfd.readouterr().err
    # Of 90 samples that found them, three times each.
    assert "directions: 100%" in shown
    assert "270/270" in shown
