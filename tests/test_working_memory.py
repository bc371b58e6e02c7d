"""What a batch takes while it is computed on is known before it runs, and kept within
the budget, with the same gradients.
"""

import sys

import numpy as np
import pytest
import reference
import torch
from networks import CLASSES, make_net
from process import grows_by
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fishermask_sk import FisherMask, check_network
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.memory import Budget, Needs
from fishermask_sk.strategy.masks import ranked_mask


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
    assert Budget(None, torch.device("meta")).beside(5000) is None


# What torch allocates, counted byte by byte.


def most_held(function):
    """The most bytes of torch's allocations that were held at a time, beyond those
    before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = found.profiler.kineto_results.events()
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
    )
    return int(np.cumsum([n_bytes for _, n_bytes in changes]).max())


def many_weights():
    return nn.Sequential(
        nn.Linear(64, 1500),
        nn.Tanh(),
        nn.Linear(1500, 500),
        nn.Tanh(),
        nn.Linear(500, 3),
    )


def large_activations():
    layers = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    layers += [nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)
    )


def of_shape(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("limit", [None, "8MB"])
@pytest.mark.parametrize(
    ("make", "shape"), [(large_activations, (1, 32, 32)), (many_weights, (64,))]
)
def test_what_a_query_takes_is_what_was_said(make, shape, limit):
    """Copies of weights, scores and gradients, the graph of a batch, and what torch's
    own libraries copy of it.
    """
    torch.manual_seed(0)
    net, X = make_net(make()).initialize(), of_shape(40, *shape)
    strategy = FisherMask(40, keep_head=False, max_memory=limit, random_state=0)
    said = check_network(net, X, 3, query_strategy=strategy, X_labeled=X[:0]).bytes
    if make is many_weights and limit is not None:
        with pytest.raises(MemoryError, match="on top of a batch"):
            strategy.select(net, X, 3, X_labeled=X[:0])
        return
    taken = most_held(lambda: strategy.select(net, X, 3, X_labeled=X[:0]))
    assert 0.5 * said["total"] < taken < 1.05 * said["total"]
    largest = "batch" if make is large_activations else "weights"
    assert said[largest] > 0.7 * said["total"]


@pytest.mark.parametrize("limit", [3, 6])
def test_what_rules_of_entries_keep_is_within_a_small_budget(limit):
    """Columns of a convolution's input, of which a mask of many entries takes most."""
    torch.manual_seed(0)
    net, X = make_net(large_activations()).initialize(), of_shape(40, 1, 32, 32)
    strategy = FisherMask(100, keep_head=False, max_memory=f"{limit}MB", random_state=0)
    taken = most_held(lambda: strategy.select(net, X, 3, X_labeled=X[:0]))
    assert taken < limit * 1e6


def test_a_net_whose_weights_do_not_fit_is_refused_before_any_work():
    net, X = make_net(many_weights()).initialize(), of_shape(40, 64)
    strategy = FisherMask(40, max_memory="8MB")
    seen = []
    net.module_.register_forward_hook(lambda *args: seen.append(args))
    message = (
        r"net holds 1\d\.\d MiB on top of a batch, a copy of its weights, their "
        r"gradients and their scores, and 7\.6 MiB max_memory allows, "
        r"of which a batch has 25%; use a smaller net, or raise max_memory\."
    )
    with pytest.raises(MemoryError, match=message):
        strategy.select(net, X, 3, X_labeled=X[:0])
    assert all(len(outputs) <= 8 for _, _, outputs in seen)
    report = check_network(net, X, 3, query_strategy=strategy, X_labeled=X[:0])
    assert report.verdict.startswith("would be refused: A query on this net holds")
    limited = Budget(None, torch.device("cpu"))
    with pytest.raises(MemoryError, match=r"of what is free, .* smaller net\.$"):
        limited.check_weights(2**60)


def test_a_mask_of_many_weights_takes_no_list_of_them():
    """Nor a copy of their scores, where a head is kept first or not."""
    n = 2**22
    torch.manual_seed(0)
    scores = torch.rand(n)
    candidates, head = [slice(0, n)], [slice(n - 100, n)]
    expected = reference.naive_top_k(scores[: n - 100], 50)
    for of_head, k in ((head, 150), ((), 50)):
        found = []
        taken = most_held(
            lambda k=k, h=of_head, to=found: to.append(
                ranked_mask(scores, k, candidates, h)
            )
        )
        assert (
            taken < 16.5 * 2**20
        )  # topk of a part; positions alone are 8 bytes a score
        if of_head:
            assert found[0].tolist() == expected + list(range(n - 100, n))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_large_net_stays_within_its_budget():
    """ResNet-18 of width 64 at 224 pixels, by the memory of the process."""
    grown = grows_by(
        """
import numpy as np, torch
from fishermask_sk import FisherMask, as_estimator
from fishermask_sk.nets.resnet_module import resnet18
torch.set_num_threads(1)
net = resnet18(3, 10, width=64, stem="imagenet", head_bias=True, weights=None)
net = as_estimator(net, classes=range(10))
X = np.random.default_rng(0).random((40, 3, 224, 224), dtype="float32")
net.predict_proba(X[:2])
strategy = FisherMask(300, keep_head=False, max_memory="600MB", n_mask_samples=16,
                      random_state=0)
""",
        "strategy.select(net, X, 3, X_labeled=X[:0])",
    )
    assert 20e6 < grown < 750e6
