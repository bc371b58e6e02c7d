"""FisherMask through its public interface: against the slow twin, with real nets, and
with bad input.
"""

import itertools
import pickle
import random
import re
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from skorch.helper import SliceDataset
from torch import nn

from fishermask_sk import FisherMask, check_network, fisher_mask_sampling
from fishermask_sk.baselines import margin_sampling
from fishermask_sk.nets.skorch_adapter import preserved_rng
from fishermask_sk.strategy import pace

N_LABELED, N_POOL, CLASSES = 12, 30, 3


class Images(nn.Module):
    """A small convolutional net with everything that a query must leave alone."""

    def __init__(self, outputs=CLASSES, end=None):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(3, 2, 2),
        )
        self.head = nn.Linear(2 * 9, outputs)
        self.end = end

    def forward(self, x):
        x = self.head(self.body(x).tanh().flatten(1))
        return x if self.end is None else self.end(x)


def images(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 1, 6, 6))


def labels(n):
    return np.arange(n) % CLASSES


def fitted(kind="logits", **kwargs):
    torch.manual_seed(0)
    settings = {
        "max_epochs": 3,
        "lr": 0.1,
        "verbose": 0,
        "train_split": None,
        "batch_size": 8,
    }
    X, y = images(N_LABELED, seed=1), labels(N_LABELED)
    if kind == "logits":
        net = NeuralNetClassifier(
            Images().double(), criterion=nn.CrossEntropyLoss, **settings, **kwargs
        )
    elif kind == "probabilities":
        net = NeuralNetClassifier(
            Images(end=nn.Softmax(1)).double(), **settings, **kwargs
        )
    else:
        net = NeuralNetBinaryClassifier(
            Images(outputs=1).double(), **settings, **kwargs
        )
        y = (y > 0).astype("float64")
    return net.fit(X, y)


def vector_net(module, criterion=nn.CrossEntropyLoss, cls=NeuralNetClassifier):
    return cls(module, criterion=criterion, verbose=0, train_split=None).initialize()


VECTORS = np.random.default_rng(0).normal(size=(6, 4))


def expected_query(
    net,
    n_instances,
    kind="logits",
    sparsity=0.3,
    labeled=True,
    layers=slice(None),
    **kwargs,
):
    """The whole query by the slow twins; `layers` are the candidates' positions, the
    head is kept.
    """
    module = net.module_.eval()
    pool, known = (
        torch.as_tensor(images(N_POOL)),
        torch.as_tensor(images(N_LABELED, seed=1)),
    )
    known = known if labeled else known[:0]
    everything = torch.cat([pool, known])
    weighting, top = (
        kwargs.pop("weighting", "fisher"),
        {"n_top_classes": kwargs.pop("n_top_classes", None)},
    )
    rows = reference.naive_embeddings(module, everything, scores=kind, **top)
    scores = rows.square().sum(1).mean(0)
    n_head = sum(p.numel() for p in module.head.parameters())
    k = int(sparsity * len(scores))
    head = list(range(len(scores) - n_head, len(scores)))
    mask = (
        sorted(reference.naive_top_k(scores[:-n_head], k - n_head) + head)
        if k > n_head
        else None
    )
    v = reference.naive_embeddings(
        module, everything, scores=kind, weighting=weighting, **top
    )
    v = v[:, :, mask].numpy()
    picks, gains = reference.naive_selection(
        v[:N_POOL], v[N_POOL:], n_instances, **kwargs
    )
    return mask, picks, gains


@pytest.mark.parametrize("kind", ["logits", "probabilities", "logit"])
@pytest.mark.parametrize("n_instances", [1, 2, 10, N_POOL])
@pytest.mark.parametrize("labeled", [True, False])
def test_a_query_equals_the_slow_twin(kind, n_instances, labeled):
    net = fitted(kind)
    strategy = FisherMask(sparsity=0.9, random_state=0, batch_size=7)
    X_labeled = images(N_LABELED, seed=1)[: N_LABELED if labeled else 0]
    query_idx = strategy.select(net, images(N_POOL), n_instances, X_labeled=X_labeled)
    mask, picks, gains = expected_query(
        net, n_instances, kind, sparsity=0.9, labeled=labeled
    )
    assert strategy.mask_indices_.tolist() == mask
    assert query_idx.tolist() == picks == strategy.query_idx_.tolist()
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-7)
    assert query_idx.dtype == np.int64


@pytest.mark.parametrize(
    "kwargs",
    [
        {"oversample": 2.0},
        {"damping": 0.01},
        {"weighting": "uniform"},
        {"n_top_classes": 2},
    ],
)
def test_parameters_reach_the_slow_twin(kwargs):
    net = fitted()
    strategy = FisherMask(sparsity=0.9, random_state=0, **kwargs)
    strategy.select(net, images(N_POOL), 5, X_labeled=images(N_LABELED, seed=1))
    _, picks, gains = expected_query(net, 5, sparsity=0.9, **kwargs)
    assert strategy.query_idx_.tolist() == picks
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-7)


def test_a_callers_autocast_changes_nothing():
    """Sums and products of gradients in bfloat16 would pick others."""
    torch.manual_seed(0)
    net = vector_net(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)))
    X = np.random.default_rng(1).normal(size=(200, 4)).astype("float32")
    alone, inside = FisherMask(0.9), FisherMask(0.9)
    alone.select(net, X, 20, X_labeled=X[:0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.select(net, X, 20, X_labeled=X[:0])
    assert inside.query_idx_.tolist() == alone.query_idx_.tolist()
    np.testing.assert_array_equal(inside.trace_reductions_, alone.trace_reductions_)


def select(strategy, net=None, n_instances=3, **kwargs):
    kwargs.setdefault("X_labeled", images(N_LABELED, seed=1))
    strategy.select(net or fitted(), images(N_POOL), n_instances, **kwargs)
    return strategy


def test_every_kind_of_mask_and_layers():
    net = fitted()
    sizes = {name: p.numel() for name, p in net.module_.named_parameters()}

    def kept(**kwargs):
        return select(FisherMask(random_state=0, **kwargs), net).weights_per_layer_

    head = ["head.weight", "head.bias"]
    n_head = sum(sizes[name] for name in head)
    assert kept(sparsity=1.0) == sizes
    assert sum(kept(sparsity=n_head + 7).values()) == n_head + 7
    assert (
        kept(sparsity=n_head + 7, mask="random")["head.weight"] == sizes["head.weight"]
    )
    assert sum(kept(sparsity=20, mask="random", keep_head=False).values()) == 20
    per_layer = kept(sparsity=0.15, mask="per_layer", keep_head=False)
    assert per_layer == {
        name: -(-15 * size // 100) for name, size in sizes.items()
    }  # ⌈0.15·size⌉
    assert sum(kept(sparsity=12, mask="per_layer", keep_head=False).values()) >= 12
    assert kept(sparsity=0.1, mask="per_layer")["head.weight"] == sizes["head.weight"]
    last = kept(sparsity=1.0, layers="last")
    assert {name: n for name, n in last.items() if n} == {
        name: sizes[name] for name in head
    }
    middle = kept(sparsity=1.0, layers="middle")
    assert [name for name, n in middle.items() if n] == [
        "body.1.weight",
        "body.1.bias",
        "body.4.weight",
        "body.4.bias",
    ]
    assert sum(kept(sparsity=5, layers="body.4.*").values()) == 5
    assert (
        kept(mask=lambda scores, k, slices: [slices["body.1.bias"].start])[
            "body.1.bias"
        ]
        == 1
    )


def test_frozen_weights_are_numbered_and_never_chosen():
    net = fitted()
    net.module_.body[0].weight.requires_grad_(False)
    strategy = select(FisherMask(sparsity=1.0), net)
    assert strategy.mask_indices_[0] == net.module_.body[0].weight.numel()
    assert "body.0.weight" not in strategy.weights_per_layer_
    for p in net.module_.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="All weights of the net are frozen"):
        select(FisherMask(), net)


def test_a_head_larger_than_the_mask_warns_once():
    with pytest.warns(UserWarning, match="the head alone has") as caught:
        strategy = select(FisherMask(sparsity=10))
    assert [warning.filename for warning in caught] == [__file__]  # not a file of ours
    assert strategy.weights_per_layer_["body.0.weight"] == 0
    assert len(strategy.mask_indices_) == 10


def global_numpy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002


class Token(nn.Module):
    """A bare parameter, a layer called twice and tied weights: some of the net goes the
    generic way, some does not.
    """

    def __init__(self):
        super().__init__()
        self.token, self.block = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)
        self.twin, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.twin.weight = self.block.weight

    def forward(self, x):
        return self.head(
            self.twin(self.block(self.block(x + self.token).tanh())).tanh()
        )


def test_a_net_that_partly_goes_the_generic_way():
    torch.manual_seed(0)
    net = vector_net(Token().double())
    strategy = FisherMask(1.0)
    query_idx = strategy.select(net, VECTORS, 4, X_labeled=VECTORS[:2])
    rows = reference.naive_embeddings(
        net.module_, torch.as_tensor(np.concatenate([VECTORS, VECTORS[:2]]))
    ).numpy()
    picks, gains = reference.naive_selection(
        rows[: len(VECTORS)], rows[len(VECTORS) :], 4
    )
    assert query_idx.tolist() == picks
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-7)


def test_buffers_that_forward_replaces_are_put_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(4, CLASSES, dtype=torch.float64)
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("cache", None)

        def forward(self, x):
            self.steps, self.cache = self.steps + 1, x.detach()
            return super().forward(x)

    net = vector_net(Counting())
    steps = net.module_.steps
    FisherMask(1.0).select(net, VECTORS, 2, X_labeled=VECTORS[:0])
    assert net.module_.steps is steps
    assert steps == 0
    assert net.module_.cache is None


def test_values_are_checked_where_they_reach_the_net():
    X = VECTORS.astype("float32").copy()
    net = vector_net(nn.Linear(4, CLASSES))
    imputed = make_pipeline(SimpleImputer(), ToFloat32(), net)
    imputed[:-1].fit(X)
    X[3, 1] = np.nan
    assert len(FisherMask(1.0).select(imputed, X, 2, X_labeled=X[:0])) == 2
    plain = make_pipeline(StandardScaler().fit(X), ToFloat32(), net)
    with pytest.raises(ValueError, match="X_pool holds NaN"):
        FisherMask(1.0).select(plain, X, 2, X_labeled=X[:0])
    lazy = torch.utils.data.TensorDataset(
        torch.as_tensor(X.repeat(3, 0)), torch.zeros(18)
    )
    with pytest.raises(ValueError, match="gradients of sample 9 of X_pool hold NaN"):
        FisherMask(1.0, mask="random").select(net, lazy, 2, X_labeled=X[:0])
    with pytest.raises(FloatingPointError, match="samples do, or the net's weights"):
        FisherMask(9, keep_head=False).select(net, lazy, 2, X_labeled=X[:0])


class ToFloat32(FunctionTransformer):
    def __init__(self):
        super().__init__(lambda X: X.astype("float32"))


@pytest.mark.parametrize("kind", ["tensor", "dataset"])
def test_pool_and_labelled_samples_may_come_in_different_containers(kind):
    net, X, known = fitted(), images(N_POOL), images(N_LABELED, seed=1)
    expected = FisherMask(0.9).select(net, X, 5, X_labeled=known).tolist()
    pool = torch.as_tensor(X)
    if kind == "dataset":
        pool = torch.utils.data.TensorDataset(pool, torch.zeros(len(pool)))
    assert FisherMask(0.9).select(net, pool, 5, X_labeled=known).tolist() == expected
    assert FisherMask(0.9).select(net, pool, 5, X_labeled=[]).tolist() != expected


def bits(net):
    """Everything of a net that a query must leave as it was, by value."""
    module = net.module_
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "training": [m.training for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "grad": [
            None if p.grad is None else p.grad.clone() for p in module.parameters()
        ],
        "identity": [id(p) for p in module.parameters()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()
        ],
        "rng": [random.getstate(), global_numpy_state(), torch.get_rng_state()],
        "params": str(net.get_params(deep=False)),
        "attributes": sorted(vars(net)),
    }


def assert_same_bits(before, after):
    for name, was in before.items():
        if name == "state":
            torch.testing.assert_close(after[name], was, rtol=0, atol=0)
        else:
            assert str(after[name]) == str(was), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_net_is_untouched(training, fails):
    net = fitted(iterator_valid__shuffle=False)
    net.module_.train(training)
    before = bits(net)
    strategy = FisherMask(sparsity=0.9)
    if fails:
        strategy.set_params(mask=_failing_rule)
        with pytest.raises(RuntimeError, match="a rule of ours"):
            select(strategy, net)
        assert not hasattr(strategy, "mask_indices_")
    else:
        select(strategy, net)
    assert_same_bits(before, bits(net))


def _failing_rule(scores, k, slices):
    raise RuntimeError("a rule of ours")


def test_scikit_learn_treats_it_like_any_estimator():
    strategy = FisherMask(0.01, layers=["a*"], mask=_failing_rule, random_state=3)
    copy = clone(strategy)
    assert copy.get_params() == strategy.get_params()
    assert copy.set_params(damping=2.0).damping == 2.0
    with pytest.raises(ValueError, match="Invalid parameter"):
        strategy.set_params(dampng=2)
    assert repr(FisherMask(0.01)) == "FisherMask(sparsity=0.01)"
    select(strategy := FisherMask(0.9))
    again = pickle.loads(pickle.dumps(strategy))
    assert again.query_idx_.tolist() == strategy.query_idx_.tolist()
    assert not hasattr(clone(strategy), "query_idx_")


def test_the_same_random_state_gives_the_same_picks():
    net = fitted()

    def picks(random_state):
        return select(
            FisherMask(0.9, mask="random", n_mask_samples=4, random_state=random_state),
            net,
        ).query_idx_.tolist()

    assert picks(1) == picks(1)
    assert picks(np.random.RandomState(1)) == picks(1)
    before = global_numpy_state()
    picks(None)
    assert global_numpy_state() == before


def test_timings_and_progress(capfd):
    strategy = select(FisherMask(0.9, verbose=1))
    assert set(strategy.timings_) == {"mask", "embeddings", "selection"}
    assert all(seconds > 0 for seconds in strategy.timings_.values())
    shown = capfd.readouterr().err
    assert all(step in shown for step in ("mask", "embeddings", "set-up", "picks"))
    # Every bar is full when it closes.
    for step in ("mask", "embeddings", "set-up", "picks"):
        assert f"{step}: 100%" in shown
    select(FisherMask(0.9))
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


def test_seconds_of_each_step_are_logged(caplog):
    with caplog.at_level("INFO", logger="fishermask_sk"):
        strategy = select(FisherMask(0.9))
    steps = [record.getMessage().split(":")[0] for record in caplog.records]
    assert steps == list(strategy.timings_)


def said_to_be_shorter(caught):
    """What one warning says that a query needs, and the setting that it names."""
    found = [
        re.search(
            r"This query needs about (.*) more, by the first (.*); "
            r"(.*) would take about .*\. See the page on choosing settings\.",
            str(w.message),
        )
        for w in caught
    ]
    ((needs, by, setting),) = [each.groups() for each in found if each]
    return needs, by, eval(f"dict({setting})")


def test_a_long_query_says_so_from_its_first_batches(monkeypatch):
    # A clock on which a minute passes between two looks.
    monkeypatch.setattr(pace, "perf_counter", itertools.count(step=60.0).__next__)
    strategy = FisherMask(0.9, batch_size=2)
    with pytest.warns(UserWarning, match="This query needs") as caught:
        select(strategy)
    needs, by, setting = said_to_be_shorter(caught)
    # To rank 40 more takes 20 minutes, and to embed all 42 half as long.
    assert (needs, by) == ("30 min", "2 of 42 samples")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(strategy)  # once for a loop
    assert len(select(FisherMask(0.9, **setting)).query_idx_) == 3
    report = check_network(fitted(), images(N_POOL), 3, query_strategy=strategy)
    priced = [eval(f"dict({other.setting})") for other in report.alternatives]
    assert setting in priced


@pytest.mark.parametrize("params", [{}, {"mask": "random"}, {"candidates": 2}])
def test_to_say_so_changes_no_pick(monkeypatch, params):
    params = {"batch_size": 2, "n_mask_samples": 40, "random_state": 0, **params}
    expected = select(FisherMask(0.2, **params)).query_idx_
    monkeypatch.setattr(pace, "perf_counter", itertools.count(step=60.0).__next__)
    with pytest.warns(UserWarning, match="This query needs"):
        found = select(FisherMask(0.2, **params)).query_idx_
    assert found.tolist() == expected.tolist()


def test_so_does_one_whose_picks_take_long(monkeypatch):
    monkeypatch.setattr(pace, "perf_counter", itertools.count(step=60.0).__next__)
    strategy = FisherMask(1.0, layers="last", oversample=3.0)
    with pytest.warns(UserWarning, match="This query needs") as caught:
        select(strategy)
    # Nine picks, of which six are taken back.
    assert said_to_be_shorter(caught)[:2] == ("14 min", "1 of 15 picks")


def test_random_tie_break_draws_among_equal_samples():
    net, X = fitted(), np.tile(images(1), (8, 1, 1, 1))
    picks = {
        int(
            FisherMask(0.9, random_state=s).select(
                net, X, 1, X_labeled=X[:0], random_tie_break=True
            )[0]
        )
        for s in range(12)
    }
    assert len(picks) > 2
    assert FisherMask(0.9).select(net, X, 8, X_labeled=X[:0]).tolist() == list(range(8))


def test_earlier_steps_of_a_pipeline_are_applied_once():
    X = np.random.default_rng(0).normal(3, 5, size=(40, 4)).astype("float32")
    y = labels(40)
    torch.manual_seed(0)
    net = NeuralNetClassifier(
        nn.Linear(4, CLASSES),
        criterion=nn.CrossEntropyLoss,
        verbose=0,
        train_split=None,
        max_epochs=5,
        lr=0.1,
    )
    pipe = make_pipeline(StandardScaler(), "passthrough", net).fit(X[:10], y[:10])
    scaled = pipe[0].transform(X)
    strategy = FisherMask(1.0)
    query_idx = strategy.select(pipe, X[10:], 5, X_labeled=X[:10])
    assert (
        query_idx.tolist()
        == strategy.select(pipe[-1], scaled[10:], 5, X_labeled=scaled[:10]).tolist()
    )
    assert (
        query_idx.tolist()
        != strategy.select(pipe[-1], X[10:], 5, X_labeled=X[:10]).tolist()
    )
    search = GridSearchCV(
        pipe, {"neuralnetclassifier__lr": [0.1]}, cv=2, scoring="accuracy"
    ).fit(X[:20], y[:20])
    by_search = strategy.select(search, X[20:], 5, X_labeled=X[:20]).tolist()
    assert (
        by_search
        == strategy.select(search.best_estimator_, X[20:], 5, X_labeled=X[:20]).tolist()
    )


@pytest.mark.parametrize("form", ["tensor", "dataset", "slice dataset", "dict"])
def test_other_forms_of_samples_give_the_same_picks(form):
    net, X, known = fitted(), images(N_POOL), images(N_LABELED, seed=1)
    expected = FisherMask(0.9).select(net, X, 5, X_labeled=known).tolist()
    if form == "tensor":
        X, known = torch.as_tensor(X), torch.as_tensor(known)
    elif form == "dataset":
        X, known = (
            torch.utils.data.TensorDataset(torch.as_tensor(v), torch.zeros(len(v)))
            for v in (X, known)
        )
    elif form == "slice dataset":
        X, known = (
            SliceDataset(
                torch.utils.data.TensorDataset(torch.as_tensor(v), torch.zeros(len(v)))
            )
            for v in (X, known)
        )
    else:
        X, known = {"x": X}, {"x": known}
    assert FisherMask(0.9).select(net, X, 5, X_labeled=known).tolist() == expected


def test_functional_form():
    net, X, known = fitted(), images(N_POOL), images(N_LABELED, seed=1)
    strategy = partial(fisher_mask_sampling, sparsity=0.9, random_state=0)
    found = strategy(net, X, n_instances=4, X_labeled=known)
    assert (
        found.tolist()
        == FisherMask(0.9, random_state=0).select(net, X, 4, X_labeled=known).tolist()
    )
    with pytest.raises(TypeError, match="sparsty"):
        fisher_mask_sampling(net, X, sparsty=0.9, X_labeled=known)


def test_no_labelled_samples_is_said():
    with pytest.warns(UserWarning, match="No labelled samples"):
        FisherMask(0.9).select(fitted(), images(N_POOL), 2)


class NoLogits(nn.Linear):
    def __init__(self, ending):
        super().__init__(4, 3, dtype=torch.float64)
        self.ending = ending

    def forward(self, x):
        return self.ending(super().forward(x))


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (
            NeuralNetClassifier(Images),
            NotFittedError,
            "NeuralNetClassifier is not fitted yet",
        ),
        (
            LogisticRegression(),
            TypeError,
            "no.* in this LogisticRegression; wrap the torch module",
        ),
        (
            make_pipeline(StandardScaler(), LogisticRegression()),
            TypeError,
            "in this LogisticRegression",
        ),
        (
            GridSearchCV(NeuralNetClassifier(Images), {}),
            NotFittedError,
            "GridSearchCV has no best_estimator_",
        ),
        (
            CalibratedClassifierCV(NeuralNetClassifier(Images)),
            TypeError,
            "changes the probabilities",
        ),
        (
            vector_net(NoLogits(lambda x: x[:, 0]), nn.MSELoss, NeuralNetRegressor),
            ValueError,
            "fitted with MSELoss",
        ),
        (vector_net(NoLogits(lambda x: x[:, 0])), ValueError, r"it returned \(6,\)"),
        (
            vector_net(NoLogits(lambda x: x[:, :1])),
            ValueError,
            r"One logit goes with BCEWithLogitsLoss",
        ),
        (
            vector_net(NoLogits(lambda x: x[:, :, None])),
            ValueError,
            r"it returned \(6, 3, 1\)",
        ),
        (vector_net(NoLogits(lambda x: [x, x])), ValueError, "module returned list"),
        (
            vector_net(NoLogits(lambda x: x), nn.NLLLoss),
            ValueError,
            "End the module with softmax",
        ),
        (
            vector_net(NoLogits(lambda x: x.log_softmax(1)), nn.NLLLoss),
            ValueError,
            "these are none.*not log_softmax: skorch takes the logarithm",
        ),
        (
            vector_net(NoLogits(lambda x: x / 0)),
            ValueError,
            "outputs hold NaN or infinite",
        ),
        (
            vector_net(NoLogits(lambda x: x), nn.BCEWithLogitsLoss),
            ValueError,
            r"one logit a sample, shape \(n,\) or \(n, 1\); it returned \(6, 3\)",
        ),
        (  # skorch's own binary net says it first
            vector_net(
                NoLogits(lambda x: x), nn.BCEWithLogitsLoss, NeuralNetBinaryClassifier
            ),
            ValueError,
            r"shape \(n,\) or \(n, 1\), got \(6, 3\)",
        ),
    ],
)
def test_nets_that_cannot_be_asked(net, error, message):
    with pytest.raises(error, match=message):
        FisherMask().select(net, VECTORS, 2, X_labeled=VECTORS[:0])


def test_softmax_before_a_loss_that_takes_logits():
    net = vector_net(NoLogits(lambda x: x.softmax(1)))
    with pytest.warns(
        UserWarning,
        match=r"CrossEntropyLoss takes logits.*Leave softmax out of forward, or set",
    ):
        FisherMask(0.9).select(net, VECTORS, 2, X_labeled=VECTORS[:0])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sparsity": 0.0}, r"sparsity=0.0 must be a fraction in \(0, 1\]"),
        ({"sparsity": 1.5}, "sparsity=1.5"),
        ({"sparsity": 0}, "sparsity=0 "),
        ({"sparsity": True}, "sparsity=True"),
        ({"sparsity": "0.1"}, "sparsity='0.1'"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"mask": np.zeros(2)}, "is unknown; use one of fisher"),
        ({"weighting": np.zeros(2)}, "is unknown; use 'fisher'"),
        ({"mask": lambda *_: None}, "integer positions; it returned NoneType"),
        (
            {"mask": "best"},
            "mask='best' is unknown; use one of fisher, per_layer, random",
        ),
        ({"weighting": "p"}, "weighting='p' is unknown"),
        ({"layers": []}, r"layers=\[\] must be"),
        ({"layers": 3}, "layers=3 must be"),
        (
            {"layers": "conv7*"},
            "matches none of the trainable parameters.*body.0.weight",
        ),
        ({"head": "fc"}, "head='fc' names no module"),
        ({"damping": 0}, "damping=0 must be a finite number > 0"),
        ({"damping": float("inf")}, "damping=inf"),
        ({"oversample": 0.5}, "oversample=0.5 must be a finite number >= 1"),
        ({"n_mask_samples": 0}, "n_mask_samples=0 must be an int >= 1"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be an int >= 1"),
        ({"batch_size": True}, "batch_size=True must be an int >= 1"),
        ({"keep_head": "no"}, "keep_head='no' must be True or False"),
        ({"keep_head": 1}, "keep_head=1 must be True or False"),
        ({"keep_head": None}, "keep_head=None must be True or False"),
        ({"head": 3}, "head=3 must be the name of a module"),
        ({"head": nn.Linear(2, 2)}, r"head=Linear\(.* must be the name of a module"),
        ({"verbose": 3.5}, "verbose=3.5 must be an int >= 0"),
        ({"verbose": "yes"}, "verbose='yes' must be an int >= 0"),
        ({"verbose": -1}, "verbose=-1 must be an int >= 0"),
        ({"random_state": "seed"}, "random_state='seed' must be an int, a RandomState"),
        ({"random_state": 1.5}, "random_state=1.5 must be an int, a RandomState"),
        (
            {"random_state": np.random.default_rng(0)},
            r"random_state=Generator.* must be an int, a RandomState or None",
        ),
        ({"n_top_classes": 1}, "n_top_classes=1 must be an int >= 2"),
        ({"n_components": 0}, "n_components=0 must be an int >= 1"),
        ({"n_information_samples": 0}, "n_information_samples=0 must be an int >= 1"),
        ({"max_memory": "much"}, "max_memory='much' must be a number of bytes"),
        ({"sparsity": None}, "sparsity=None must be a fraction"),
        ({"damping": "1"}, "damping='1' must be a finite number"),
        ({"oversample": None}, "oversample=None must be a finite number"),
        ({"layers": [1]}, r"layers=\[1\] must be"),
    ],
)
def test_parameters_out_of_range(params, message):
    strategy = FisherMask(**params)
    with pytest.raises(ValueError, match=message):
        select(strategy)
    assert not hasattr(strategy, "query_idx_")


def test_every_parameter_is_checked():
    """Each refuses an object that can be nothing."""
    for name in FisherMask().get_params():
        with pytest.raises((TypeError, ValueError), match=name):
            select(FisherMask(**{name: object()}))


def test_random_tie_break_is_checked():
    with pytest.raises(ValueError, match="random_tie_break='no' must be True or False"):
        FisherMask().select(
            fitted(), images(5), X_labeled=images(0), random_tie_break="no"
        )


@pytest.mark.parametrize(
    ("X", "n_instances", "X_labeled", "error", "message"),
    [
        (images(5), 1.0, None, TypeError, "n_instances=1.0 must be an int"),
        (images(5), True, None, TypeError, "n_instances=True must be an int"),
        (images(5), 0, None, ValueError, "n_instances=0 must be 1 or more"),
        (
            images(5),
            6,
            None,
            ValueError,
            "n_instances=6 exceeds the pool of 5 samples; lower n_instances",
        ),
        (images(5)[:0], 1, None, ValueError, "X_pool is empty"),
        (
            np.where(images(5) > 1, np.nan, 0),
            1,
            None,
            ValueError,
            "X_pool holds NaN or infinite values",
        ),
        (
            torch.full((5, 1, 6, 6), torch.inf),
            1,
            None,
            ValueError,
            "X_pool holds NaN or infinite values",
        ),
        (
            images(5),
            1,
            images(5) * np.nan,
            ValueError,
            "X_labeled holds NaN or infinite values",
        ),
        (
            images(5),
            1,
            images(5)[:, :, :5],
            ValueError,
            r"X_pool has samples of shape \(1, 6, 6\) and the labelled",
        ),
        (
            list(images(5)),
            1,
            None,
            ValueError,
            r"X_pool is a list, which skorch takes for the module's inputs.*"
            r"pass one array, np.stack\(X_pool\)",
        ),
        (
            pd.DataFrame(images(5).reshape(5, 36)),
            1,
            None,
            ValueError,
            r"X_pool is a DataFrame, which skorch takes for .* a column each.*"
            r"pass X_pool.to_numpy\(",
        ),
        (
            images(5)[:, :, :5],
            1,
            None,
            ValueError,
            r"cannot take these samples, of shape \(1, 5, 6\)",
        ),
        (None, 1, None, TypeError, "X_pool is None; pass samples"),
        (3, 1, None, TypeError, "X_pool is 3; pass samples"),
        ("abc", 1, None, TypeError, "X_pool is 'abc'; pass samples"),
        (np.array(3.0), 1, None, TypeError, r"X_pool is array\(3.\); pass samples"),
        (
            np.array(["a", "b"]),
            1,
            None,
            TypeError,
            "the net takes numbers, one sample a row: encode it",
        ),
        ([], 1, None, ValueError, "X_pool is empty"),
        ({}, 1, None, ValueError, "X_pool is empty"),
        (
            images(5).astype("float32"),
            1,
            None,
            ValueError,
            "dtype float32.*its weights are float64: cast the samples",
        ),
    ],
)
def test_samples_that_cannot_be_taken(X, n_instances, X_labeled, error, message):
    strategy = FisherMask(0.9)
    with pytest.raises(error, match=message):
        strategy.select(
            fitted(),
            X,
            n_instances,
            X_labeled=images(0) if X_labeled is None else X_labeled,
        )
    assert not hasattr(strategy, "query_idx_")


def test_rng_is_given_back_after_an_error():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), preserved_rng():
        {}[torch.rand(3)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n_labeled", [0, N_LABELED])
def test_only_candidates_are_picked_and_the_whole_pool_is_wanted(n_labeled):
    net, X, known = fitted(), images(N_POOL), images(N_LABELED, seed=1)[:n_labeled]
    strategy, candidates = FisherMask(0.9), [28, 3, 4, 17, 11, 3, 20]
    query_idx = strategy.select(net, X, 4, X_labeled=known, candidates=candidates)
    rows = reference.naive_embeddings(
        net.module_.eval(), torch.as_tensor(np.concatenate([X, known]))
    )
    rows = rows[:, :, strategy.mask_indices_].numpy()
    allowed = sorted(set(candidates))
    target = np.einsum("nck,ncl->kl", rows, rows) / len(rows)
    m, weight = np.eye(rows.shape[2]), 4 / (n_labeled + 4)
    if n_labeled:
        m = m + np.einsum("nck,ncl->kl", rows[N_POOL:], rows[N_POOL:]) / (n_labeled + 4)
    picks = []
    for _ in range(4):
        left = [i for i in allowed if i not in picks]
        traces = [
            np.trace(np.linalg.solve(m + weight * rows[i].T @ rows[i], target))
            for i in left
        ]
        picks.append(left[int(np.argmin(traces))])
        m = m + weight * rows[picks[-1]].T @ rows[picks[-1]]
    assert query_idx.tolist() == picks


def test_candidates_may_be_all_or_proposed_by_a_strategy():
    net, X, known = fitted(), images(N_POOL), images(N_LABELED, seed=1)
    expected = FisherMask(0.9).select(net, X, 5, X_labeled=known).tolist()
    of_all = FisherMask(0.9).select(
        net, X, 5, X_labeled=known, candidates=np.arange(N_POOL)
    )
    assert of_all.tolist() == expected
    first_stage = partial(margin_sampling, n_instances=8)
    picks = FisherMask(0.9).select(net, X, 5, X_labeled=known, candidates=first_stage)
    assert set(picks) <= set(first_stage(net, X).tolist())


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (
            [0, 1],
            "n_instances=3 exceeds the 2 candidates; lower n_instances, or propose "
            "more",
        ),
        ([], "exceeds the 0 candidates"),
        (
            [0, 1, N_POOL],
            f"positions from 0 to {N_POOL}, and X_pool has {N_POOL} samples",
        ),
        ([-1, 1, 2], "positions from -1 to 2"),
        (np.ones(N_POOL, bool), "np.flatnonzero makes them of a boolean mask"),
        ([[0, 1, 2]], r"candidates have shape \(1, 3\)"),
        ([0.0, 1.0, 2.0], "dtype float64; pass positions"),
    ],
)
def test_candidates_that_are_none(candidates, message):
    with pytest.raises(ValueError, match=message):
        select(FisherMask(0.9), candidates=candidates)


def test_directions_have_a_line_of_their_own(caplog):
    with caplog.at_level("INFO", logger="fishermask_sk"):
        select(FisherMask(0.9, n_components=5))
    steps = [record.getMessage().split(":")[0] for record in caplog.records]
    assert steps == ["mask", "directions", "embeddings", "selection"]
