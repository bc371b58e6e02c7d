"""What labels are for, through the loop and the comparison: who is handed the target,
who keeps his own, and what is said.
"""

import json
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import TensorDataset

from fishermask_sk import FisherMask, compare_strategies, fisher_mask_sampling
from fishermask_sk._describe import describe
from fishermask_sk.baselines import (
    bait_sampling,
    facility_location_sampling,
    margin_sampling,
    random_sampling,
    weighted_margin_sampling,
)
from fishermask_sk.loops.classifier import ActiveLearningClassifier
from fishermask_sk.loops.results_file import differences

X, Y = load_iris(return_X_y=True)
TARGET = X[Y == 2][:7] + 0.1
SEEN = []


def recorder(learner, X_pool, n_instances=1, *, X_target=None, target_weight=None):
    SEEN.append((X_pool, X_target, target_weight))
    return np.arange(n_instances)


def without_weight(learner, X_pool, n_instances=1, *, X_target=None):
    return recorder(learner, X_pool, n_instances, X_target=X_target)


class Recorder(BaseEstimator):
    """The same as an object with a parameter."""

    def __init__(self, lead=0):
        self.lead = lead

    def __call__(
        self, learner, X_pool, n_instances=1, *, X_target=None, target_weight=None
    ):
        return self.lead + recorder(
            learner,
            X_pool,
            n_instances,
            X_target=X_target,
            target_weight=target_weight,
        )


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def loop(strategy=recorder, estimator=None, **params):
    settings = {"n_initial": 10, "n_instances": 5, "n_queries": 2, "random_state": 0}
    return ActiveLearningClassifier(
        estimator or GaussianNB(), strategy, **(settings | params)
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.hidden(x.float()).tanh())


def net(seed=0):
    return NeuralNetClassifier(
        Net,
        criterion=nn.CrossEntropyLoss,
        classes=[0, 1, 2],
        train_split=None,
        verbose=0,
        max_epochs=3,
        lr=0.1,
    )


# --- who is handed what
# --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [recorder, Recorder(), partial(recorder)])
def test_functions_objects_and_partials_are_handed_the_target(strategy):
    weight = np.arange(7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(strategy).fit(X, Y, X_target=TARGET, target_weight=weight.tolist())
    assert len(SEEN) == 2
    for _, target, weights in SEEN:
        np.testing.assert_array_equal(target, TARGET)
        np.testing.assert_array_equal(weights, weight)


def test_without_a_target_nothing_is_handed_on():
    loop().fit(X, Y)
    assert all(seen[1:] == (None, None) for seen in SEEN)


def test_weights_alone_are_those_of_the_rows_that_are_left():
    X_numbered = X.copy()
    X_numbered[:, 0] = np.arange(150)  # which row a row is
    weight = np.linspace(0, 3, 150)
    loop().fit(X_numbered, Y, target_weight=pd.Series(weight))
    assert [len(pool) for pool, _, _ in SEEN] == [140, 135]
    for pool, target, weights in SEEN:
        assert target is None
        np.testing.assert_array_equal(weights, weight[pool[:, 0].astype(int)])


def test_a_partial_keeps_its_own_target():
    own, other = TARGET[:2], np.ones(7)
    strategy = partial(recorder, X_target=own)
    loop(strategy).fit(X, Y, X_target=TARGET, target_weight=other)
    loop(partial(recorder, X_target=None)).fit(X, Y, X_target=TARGET)
    for _, target, weights in SEEN[:2]:
        np.testing.assert_array_equal(target, own)
        assert weights is None  # those of the loop's target are not its own's
    assert all(seen[1:] == (None, None) for seen in SEEN[2:])
    weight = partial(recorder, target_weight=2 * other)
    loop(weight).fit(X, Y, X_target=TARGET, target_weight=other)
    np.testing.assert_array_equal(SEEN[-1][2], 2 * other)
    np.testing.assert_array_equal(SEEN[-1][1], TARGET)


def test_who_has_no_such_parameter_is_named_once():
    with pytest.warns(UserWarning, match="No parameter X_target: margin_samp") as said:
        loop(margin_sampling).fit(X, Y, X_target=TARGET)
    assert len(said) == 1
    assert said[0].filename == __file__
    expected = "No parameter target_weight: without_weight. Where a strategy has none, "
    with pytest.warns(UserWarning, match=expected) as said:
        loop(without_weight).fit(X, Y, X_target=TARGET, target_weight=np.ones(7))
    assert len(said) == 1
    np.testing.assert_array_equal(SEEN[-1][1], TARGET)

    def swallows(learner, X_pool, n_instances=1, **kwargs):
        assert not kwargs
        return np.arange(n_instances)

    with pytest.warns(UserWarning, match="No parameter X_target: swallows"):
        loop(swallows).fit(X, Y, X_target=TARGET)


def test_a_fisher_mask_in_a_partial_is_seeded_like_a_bare_one():
    def picks(strategy):
        found = []
        for played in loop(strategy, net()).iter_rounds(X.astype("float32"), Y):
            found += played.query_idx.tolist()
        return found

    strategy = FisherMask(0.5, n_mask_samples=5)
    assert picks(strategy) == picks(partial(strategy, X_target=None))


@pytest.mark.parametrize(
    "strategy",
    [
        FisherMask(1.0),
        partial(fisher_mask_sampling, sparsity=1.0),
        bait_sampling,
        facility_location_sampling,
        weighted_margin_sampling,
    ],
)
def test_picks_are_those_of_the_strategy_itself(strategy):
    """Of the loop's learner, with the raw target: a pipeline's steps are the
    strategy's, and are applied once.
    """
    pipe = make_pipeline(StandardScaler(), net())
    scaled = [50, 1, 1, 1] * X.astype("float32"), [50, 1, 1, 1] * TARGET
    pool, target = (part.astype("float32") for part in scaled)
    rounds = loop(strategy, pipe, n_queries=1).iter_rounds(pool, Y, X_target=target)
    first, second = rounds
    left = np.setdiff1d(np.arange(150), first.query_idx)
    scaler, fitted = first.learner.estimator[0], first.learner.estimator[1]
    given = {"X_target": scaler.transform(target)}
    if strategy not in (facility_location_sampling, weighted_margin_sampling):
        given["X_labeled"] = scaler.transform(first.learner.X_training)
    expected = strategy(fitted, scaler.transform(pool[left]), 5, **given)
    np.testing.assert_array_equal(left[expected], second.query_idx)
    plain = {**given, "X_target": scaler.transform(pool[left])}
    elsewhere = strategy(fitted, scaler.transform(pool[left]), 5, **plain)
    assert left[elsewhere].tolist() != second.query_idx.tolist()


def test_targets_of_other_kinds():
    frame = pd.DataFrame(X, columns=list("abcd"))
    loop().fit(frame, Y, X_target=frame[:3])
    pd.testing.assert_frame_equal(SEEN[-1][1], frame[:3])
    dataset = TensorDataset(torch.tensor(TARGET))
    loop().fit(X, Y, X_target=dataset)
    assert SEEN[-1][1] is dataset


# --- searches
# --------------------------------------------------------------------------


def search(**given):
    grid = {"query_strategy__lead": [0]}
    GridSearchCV(loop(Recorder()), grid, cv=KFold(3), refit=False).fit(X, Y, **given)
    return SEEN


def test_a_search_hands_on_a_target_of_another_length():
    for _, target, weights in search(X_target=TARGET, target_weight=np.ones(7)):
        np.testing.assert_array_equal(target, TARGET)
        assert len(weights) == 7


def test_a_search_cuts_weights_of_rows_as_it_cuts_rows():
    weight = np.linspace(1, 2, 150)
    rows = {row.tobytes(): value for row, value in zip(X, weight, strict=True)}
    for pool, _, weights in search(target_weight=weight):
        close = [
            abs(rows[row.tobytes()] - w) for row, w in zip(pool, weights, strict=1)
        ]
        assert np.median(close) == 0  # some flowers are there twice


def test_a_search_cuts_a_target_as_long_as_the_pool():
    """As the docstring says: another number of samples is the cure."""
    assert {len(target) for _, target, _ in search(X_target=X + 0.1)} == {100}
    SEEN.clear()
    assert {len(target) for _, target, _ in search(X_target=X[1:] + 0.1)} == {149}


# --- comparisons
# --------------------------------------------------------------------------


def compare(strategies, **params):
    settings = {"n_initial": 8, "n_instances": 4, "n_queries": 2, "seeds": 2, **params}
    return compare_strategies(
        GaussianNB(), strategies, X[::2], Y[::2], X[1::2], Y[1::2], **settings
    )


def test_a_comparison_hands_on_the_target_and_names_the_others_once():
    strategies = {
        "random": random_sampling,
        "recorder": recorder,
        "own": partial(recorder, X_target=TARGET[:1]),
        "margin": margin_sampling,
    }
    with pytest.warns(UserWarning, match="No parameter X_target: random, margin") as w:
        compare(strategies, X_target=TARGET)
    assert len(w) == 1
    assert w[0].filename == __file__
    assert [len(target) for _, target, _ in SEEN] == [7] * 4 + [1] * 4


def test_a_comparison_in_processes_is_that_of_one():
    strategies = [partial(fisher_mask_sampling, sparsity=1.0), FisherMask(1.0)]
    data = X[::2].astype("float32"), Y[::2], X[1::2].astype("float32"), Y[1::2]
    budget = {"n_initial": 9, "n_instances": 3, "n_queries": 1, "seeds": 1}
    target = TARGET.astype("float32")
    rows = [
        compare_strategies(
            net(), strategies, *data, **budget, X_target=target, n_jobs=n_jobs
        )
        for n_jobs in (1, 2)
    ]
    for row, other in zip(*rows, strict=True):
        assert row["indices"] == other["indices"]


def test_a_file_knows_the_target(tmp_path):
    file = tmp_path / "results.jsonl"
    compare({"recorder": recorder}, results=file)
    plain = file.read_text().splitlines()[1]
    assert "target" not in plain  # a file from before has the same settings
    with pytest.raises(ValueError, match=r"data\.X_target is None in the file and '"):
        compare({"recorder": recorder}, results=file, X_target=TARGET)
    file = tmp_path / "targeted.jsonl"
    whole = compare({"recorder": recorder}, results=file, X_target=TARGET)
    n_seen = len(SEEN)
    again = compare({"recorder": recorder}, results=file, X_target=TARGET.copy())
    assert len(SEEN) == n_seen
    assert again == whole
    with pytest.raises(ValueError, match=r"data\.X_target is '"):
        compare({"recorder": recorder}, results=file, X_target=TARGET + 1)
    with pytest.raises(ValueError, match=r"data\.target_weight is None in the file"):
        compare(
            {"recorder": recorder},
            results=file,
            X_target=TARGET,
            target_weight=np.ones(7),
        )


def test_a_file_from_before_a_parameter_goes_on(tmp_path):
    file, strategies = (
        tmp_path / "results.jsonl",
        {"mask": Recorder(), "other": Recorder},
    )
    strategies["other"] = Recorder(lead=1)
    whole = compare(strategies, results=file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if "definition" in record:
            assert record["definition"]["params"].pop("lead") in (0, 1)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"'other'\]\.params\.lead is 0 in the file"):
        compare(strategies, results=file)
    again = compare({"mask": Recorder()}, results=file)
    assert again == whole[: len(again)]


def test_what_a_class_had_not_then():
    now = describe(FisherMask())
    then = {"class": now["class"], "params": dict(list(now["params"].items())[:3])}
    assert differences(then, now) == []
    changed = describe(FisherMask(damping=0.5))
    assert differences(then, changed) == [
        "params.damping is 1.0 in the file and 0.5 now"
    ]
    nowhere = {"class": "gone.Strategy", "params": {}}
    assert differences(nowhere, {"class": "gone.Strategy", "params": {"a": 1}}) == [
        "params.a is None in the file and 1 now"
    ]


# --- refusals, all before anything is fitted
# --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"X_target": TARGET[:0]}, "X_target is empty; pass samples of what the model"),
        (
            {"X_target": TARGET[:, 1:]},
            r"of shape \(4,\) and those of X_target of shape",
        ),
        ({"target_weight": np.ones(7)}, r"has shape \(7,\), and X has \d+ samples"),
        (
            {"X_target": TARGET, "target_weight": np.ones(8)},
            r"has shape \(8,\), and X_target has 7 samples; pass one weight a sample",
        ),
        (
            {"X_target": TARGET, "target_weight": [-1, 1, 1, 1, 1, 1, 1]},
            "target_weight goes from -1.0 to 1.0; weights must be finite and not neg",
        ),
        ({"X_target": TARGET, "target_weight": [np.nan] * 7}, "must be finite"),
        ({"X_target": TARGET, "target_weight": [0] * 7}, "zero for every sample; give"),
        ({"X_target": TARGET, "target_weight": ["a"] * 7}, "must be numbers, one for"),
    ],
)
def test_bad_targets_are_refused_before_any_work(given, message):
    class Refuses(GaussianNB):
        def fit(self, X, y):
            raise AssertionError

    for strategy in (recorder, margin_sampling):
        with pytest.raises(ValueError, match=message):
            loop(strategy, Refuses()).iter_rounds(X, Y, **given)
        with pytest.raises(ValueError, match=message):
            loop(strategy, Refuses()).fit(X, Y, **given)
        with pytest.raises(ValueError, match=message):
            compare({"a": strategy}, **given)


def test_a_typing_error_is_no_target():
    with pytest.raises(
        TypeError, match=r"X_target and target_weight, and got \['X_tar"
    ):
        loop().fit(X, Y, X_targets=TARGET)
