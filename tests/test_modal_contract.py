"""FisherMask inside modAL's own classes and in ours: run once per query, the right
indices, the right rows.

`test_modal_versions.py` runs this file again in other versions of modAL and
scikit-learn.
"""

from functools import partial
from importlib.metadata import version

import modAL.models
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

import fishermask_sk.modal
from fishermask_sk import (
    ActiveLearningClassifier,
    FisherMask,
    compare_strategies,
    fisher_mask_sampling,
)

SCIKIT_LEARN = tuple(int(part) for part in version("scikit-learn").split(".")[:2])
# With modAL 0.4.2 came metrics of a query, and a learner that keeps no samples.
HAS_METRICS = hasattr(modAL.models, "DeepActiveLearner")

LEARNERS = {
    "modAL's": modAL.models.ActiveLearner,
    "ours": fishermask_sk.modal.ActiveLearner,
}
PARAMS = {"sparsity": 0.5, "random_state": 0}

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # modAL's teach on scikit-learn 1.6 and 1.7.
    pytest.mark.filterwarnings("ignore:'force_all_finite' was renamed:FutureWarning"),
]

RNG = np.random.default_rng(0)
Y = np.arange(45) % 3
X = (RNG.normal(size=(45, 4)) + np.eye(4)[Y]).astype(np.float32)
X_LABELED, Y_LABELED, X_POOL, Y_POOL = X[:15], Y[:15], X[15:], Y[15:]


def net(*layers, **kwargs):
    """A tiny skorch net; always the same one, as it is seeded here."""
    torch.manual_seed(0)
    module = (
        nn.Sequential(*layers)
        if layers
        else nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    )
    settings = {
        "max_epochs": 5,
        "lr": 0.1,
        "train_split": None,
        "verbose": 0,
        "classes": [0, 1, 2],
    }
    return NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, **{**settings, **kwargs}
    )


class CountedFisherMask(FisherMask):
    """FisherMask that counts how often it was asked, and does as it is told
    otherwise.
    """

    n_calls = 0

    def __call__(self, *args, **kwargs):
        self.n_calls += 1
        return super().__call__(*args, **kwargs)


class CountedFunction:
    """A functional strategy, counted in the same way."""

    def __init__(self):
        self.n_calls = 0
        self.function = partial(fisher_mask_sampling, **PARAMS)

    def __call__(self, *args, **kwargs):
        self.n_calls += 1
        return self.function(*args, **kwargs)


STRATEGIES = {
    "object": lambda: CountedFisherMask(**PARAMS),
    "function": CountedFunction,
}


def expected(estimator, X_pool, n_instances, X_labeled=X_LABELED):
    """What FisherMask picks where no modAL is involved."""
    return FisherMask(**PARAMS).select(
        estimator, X_pool, n_instances, X_labeled=X_labeled
    )


def check_query(result, learner, X_pool, n_instances, X_labeled=X_LABELED):
    """A query gave positions in the form of scikit-learn, the right ones, and the rows
    that are there.
    """
    query_idx, X_query = result
    assert isinstance(query_idx, np.ndarray)
    assert query_idx.shape == (n_instances,)
    assert query_idx.dtype == np.int64
    np.testing.assert_array_equal(
        query_idx, expected(learner.estimator, X_pool, n_instances, X_labeled)
    )
    np.testing.assert_array_equal(X_query, X_pool[query_idx])


@pytest.mark.parametrize("learner_class", LEARNERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loop(learner_class, strategy):
    strategy = STRATEGIES[strategy]()
    learner = LEARNERS[learner_class](net(), strategy, X_LABELED, Y_LABELED)
    X_pool, y_pool = X_POOL, Y_POOL
    for n_calls, n_instances in enumerate([1, 2, 5], start=1):
        X_labeled = learner.X_training
        result = query_idx, X_query = learner.query(X_pool, n_instances=n_instances)
        check_query(result, learner, X_pool, n_instances, X_labeled)
        assert strategy.n_calls == n_calls
        # On scikit-learn >= 1.8 teaching is what modAL's own learner cannot do,
        # whatever the strategy.
        if learner_class == "ours" or SCIKIT_LEARN < (1, 8):
            learner.teach(X_query, y_pool[query_idx])
            assert len(learner.X_training) == len(X_labeled) + n_instances
        X_pool, y_pool = (
            np.delete(X_pool, query_idx, axis=0),
            np.delete(y_pool, query_idx),
        )


@pytest.mark.parametrize("learner_class", LEARNERS)
def test_positional_and_further_keywords(learner_class):
    strategy = CountedFisherMask(**PARAMS)
    learner = LEARNERS[learner_class](net(), strategy, X_LABELED, Y_LABELED)
    check_query(learner.query(X_POOL, 2), learner, X_POOL, 2)
    check_query(
        learner.query(X_POOL, n_instances=len(X_POOL)), learner, X_POOL, len(X_POOL)
    )
    learner.query(X_POOL, n_instances=2, random_tie_break=True)
    none = X_LABELED[:0]
    check_query(learner.query(X_POOL, 2, X_labeled=none), learner, X_POOL, 2, none)
    assert strategy.n_calls == 4


@pytest.mark.parametrize("learner_class", LEARNERS)
@pytest.mark.parametrize("on_transformed", [False, True])
def test_a_pipeline_is_applied_once(learner_class, on_transformed):
    strategy = CountedFisherMask(**PARAMS)
    pipeline = make_pipeline(StandardScaler(), net())
    learner = LEARNERS[learner_class](
        pipeline, strategy, 9 * X_LABELED, Y_LABELED, on_transformed=on_transformed
    )
    check_query(
        learner.query(9 * X_POOL, n_instances=2), learner, 9 * X_POOL, 2, 9 * X_LABELED
    )
    assert strategy.n_calls == 1
    scaler, inner = pipeline[0], pipeline[-1]
    by_hand = expected(
        inner, scaler.transform(9 * X_POOL), 2, scaler.transform(9 * X_LABELED)
    )
    np.testing.assert_array_equal(strategy.query_idx_, by_hand)


@pytest.mark.parametrize("learner_class", LEARNERS)
def test_images(learner_class):
    images = np.random.default_rng(0).normal(size=(30, 1, 6, 6)).astype(np.float32)
    strategy = CountedFisherMask(**PARAMS)
    estimator = net(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    learner = LEARNERS[learner_class](estimator, strategy, images[:9], Y[:9])
    check_query(
        learner.query(images[9:], n_instances=2), learner, images[9:], 2, images[:9]
    )
    assert strategy.n_calls == 1


def test_tensors_in_our_learner():
    strategy = CountedFisherMask(**PARAMS)
    learner = fishermask_sk.modal.ActiveLearner(
        net(), strategy, torch.tensor(X_LABELED), torch.tensor(Y_LABELED)
    )
    query_idx, X_query = learner.query(torch.tensor(X_POOL), n_instances=2)
    assert torch.is_tensor(X_query)
    check_query((query_idx, X_query.numpy()), learner, X_POOL, 2)
    learner.teach(X_query, torch.tensor(Y_POOL)[query_idx])
    assert strategy.n_calls == 1


def test_our_learner_clones_with_the_strategy_inside():
    learner = fishermask_sk.modal.ActiveLearner(
        net(), FisherMask(**PARAMS), X_LABELED, Y_LABELED
    )
    twin = clone(learner.set_params(query_strategy__sparsity=0.7))
    assert twin.query_strategy.sparsity == 0.7
    assert twin.query_strategy is not learner.query_strategy


# Metrics
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_instances", [1, 2, 5])
@pytest.mark.parametrize(
    "learner_class", LEARNERS if HAS_METRICS else ["ours"]
)  # 0.4.1's query knows none
def test_metrics_are_the_trace_reductions(learner_class, n_instances):
    strategy = CountedFisherMask(**PARAMS)
    learner = LEARNERS[learner_class](net(), strategy, X_LABELED, Y_LABELED)
    query_idx, X_query, metrics = learner.query(
        X_POOL, n_instances=n_instances, return_metrics=True
    )
    check_query((query_idx, X_query), learner, X_POOL, n_instances)
    assert strategy.n_calls == 1
    assert metrics.shape == (n_instances,)
    np.testing.assert_array_equal(metrics, strategy.trace_reductions_)
    assert (metrics > 0).all()


@pytest.mark.skipif(
    HAS_METRICS, reason="modAL 0.4.1 hands return_metrics on to the strategy"
)
def test_the_older_modal_forwards_return_metrics():
    strategy = CountedFisherMask(**PARAMS)
    learner = modAL.models.ActiveLearner(net(), strategy, X_LABELED, Y_LABELED)
    check_query(
        learner.query(X_POOL, n_instances=2, return_metrics=True), learner, X_POOL, 2
    )
    assert strategy.n_calls == 1


# modAL's other learners
# ------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_METRICS, reason="modAL 0.4.1 has no DeepActiveLearner")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_deep_active_learner(strategy):
    strategy = STRATEGIES[strategy]()
    learner = modAL.models.DeepActiveLearner(net(), strategy)
    learner.fit(X_LABELED, Y_LABELED)
    for n_calls, n_instances in enumerate([1, 2, 5], start=1):
        result = query_idx, X_query = learner.query(
            X_POOL, n_instances=n_instances, X_labeled=X_LABELED
        )
        check_query(result, learner, X_POOL, n_instances)
        assert strategy.n_calls == n_calls
        learner.teach(X_query, Y_POOL[query_idx])
    *result, metrics = learner.query(
        X_POOL, n_instances=2, X_labeled=X_LABELED, return_metrics=True
    )
    check_query(result, learner, X_POOL, 2)
    assert metrics.shape == (2,)


@pytest.mark.skipif(not HAS_METRICS, reason="modAL 0.4.1 has no DeepActiveLearner")
def test_deep_active_learner_without_labeled_samples_warns():
    strategy = CountedFisherMask(**PARAMS)
    learner = modAL.models.DeepActiveLearner(net(), strategy)
    learner.fit(X_LABELED, Y_LABELED)
    with pytest.warns(UserWarning, match="X_labeled") as caught:
        result = learner.query(X_POOL, n_instances=2)
    assert [warning.filename for warning in caught] == [__file__]
    check_query(result, learner, X_POOL, 2, X_LABELED[:0])
    assert strategy.n_calls == 1


@pytest.mark.parametrize("learner_class", LEARNERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_committee_is_refused_in_one_sentence(learner_class, strategy):
    learners = [
        LEARNERS[learner_class](net(), FisherMask(), X_LABELED, Y_LABELED)
        for _ in range(2)
    ]
    committee = modAL.models.Committee(learners, STRATEGIES[strategy]())
    with pytest.raises(
        TypeError,
        match=r"one net, and a Committee has several; give each of .* ActiveLearner\.$",
    ):
        committee.query(X_POOL, n_instances=2)


@pytest.mark.parametrize("learner_class", LEARNERS)
def test_warnings_point_at_the_query(learner_class):
    learner = LEARNERS[learner_class](
        net(), FisherMask(2, random_state=0), X_LABELED, Y_LABELED
    )
    with pytest.warns(UserWarning, match="the head alone has") as caught:
        learner.query(X_POOL, n_instances=2)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("learner_class", LEARNERS)
def test_errors_come_through(learner_class):
    learner = LEARNERS[learner_class](net(), FisherMask(**PARAMS), X_LABELED, Y_LABELED)
    with pytest.raises(
        ValueError, match="n_instances=31 exceeds the pool of 30 samples"
    ):
        learner.query(X_POOL, n_instances=31)
    with pytest.raises(TypeError, match="n_instance"):
        learner.query(X_POOL, n_instance=2)


def through_the_loop(net, strategy):
    ActiveLearningClassifier(
        net,
        strategy,
        n_initial=20,
        n_instances=2,
        n_queries=1,
        random_state=0,
        verbose=1,
    ).fit(X_POOL, np.resize([0, 1, 2], len(X_POOL)))


def through_a_search(net, strategy):
    loop = ActiveLearningClassifier(
        net, strategy, n_initial=12, n_instances=2, n_queries=1, random_state=0
    )
    y = np.resize([0, 1, 2], len(X_POOL))
    GridSearchCV(loop, {"n_instances": [2]}, cv=2, refit=False).fit(X_POOL, y)


def through_a_comparison(net, strategy):
    y = np.resize([0, 1, 2], len(X_POOL))
    sizes = {"n_initial": 20, "n_instances": 2, "n_queries": 1, "seeds": 1}
    data = (X_POOL, y, X_POOL, y)
    compare_strategies(net, {"FisherMask": strategy}, *data, verbose=1, **sizes)


@pytest.mark.parametrize(
    "run", [through_the_loop, through_a_search, through_a_comparison]
)
def test_warnings_point_at_the_user_behind_loops_and_progress_bars(run):
    strategy = FisherMask(6, random_state=0)  # two tell no sample from others
    with pytest.warns(UserWarning, match="the head alone has") as caught:
        run(net(), strategy)
    names = {
        warning.filename
        for warning in caught
        if "the head alone has" in str(warning.message)
    }
    assert names == {__file__}
