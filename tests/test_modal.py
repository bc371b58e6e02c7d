"""The learner of fishermask_sk.modal: the same with both modAL versions and every
supported scikit-learn.

`test_modal_versions.py` runs this file again in other versions of both.
"""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from modAL.disagreement import vote_entropy_sampling
from modAL.models import Committee
from scipy import sparse
from sklearn.base import clone
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from skorch import NeuralNetClassifier
from skorch.helper import SliceDataset, SliceDict
from torch import nn
from torch.utils.data import TensorDataset

from fishermask_sk.modal import ActiveLearner

# Not LogisticRegression: scikit-learn 1.5's makes today's scipy warn.
pytestmark = pytest.mark.filterwarnings("error")

RNG = np.random.default_rng(0)
Y = np.arange(60) % 3
X = (RNG.normal(size=(60, 4)) + 4 * np.eye(4)[Y]).astype(np.float32)

CONTAINERS = {
    "ndarray": (lambda a: a, lambda a: a),
    "list": (np.ndarray.tolist, np.ndarray.tolist),
    "pandas": (lambda a: pd.DataFrame(a, columns=list("abcd")), pd.Series),
    "pandas without names": (pd.DataFrame, pd.Series),
    "tensor": (torch.tensor, torch.tensor),
}


def net(module, **kwargs):
    """A skorch net that trains deterministically and says nothing."""
    torch.manual_seed(0)
    return NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        max_epochs=2,
        train_split=None,
        verbose=0,
        lr=0.1,
        **kwargs,
    )


class Recorder(GaussianNB):
    """An estimator that remembers what it was fitted on."""

    def fit(self, X, y, sample_weight=None):
        self.seen_ = X, y, sample_weight
        return super().fit(X, y, sample_weight)


def last_rows(learner, X_pool, n_instances=1):
    return np.arange(X_pool.shape[0])[-n_instances:]


@pytest.fixture
def taught():
    return ActiveLearner(Recorder(), last_rows, X[:6], Y[:6])


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("bootstrap", [False, True])
def test_a_loop_in_every_container(kind, bootstrap):
    to_X, to_y = CONTAINERS[kind]
    pool, labels = X[30:], Y[30:]
    learner = ActiveLearner(
        GaussianNB(),
        X_training=to_X(X[:30]),
        y_training=to_y(Y[:30]),
        bootstrap_init=bootstrap,
        random_state=0,
    )
    for _ in range(3):
        query_idx, X_query = learner.query(to_X(pool), n_instances=2)
        assert type(X_query) is type(to_X(pool))
        np.testing.assert_array_equal(
            np.asarray(X_query, dtype=np.float32), pool[query_idx]
        )
        learner.teach(X_query, to_y(labels[query_idx]), bootstrap=bootstrap)
        pool, labels = np.delete(pool, query_idx, axis=0), np.delete(labels, query_idx)
    assert type(learner.X_training) is type(to_X(pool))
    assert type(learner.y_training) is type(to_y(labels))
    assert np.shape(learner.X_training) == (36, 4)
    taught = {tuple(row) for row in np.asarray(learner.X_training, dtype=np.float32)}
    assert taught.isdisjoint({tuple(row) for row in pool})
    assert learner.score(to_X(X), to_y(Y)) > 0.9
    assert learner.predict(to_X(X)).shape == (60,)
    assert learner.predict_proba(to_X(X)).shape == (60, 3)


@pytest.mark.parametrize("to_tensor", [np.asarray, torch.tensor])
def test_images_of_four_axes(to_tensor):
    rng = np.random.default_rng(0)
    images = to_tensor(rng.normal(size=(20, 3, 5, 5)).astype(np.float32))
    labels = to_tensor(np.arange(20) % 3)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    learner = ActiveLearner(
        net(module, classes=[0, 1, 2]), X_training=images[:6], y_training=labels[:6]
    )
    query_idx, X_query = learner.query(images[6:], n_instances=2)
    learner.teach(X_query, labels[6:][query_idx])
    assert X_query.shape == (2, 3, 5, 5)
    assert learner.X_training.shape == (8, 3, 5, 5)
    assert learner.predict_proba(images).shape == (20, 3)


@pytest.mark.parametrize(
    "to_sparse", [sparse.csr_array, sparse.csr_matrix, sparse.coo_array]
)
def test_sparse_rows(to_sparse):
    learner = ActiveLearner(KNeighborsClassifier(3), last_rows, to_sparse(X[:9]), Y[:9])
    query_idx, X_query = learner.query(to_sparse(X), n_instances=2)
    np.testing.assert_array_equal(X_query.toarray(), X[58:])
    learner.teach(X_query, Y[query_idx], bootstrap=True)
    np.testing.assert_array_equal(learner.X_training.toarray()[-2:], X[58:])


def test_tensors_on_every_device(device):
    samples, labels = torch.tensor(X, device=device), torch.tensor(Y, device=device)
    learner = ActiveLearner(net(nn.Linear(4, 3), device=device, classes=[0, 1, 2]))
    learner.fit(samples[:30], labels[:30])
    query_idx, X_query = learner.query(samples[30:], n_instances=2)
    learner.teach(X_query, labels[30:][query_idx], bootstrap=True)
    assert (
        learner.X_training.device.type == learner.y_training.device.type == device.type
    )
    np.testing.assert_array_equal(learner.X_training[30:].cpu(), X[30:][query_idx])


# Fitting
# --------------------------------------------------------------------------------


def test_fit_forgets_and_teach_remembers(taught):
    taught.teach(X[6:9], Y[6:9])
    np.testing.assert_array_equal(taught.X_training, X[:9])
    np.testing.assert_array_equal(taught.estimator.seen_[0], X[:9])
    assert taught.fit(X[10:20], Y[10:20]) is taught
    np.testing.assert_array_equal(taught.X_training, X[10:20])
    np.testing.assert_array_equal(taught.y_training, Y[10:20])


def test_teach_without_initial_samples():
    learner = ActiveLearner(GaussianNB())
    assert learner.X_training is None
    learner.teach(X[:6], Y[:6])
    np.testing.assert_array_equal(learner.X_training, X[:6])


def test_only_new_fits_on_the_new_and_remembers_all(taught):
    taught.teach(X[6:12], Y[6:12], only_new=True)
    np.testing.assert_array_equal(taught.estimator.seen_[0], X[6:12])
    np.testing.assert_array_equal(taught.X_training, X[:12])
    np.testing.assert_array_equal(taught.y_training, Y[:12])


@pytest.mark.parametrize("only_new", [False, True])
def test_fit_kwargs_reach_the_estimator(taught, only_new):
    weight = np.linspace(1, 2, 3 if only_new else 9)
    taught.teach(
        X[6:9], Y[6:9], only_new=only_new, bootstrap=only_new, sample_weight=weight
    )
    assert taught.estimator.seen_[2] is weight
    learner = ActiveLearner(
        Recorder(), X_training=X[:6], y_training=Y[:6], sample_weight=np.ones(6)
    )
    assert learner.estimator.seen_[2] is not None


def test_bootstrap_draws_pairs_with_replacement(taught):
    taught.random_state = 0
    taught.fit(X, Y, bootstrap=True)
    drawn = np.random.RandomState(0).choice(60, 60)
    np.testing.assert_array_equal(taught.estimator.seen_[0], X[drawn])
    np.testing.assert_array_equal(taught.estimator.seen_[1], Y[drawn])
    np.testing.assert_array_equal(taught.X_training, X)


def test_bootstrap_follows_numpys_global_seed_as_in_modal(taught):
    state = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(3)  # noqa: NPY002
        drawn = np.random.choice(range(60), 60, replace=True)  # noqa: NPY002
        np.random.seed(3)  # noqa: NPY002
        taught.fit(X, Y, bootstrap=True)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    np.testing.assert_array_equal(taught.estimator.seen_[0], X[drawn])


# All or nothing
# -------------------------------------------------------------------------


class Breaks(Recorder):
    """An estimator whose next fit may break off."""

    error = None

    def fit(self, X, y, sample_weight=None):
        if self.error is not None:
            raise self.error
        return super().fit(X, y, sample_weight)


class CheckedAfterwards(Recorder):
    """Refuses labels that it does not know, as a net with `classes` does."""

    def fit(self, X, y, sample_weight=None):
        unknown = set(np.asarray(y).tolist()) - {"zero", "one", "two"}
        if unknown:
            raise ValueError(f"labels {sorted(unknown)} are not among classes")
        return super().fit(X, y, sample_weight)


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize(
    "error", [ValueError("no"), MemoryError("full"), KeyboardInterrupt()]
)
@pytest.mark.parametrize(
    ("method", "kwargs"),
    [
        ("fit", {}),
        ("fit", {"bootstrap": True}),
        ("teach", {}),
        ("teach", {"bootstrap": True}),
        ("teach", {"only_new": True}),
        ("teach", {"only_new": True, "bootstrap": True}),
    ],
)
def test_a_fit_that_breaks_off_leaves_what_was_taught(kind, error, method, kwargs):
    to_X, to_y = CONTAINERS[kind]
    learner = ActiveLearner(Breaks(), last_rows, to_X(X[:6]), to_y(Y[:6]))
    before = learner.X_training, learner.y_training
    learner.estimator.error = error
    for _ in range(2):  # a second try adds nothing either
        with pytest.raises(type(error)):
            getattr(learner, method)(to_X(X[6:9]), to_y(Y[6:9]), **kwargs)
        assert learner.X_training is before[0]
        assert learner.y_training is before[1]
    learner.estimator.error = None
    getattr(learner, method)(to_X(X[6:9]), to_y(Y[6:9]), **kwargs)
    expected = X[6:9] if method == "fit" else X[:9]
    np.testing.assert_array_equal(
        np.asarray(learner.X_training, dtype=np.float32), expected
    )
    assert len(learner.y_training) == len(expected)


def test_a_typo_in_a_label_is_put_right_and_taught():
    names = np.array(["zero", "one", "two"])[Y]
    learner = ActiveLearner(CheckedAfterwards(), last_rows, X[:6], names[:6])
    with pytest.raises(ValueError, match=r"labels \['tow'\] are not among"):
        learner.teach(X[6:8], np.array(["one", "tow"]))
    learner.teach(X[6:8], np.array(["one", "two"]))
    np.testing.assert_array_equal(learner.X_training, X[:8])
    np.testing.assert_array_equal(learner.estimator.seen_[0], X[:8])
    assert learner.y_training.tolist() == [*names[:6], "one", "two"]


def test_the_first_fit_that_breaks_off_leaves_nothing():
    estimator = Breaks()
    estimator.error = MemoryError("full")
    learner = ActiveLearner(estimator, last_rows)
    for method in (learner.fit, learner.teach):
        with pytest.raises(MemoryError, match="full"):
            method(X[:6], Y[:6])
        assert learner.X_training is learner.y_training is None


def test_an_argument_that_the_fit_does_not_take_leaves_what_was_taught(taught):
    for method in (taught.fit, taught.teach):
        with pytest.raises(TypeError, match="wieght"):
            method(X[6:9], Y[6:9], wieght=1)
    np.testing.assert_array_equal(taught.X_training, X[:6])
    np.testing.assert_array_equal(taught.y_training, Y[:6])


# Queries
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_instances", [1, 2, 5])
@pytest.mark.parametrize("pair", [False, True])
def test_a_strategy_of_either_modal_runs_once(n_instances, pair):
    calls = []

    def strategy(learner, X_pool, n_instances=1):
        calls.append(learner)
        positions = last_rows(learner, X_pool, n_instances)
        return (positions, positions / 10) if pair else positions

    learner = ActiveLearner(GaussianNB(), strategy, X[:6], Y[:6])
    query_idx, X_query = learner.query(X[6:], n_instances)
    assert calls == [learner]
    np.testing.assert_array_equal(query_idx, np.arange(54)[-n_instances:])
    np.testing.assert_array_equal(X_query, X[60 - n_instances :])


def test_metrics():
    learner = ActiveLearner(
        GaussianNB(),
        lambda learner, pool: (np.array([3]), np.array([0.5])),
        X[:6],
        Y[:6],
    )
    query_idx, X_query, metrics = learner.query(X, return_metrics=True)
    assert (query_idx, metrics) == ([3], [0.5])
    np.testing.assert_array_equal(X_query, X[3:4])


def test_metrics_that_a_strategy_has_not(taught):
    with pytest.warns(
        UserWarning, match=r"last_rows.* has no metrics; return_metrics=True gives None"
    ):
        query_idx, _, metrics = taught.query(X, return_metrics=True)
    assert query_idx == [59]
    assert metrics is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_a_strategy_raises_comes_through_at_once(error):
    calls = []

    def strategy(learner, X_pool):
        calls.append(1)
        raise error("stop")

    learner = ActiveLearner(GaussianNB(), strategy, X[:6], Y[:6])
    with pytest.raises(error, match="stop"):
        learner.query(X)
    assert len(calls) == 1


def test_in_a_committee():
    learners = [
        ActiveLearner(
            GaussianNB(),
            X_training=X[:30],
            y_training=Y[:30],
            bootstrap_init=True,
            random_state=seed,
        )
        for seed in range(2)
    ]
    committee = Committee(learners, vote_entropy_sampling)
    query_idx, X_query = committee.query(X[30:], n_instances=1)
    committee.teach(X_query, Y[30:][query_idx], bootstrap=True)
    committee.teach(X[40:45], Y[40:45], only_new=True)
    committee.rebag()
    assert [len(learner.X_training) for learner in committee] == [36, 36]


# An estimator like any other
# -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONTAINERS)
def test_clone(kind):
    to_X, to_y = CONTAINERS[kind]
    learner = ActiveLearner(
        GaussianNB(),
        last_rows,
        to_X(X[:9]),
        to_y(Y[:9]),
        True,
        force_all_finite=False,
        random_state=1,
    )
    twin = clone(learner)
    assert twin.estimator is not learner.estimator
    assert (twin.bootstrap_init, twin.force_all_finite, twin.random_state) == (
        True,
        False,
        1,
    )
    np.testing.assert_array_equal(
        np.asarray(twin.X_training), np.asarray(learner.X_training)
    )
    np.testing.assert_array_equal(twin.predict(to_X(X)), learner.predict(to_X(X)))


def test_get_and_set_params(taught):
    assert taught.set_params(estimator__var_smoothing=0.1, random_state=3) is taught
    assert taught.get_params()["estimator__var_smoothing"] == 0.1
    assert taught.get_params()["random_state"] == 3
    assert taught.get_params()["bootstrap_init"] is False


def test_repr():
    learner = ActiveLearner(
        GaussianNB(), last_rows, bootstrap_init=True, force_all_finite=False
    )
    text = repr(learner)
    assert text.startswith("ActiveLearner(bootstrap_init=True, estimator=GaussianNB(),")
    assert "force_all_finite=False" in text
    assert "X_training=array" in repr(
        ActiveLearner(GaussianNB(), last_rows, X[:6], Y[:6])
    )


@pytest.mark.parametrize("kind", CONTAINERS)
def test_pickle(kind):
    to_X, to_y = CONTAINERS[kind]
    learner = ActiveLearner(GaussianNB(), last_rows, to_X(X[:9]), to_y(Y[:9]))
    twin = pickle.loads(pickle.dumps(learner))
    np.testing.assert_array_equal(
        twin.predict_proba(to_X(X)), learner.predict_proba(to_X(X))
    )
    twin.teach(to_X(X[9:12]), to_y(Y[9:12]))
    assert len(twin.X_training) == 12


# Bad input
# --------------------------------------------------------------------------------

NAN, INFINITE = (np.full((2, 4), value, dtype=np.float32) for value in (np.nan, np.inf))
ADVICE = "; hand in one sample or more, all finite, and a label for each"


@pytest.mark.parametrize("method", ["fit", "teach"])
@pytest.mark.parametrize("to_X", [np.asarray, pd.DataFrame, torch.tensor])
@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        (X[:3], Y[:2], r"inconsistent numbers of samples: \[3, 2\]"),
        (NAN, Y[:2], "Input X contains NaN"),
        (INFINITE, Y[:2], "Input X contains infinity"),
        (X[:2], None, "y cannot be None|requires y to be passed"),
        (X[:0], Y[:0], r"Found array with 0 sample\(s\)"),
    ],
)
def test_what_scikit_learn_refuses_changes_nothing(
    taught, method, to_X, samples, labels, message
):
    fitted_on = taught.estimator.seen_
    with pytest.raises(ValueError, match=f"(?:{message}).*{ADVICE}"):
        getattr(taught, method)(to_X(samples), labels)
    np.testing.assert_array_equal(taught.X_training, X[:6])
    np.testing.assert_array_equal(taught.y_training, Y[:6])
    assert taught.estimator.seen_ is fitted_on


def test_initial_samples_are_checked():
    with pytest.raises(ValueError, match=f"contains NaN{ADVICE}"):
        ActiveLearner(GaussianNB(), X_training=NAN, y_training=Y[:2])


def test_not_finite_where_that_is_wanted():
    learner = ActiveLearner(
        net(nn.Linear(4, 3)), X_training=NAN, y_training=Y[:2], force_all_finite=False
    )
    learner.teach(NAN, Y[:2])
    assert learner.X_training.shape == (4, 4)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_rows_of_another_shape(kind):
    to_X, to_y = CONTAINERS[kind]
    learner = ActiveLearner(GaussianNB(), last_rows, to_X(X[:6]), to_y(Y[:6]))
    narrow = (
        pd.DataFrame(X[6:8, :3])
        if isinstance(learner.X_training, pd.DataFrame)
        else to_X(X[6:8, :3].copy())
    )
    with pytest.raises(
        ValueError,
        match=r"X has rows of shape \(3,\), but this learner was taught .*\(4,\); "
        r"hand in rows of that",
    ):
        learner.teach(narrow, to_y(Y[6:8]))
    with pytest.raises(
        ValueError,
        match=r"y has rows of shape \(2,\), but .* of shape \(\); hand in rows of",
    ):
        learner.teach(to_X(X[6:8]), np.zeros((2, 2)))
    assert len(learner.X_training) == len(learner.y_training) == 6


@pytest.mark.parametrize(
    ("kind", "name"), [("pandas", "DataFrame"), ("tensor", "Tensor")]
)
def test_another_container(kind, name):
    to_X, to_y = CONTAINERS[kind]
    learner = ActiveLearner(GaussianNB(), last_rows, to_X(X[:6]), to_y(Y[:6]))
    with pytest.raises(
        TypeError,
        match=f"X is a ndarray, but this learner was taught a {name}; "
        f"hand in a {name}, or start",
    ):
        learner.teach(X[6:8], to_y(Y[6:8]))
    with pytest.raises(
        TypeError,
        match=f"y is a list, but this learner was taught a {to_y.__name__.title()};",
    ):
        learner.teach(to_X(X[6:8]), [0, 1])
    assert len(learner.X_training) == len(learner.y_training) == 6


def test_other_columns():
    learner = ActiveLearner(
        GaussianNB(), last_rows, pd.DataFrame(X[:6], columns=list("abcd")), Y[:6]
    )
    with pytest.raises(
        ValueError,
        match=r"X has the columns \['a', 'b', 'c', 'x'\], but .*'d'\]; rename them",
    ):
        learner.teach(pd.DataFrame(X[6:8], columns=list("abcx")), Y[6:8])
    learner.teach(pd.DataFrame(X[6:8], columns=list("abcd"))[list("dcba")], Y[6:8])
    np.testing.assert_array_equal(learner.X_training.to_numpy(), X[:8])


PAIRS = TensorDataset(torch.tensor(X[6:8]), torch.tensor(Y[6:8]))
A_DICT = (
    "X is a {}, and a learner keeps rows of one array.* "
    "make the dict of it in a Pipeline.*FisherMask"
)
A_DATASET = (
    r"X is a {}, and a learner cannot join it .*arrays from the start.*{}.*"
    r"FisherMask\(\).select\(net"
)


@pytest.mark.parametrize("method", ["fit", "teach"])
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"a": X[6:8]}, A_DICT.format("dict")),
        (SliceDict(a=X[6:8]), A_DICT.format("SliceDict")),
        (
            PAIRS,
            A_DATASET.format(
                "TensorDataset", r"np.stack\(\[sample for sample, _ in X\]\)"
            ),
        ),
    ],
)
def test_dicts_and_datasets_are_refused(taught, method, samples, message):
    with pytest.raises(TypeError, match=message):
        getattr(taught, method)(samples, Y[6:8])
    np.testing.assert_array_equal(taught.X_training, X[:6])


def test_a_slice_dataset_is_fitted_and_not_joined(taught):
    pairs = SliceDataset(PAIRS)
    message = A_DATASET.format("SliceDataset", r"np.stack\(X\)")
    with pytest.raises(TypeError, match=message):
        taught.teach(pairs, Y[6:8])
    learner = ActiveLearner(
        net(nn.Linear(4, 3), classes=[0, 1, 2]), last_rows, pairs, Y[6:8]
    )
    for samples in (X[8:10], pairs):
        with pytest.raises(TypeError, match=message):
            learner.teach(samples, Y[8:10])
    assert learner.X_training is pairs
    taught.teach(np.stack([sample for sample, _ in PAIRS]), Y[6:8])
    taught.teach(np.stack(pairs), Y[6:8])
    np.testing.assert_array_equal(taught.X_training, X[[*range(8), 6, 7]])


@pytest.mark.parametrize(("samples", "labels"), [(X[6], Y[6]), (X[6:7], 0)])
def test_one_sample_without_its_axis(taught, samples, labels):
    with pytest.raises(TypeError, match=r"a single sample as X\[\[i\]\], y\[\[i\]\]"):
        taught.teach(samples, labels)


@pytest.mark.parametrize("strategy", [None, "margin", GaussianNB])
def test_a_strategy_that_is_none(strategy):
    with pytest.raises(
        TypeError,
        match=r"query_strategy must be .*, got .*; "
        r"hand in FisherMask\(\), for instance",
    ):
        ActiveLearner(GaussianNB(), strategy)
