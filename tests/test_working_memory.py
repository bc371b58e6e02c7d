"""What a batch takes while it is computed on is known before it runs, and kept within
the budget, with the same gradients.
"""

import numpy as np
import pytest
import reference
import torch
from networks import CLASSES, make_net
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.memory import Budget, Needs


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.PReLU(4),
        nn.ConvTranspose2d(4, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    ).double()


@pytest.mark.parametrize("n_bytes", [1, 200_000, 10**6, 2 * 10**7, None])
def test_batches_are_bounded_before_they_run(n_bytes):
    net, batch = small_net().eval(), torch.randn(20, 2, 12, 12).double()
    every = reference.naive_embeddings(net, batch)
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return net(x)

    gradients = PerSampleGradients(net, forward, batch[:4], working_bytes=n_bytes)
    sizes.clear()
    mask = torch.arange(0, every.shape[2], 3)
    torch.testing.assert_close(
        gradients.embeddings(batch, mask), every[..., mask], rtol=1e-9, atol=1e-12
    )
    scores = gradients.diagonal_fisher([batch])
    expected = every.square().sum(1).mean(0)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-14)
    a_sample = 8 * 12 * 12 * (2 + 4 + 4)  # in, convolved, normalised: it takes more
    assert max(sizes) <= max(1, (n_bytes or 10**9) // a_sample)
    assert (max(sizes) == 20) == (n_bytes is None or n_bytes > 10**7)


def test_picks_do_not_depend_on_max_memory():
    net = make_net(small_net()).initialize()
    X = np.random.default_rng(0).normal(size=(30, 2, 12, 12))
    strategies = [
        FisherMask(40, keep_head=False, max_memory=limit, random_state=0)
        for limit in (None, "1MB")
    ]
    picks = [s.select(net, X, 4, X_labeled=X[:3]).tolist() for s in strategies]
    assert picks[0] == picks[1]
    assert strategies[0].mask_indices_.tolist() == strategies[1].mask_indices_.tolist()


def test_a_batch_has_what_is_left_of_the_budget():
    budget = Budget(1000, torch.device("cpu"))
    assert budget.beside(300) == 700
    assert budget.beside(5000) == 250
    assert budget.holds(Needs(400, 600))
    assert not budget.holds(Needs(500, 600))
    budget.n_bytes = None
    assert budget.beside(5000) is None
