"""Nets on an accelerator, which `pretend_device` stands in for: the picks of a CPU, and
how often the host has to wait.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from pretend_device import OnDevice, PretendDevice
from skorch import NeuralNetClassifier
from steps import embedded, without_product
from torch import nn

from fishermask_sk import FisherMask, check_network
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.gradients.layer_rules import SQUARED_AT_A_TIME, find_rule
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.memory import needs
from fishermask_sk.selection import select
from fishermask_sk.strategy.agreement import _sums

N_CLASSES = 5


def fitted(module):
    net = NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, train_split=None, verbose=0
    )
    return net.initialize()


def convolutions(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, N_CLASSES),
    )


def images(n, seed=1):
    return np.random.default_rng(seed).normal(size=(n, 1, 6, 6)).astype("float32")


# The pretence itself.


def test_a_pretended_device_refuses_what_a_real_one_refuses():
    with PretendDevice() as device:
        here, there = device.put(torch.ones(3)), torch.ones(3)
        assert here.device == torch.device("cuda:0")
        assert here.is_cuda
        assert torch.zeros(2, device=here.device).device == here.device
        for mixed in (
            lambda: here + there,
            lambda: there.copy_(here + 1) + here,
            lambda: here + device.put(there, "cuda:1"),
            lambda: here[:2] @ there[:2],
        ):
            with pytest.raises(RuntimeError, match="to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="can't convert cuda:0 device type"):
            here.numpy()
        assert (here * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]  # a CPU's scalar
        assert here[torch.tensor([0, 2])].tolist() == [1, 1]  # and its positions


def test_what_is_counted():
    """An exact number for each, by what CUDA does in its place."""
    with PretendDevice() as device:
        x = device.put(torch.arange(6.0).reshape(2, 3))
        for act, launches, syncs in (
            (lambda: x.mT[0].reshape(-1), 0, 0),
            (lambda: torch.empty_like(x), 0, 0),
            (lambda: x + 1, 1, 0),
            (lambda: (x @ x.mT).sum(), 2, 0),
            (lambda: x[0, 0].item(), 0, 1),
            (lambda: bool((x > 1).all()), 2, 1),
            (lambda: x.tolist(), 0, 1),
            (lambda: x.cpu(), 0, 1),
            (lambda: x[x > 1], 2, 1),
            (lambda: x.masked_fill(x > 1, 0.0), 2, 0),
            (lambda: x.nonzero(), 1, 1),
            (lambda: torch.tensor([1.0, 2.0], device=x.device), 0, 1),
            (lambda: torch.ones(2).to(x.device, non_blocking=True), 0, 0),
            (lambda: torch.linalg.cholesky(x @ x.mT + torch.eye(2).to(x)), 4, 2),
            (lambda: torch.linalg.cholesky_ex(x @ x.mT), 2, 0),
        ):
            with device.counted() as counts:
                act()
            assert (counts.n_launches, counts.n_syncs) == (launches, syncs), counts


def test_gradients_through_a_pretended_device():
    torch.manual_seed(0)
    module, x = convolutions().double(), torch.randn(4, 1, 6, 6).double()
    expected = torch.autograd.grad(module(x).square().sum(), module.parameters())
    with PretendDevice() as device:
        device.move(module)
        found = torch.autograd.grad(
            module(device.put(x)).square().sum(), module.parameters()
        )
        assert all(isinstance(g, OnDevice) for g in found)
        for g, e in zip(found, expected, strict=True):
            torch.testing.assert_close(g.cpu(), e)


# Queries.


def small(seed=0):
    torch.manual_seed(seed)
    return fitted(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, N_CLASSES)))


def vectors(n, seed=1):
    return np.random.default_rng(seed).normal(size=(n, 6)).astype("float32")


def picks(net, X, n_instances=6, of_call=None, **params):
    strategy = FisherMask(**{"sparsity": 0.95, "random_state": 0, **params})
    known = {"X_labeled": X[:7]}
    found = strategy.select(net, X, n_instances, **{**known, **(of_call or {})})
    return found.tolist()


def test_picks_of_a_device_are_those_of_the_cpu():
    X = images(40)
    expected = picks(fitted(convolutions()), X)
    with PretendDevice() as device:
        assert picks(device.adopt(fitted(convolutions())), X) == expected


SETTINGS = {
    "plain": {},
    "float64 alone": {"damping": 1e-3},
    "oversampled": {"oversample": 2.0},
    "no labels": {"of_call": {"X_labeled": vectors(0)}},
    "candidates": {"of_call": {"candidates": np.arange(3, 33)}},
    "random ties": {"of_call": {"random_tie_break": True}},
    "a random mask": {"mask": "random"},
    "weights": {"of_call": {"target_weight": np.arange(40.0)}},
    "an own mask": {"mask": lambda scores, k, slices: np.arange(20)},
    "few to rank": {"n_mask_samples": 9},
    "directions": {"n_components": 12},
    "top classes": {"n_top_classes": 3},
    "a target": {"of_call": {"X_target": vectors(9), "target_weight": np.arange(9.0)}},
    "two stages": {"n_information_samples": 20, "candidates": 4},
    "a file": {"max_memory": 10**6},
}


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "cpu"])
@pytest.mark.parametrize("name", SETTINGS)
def test_picks_do_not_depend_on_the_default_device(name, on_device):
    """The net on the device where tensors are made by default, and on the CPU beside
    it.
    """
    X, settings = vectors(40), SETTINGS[name]
    expected = picks(small(), X, **settings)
    net = small()
    with PretendDevice() as device:
        if on_device:
            device.adopt(net)
        torch.set_default_device("meta")  # what torch itself calls the pretended one
        try:
            assert picks(net, X, **settings) == expected
            if name == "plain":
                check_network(net, X)
        finally:
            torch.set_default_device(None)


# How often the host waits, and what it asks for.


def layers(depth, n_classes):
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 3, 3), nn.ReLU()]
    for _ in range(depth):
        body += [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(48, n_classes)).eval()


@pytest.mark.parametrize(("depth", "n_classes"), [(1, 3), (3, 5)])
def test_the_host_waits_once_a_batch_whatever_the_net(depth, n_classes):
    """Not for each layer or class: what depends on the mask alone is looked up once."""
    with PretendDevice() as device:
        module = device.move(layers(depth, n_classes))
        batches = [device.put(torch.as_tensor(images(9, seed))) for seed in range(4)]
        with device.counted() as counts:
            gradients = PerSampleGradients(module, module, batches[0][:4])
        # Weights of the comparison there; places and the comparison itself back.
        assert counts.n_syncs == 3, counts
        mask_indices = device.put(torch.arange(0, gradients.n_parameters, 3))
        asked = []
        for batch in batches[1:]:
            with device.counted() as counts:
                gradients.embeddings(batch, mask_indices, reduced=True)
            asked.append(counts)
        # The mask, and whether gradients are autograd's; then the latter alone.
        assert [counts.n_syncs for counts in asked] == [2, 1, 1], asked
        assert asked[1].n_launches == asked[2].n_launches <= asked[0].n_launches
        # Who has a pass of its own, and which number belongs to which weights.
        assert sum(asked[2].to_device.values()) == 2
        with device.counted() as counts:
            gradients.diagonal_fisher(batches[:1])
        assert counts.n_syncs == 1, counts
        with device.counted() as counts, undisturbed(module):
            pass
        assert counts.n_syncs == 1, counts


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4)
        self.head = nn.Linear(4, N_CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.embed(x)).mean(1))


class Grouped(nn.Sequential):
    def __init__(self):
        super().__init__(
            *(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.PReLU(4)),
            *(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, N_CLASSES)),
        )


class Bags(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, **kwargs), nn.Linear(4, N_CLASSES)

    def forward(self, x):
        return self.head(self.bag(x).tanh())


class OverTime(nn.Module):
    def __init__(self, kind, **kwargs):
        super().__init__()
        self.layer, self.head = kind(3, 4, **kwargs), nn.Linear(4, N_CLASSES)

    def forward(self, x):
        if self.layer.batch_first:
            return self.head(self.layer(x)[0][:, -1])
        return self.head(self.layer(x.transpose(0, 1))[0][-1])


BY_BATCH = {
    "words": Words,
    "grouped": Grouped,
    "bags, mean": partial(Bags, padding_idx=0),
    "bags, sum": partial(Bags, mode="sum"),
    "bags, max": partial(Bags, mode="max"),
    "lstm": partial(OverTime, nn.LSTM),
    "lstm, batch first": partial(OverTime, nn.LSTM, batch_first=True),
    "gru": partial(OverTime, nn.GRU, batch_first=True),
    "rnn": partial(OverTime, nn.RNN),
}


@pytest.mark.parametrize("kind", BY_BATCH)
def test_a_batch_asks_for_as_much_whatever_its_size(kind):
    """And waits once, for scores and for embeddings; where it is vmapped, thrice."""
    torch.manual_seed(0)
    module = BY_BATCH[kind]().eval()
    if kind == "grouped":
        batches = [torch.randn(n, 2, 6, 6) for n in (6, 34)]
    elif isinstance(module, OverTime):
        batches = [torch.randn(n, 5, 3) for n in (6, 34)]
    else:
        batches = [torch.randint(7, (n, 5)) for n in (6, 34)]
    gradients = PerSampleGradients(module, module, batches[0])
    k = torch.arange(0, gradients.n_parameters, 3)
    expected = (
        gradients.diagonal_fisher(batches[:1]),
        gradients.embeddings(batches[0], k),
    )
    with PretendDevice() as device, undisturbed(device.move(module)):
        batches, k = [device.put(batch) for batch in batches], device.put(k)
        gradients = PerSampleGradients(module, module, batches[0])
        found = (
            gradients.diagonal_fisher(batches[:1]),
            gradients.embeddings(batches[0], k),
        )
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f.cpu(), e, rtol=1e-4, atol=1e-6)
        for ask in (
            lambda batch: gradients.diagonal_fisher([batch]),
            lambda batch: gradients.embeddings(batch, k),
        ):
            counted = []
            for batch in batches:
                with device.counted() as counts:
                    ask(batch)
                counted.append((counts.n_launches, counts.n_syncs))
            assert counted[0] == counted[1]
            assert counted[0][1] <= (3 if isinstance(module, OverTime) else 1)


def test_processes_compare_their_nets_with_one_wait():
    with PretendDevice() as device:
        state = device.move(convolutions()).state_dict()
        state["steps"], state["name"] = device.put(torch.tensor(3)), "net"
        with device.counted() as counts:
            found = _sums(state)
        assert counts.n_syncs == 1, counts
        weight = state["0.weight"].cpu().double()
        assert found["0.weight"] == pytest.approx(
            (float(weight.sum()), float(weight.norm()))
        )
        assert found["steps"] is found["name"] is None
        assert _sums({"name": 1}) == {"name": None}


@pytest.mark.parametrize("batch_size", [10, 40])
def test_batches_come_from_pinned_memory_once(batch_size):
    """Whatever is computed of them, and none is waited for. The first few samples,
    which are tried on before, skorch copies.
    """
    X = vectors(40)
    expected = picks(small(), X, batch_size=batch_size)
    with PretendDevice() as device:
        net = device.adopt(small())
        with device.counted() as counts:
            assert picks(net, X, batch_size=batch_size) == expected
    to_device, pageable = (
        sum(n for line, n in counter.items() if "skorch_adapter.py" in line)
        for counter in (counts.to_device, counts.pageable)
    )
    # The pool and the labelled samples, once to rank weights and once to embed.
    assert to_device - pageable == 2 * (40 // batch_size + 1), counts
    assert pageable == 24, counts


def asked_for_picks(device, pick, few=3, many=11):
    """What a pick asks of the device: the difference of two numbers of picks."""
    found = []
    for n_instances in (few, many):
        with device.counted() as counts:
            pick(n_instances)
        found.append(counts)
    n_picks = many - few
    return (
        (found[1].n_launches - found[0].n_launches) / n_picks,
        (found[1].n_syncs - found[0].n_syncs) / n_picks,
        found[1],
    )


def net_on(device, product):
    return device.adopt(small() if product else without_product(small(), "2"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": "last"},
        {"damping": 1e-3},
        {"keep_head": False, "sparsity": 0.9},
    ],
)
@pytest.mark.parametrize("product", [False, True])
def test_a_pick_asks_little_of_a_device(product, settings):
    """One answer says which sample it is and what rounding has left in the gains."""
    with PretendDevice() as device:
        net, X = net_on(device, product), vectors(60)
        launches, syncs, counts = asked_for_picks(
            device, lambda n_instances: picks(net, X, n_instances, **settings)
        )
    assert syncs == 1, counts
    assert launches <= 40, counts


@pytest.mark.parametrize(("rows", "of_pick", "waits"), [(True, 22, 2), (False, 32, 1)])
def test_a_removal_asks_little_of_a_device(rows, of_pick, waits):
    """A pick in rows as well; the backward pass waits for costs, and for whether they
    are exact, and once in sixteen removals for what it begins with.
    """
    torch.manual_seed(0)
    v = torch.randn(40, 3, 200)
    target = None if rows else v.double().flatten(0, 1)
    found = {}
    with PretendDevice() as device:
        pool = device.put(v)
        if target is not None:
            target = device.put(target.mT @ target / len(v))
        for oversample in (1, 2):
            for n in (3, 11):
                with device.counted() as counts:
                    select(pool, target, n, oversample=oversample)
                found[oversample, n] = counts
    picks, both = (
        [
            (getattr(found[times, 11], each) - getattr(found[times, 3], each)) / 8
            for each in ("n_launches", "n_syncs")
        ]
        for times in (1, 2)
    )
    assert picks[0] <= of_pick, found[1, 11]
    assert picks[1] == waits, found[1, 11]
    removal = [both[0] - 2 * picks[0], both[1] - 2 * picks[1]]
    assert removal[0] <= 49, found[2, 11]
    assert removal[1] <= 2.5, found[2, 11]


@pytest.mark.parametrize(("in_main_memory", "waits"), [(False, 1), (True, 2)])
@pytest.mark.parametrize(("product", "most"), [(False, 6), (True, 9)])
def test_embeddings_in_blocks_ask_for_each_block(product, most, in_main_memory, waits):
    """And wait for none of them. From main memory the pick's own rows are fetched."""
    X, max_memory = vectors(60), None
    if in_main_memory:  # the device holds the matrices of k weights, and no embeddings
        k = embedded(FisherMask(0.95), small(), X, 1, X_labeled=X[:7]).pool.k
        k = k if product else 61
        max_memory = needs(60, 7, N_CLASSES - 1, k, 4).matrices
    with PretendDevice() as device:
        strategy = FisherMask(0.95, max_memory=max_memory, random_state=0)
        given = embedded(strategy, net_on(device, product), X, 11, X_labeled=X[:7])

        def pick(n_instances):
            select(
                given.pool,
                given.pool_information,
                n_instances,
                labeled_information=given.labeled_information,
                n_labeled=7,
            )

        whole = asked_for_picks(device, pick)
        given.pool.width = 2**27 // 20  # as of samples so large that a block holds 20
        in_blocks = asked_for_picks(device, pick)
    counts = in_blocks[2]
    copied, pageable = (
        sum(n for line, n in counter.items() if "embeddings.py" in line)
        for counter in (counts.to_device, counts.pageable)
    )
    # Blocks and the rows of each pick come from pinned memory, else no copy goes on
    # beside the computation. Copies are looked for before, by weights of each tensor.
    assert (copied > 20) == in_main_memory, counts
    assert pageable <= 3, counts
    assert in_blocks[1] == waits, in_blocks[2]
    assert 0 < in_blocks[0] - whole[0] <= 2 * most, in_blocks[2]  # two blocks more


@pytest.mark.parametrize("shared", [5, 1], ids=["tokens", "pixels in groups"])
def test_a_rule_takes_all_samples_in_one_launch(shared):
    """A CPU's cache holds few squares at a time; an accelerator waits for launches."""
    if shared > 1:
        layer, seen, at_output = nn.Linear(128, 96), (shared, 128), (shared, 96)
    else:
        layer, seen, at_output = nn.Conv1d(64, 96, 6, groups=2), (64, 9), (96, 4)
    launched = []
    for n in (2, 4 * SQUARED_AT_A_TIME // layer.weight.numel()):
        torch.manual_seed(0)
        a, g = torch.randn(n, *seen), torch.randn(n, *at_output)
        expected = find_rule(layer, "weight").squares(layer, a)(g)
        with PretendDevice() as device:
            moved = device.move(copy.deepcopy(layer))
            rule = find_rule(moved, "weight")
            a, g = device.put(a), device.put(g)
            with device.counted() as counts:
                found = rule.squares(moved, a)(g)
            launched.append(counts.n_launches)
            torch.testing.assert_close(found.cpu(), expected)
    assert launched[0] == launched[1]


# A real one, where there is one (`make gpu PART=tests`).

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def on_cuda(net):
    net.module_.to("cuda")
    net.device = "cuda"
    return net


@CUDA
@pytest.mark.parametrize("name", SETTINGS)
def test_picks_of_cuda_are_those_of_the_cpu(name):
    X, settings = vectors(40), SETTINGS[name]
    assert picks(on_cuda(small()), X, **settings) == picks(small(), X, **settings)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(6, 5, batch_first=True)
        self.head = nn.Linear(5, N_CLASSES)

    def forward(self, x):
        return self.head(self.layer(x.reshape(len(x), -1, 6))[0].mean(1))


NETS = {
    "convolutions": convolutions,
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
}


@CUDA
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_picks_of_layers_that_cuda_has_kernels_of_its_own_for(name, tf32):
    """Recurrent layers and convolutions of cuDNN, with TF32 allowed and without."""
    X, answers = images(40), []
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        for place in (lambda net: net, on_cuda):
            torch.manual_seed(0)
            answers.append(picks(place(fitted(NETS[name]())), X))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert answers[0] == answers[1]


@CUDA
def test_a_batch_that_fills_a_gpu_is_halved_on_cuda():
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, N_CLASSES))
    net, X = net.double().cuda(), torch.randn(512, 64, dtype=torch.float64).cuda()
    mask_indices = torch.arange(4_000, device="cuda")
    gradients = PerSampleGradients(net, net, X)
    parts = [gradients.embeddings(x, mask_indices) for x in X.split(64)]
    expected = torch.cat([part.cpu() for part in parts])
    del parts
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_allocated() + expected.nbytes // 2
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        found = [gradients.embeddings(x, mask_indices).cpu() for x in X.split(256)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert gradients.memory.max_samples is not None
    torch.testing.assert_close(torch.cat(found), expected)
