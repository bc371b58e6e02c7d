"""A head as a product, and with the rest of a mask beside it, against the dense form in
float64.
"""

import numpy as np
import pytest
import torch

from fishermask_sk.embeddings import DenseEmbeddings
from fishermask_sk.head_embeddings import HeadEmbeddings, JoinedEmbeddings, head_places
from fishermask_sk.selection import select


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


def embedded(kind, n=40, n_classes=4, d=6, n_rows=None, n_rest=0, seed=0):
    """The same embeddings as a product and as a tensor."""
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(n, n_rows or n_classes - 1, n_classes))
    r *= rng.uniform(0.2, 2, size=(n, 1, 1))
    if n_rows is not None:  # as of n_top_classes: zeros beyond each sample's own
        r *= rng.permuted(np.arange(n_classes) <= n_rows + 0 * r[:, :1], axis=2)
    h = np.concatenate([rng.normal(size=(n, d)), np.ones((n, 1))], axis=1)
    positions = torch.as_tensor(mask_of(kind, n_classes, d, rng))
    weight, bias = slice(0, n_classes * d), slice(n_classes * d, n_classes * (d + 1))
    _, classes, columns = head_places(positions, weight, bias, d)
    r, h = torch.as_tensor(r), torch.as_tensor(h)
    head = HeadEmbeddings(r, h, classes, columns)
    dense = r[:, :, classes] * h[:, None, columns]
    if not n_rest:
        return head, dense
    values = torch.as_tensor(rng.normal(size=(n, r.shape[1], n_rest)))
    order = torch.as_tensor(rng.permutation(head.k + n_rest))
    in_head, in_rest = order[: head.k].sort().values, order[head.k :].sort().values
    joined = dense.new_empty(n, r.shape[1], head.k + n_rest)
    joined[..., in_head], joined[..., in_rest] = dense, values
    rest = DenseEmbeddings(values)
    return JoinedEmbeddings(head, rest, in_head, in_rest), joined


KINDS = ["whole", "weight alone", "one class", "part"]
SHAPES = [
    {},
    {"n_rest": 5},
    {"n_classes": 2, "d": 9},
    {"n_classes": 7, "n_rows": 2, "n_rest": 3},
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


@pytest.mark.parametrize("blocks", [2**21, 30])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_picks_are_those_of_the_tensor(kind, shape, blocks, monkeypatch):
    monkeypatch.setattr("fishermask_sk.embeddings.BLOCK_NUMBERS", {"cpu": blocks})
    found, dense = embedded(kind, **shape)
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
