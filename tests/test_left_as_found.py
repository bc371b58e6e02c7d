"""A query leaves every tensor that a module holds as it was, and the net can be copied
and pickled as before.
"""

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
from networks import CLASSES, make_net
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fishermask_sk import FisherMask, check_network
from fishermask_sk.baselines import kcenter_sampling

N = 12
rng = np.random.default_rng(0)
VECTORS, WORDS = rng.normal(size=(N, 6)), rng.integers(0, 9, (N, 4))


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a new one
        return nn.utils.weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


class Renormalised(nn.Linear):
    """Weights that are scaled behind autograd's back, as normalised heads do."""

    def forward(self, x):
        self.weight.data = F.normalize(self.weight.data)
        return super().forward(x)


class Clipped(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class Remembers(nn.Linear):
    """Plain attributes: one replaced, one changed in place, one new, and lists."""

    def __init__(self, *args):
        super().__init__(*args)
        self.last, self.total, self.all = torch.zeros(1), torch.zeros(6), []
        self.by_name = {"first": torch.ones(2)}

    def forward(self, x):
        self.last = x * self.weight[0, 0]
        self.total += x.detach().sum(0)
        self.new = x + self.bias[0]
        self.all.append(self.new)
        self.by_name["first"] = self.new
        return super().forward(x)


class Words(nn.Module):
    def __init__(self, **params):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 5, **params), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


def with_head(layer):
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, CLASSES))


NETS = {
    "pruned": (lambda: with_head(pruned(nn.Linear(6, 5))), VECTORS),
    "weight norm": (lambda: with_head(old_weight_norm(nn.Linear(6, 5))), VECTORS),
    "spectral norm": (
        lambda: with_head(nn.utils.spectral_norm(nn.Linear(6, 5))),
        VECTORS,
    ),
    "renormalised": (lambda: with_head(Renormalised(6, 5)), VECTORS),
    "clipped": (lambda: with_head(Clipped(6, 5)), VECTORS),
    "remembers": (lambda: with_head(Remembers(6, 5)), VECTORS),
    "largest norm": (lambda: Words(max_norm=0.5), WORDS),
}


def numbers(value):
    """What a value holds, so that it can be compared with `==`."""
    if isinstance(value, torch.Tensor):
        return (id(value), value.detach().tolist(), value.requires_grad)
    if isinstance(value, dict):
        return {key: numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return id(value)


def state(module):
    return [(id(m), list(vars(m)), numbers(vars(m))) for m in module.modules()]


def as_found(net):
    net.module_.eval()
    with torch.no_grad():
        net.module_(torch.as_tensor(WORDS if "embed" in dir(net.module_) else VECTORS))
    return state(net.module_)


def make(name):
    torch.manual_seed(0)
    module, X = NETS[name]
    net = make_net(module().double()).initialize()
    return net, X


def unnormalised(net):
    """Undo what `as_found` itself did to the weights."""
    with torch.no_grad():
        for p in net.module_.parameters():
            p.mul_(3)


@pytest.mark.parametrize("name", NETS)
def test_tensors_are_afterwards_as_before(name):
    net, X = make(name)
    as_found(net)
    unnormalised(net)
    before = state(net.module_)

    def select():
        strategy = FisherMask(0.5, random_state=0)
        return strategy.select(net, X, 2, X_labeled=X[:3]).tolist()

    for query in (
        select,
        lambda: check_network(net, X, 2),
        lambda: kcenter_sampling(net, X, 2, X_labeled=X[:0]),
    ):
        query()
        assert state(net.module_) == before
        pickle.dumps(net)
        copy.deepcopy(net)
    assert select() == select()


class LostError(Exception):
    """Of no kind that the package knows."""


@pytest.mark.parametrize("error", [LostError(), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["pruned", "remembers", "largest norm"])
def test_after_errors_too(name, error):
    net, X = make(name)
    as_found(net)
    for last in (3, 7, 11):
        before, calls = state(net.module_), []

        def interrupt(*_, calls=calls, last=last):
            calls.append(1)
            if len(calls) == last:
                raise error

        handle = net.module_.register_forward_hook(interrupt)
        try:
            with pytest.raises(type(error)):
                FisherMask(0.5, batch_size=4, random_state=0).select(
                    net, X, 2, X_labeled=X[:0]
                )
        finally:
            handle.remove()
        assert state(net.module_) == before
        pickle.dumps(net)
        copy.deepcopy(net)


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("ask", ["select", "check_network"])
@pytest.mark.parametrize("last", [nn.ReLU(), nn.PReLU()])
def test_nothing_of_a_query_stays_in_memory(last, ask):
    # What an operation saves of its own output must not hold its graph.
    layers = nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 8), last, nn.Linear(8, 3)
    net = make_net(nn.Sequential(*layers).double()).initialize()
    strategy = FisherMask(0.9, random_state=0)

    def query():
        if ask == "select":
            strategy.select(net, VECTORS, 2, X_labeled=VECTORS[:3])
        else:
            check_network(net, VECTORS, 2, query_strategy=strategy)

    query()
    before = tensors_alive()
    query()
    assert tensors_alive() == before
