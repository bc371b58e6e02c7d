"""The loop as a classifier and as a generator: what it reads, asks, seeds, refuses and
learns.
"""

import inspect
import itertools
import pickle
import random
from functools import partial

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn.utils
import torch
from modAL.batch import uncertainty_batch_sampling
from modAL.uncertainty import entropy_sampling as modal_entropy_sampling
from modAL.uncertainty import margin_sampling as modal_margin_sampling
from scipy import sparse
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_digits, load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, StratifiedKFold
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from skorch import NeuralNetClassifier
from skorch.helper import SliceDataset
from torch import nn
from torch.utils.data import TensorDataset

from fishermask_sk.baselines import entropy_sampling, margin_sampling, random_sampling
from fishermask_sk.loops.classifier import ActiveLearningClassifier
from fishermask_sk.loops.learner import PoolLearner
from fishermask_sk.strategy.fisher_mask import FisherMask

X_IRIS, Y_IRIS = load_iris(return_X_y=True)


def first_samples(learner, X_pool, n_instances=1):
    return np.arange(n_instances)


class Margin(BaseEstimator):
    """The same in every process by name, which a function's repr is not."""

    def __call__(self, learner, X_pool, n_instances=1):
        return margin_sampling(learner, X_pool, n_instances)


def loop(estimator=None, query_strategy=margin_sampling, **params):
    settings = {
        "n_initial": 10,
        "n_instances": 5,
        "n_queries": 3,
        "random_state": 0,
        **params,
    }
    return ActiveLearningClassifier(
        GaussianNB() if estimator is None else estimator, query_strategy, **settings
    )


class TinyNet(nn.Module):
    def __init__(self, n_features=4, n_classes=3):
        super().__init__()
        self.body, self.head = nn.Linear(n_features, 8), nn.Linear(8, n_classes)

    def forward(self, X):
        return self.head(torch.relu(self.body(X.flatten(1))))


def net(module=TinyNet, **params):
    settings = {
        "criterion": nn.CrossEntropyLoss,
        "train_split": None,
        "verbose": 0,
        "max_epochs": 5,
        "lr": 0.1,
    }
    return NeuralNetClassifier(module, **{**settings, **params})


# --- scikit-learn's own checks
# ------------------------------------------------------------------------------

# None is exempt. `check_array_api_input` skips itself: it runs only where
# SCIPY_ARRAY_API is set before start.


@parametrize_with_checks(
    [ActiveLearningClassifier(LogisticRegression(), Margin(), random_state=0)]
)
@pytest.mark.filterwarnings("ignore")  # the checks feed what classifiers warn about
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [
        ActiveLearningClassifier(
            LogisticRegression(),
            Margin(),
            n_initial=40,
            n_instances=30,
            n_queries=8,
            initial="stratified",
        )
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_checks_with_queries(estimator, check):
    check(estimator)


# --- rounds
# --------------------------------------------------------------------------------


def test_rounds_are_counted_and_every_sample_is_labelled_at_most_once():
    clf = loop().fit(X_IRIS, Y_IRIS)
    assert clf.labeled_indices_.shape == (25,)
    assert len(set(clf.labeled_indices_)) == 25
    assert np.bincount(clf.labeled_iter_ + 1).tolist() == [125, 10, 5, 5, 5]
    order = clf.labeled_iter_[clf.labeled_indices_]
    assert order.tolist() == [0] * 10 + [1] * 5 + [2] * 5 + [3] * 5


def test_the_last_estimator_was_fitted_on_all_labelled_samples():
    clf = loop().fit(X_IRIS, Y_IRIS)
    labeled = clf.labeled_indices_
    expected = GaussianNB().fit(X_IRIS[labeled], Y_IRIS[labeled])
    np.testing.assert_array_equal(
        clf.predict_proba(X_IRIS), expected.predict_proba(X_IRIS)
    )
    assert clf.score(X_IRIS, Y_IRIS) == expected.score(X_IRIS, Y_IRIS)


def test_picks_are_those_of_the_strategy_on_the_rest_of_the_pool():
    rounds = list(loop().iter_rounds(X_IRIS, Y_IRIS))
    for before, after in itertools.pairwise(rounds):
        pool = np.setdiff1d(np.arange(150), before.labeled_indices)
        picks, _ = margin_sampling(before.learner, X_IRIS[pool], n_instances=5)
        np.testing.assert_array_equal(pool[picks], after.query_idx)


@pytest.mark.parametrize(("n_initial", "n_instances"), [(1000, 5), (140, 20), (75, 75)])
def test_a_budget_beyond_the_data_labels_all_rows(n_initial, n_instances):
    clf = loop(n_initial=n_initial, n_instances=n_instances).fit(X_IRIS, Y_IRIS)
    assert sorted(clf.labeled_indices_) == list(range(150))
    assert clf.labeled_iter_.min() == 0


@pytest.mark.parametrize("n_instances", [1, 2, 140])
def test_any_batch_size(n_instances):
    clf = loop(n_instances=n_instances, n_queries=1).fit(X_IRIS, Y_IRIS)
    assert len(clf.labeled_indices_) == 10 + n_instances


def test_no_query_is_a_fit_on_the_first_batch():
    assert len(loop(n_queries=0).fit(X_IRIS, Y_IRIS).labeled_indices_) == 10


def test_duplicated_rows_are_samples_of_their_own():
    X, y = np.repeat(X_IRIS[::10], 4, axis=0), np.repeat(Y_IRIS[::10], 4)
    assert len(set(loop().fit(X, y).labeled_indices_)) == 25


def test_the_generator_stops_where_one_stops_and_stores_nothing():
    clf = loop()
    rounds = clf.iter_rounds(X_IRIS, Y_IRIS)
    first = next(rounds)
    rounds.close()
    assert first.number == 0
    assert len(first.learner.X_training) == len(first.query_idx) == 10
    assert first.fit_seconds >= 0 == first.query_seconds
    assert not [name for name in vars(clf) if name.endswith("_")]


def test_rounds_keep_estimators_of_their_own():
    rounds = list(loop().iter_rounds(X_IRIS, Y_IRIS))
    assert len({id(played.learner.estimator) for played in rounds}) == 4
    assert [played.learner.estimator.class_count_.sum() for played in rounds] == [
        10,
        15,
        20,
        25,
    ]


@pytest.mark.parametrize("n_known", [1, 2, 4])
@pytest.mark.parametrize(
    "estimator", [RandomForestClassifier(5), net()], ids=["forest", "net"]
)
def test_going_on_from_a_history_gives_what_would_have_followed(n_known, estimator):
    clf = loop(estimator, random_sampling)
    X = X_IRIS.astype("float32")
    whole = list(clf.iter_rounds(X, Y_IRIS))
    rest = list(
        clf.iter_rounds(
            X, Y_IRIS, labeled_iter=[played.query_idx for played in whole[:n_known]]
        )
    )
    assert [played.number for played in rest] == list(range(n_known - 1, 4))
    for expected, played in zip(whole[n_known - 1 :], rest, strict=True):
        np.testing.assert_array_equal(played.query_idx, expected.query_idx)
        np.testing.assert_array_equal(
            played.learner.predict_proba(X), expected.learner.predict_proba(X)
        )


def test_a_history_beyond_the_budget_is_its_last_round():
    history = np.arange(40).reshape(8, 5)
    rounds = list(
        loop(n_queries=2).iter_rounds(X_IRIS[::-1], Y_IRIS[::-1], labeled_iter=history)
    )
    assert [played.number for played in rounds] == [7]


# --- the oracle
# --------------------------------------------------------------------------------


class Oracle:
    """Labels that remember who looked at them."""

    def __init__(self, y):
        self.y, self.shape, self.asked = y, y.shape, []

    def __len__(self):
        return len(self.y)

    def __getitem__(self, key):
        indices = key[0] if isinstance(key, tuple) else key
        self.asked.extend(np.asarray(indices).tolist())
        return self.y[indices]


def test_y_is_read_at_queried_rows_only_and_once():
    oracle = Oracle(Y_IRIS)
    clf = loop().fit(X_IRIS, oracle)
    assert oracle.asked == clf.labeled_indices_.tolist()


def test_labels_of_other_rows_change_nothing():
    clf = loop().fit(X_IRIS, Y_IRIS)
    poisoned = np.full(150, 99)
    poisoned[clf.labeled_indices_] = Y_IRIS[clf.labeled_indices_]
    np.testing.assert_array_equal(
        loop().fit(X_IRIS, poisoned).labeled_iter_, clf.labeled_iter_
    )


def test_stratified_reads_all_of_y():
    oracle = Oracle(Y_IRIS)
    loop(initial="stratified").fit(X_IRIS, oracle)
    assert set(oracle.asked) == set(range(150))


@pytest.mark.parametrize("n_initial", [3, 4, 9, 30])
def test_stratified_gives_every_class_a_label_and_its_share(n_initial):
    rare = np.r_[0, 50:80, 100:150]  # 1, 30 and 50 samples
    first = next(
        loop(initial="stratified", n_initial=n_initial).iter_rounds(
            X_IRIS[rare], Y_IRIS[rare]
        )
    )
    counts = np.bincount(first.learner.y_training, minlength=3)
    assert counts[0] == 1
    assert counts.sum() == n_initial
    assert abs(counts[1] - 30 / 81 * n_initial) <= 1
    assert counts.min() > 0


def test_positions_can_be_the_first_batch():
    first = next(loop(initial=[0, 75, 149]).iter_rounds(X_IRIS, Y_IRIS))
    assert first.query_idx.tolist() == [0, 75, 149]


def test_string_labels():
    names = np.array(["setosa", "versicolor", "virginica"])[Y_IRIS]
    clf = loop().fit(X_IRIS, names)
    assert clf.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    np.testing.assert_array_equal(
        clf.labeled_iter_, loop().fit(X_IRIS, Y_IRIS).labeled_iter_
    )
    assert clf.score(X_IRIS, names) > 0.8


@pytest.mark.parametrize(
    "y",
    [
        Y_IRIS.tolist(),
        pd.Series(Y_IRIS, index=np.arange(150)[::-1]),
        torch.tensor(Y_IRIS),
    ],
)
def test_labels_in_other_containers(y):
    np.testing.assert_array_equal(
        loop().fit(X_IRIS, y).labeled_iter_, loop().fit(X_IRIS, Y_IRIS).labeled_iter_
    )


def test_a_column_of_labels_warns_once():
    with pytest.warns(DataConversionWarning, match="column-vector") as caught:
        clf = loop().fit(X_IRIS, Y_IRIS[:, None])
    assert len(caught) == 1
    np.testing.assert_array_equal(
        clf.labeled_iter_, loop().fit(X_IRIS, Y_IRIS).labeled_iter_
    )


def test_a_class_that_the_first_batch_misses_joins_later():
    rounds = list(
        loop(
            LogisticRegression(max_iter=500), random_sampling, initial=np.arange(48, 58)
        ).iter_rounds(X_IRIS, Y_IRIS)
    )
    assert rounds[0].learner.estimator.classes_.tolist() == [0, 1]
    assert rounds[-1].learner.estimator.classes_.tolist() == [0, 1, 2]


def test_classes_of_a_plain_net_are_its_columns():
    clf = loop(net(), random_sampling, n_queries=0, initial=[0, 1, 100]).fit(
        X_IRIS.astype("float32"), Y_IRIS
    )
    assert clf.estimator_.classes_.tolist() == [0, 2]  # skorch: the labels seen
    assert clf.classes_.tolist() == [0, 1, 2]
    proba = clf.predict_proba(X_IRIS.astype("float32"))
    np.testing.assert_array_equal(
        clf.predict(X_IRIS.astype("float32")), clf.classes_[proba.argmax(1)]
    )


# --- query strategies
# --------------------------------------------------------------------------------


def test_the_learner_has_what_modals_learners_have():
    seen = {}

    def strategy(learner, X_pool, n_instances=1):
        seen.update(vars(learner), learner=learner, n_instances=n_instances)
        assert "return_metrics" in inspect.signature(learner.query).parameters
        return np.arange(n_instances)

    loop(query_strategy=strategy, n_queries=1).fit(X_IRIS, Y_IRIS)
    learner = seen["learner"]
    assert seen["n_instances"] == 5
    assert len(learner.X_training) == len(learner.y_training) == 10
    np.testing.assert_array_equal(
        learner.predict(X_IRIS), learner.estimator.predict(X_IRIS)
    )
    np.testing.assert_array_equal(
        learner.predict_proba(X_IRIS), learner.estimator.predict_proba(X_IRIS)
    )
    assert learner.score(X_IRIS, Y_IRIS) == learner.estimator.score(X_IRIS, Y_IRIS)


PICKS = {
    "bare": lambda n: np.arange(n),
    "list": lambda n: list(range(n)),
    "tuple": lambda n: tuple(range(n)),
    "pair": lambda n: (np.arange(n), np.ones(n)),
    "pair of lists": lambda n: (list(range(n)), [1.0] * n),
    "tensor": lambda n: torch.arange(n),
    "unsigned": lambda n: np.arange(n, dtype=np.uint8),
}


@pytest.mark.parametrize("n_instances", [1, 2, 5])
@pytest.mark.parametrize("kind", PICKS)
def test_bare_indices_and_pairs_are_understood(kind, n_instances):
    played = list(
        loop(
            query_strategy=lambda learner, X_pool, n_instances=1: PICKS[kind](
                n_instances
            ),
            n_queries=1,
            n_instances=n_instances,
        ).iter_rounds(X_IRIS, Y_IRIS)
    )[-1]
    pool = np.setdiff1d(np.arange(150), played.labeled_indices[:10])
    np.testing.assert_array_equal(played.query_idx, pool[:n_instances])
    assert (played.metrics is not None) == kind.startswith("pair")


@pytest.mark.parametrize("answer", [3, np.int64(3), (np.int64(3), 0.5)])
def test_a_single_index_is_understood(answer):
    learner = PoolLearner(
        None, lambda learner, X_pool, n_instances=1: answer, None, None
    )
    query_idx, X_query = learner.query(X_IRIS)
    assert query_idx.tolist() == [3]
    np.testing.assert_array_equal(X_query, X_IRIS[[3]])


def test_metrics_come_with_the_round():
    last = list(loop(query_strategy=entropy_sampling).iter_rounds(X_IRIS, Y_IRIS))[-1]
    assert last.metrics.shape == (5,)
    assert (np.diff(last.metrics) <= 0).all()


def test_modals_own_strategies_work():
    clf = loop(query_strategy=modal_margin_sampling).fit(X_IRIS, Y_IRIS)
    np.testing.assert_array_equal(
        np.sort(clf.labeled_indices_),
        np.sort(
            loop(query_strategy=margin_sampling).fit(X_IRIS, Y_IRIS).labeled_indices_
        ),
    )


@pytest.mark.parametrize(
    "strategy", [modal_entropy_sampling, uncertainty_batch_sampling]
)
def test_modals_other_strategies_work(strategy):
    assert (
        len(set(loop(query_strategy=strategy).fit(X_IRIS, Y_IRIS).labeled_indices_))
        == 25
    )


def test_a_strategy_is_asked_once_per_query():
    calls = []

    def strategy(learner, X_pool, n_instances=1):
        calls.append(len(X_pool))
        return np.arange(n_instances)

    loop(query_strategy=strategy).fit(X_IRIS, Y_IRIS)
    assert calls == [140, 135, 130]


def test_fisher_mask_with_nested_parameters():
    clf = loop(net(), FisherMask(sparsity=5, keep_head=False))
    clf.set_params(query_strategy__sparsity=20, estimator__max_epochs=2)
    clf.fit(X_IRIS.astype("float32"), Y_IRIS)
    assert len(clf.query_strategy_.mask_indices_) == 20
    assert clf.query_strategy_.trace_reductions_.shape == (5,)
    assert not hasattr(clf.query_strategy, "mask_indices_")
    assert clf.estimator_.max_epochs == 2


# --- randomness
# --------------------------------------------------------------------------------


class Recorder(BaseEstimator):
    """A strategy with seeds of its own, that draws from every generator there is."""

    def __init__(self, random_state=None):
        self.random_state = random_state

    def __call__(self, learner, X_pool, n_instances=1):
        random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
        self.seed_ = self.random_state
        return np.random.RandomState(self.random_state).permutation(len(X_pool))[
            :n_instances
        ]


@pytest.mark.parametrize(
    "estimator", [RandomForestClassifier(5), net()], ids=["forest", "net"]
)
def test_an_int_random_state_gives_all_candidates_one_first_batch_and_one_noise(
    estimator,
):
    X = X_IRIS.astype("float32")
    first = [
        next(loop(clone(estimator), strategy).iter_rounds(X, Y_IRIS))
        for strategy in (first_samples, Recorder(), random_sampling)
    ]
    for played in first[1:]:
        np.testing.assert_array_equal(played.query_idx, first[0].query_idx)
        np.testing.assert_array_equal(
            played.learner.predict_proba(X), first[0].learner.predict_proba(X)
        )


@pytest.mark.parametrize(
    "strategy", [random_sampling, Recorder()], ids=["function", "object"]
)
def test_an_int_random_state_repeats_everything(strategy):
    X = X_IRIS.astype("float32")
    fits = [
        loop(net(), clone(strategy, safe=False), random_state=3).fit(X, Y_IRIS)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(fits[0].labeled_indices_, fits[1].labeled_indices_)
    np.testing.assert_array_equal(fits[0].predict_proba(X), fits[1].predict_proba(X))
    other = loop(net(), strategy, random_state=4).fit(X, Y_IRIS)
    assert other.labeled_indices_.tolist() != fits[0].labeled_indices_.tolist()


def test_nested_random_states_are_set_on_clones_by_round():
    estimator = make_pipeline(
        StandardScaler(), RandomForestClassifier(2, random_state=77)
    )
    rounds = list(
        loop(estimator, Recorder(random_state=78)).iter_rounds(X_IRIS, Y_IRIS)
    )
    seeds = [
        played.learner.estimator.get_params()["randomforestclassifier__random_state"]
        for played in rounds
    ]
    assert len({77, *seeds}) == 5
    assert estimator.get_params()["randomforestclassifier__random_state"] == 77
    assert rounds[-1].learner.query_strategy.seed_ != 78


def test_without_random_state_nested_ones_stay():
    clf = loop(RandomForestClassifier(2, random_state=77), random_state=None).fit(
        X_IRIS, Y_IRIS
    )
    assert clf.estimator_.random_state == 77


def test_global_generators_are_as_before():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    loop(net(), Recorder()).fit(X_IRIS.astype("float32"), Y_IRIS)
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == str(states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


# --- containers
# --------------------------------------------------------------------------------

DIGITS, Y_DIGITS = load_digits(return_X_y=True)
IMAGES = (DIGITS[:120] / 16).astype("float32").reshape(-1, 1, 8, 8)
Y_IMAGES = Y_DIGITS[:120].astype("int64")


class DictNet(TinyNet):
    def forward(self, left, right):
        return super().forward(torch.cat([left.flatten(1), right.flatten(1)], dim=1))


def image_net(module=TinyNet, **params):
    return net(
        module=module,
        module__n_features=64,
        module__n_classes=10,
        classes=list(range(10)),
        **params,
    )


@pytest.mark.parametrize(
    "strategy",
    [margin_sampling, FisherMask(sparsity=10, keep_head=False)],
    ids=["margin", "fisher_mask"],
)
@pytest.mark.parametrize(
    "kind", ["array", "tensor", "slice_dataset", "dataset", "dict"]
)
def test_containers_of_images_give_the_same_picks(kind, strategy):
    expected = loop(image_net(), clone(strategy, safe=False), n_queries=2).fit(
        IMAGES, Y_IMAGES
    )
    dataset = TensorDataset(torch.tensor(IMAGES), torch.tensor(Y_IMAGES))
    X = {
        "array": IMAGES,
        "tensor": torch.tensor(IMAGES),
        "slice_dataset": SliceDataset(dataset, idx=0),
        "dataset": dataset,
        "dict": {"left": IMAGES[..., :4], "right": IMAGES[..., 4:]},
    }[kind]
    estimator = image_net(DictNet if kind == "dict" else TinyNet)
    if kind == "dict":  # columns come in another order
        assert (
            len(
                loop(estimator, strategy, n_queries=2).fit(X, Y_IMAGES).labeled_indices_
            )
            == 20
        )
        return
    clf = loop(estimator, strategy, n_queries=2).fit(X, Y_IMAGES)
    np.testing.assert_array_equal(clf.labeled_indices_, expected.labeled_indices_)
    np.testing.assert_allclose(
        clf.predict_proba(X), expected.predict_proba(IMAGES), rtol=1e-6
    )


class ReadCounter(TensorDataset):
    """A Dataset that remembers which samples were read."""

    def __getitem__(self, i):
        assert type(i) is int
        self.read = getattr(self, "read", set()) | {i}
        return super().__getitem__(i)


def test_a_dataset_is_read_at_labelled_rows_to_train():
    dataset = ReadCounter(torch.tensor(IMAGES), torch.tensor(Y_IMAGES))
    clf = loop(image_net(), random_sampling).fit(dataset, Y_IMAGES)
    assert dataset.read == set(clf.labeled_indices_.tolist())


@pytest.mark.parametrize(
    "container", [sparse.csr_matrix, sparse.coo_array, sparse.dok_matrix]
)
def test_sparse_matrices(container):
    clf = loop(LogisticRegression()).fit(container(X_IRIS), Y_IRIS)
    np.testing.assert_array_equal(
        clf.labeled_indices_,
        loop(LogisticRegression())
        .fit(sparse.csr_matrix(X_IRIS), Y_IRIS)
        .labeled_indices_,
    )


def test_a_dataframe_keeps_its_columns():
    frame = pd.DataFrame(X_IRIS, columns=list("abcd"), index=np.arange(150)[::-1])
    scaler = make_column_transformer(
        (StandardScaler(), ["a", "b"]), ("passthrough", ["c", "d"])
    )
    clf = loop(make_pipeline(scaler, GaussianNB())).fit(frame, Y_IRIS)
    assert clf.feature_names_in_.tolist() == list("abcd")
    assert clf.n_features_in_ == 4
    assert clf.score(frame, Y_IRIS) > 0.8


def test_lists_of_texts():
    from sklearn.feature_extraction.text import CountVectorizer

    texts, y = ["good film", "bad film", "good", "bad"] * 10, ["+", "-", "+", "-"] * 10
    clf = loop(make_pipeline(CountVectorizer(), LogisticRegression())).fit(texts, y)
    assert clf.predict(["very good"]).tolist() == ["+"]


# --- at home in scikit-learn
# --------------------------------------------------------------------------------


def test_params_clone_pickle_repr_tags():
    clf = loop(LogisticRegression(C=3), FisherMask(sparsity=0.01))
    params = clone(clf).get_params()
    assert params["estimator__C"] == 3
    assert params["query_strategy__sparsity"] == 0.01
    assert is_classifier(clf)
    assert "FisherMask" in repr(clf)
    fitted = loop().fit(X_IRIS, Y_IRIS)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(fitted)).predict(X_IRIS), fitted.predict(X_IRIS)
    )


def test_methods_are_those_of_the_estimator():
    clf = loop(LinearSVC(), first_samples).fit(X_IRIS, Y_IRIS)
    assert not hasattr(clf, "predict_proba")
    assert clf.decision_function(X_IRIS).shape == (150, 3)
    assert clf.classes_.tolist() == [0, 1, 2]
    log_proba = loop().fit(X_IRIS, Y_IRIS).predict_log_proba(X_IRIS)
    assert log_proba.shape == (150, 3)


def test_grid_search_over_sparsity():
    search = GridSearchCV(
        loop(net(), FisherMask(keep_head=False), n_queries=1, initial="stratified"),
        {"query_strategy__sparsity": [10, 40]},
        cv=StratifiedKFold(2),
    )
    search.fit(X_IRIS.astype("float32"), Y_IRIS)
    assert search.best_params_["query_strategy__sparsity"] in (10, 40)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_randomized_search_inside_a_pipeline(n_jobs):
    pipe = make_pipeline(StandardScaler(), loop(n_queries=1))
    search = RandomizedSearchCV(
        pipe,
        {
            "activelearningclassifier__n_initial": [20, 30],
            "activelearningclassifier__n_instances": [5, 10],
        },
        n_iter=2,
        cv=2,
        n_jobs=n_jobs,
        random_state=0,
    )
    assert search.fit(X_IRIS, Y_IRIS).score(X_IRIS, Y_IRIS) > 0.8


@pytest.mark.slow
def test_grid_search_on_a_dask_cluster():
    distributed = pytest.importorskip(
        "distributed", reason="dask's distributed is not installed"
    )
    search = GridSearchCV(
        loop(LogisticRegression(max_iter=500), margin_sampling, n_queries=1),
        {"n_instances": [5, 10]},
        cv=2,
    )
    expected = clone(search).fit(X_IRIS, Y_IRIS)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        search.fit(X_IRIS, Y_IRIS)
    np.testing.assert_array_equal(
        search.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"]
    )


def test_learning_curve_with_an_eval_set():
    clf = loop().fit(X_IRIS[::2], Y_IRIS[::2], eval_set=(X_IRIS[1::2], Y_IRIS[1::2]))
    assert [row["n_labels"] for row in clf.learning_curve_] == [10, 15, 20, 25]
    assert clf.learning_curve_[-1]["accuracy"] == clf.score(X_IRIS[1::2], Y_IRIS[1::2])
    assert not hasattr(loop().fit(X_IRIS, Y_IRIS), "learning_curve_")


@pytest.mark.parametrize(
    "y_eval", [Y_IRIS[:, None], Y_IRIS.tolist(), torch.tensor(Y_IRIS)]
)
def test_labels_of_an_eval_set_in_other_containers(y_eval):
    clf = loop().fit(X_IRIS, Y_IRIS, eval_set=(X_IRIS, y_eval))
    assert clf.learning_curve_[-1]["accuracy"] == clf.score(X_IRIS, Y_IRIS)


def test_nothing_is_printed_but_the_bar_on_request(capsys):
    loop().fit(X_IRIS, Y_IRIS)
    assert capsys.readouterr() == ("", "")
    loop(verbose=1).fit(X_IRIS, Y_IRIS)
    printed, shown = capsys.readouterr()
    assert printed == ""
    assert "4/4" in shown


# --- refusals
# --------------------------------------------------------------------------------


def test_sample_weight_is_refused():
    with pytest.raises(
        TypeError, match=r"takes X, y, eval_set, X_target and target_weight, and got"
    ):
        loop().fit(X_IRIS, Y_IRIS, sample_weight=np.ones(150))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_initial": 0}, "n_initial must be an integer of at least 1, got 0"),
        ({"n_initial": 2.5}, "n_initial must be an integer of at least 1, got 2.5"),
        ({"n_instances": 0}, "n_instances must be an integer of at least 1, got 0"),
        (
            {"n_instances": True},
            "n_instances must be an integer of at least 1, got True",
        ),
        ({"n_queries": -1}, "n_queries must be an integer of at least 0, got -1"),
        (
            {"initial": "balanced"},
            "initial must be 'random', 'stratified' or positions in X, got 'balanced'",
        ),
        (
            {"initial": [0, 150]},
            "initial has positions from 0 to 150; there are 150 samples, 0 to 149",
        ),
        ({"initial": [1, 1]}, "initial has a position twice"),
        (
            {"initial": [0.5]},
            r"initial must be a one-dimensional array of integers, "
            r"got shape \(1,\) of float64",
        ),
        ({"initial": []}, "initial must be a one-dimensional array of integers"),
    ],
)
def test_parameters_out_of_range(params, message):
    with pytest.raises(ValueError, match=message):
        loop(**params).fit(X_IRIS, Y_IRIS)


@pytest.mark.parametrize("strategy", [FisherMask, "margin", None])
def test_what_is_no_strategy(strategy):
    with pytest.raises(
        TypeError, match="query_strategy must be a function or a callable object, got"
    ):
        loop(query_strategy=strategy).iter_rounds(X_IRIS, Y_IRIS)


@pytest.mark.parametrize("estimator", [GaussianNB, "net"])
def test_what_is_no_estimator(estimator):
    with pytest.raises(
        TypeError, match="estimator must be a classifier object with a fit method, got"
    ):
        loop(estimator).iter_rounds(X_IRIS, Y_IRIS)


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (X_IRIS, None, "requires y to be passed, but the target y is None"),
        (None, Y_IRIS, "X is None; pass the samples"),
        (X_IRIS, Y_IRIS[:-1], "X has 150 samples and y has 149 labels"),
        (X_IRIS[:0], Y_IRIS[:0], "0 samples, a minimum of 1 is required"),
        (
            {"a": X_IRIS, "b": X_IRIS[1:]},
            Y_IRIS,
            "X is a dict whose arrays have .* rows",
        ),
        (np.float64(3), Y_IRIS, "X is the single value .*; pass an array"),
    ],
)
def test_samples_and_labels_that_do_not_match(X, y, message):
    with pytest.raises(ValueError, match=message):
        loop().iter_rounds(X, y)


def test_a_history_with_other_samples():
    with pytest.raises(
        ValueError,
        match="labeled_iter has positions from 3 to 150; there are 150 samples",
    ):
        loop().iter_rounds(X_IRIS, Y_IRIS, labeled_iter=[[3, 4], [150]])


@pytest.mark.parametrize("missing", [np.nan, None])
def test_a_missing_label_names_its_row(missing):
    y = Y_IRIS.astype(object)
    y[7] = missing
    with pytest.raises(
        ValueError, match=r"y has no label for row 7, which was queried: (nan|None)"
    ):
        loop(initial=[3, 7, 60, 120]).fit(X_IRIS, y)


def test_continuous_labels():
    with pytest.raises(ValueError, match="Unknown label type"):
        loop().fit(X_IRIS, X_IRIS[:, 0])


def test_a_first_batch_of_one_class_that_cannot_be_fitted():
    with pytest.raises(
        ValueError,
        match=r"All 10 labels so far are of one class, .*0.*"
        r"raise n_initial, or use initial",
    ):
        loop(LogisticRegression(), initial=np.arange(10)).fit(X_IRIS, Y_IRIS)


def test_other_errors_of_the_estimator_pass_unchanged():
    X = X_IRIS.copy()
    X[0] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        loop(LogisticRegression(), initial=[0, 60, 120]).fit(X, Y_IRIS)


@pytest.mark.parametrize("eval_set", [X_IRIS, (X_IRIS,), (X_IRIS, Y_IRIS, Y_IRIS)])
def test_an_eval_set_that_is_no_pair(eval_set):
    with pytest.raises(ValueError, match=r"eval_set must be a pair \(X, y\), got"):
        loop().fit(X_IRIS, Y_IRIS, eval_set=eval_set)


def test_an_eval_set_that_does_not_match():
    with pytest.raises(
        ValueError, match="eval_set has 150 samples and 147 labels; pass one label per"
    ):
        loop().fit(X_IRIS, Y_IRIS, eval_set=(X_IRIS, Y_IRIS[:-3]))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.arange(4), r"strategy returned indices of shape \(4,\) for n_instances=5"),
        (np.arange(5)[None], r"strategy returned indices of shape \(1, 5\)"),
        (
            (np.arange(5), X_IRIS[:5], 0),
            "strategy returned indices of shape|inhomogeneous",
        ),
        (
            np.ones(5),
            "The answer of strategy must be a one-dimensional array of integers, got "
            ".* float64",
        ),
        (
            np.ones(5, dtype=bool),
            "The answer of strategy must be a one-dimensional array of integers, got "
            ".* bool",
        ),
        (np.array([0, 1, 2, 3, 3]), "The answer of strategy has a position twice"),
        (
            np.array([0, 1, 2, 3, 140]),
            "The answer of strategy has positions from 0 to 140; there are 140 samples",
        ),
        (
            np.array([-1, 1, 2, 3, 4]),
            "The answer of strategy has positions from -1 to 4",
        ),
    ],
)
def test_answers_that_are_no_positions(answer, message):
    def strategy(learner, X_pool, n_instances=1):
        return answer

    with pytest.raises(ValueError, match=message):
        loop(query_strategy=strategy).fit(X_IRIS, Y_IRIS)


def test_an_error_of_the_strategy_passes_and_leaves_the_generators_as_they_were():
    before = torch.get_rng_state()

    def strategy(learner, X_pool, n_instances=1):
        torch.rand(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(query_strategy=strategy).fit(X_IRIS, Y_IRIS)
    assert torch.equal(torch.get_rng_state(), before)


def test_not_fitted():
    for method in ("predict", "predict_proba", "predict_log_proba"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(loop(), method)(X_IRIS)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        loop(LogisticRegression()).decision_function(X_IRIS)


def test_columns_that_have_no_classes():
    class Odd(GaussianNB):
        def predict_proba(self, X):
            return np.ones((len(X), 7))

    with pytest.raises(
        ValueError, match="Odd gives 7 probabilities per sample and has the classes"
    ):
        loop(Odd(), first_samples).fit(X_IRIS, np.array(["a", "b", "c"])[Y_IRIS])


def test_partials_are_strategies():
    clf = loop(query_strategy=partial(random_sampling, random_state=5)).fit(
        X_IRIS, Y_IRIS
    )
    assert len(clf.labeled_indices_) == 25


@pytest.mark.skipif(
    not hasattr(sklearn.utils, "get_tags"), reason="tags of this kind came with 1.6"
)
def test_several_labels_a_sample_are_neither_promised_nor_taken():
    from sklearn.utils import get_tags

    inner = KNeighborsClassifier()
    loop = ActiveLearningClassifier(inner, margin_sampling, n_initial=5, n_queries=1)
    assert get_tags(inner).classifier_tags.multi_label
    assert not get_tags(loop).classifier_tags.multi_label
    assert get_tags(inner).classifier_tags.multi_label  # its own stay
    with pytest.raises(ValueError, match="y should be a 1d array"):
        loop.fit(np.zeros((20, 2)), np.zeros((20, 3), dtype=int))
