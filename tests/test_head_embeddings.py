"""A head as a product, and with the rest of a mask beside it, against the dense form in
float64.
"""

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from steps import embedded as embedded_by_a_query
from steps import without_product
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.selection import select
from fishermask_sk.selection.embeddings import DenseEmbeddings
from fishermask_sk.selection.head_embeddings import (
    HeadEmbeddings,
    JoinedEmbeddings,
    head_mask,
)
from fishermask_sk.selection.top_head_embeddings import TopHeadEmbeddings


def mask_of(kind, n_classes, d, rng):
    """Positions in a head's weight (C, d), then its bias."""
    every = np.arange(n_classes * (d + 1))
    if kind == "whole":
        return every
    if kind == "weight alone":
        return every[: n_classes * d]
    if kind == "one class":
        return every[d : 2 * d]
    return np.sort(rng.choice(every, len(every) // 2, replace=False))


def embedded(kind, n=40, n_classes=4, d=6, n_rows=None, n_rest=0, tops=False, seed=0):
    """The same embeddings as a product and as a tensor."""
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(n, n_rows or n_classes - 1, n_classes))
    r *= rng.uniform(0.2, 2, size=(n, 1, 1))
    if n_rows is not None:  # as of n_top_classes: zeros beyond each sample's own
        r *= rng.permuted(np.arange(n_classes) <= n_rows + 0 * r[:, :1], axis=2)
    h = np.concatenate([rng.normal(size=(n, d)), np.ones((n, 1))], axis=1)
    positions = torch.as_tensor(mask_of(kind, n_classes, d, rng))
    weight, bias = slice(0, n_classes * d), slice(n_classes * d, n_classes * (d + 1))
    _, mask = head_mask(positions, weight, bias, d)
    r, h = torch.as_tensor(r), torch.as_tensor(h)
    head = HeadEmbeddings(r, h, mask)
    if tops:
        head = TopHeadEmbeddings.of_whole(head, n_rows + 1)
    dense = r[:, :, mask.classes] * h[:, None, mask.columns]
    if not n_rest:
        return head, dense
    values = torch.as_tensor(rng.normal(size=(n, r.shape[1], n_rest)))
    joined = torch.cat([dense, values], dim=2)
    return JoinedEmbeddings(head, DenseEmbeddings(values)), joined


KINDS = ["whole", "weight alone", "one class", "part"]
SHAPES = [
    {},
    {"n_rest": 5},
    {"n_classes": 2, "d": 9},
    {"n_classes": 7, "n_rows": 2, "n_rest": 3},
    {"n_classes": 7, "n_rows": 2, "tops": True},
    {"n_classes": 7, "n_rows": 2, "n_rest": 3, "tops": True},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_selection_asks_for_is_that_of_the_tensor(kind, shape):
    found, dense = embedded(kind, **shape)
    expected = DenseEmbeddings(dense)
    rng = np.random.default_rng(1)
    u = torch.as_tensor(rng.normal(size=(found.k, 3)))
    m = torch.as_tensor(rng.normal(size=(found.k, found.k)))
    m = m @ m.mT
    some = torch.tensor([3, 0, 7])
    assert (found.n, found.c, found.k) == dense.shape
    for one, other in [
        (found.times(u), expected.times(u)),
        (found.rows(some), dense[some]),
        (found.information(), expected.information()),
        (found.quadratic(m), expected.quadratic(m)),
        (found.quadratic(), expected.quadratic()),
        (found.part(slice(3, 9)).times(u), dense[3:9] @ u),
        (
            found.scaled(torch.arange(found.n)).rows(some),
            dense[some] * some[:, None, None],
        ),
        (found.of([t[some] for t in found.tensors]).times(u), dense[some] @ u),
    ]:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("width", [None, 2**19])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_picks_are_those_of_the_tensor(kind, shape, width):
    found, dense = embedded(kind, **shape)
    if width is not None:  # as of samples so large that a block holds four
        found.width = width
        if "n_rest" in shape:
            found.head.width = width
    known, known_dense = embedded(kind, n=6, seed=1, **shape)
    of_labeled = DenseEmbeddings(known_dense).information()
    target = (DenseEmbeddings(dense).information() + of_labeled) / (found.n + 6)
    settings = {"n_labeled": 6, "oversample": 1.5, "damping": 0.05}
    matrices = {"labeled_information": of_labeled / 6, **settings}
    expected = select(dense, target, 9, **matrices)
    in_rows = {"labeled_embeddings": known, **settings}
    for picks in (
        select(found, target, 9, **matrices),
        select(found, None, 9, **in_rows),
    ):
        assert picks.indices.tolist() == expected.indices.tolist()
        torch.testing.assert_close(picks.trace_reductions, expected.trace_reductions)


@pytest.mark.parametrize(("n_classes", "d"), [(2, 9), (4, 6), (7, 3)])
def test_a_whole_head_goes_without_what_all_classes_share(n_classes, d):
    head, _ = embedded("whole", n_classes=n_classes, d=d)
    assert head.centred() is None  # these rows do not sum to zero
    shared = head.cotangents.mean(2, keepdim=True)
    head = HeadEmbeddings(head.cotangents - shared, head.inputs, head.mask)
    dense = head.rows(torch.arange(head.n))
    found = head.centred()
    assert (found.k, head.k) == ((n_classes - 1) * (d + 1), n_classes * (d + 1))
    inner = dense.flatten(0, 1) @ dense.flatten(0, 1).mT
    rows = found.rows(torch.arange(found.n)).flatten(0, 1)
    torch.testing.assert_close(rows @ rows.mT, inner)
    settings = {"n_labeled": 6, "damping": 0.05}
    few = DenseEmbeddings(dense[:6]).information() / 6
    expected = select(
        dense[6:],
        DenseEmbeddings(dense).information() / head.n,
        9,
        labeled_information=few,
        **settings,
    )
    picks = select(
        found.part(slice(6, None)),
        found.information() / head.n,
        9,
        labeled_information=found.part(slice(0, 6)).information() / 6,
        **settings,
    )
    assert picks.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(
        picks.trace_reductions, expected.trace_reductions, rtol=1e-9, atol=0
    )


def test_the_head_of_one_score_keeps_all():
    head, _ = embedded("whole", n_classes=1, n_rows=1)
    none = HeadEmbeddings(0 * head.cotangents, head.inputs, head.mask)
    assert head.centred() is none.centred() is None


class Scaled(nn.Module):
    """Something lies between the head and the scores."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return 2 * self.head(self.body(x).tanh())


class LogSoftmax(Scaled):
    def forward(self, x):
        return self.head(self.body(x).tanh()).log_softmax(1)


class Probabilities(Scaled):
    def forward(self, x):
        return (self.head(self.body(x).tanh()) / 0.7).softmax(1)


class SometimesScaled(Scaled):
    """As the first samples do not show."""

    def forward(self, x):
        scores = self.head(self.body(x).tanh())
        return torch.where(x[:, :1] > 2.5, 2 * scores, scores)


class OneClassScaled(Scaled):
    """The cotangents of all classes do not sum to zero."""

    def forward(self, x):
        scale = torch.tensor([1.0, 2.0, 1.0, 1.0]).to(x)
        return self.head(self.body(x).tanh()) * scale


class SometimesOneClassScaled(Scaled):
    """As the first samples do not show."""

    def forward(self, x):
        scores = self.head(self.body(x).tanh())
        scale = torch.tensor([1.0, 2.0, 1.0, 1.0]).to(x)
        return torch.where(x[:, :1] > 2.5, scores * scale, scores)


class Averaged(Scaled):
    """The head is applied at two positions, and its scores are averaged."""

    def forward(self, x):
        x = torch.stack([x, x.roll(1, dims=1)], dim=1)
        return self.head(self.body(x).tanh()).mean(1)


class OfTheLargest(Averaged):
    """The positions have other gradients."""

    def forward(self, x):
        x = torch.stack([x, x.roll(1, dims=1)], dim=1)
        return self.head(self.body(x).tanh()).amax(1)


class SometimesOfTheLargest(Averaged):
    """As the first samples do not show."""

    def forward(self, x):
        positions = torch.stack([x, x.roll(1, dims=1)], dim=1)
        scores = self.head(self.body(positions).tanh())
        return torch.where(x[:, :1] > 2.5, scores.amax(1), scores.mean(1))


def plain(bias=True):
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4, bias=bias))


@pytest.mark.filterwarnings("ignore:The mask keeps k")
@pytest.mark.parametrize(
    ("make", "params", "kind"),
    [
        (plain, {"sparsity": 0.9}, JoinedEmbeddings),
        (lambda: plain(bias=False), {"sparsity": 0.9}, JoinedEmbeddings),
        (plain, {"layers": "last", "sparsity": 1.0}, HeadEmbeddings),
        (plain, {"sparsity": 60}, HeadEmbeddings),
        (plain, {"sparsity": 0.9, "max_memory": "7.3MiB"}, JoinedEmbeddings),
        (plain, {"sparsity": 0.9, "n_information_samples": 50}, JoinedEmbeddings),
        (plain, {"sparsity": 0.9, "candidates": 5}, JoinedEmbeddings),
        (plain, {"layers": "last", "sparsity": 4}, DenseEmbeddings),
        (plain, {"sparsity": 0.9, "n_top_classes": 2}, JoinedEmbeddings),
        (plain, {"sparsity": 60, "n_top_classes": 3}, TopHeadEmbeddings),
        (Scaled, {"sparsity": 60, "n_top_classes": 2}, TopHeadEmbeddings),
        (LogSoftmax, {"sparsity": 60, "n_top_classes": 2}, DenseEmbeddings),
        (Scaled, {"sparsity": 0.9}, JoinedEmbeddings),
        (Scaled, {"layers": "last", "sparsity": 1.0}, HeadEmbeddings),
        (Scaled, {"sparsity": 0.9, "weighting": "uniform"}, JoinedEmbeddings),
        (LogSoftmax, {"sparsity": 0.9}, JoinedEmbeddings),
        (Probabilities, {"layers": "last", "sparsity": 1.0}, HeadEmbeddings),
        (SometimesScaled, {"sparsity": 0.9}, JoinedEmbeddings),
        (OneClassScaled, {"layers": "last", "sparsity": 1.0}, HeadEmbeddings),
        (SometimesOneClassScaled, {"layers": "last", "sparsity": 1.0}, DenseEmbeddings),
        (SometimesOneClassScaled, {"sparsity": 0.9}, DenseEmbeddings),
        (Averaged, {"sparsity": 0.9}, JoinedEmbeddings),
        (Averaged, {"layers": "last", "sparsity": 1.0}, HeadEmbeddings),
        (OfTheLargest, {"sparsity": 0.9}, DenseEmbeddings),
        (SometimesOfTheLargest, {"sparsity": 0.9}, DenseEmbeddings),
    ],
)
def test_a_query_takes_the_product_where_it_holds(make, params, kind):
    torch.manual_seed(0)
    criterion = nn.NLLLoss if make is Probabilities else nn.CrossEntropyLoss
    settings = {"criterion": criterion, "train_split": None, "verbose": 0}
    net = NeuralNetClassifier(make().double(), **settings).initialize()
    X = np.random.default_rng(0).normal(size=(400, 8))
    X[-1, 0] = 3
    asked = X[20:], 12
    kinds, strategies = [], []
    head = "2" if isinstance(net.module_, nn.Sequential) else "head"
    for each in (net, without_product(net, head)):
        strategies.append(FisherMask(random_state=0, **params))
        strategies[-1].select(each, *asked, X_labeled=X[:20])
        found = embedded_by_a_query(strategies[-1], each, *asked, X_labeled=X[:20])
        kinds.append(type(found.pool))
    product, dense = strategies
    assert kinds == [kind, DenseEmbeddings]
    assert product.n_components_ == dense.n_components_ == len(dense.mask_indices_)
    assert product.query_idx_.tolist() == dense.query_idx_.tolist()
    np.testing.assert_allclose(
        product.trace_reductions_, dense.trace_reductions_, rtol=1e-10
    )


def test_a_sample_with_more_classes_than_are_counted_is_no_such_product():
    found, _ = embedded("whole", n_classes=7, n_rows=2)
    assert TopHeadEmbeddings.of_whole(found, 2) is None
    assert TopHeadEmbeddings.of_whole(found, 7) is None


def test_a_query_of_head_and_rest_passes_each_sample_once():
    """Beside the few samples that are tried, and those that rank the weights."""
    seen = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain()

        def forward(self, x):
            seen.append(len(x))
            return self.inner(x)

    settings = {"criterion": nn.CrossEntropyLoss, "train_split": None, "verbose": 0}
    net = NeuralNetClassifier(Counted(), **settings).initialize()
    X = np.random.default_rng(0).normal(size=(300, 8)).astype("float32")
    strategy = FisherMask(0.9, n_mask_samples=1, batch_size=100, random_state=0)
    strategy.select(net, X, 5, X_labeled=X[:0])
    assert sum(n for n in seen if n > 8) == 300


@pytest.mark.parametrize("product", [True, False])
@pytest.mark.parametrize(("damping", "exact"), [(0.09, True), (0.1, False)])
def test_information_is_summed_in_float64_where_damping_is_small(
    damping, exact, product
):
    torch.manual_seed(0)
    settings = {"criterion": nn.CrossEntropyLoss, "train_split": None, "verbose": 0}
    module = nn.Sequential(nn.Linear(12, 4))
    net = NeuralNetClassifier(module, **settings).initialize()
    net = net if product else without_product(net, "0")
    X = np.random.default_rng(0).normal(size=(90, 12)).astype("float32")
    strategy = FisherMask(1.0, damping=damping, random_state=0)
    given = embedded_by_a_query(strategy, net, X, 3, X_labeled=X[:0])
    assert isinstance(given.pool, HeadEmbeddings if product else DenseEmbeddings)
    expected = given.pool.information() / 90
    found = given.pool_information
    apart = float((found - expected).abs().max() / expected.abs().max())
    assert (apart < 1e-13) == exact
