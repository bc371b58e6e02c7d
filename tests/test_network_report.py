"""`check_network` tells what a query would do: against what the nets are, and what a
query then does.
"""

import re

import numpy as np
import pytest
import torch
from networks import CLASSES, NETS, N, OneLogit, TabularMLP, make, make_net, vectors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from test_net_checks import Body
from test_networks import LAYOUTS, belongs_to
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from fishermask_sk import FisherMask, as_estimator, check_network
from fishermask_sk.modal import ActiveLearner
from fishermask_sk.strategy import progress, selection_costs

X = vectors(np.random.default_rng(0), 60)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return make_net(TabularMLP().double()).fit(X[:20], np.arange(20) % CLASSES)


@pytest.mark.parametrize("name", NETS)
def test_every_net_is_described(name):
    net, samples = make(name)
    report = check_network(
        net, samples, 2, query_strategy=FisherMask(20, keep_head=False), n_pool=500
    )
    head, stem, generic = LAYOUTS[name]
    for p in report.parameters:
        role = (
            "head"
            if belongs_to(p.name, head)
            else "stem"
            if belongs_to(p.name, stem)
            else "middle"
        )
        assert p.role == role
        ways = ("vmap", "one by one") if p.name in generic else ("rule of", "frozen")
        assert p.gradients.startswith(ways)
        assert p.candidate == (p.gradients != "frozen")
        assert f"{p.n_weights:,}" in str(report) or p.n_weights < sum(
            q.n_weights for q in report.parameters
        )
    assert report.k == 20
    assert report.n_classes == (2 if name == "one logit" else CLASSES)
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert ("torch.func cannot batch it" in str(report)) == (name == "packed gru")


def test_the_table(net):
    report = check_network(
        net,
        X[20:],
        5,
        query_strategy=FisherMask(0.5, layers="middle"),
        X_labeled=X[:20],
    )
    lines = repr(report).splitlines()
    assert repr(report) == str(report)
    assert lines[0].split("  ")[-1] == "parameters"
    assert lines[1].split() == [
        "stem",
        "rule",
        "of",
        "Linear",
        "64",
        "0",
        "body.0.weight,",
        "body.0.bias",
    ]
    assert lines[2].split()[:6] == ["middle", "rule", "of", "BatchNorm1d", "16", "16"]
    assert "mask     k = 70 of 70 candidates, 155 weights in all" in lines
    assert "query    5 of 40 samples, 20 labelled, 3 classes" in lines
    assert [line[:15] for line in lines[-6:]] == [
        "memory   about ",
        "time     about ",
        "verdict  runs",
        "or       candid",
        "or       candid",
        "or       layers",
    ]


def test_what_the_query_then_does(net):
    strategy = FisherMask(0.5, random_state=0)
    report = check_network(net, X[20:], 5, query_strategy=strategy, X_labeled=X[:20])
    assert not hasattr(strategy, "mask_indices_")
    strategy.select(net, X[20:], 5, X_labeled=X[:20])
    assert report.k == len(strategy.mask_indices_)
    assert {p.name for p in report.parameters if p.candidate} == set(
        strategy.weights_per_layer_
    )
    assert set(report.seconds) == {*strategy.timings_, "total"}


def test_the_pool_may_be_larger_than_the_samples(net):
    small, large = (
        check_network(
            net,
            X,
            5,
            query_strategy=FisherMask(40, n_mask_samples=64),
            X_labeled=X[:0],
            n_pool=n,
        )
        for n in (100, 10_000)
    )
    assert large.n_pool == 10_000
    assert (
        check_network(
            net, X, 5, query_strategy=FisherMask(40), n_pool=np.int64(70)
        ).n_pool
        == 70
    )
    assert (
        large.bytes["embeddings"]
        == 100 * small.bytes["embeddings"]
        == 8 * 10_000 * (2 * 2 + 7 + 2 * (40 - 21))  # the head's is a product
    )
    of_selection = large.bytes["embeddings"] + large.bytes["matrices"]
    of_one = max(of_selection, large.bytes["weights"])
    assert large.bytes["total"] == of_one + large.bytes["batch"]
    assert large.seconds["embeddings"] > 10 * small.seconds["embeddings"]
    # Picks may outnumber the samples that are at hand, though not the pool.
    assert (
        check_network(
            net, X, 100, query_strategy=FisherMask(40), n_pool=120
        ).n_instances
        == 100
    )
    assert "1.5 GiB" in str(
        check_network(net, X, 1, query_strategy=FisherMask(40), n_pool=4_000_000)
    )


def test_a_learner_brings_its_strategy_and_samples():
    learner = ActiveLearner(
        make_pipeline(StandardScaler(), make_net(TabularMLP().double())),
        FisherMask(33),
        X[:20],
        np.arange(20) % CLASSES,
    )
    report = check_network(learner, X[20:], 5)
    assert (report.k, report.n_labeled, report.n_pool) == (33, 20, 40)
    learner.query_strategy = len
    assert (
        check_network(learner, X[20:], 5).k == 1
    )  # FisherMask() keeps 0.002 of 155 weights


def test_more_weights_than_are_tried():
    module = torch.nn.Linear(600, CLASSES)
    wide = NeuralNetClassifier(
        module, criterion=torch.nn.CrossEntropyLoss, classes=range(CLASSES), verbose=0
    ).initialize()
    samples = np.random.default_rng(0).normal(size=(20, 600)).astype("float32")
    report = check_network(wide, samples, 3, query_strategy=FisherMask(1800), n_pool=99)
    assert report.k == 1800
    assert report.seconds["selection"] > 0


def test_fewer_classes_and_directions(net):
    def checked(**params):
        return check_network(
            net, X, 5, query_strategy=FisherMask(100, **params), n_pool=5_000
        )

    whole, few_classes, few_directions = (
        checked(),
        checked(n_top_classes=2),
        checked(n_components=20),
    )
    assert few_classes.n_classes == CLASSES
    assert few_classes.bytes["embeddings"] == 8 * 5_000 * (2 + 2 + 7 + (100 - 21))
    assert whole.bytes["embeddings"] == 8 * 5_000 * (2 * 2 + 7 + 2 * (100 - 21))
    assert few_directions.bytes["embeddings"] == 8 * 5_000 * 2 * 20
    assert all(report.k == 100 for report in (whole, few_classes, few_directions))


def test_a_random_state_is_not_drawn_from(net):
    seed = np.random.RandomState(0)
    before = seed.get_state()[1].tolist(), seed.get_state()[2]
    check_network(
        net, X, 5, query_strategy=FisherMask(100, n_components=20, random_state=seed)
    )
    assert (seed.get_state()[1].tolist(), seed.get_state()[2]) == before


def test_no_more_than_a_batch_is_read(net):
    class Counted(Dataset):
        reads = 0

        def __len__(self):
            return 10_000

        def __getitem__(self, i):
            self.reads += 1
            assert i < 16
            return X[i], 0

    pool = Counted()
    report = check_network(net, pool, 5, query_strategy=FisherMask(20, batch_size=16))
    assert report.n_pool == 10_000
    assert pool.reads < 500


def test_the_net_is_left_as_found(net):
    net.module_.train()
    state, rng = (
        {k: v.clone() for k, v in net.module_.state_dict().items()},
        torch.get_rng_state(),
    )
    check_network(net, X, 5)
    assert all(torch.equal(v, state[k]) for k, v in net.module_.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert net.module_.training
    assert all(p.grad is None or p.requires_grad for p in net.module_.parameters())


def test_notes(net):
    head_only = check_network(net, X, 5, query_strategy=FisherMask(5)).notes
    assert (
        "the head alone has 21 weights, so the mask is a part of it and no other layer "
        "is seen" in head_only[0]
    )
    assert (
        check_network(net, X, 5, query_strategy=FisherMask(5, keep_head=False)).notes
        == ()
    )
    headless = make_net(Body(end=lambda x: x[:, :2]).double()).initialize()
    assert (
        "no layer's output dimension is the number of classes"
        in check_network(headless, X, 5).notes[0]
    )


def test_a_part_of_the_last_layer_is_told(net):
    """By default so few weights of a small net are kept that the head is not whole."""

    def notes(sparsity):
        chosen = FisherMask(sparsity, layers="last")
        return check_network(net, X, 5, query_strategy=chosen).notes

    (note,) = notes(10)
    assert re.fullmatch(
        r"the mask keeps 10 of the head's (\d+) weights: from sparsity=\1 on it is "
        r"whole\.",
        note,
    )
    assert not notes(int(re.search(r"sparsity=(\d+)", note)[1]))


def test_durations_and_sizes():
    net = make_net(OneLogit().double(), criterion=nn.BCEWithLogitsLoss).initialize()
    report = check_network(net, X, 5, query_strategy=FisherMask(10, keep_head=False))
    for seconds, words in ((1.234, "1.2 s"), (300.0, "5 min"), (9_000.0, "2.5 h")):
        object.__setattr__(report, "seconds", dict.fromkeys(report.seconds, seconds))
        assert f"about {words} (mask {words}" in str(report)
    for n_bytes, words in (
        (2_048, "2.0 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
    ):
        object.__setattr__(report, "bytes", dict.fromkeys(report.bytes, n_bytes))
        assert f"about {words} (embeddings {words}" in str(report)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"query_strategy": "margin"},
            TypeError,
            r"query_strategy='margin' is no FisherMask; pass FisherMask\(",
        ),
        ({"query_strategy": FisherMask(2.0)}, ValueError, "sparsity=2.0"),
        ({"n_pool": 0}, ValueError, "n_pool=0 must be an int >= 1"),
        ({"n_pool": 2.5}, ValueError, "n_pool=2.5 must be an int >= 1"),
        ({"n_pool": 3}, ValueError, "n_instances=5 exceeds the pool of 3 samples"),
        (
            {"n_instances": 61},
            ValueError,
            "n_instances=61 exceeds the pool of 60 samples",
        ),
        ({"X": X[:0]}, ValueError, "X_pool is empty"),
        ({"X": None}, TypeError, "X is None; pass samples"),
    ],
)
def test_what_cannot_be_checked(net, kwargs, error, message):
    with pytest.raises(error, match=message):
        check_network(net, **{"X": X, "n_instances": 5, **kwargs})


def test_a_net_that_cannot_be_right_is_refused():
    net = make_net(Body(lambda x: x - x.mean(0)).double()).initialize()
    with pytest.raises(ValueError, match="depend on the others of its batch"):
        check_network(net, X[:N], 2)


def test_the_verdict_is_what_the_query_then_does(net, monkeypatch):
    def strategy(max_memory):
        return FisherMask(100, max_memory=max_memory, random_state=0)

    def verdict(max_memory):
        chosen = strategy(max_memory)
        return check_network(
            net, X[20:], 5, query_strategy=chosen, X_labeled=X[:20]
        ).verdict

    report = check_network(
        net, X[20:], 5, query_strategy=strategy("1GiB"), X_labeled=X[:20]
    )
    assert report.verdict == "runs"
    within = report.bytes["matrices"] + report.bytes["embeddings"] // 2
    assert verdict(within) == ("runs by streaming: the embeddings lie in a mapped file")
    strategy(within).select(net, X[20:], 5, X_labeled=X[:20])
    refused = verdict(20_000)
    assert refused.startswith("would be refused: This query needs about ")
    with pytest.raises(MemoryError) as caught:
        strategy(20_000).select(net, X[20:], 5, X_labeled=X[:20])
    assert str(caught.value) == refused.removeprefix("would be refused: ")


def test_three_alternatives_have_prices(net):
    report = check_network(
        net, X, 5, query_strategy=FisherMask(100, n_mask_samples=512), n_pool=20_000
    )
    two = "candidates=10, n_information_samples=2048, n_mask_samples=256"
    settings = [other.setting for other in report.alternatives]
    assert settings == ["candidates=10", two, "layers='last'"]
    of_candidates, of_two, of_last = report.alternatives
    assert report.bytes["total"] > of_last.bytes > of_candidates.bytes == of_two.bytes
    assert 0 < of_two.seconds < report.seconds["total"]
    assert not any(other.is_refused for other in report.alternatives)
    settings = {"candidates": 10, "n_information_samples": 2048}
    chosen = FisherMask(100, layers="last", **settings, n_mask_samples=256)
    assert not check_network(net, X, 5, query_strategy=chosen).alternatives


def test_a_part_of_a_large_head_is_an_alternative():
    module = torch.nn.Sequential(torch.nn.Linear(6, 300), torch.nn.Linear(300, 5))
    net = NeuralNetClassifier(
        module, criterion=torch.nn.CrossEntropyLoss, classes=range(5), verbose=0
    ).initialize()
    samples = np.random.default_rng(0).normal(size=(30, 6)).astype("float32")
    report = check_network(net, samples, 3, query_strategy=FisherMask(1600))
    *_, last, part = report.alternatives
    assert last.setting == "layers='last'"
    assert part.setting == "layers='last', sparsity=1000"
    # Embeddings of both are the head's input and cotangents; matrices are k×k.
    assert part.bytes < last.bytes
    asked = FisherMask(1.0, layers="last")
    report = check_network(net, samples, 3, query_strategy=asked)
    assert report.alternatives[-1].setting == "sparsity=1000"


def test_an_alternative_that_would_be_refused_says_so(net):
    strategy = FisherMask(100, max_memory=20_000)
    report = check_network(net, X, 5, query_strategy=strategy, X_labeled=X[:20])
    refused = [other for other in report.alternatives if other.is_refused]
    assert refused
    assert refused[0].verdict.startswith("would be refused: This query needs about ")
    assert str(report).count(", would be refused") == len(refused)


def test_many_classes_are_pointed_at():
    module = torch.nn.Linear(6, 60)
    many = NeuralNetClassifier(
        module, criterion=torch.nn.CrossEntropyLoss, classes=range(60), verbose=0
    ).initialize()
    samples = np.random.default_rng(0).normal(size=(30, 6)).astype("float32")
    report = check_network(many, samples, 3, n_pool=1000)
    assert report.alternatives[-1].setting == "n_top_classes=5"
    assert report.alternatives[-1].bytes < report.bytes["total"]
    assert any(
        "59 of 60 passes a sample are backward" in note and "n_top_classes=5" in note
        for note in report.notes
    )
    few = check_network(
        many, samples, 3, query_strategy=FisherMask(n_top_classes=5), n_pool=1000
    )
    assert not any("passes a sample" in note for note in few.notes)


def test_a_mask_without_a_choice_costs_nothing(net):
    def seconds(**params):
        chosen = FisherMask(**params)
        return check_network(net, X, 5, query_strategy=chosen, n_pool=5_000).seconds

    # What is left is trying the net on a few samples.
    assert seconds(sparsity=100)["mask"] > 2 * seconds(sparsity=1.0)["mask"]


class Written(TorchDispatchMode):
    """A clock that counts the numbers which operations write."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.n += sum(t.numel() for t in tree_leaves(found) if torch.is_tensor(t))
        return found

    def now(self):
        return float(self.n)


def test_a_kernel_is_priced_by_its_rows_and_by_their_pairs(monkeypatch):
    """Rows are made once a sample, and the kernel holds a number for each pair."""
    torch.manual_seed(0)
    net = as_estimator(torch.nn.Linear(60, 40), classes=range(40))
    samples = np.random.default_rng(0).normal(size=(340, 60)).astype("float32")
    settings = {"sparsity": 1500, "n_top_classes": 4, "random_state": 0}
    strategy = FisherMask(**settings)
    kwargs = {"X_labeled": samples[:40]}
    with Written() as clock:
        for module in (progress, selection_costs):
            monkeypatch.setattr(module, "perf_counter", clock.now)
        report = check_network(net, samples[40:], 9, query_strategy=strategy, **kwargs)
        strategy.select(net, samples[40:], 9, **kwargs)
    assert 0.8 < report.seconds["selection"] / strategy.timings_["selection"] < 1.25
