"""Pool query strategies for scikit-activeml: its contract, its classifiers, and the
picks and gains of the formulas.
"""

import importlib
import sys
import warnings

import numpy as np
import pytest
import reference
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from skorch import NeuralNetClassifier
from torch import nn

pytest.importorskip("skactiveml")
from skactiveml.base import SingleAnnotatorPoolQueryStrategy
from skactiveml.classifier import (
    ParzenWindowClassifier,
    SklearnClassifier,
    SkorchClassifier,
)
from skactiveml.pool import SubSamplingWrapper
from skactiveml.utils import check_random_state

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.activeml import (
    BaitQuery,
    FacilityLocationQuery,
    FisherMaskQuery,
    PowerMarginQuery,
    WeightedMarginQuery,
)
from fishermask_sk.baselines import (
    bait_sampling,
    facility_location_sampling,
    power_margin_sampling,
    weighted_margin_sampling,
)

STRATEGIES = [
    FisherMaskQuery(0.9),
    BaitQuery(),
    PowerMarginQuery(),
    WeightedMarginQuery(),
    FacilityLocationQuery(),
]
IDS = ["FisherMask", "BAIT", "PowerMargin", "WeightedMargin", "FacilityLocation"]
TARGET = np.random.default_rng(1).normal(loc=1.0, size=(5, 2))
X = np.random.default_rng(0).normal(size=(14, 2))
Y = np.full(14, np.nan)
Y[[1, 4, 6, 9]] = [0, 1, 1, 0]
LABELED, UNLABELED = np.flatnonzero(~np.isnan(Y)), np.flatnonzero(np.isnan(Y))
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=IDS)


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))


def skorch_classifier(module=None, classes=(0, 1), **params):
    params = {"sample_dtype": np.float64, **params}
    return SkorchClassifier(
        (module or body()).double(),
        classes=list(classes),
        neural_net_param_dict={"verbose": 0, "train_split": None, "max_epochs": 3},
        **params,
    )


def query(strategy, y=Y, clf=None, seed=0, **params):
    strategy = clone(strategy).set_params(random_state=seed)
    if isinstance(strategy, WeightedMarginQuery):  # and FacilityLocationQuery
        params = {"X_target": TARGET, **params}
    return strategy.query(X, y, clf or skorch_classifier(), **params)


@every_strategy
@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_picks_are_unlabelled_and_utilities_have_the_right_shape(strategy, batch_size):
    assert isinstance(strategy, SingleAnnotatorPoolQueryStrategy)
    picks, utilities = query(strategy, batch_size=batch_size, return_utilities=True)
    assert picks.shape == (batch_size,)
    assert set(picks) <= set(UNLABELED)
    assert len(set(picks)) == batch_size
    assert utilities.shape == (batch_size, len(X))
    for t in range(batch_size):
        expected = np.zeros(len(X), dtype=bool)
        expected[LABELED] = expected[picks[:t]] = True
        assert (np.isnan(utilities[t]) == expected).all()
    assert (picks == query(strategy, batch_size=batch_size)).all()
    if not isinstance(strategy, BaitQuery):  # which takes picks back
        assert (np.nanargmax(utilities, axis=1) == picks).all()


@every_strategy
def test_candidates_by_position_and_as_samples(strategy):
    params = {"batch_size": 3, "return_utilities": True}
    picks, utilities = query(strategy, **params)
    again, same = query(strategy, candidates=UNLABELED, **params)
    assert (again == picks).all()
    np.testing.assert_allclose(same, utilities)
    places, as_samples = query(strategy, candidates=X[UNLABELED], **params)
    assert (UNLABELED[places] == picks).all()
    np.testing.assert_allclose(as_samples, utilities[:, UNLABELED])
    few = UNLABELED[[7, 2, 5]]
    picks, utilities = query(strategy, candidates=few, **params)
    assert set(picks) == set(few)
    assert set(np.flatnonzero(~np.isnan(utilities[0]))) == set(few)


@every_strategy
@pytest.mark.parametrize(
    ("missing", "classes", "dtype"),
    [
        (np.nan, [1.0, 2.0], float),
        (-1, [1, 2], int),
        (None, ["A", "B"], object),
        ("", ["A", "B"], str),
    ],
)
def test_any_missing_label(strategy, missing, classes, dtype):
    y = np.full(14, missing, dtype=dtype)
    y[LABELED] = np.array(classes, dtype=dtype)[Y[LABELED].astype(int)]
    strategy = clone(strategy).set_params(missing_label=missing)
    clf = skorch_classifier(classes=classes, missing_label=missing)
    picks = query(strategy, y=y, clf=clf, batch_size=3)
    assert (picks == query(clone(strategy).set_params(missing_label=np.nan),
                           batch_size=3)).all()  # fmt: skip


def test_utilities_are_the_trace_reductions_of_the_formulas():
    clf = skorch_classifier().fit(X, Y)
    strategy = clone(STRATEGIES[0]).set_params(sparsity=1.0, damping=0.5)
    picks, utilities = query(
        strategy, clf=clf, fit_clf=False, batch_size=4, return_utilities=True
    )
    module = clf.neural_net_.module_
    pool, labeled = (
        reference.naive_embeddings(module, torch.as_tensor(X[at])).numpy()
        for at in (UNLABELED, LABELED)
    )
    expected, gains = reference.naive_selection(pool, labeled, 4, damping=0.5)
    assert (picks == UNLABELED[expected]).all()
    np.testing.assert_allclose(utilities[np.arange(4), picks], gains, rtol=1e-9)
    alone = [  # what another candidate would have been worth at the first pick
        _first_gain(pool, labeled, 4, 0.5, i) for i in range(len(UNLABELED))
    ]
    np.testing.assert_allclose(utilities[0, UNLABELED], alone, rtol=1e-9)


def test_with_a_target():
    clf = skorch_classifier().fit(X, Y)
    strategy = clone(STRATEGIES[0]).set_params(sparsity=1.0, damping=0.5)
    fixed = {"clf": clf, "fit_clf": False, "batch_size": 4, "X_target": TARGET}
    picks, utilities = query(strategy, return_utilities=True, **fixed)
    net = NeuralNetClassifier(
        clf.neural_net_.module_, criterion=nn.CrossEntropyLoss, train_split=None
    ).initialize()
    pool, known = X[UNLABELED], X[LABELED]
    there = FisherMask(1.0, damping=0.5)
    expected = there.select(net, pool, 4, X_labeled=known, X_target=TARGET)
    assert (picks == UNLABELED[expected]).all()
    gains = utilities[np.arange(4), picks]
    np.testing.assert_allclose(gains, there.trace_reductions_, rtol=1e-9)
    assert (np.nanargmax(utilities, axis=1) == picks).all()
    for index, baseline in (
        (3, weighted_margin_sampling),
        (4, facility_location_sampling),
    ):
        expected = baseline(net, pool, 4, X_target=TARGET)
        assert (query(STRATEGIES[index], **fixed) == UNLABELED[expected]).all()


def test_facility_location_utilities_by_hand():
    clf = ParzenWindowClassifier(classes=[0, 1], random_state=0)
    picks, utilities = query(
        STRATEGIES[4], clf=clf, batch_size=3, return_utilities=True
    )

    def unit(a):
        return a / np.linalg.norm(a, axis=1, keepdims=True)

    similar = unit(X) @ unit(TARGET).T

    def value(chosen):
        if not chosen:
            return 0.0
        covered = np.maximum(similar[chosen].max(0), 0).sum()
        return covered + similar[chosen].max(1).sum()

    for t in range(3):
        before = list(picks[:t])
        for i in set(UNLABELED) - set(before):
            gain = value([*before, i]) - value(before)
            np.testing.assert_allclose(utilities[t, i], gain, rtol=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES[3:], ids=IDS[3:])
def test_strategies_for_a_target_need_one(strategy):
    with pytest.raises(ValueError, match="chooses labels for a target; pass X_target="):
        query(strategy, X_target=None)


def _first_gain(pool, labeled, b, damping, i):
    both = np.concatenate([pool, labeled])
    target = np.einsum("nck,ncl->kl", both, both) / len(both)
    total = np.einsum("nck,ncl->kl", labeled, labeled)
    m = damping * np.eye(pool.shape[2]) + total / (len(labeled) + b)
    added = m + b / (len(labeled) + b) * pool[i].T @ pool[i]
    return np.trace(np.linalg.solve(m, target) - np.linalg.solve(added, target))


def test_picks_are_those_of_select_and_of_the_baselines():
    clf = skorch_classifier().fit(X, Y)
    net = NeuralNetClassifier(
        clf.neural_net_.module_, criterion=nn.CrossEntropyLoss, train_split=None
    ).initialize()
    fixed = {"clf": clf, "fit_clf": False, "batch_size": 4}
    pool, known = X[UNLABELED], X[LABELED]
    expected = FisherMask(0.9).select(net, pool, 4, X_labeled=known)
    assert (query(STRATEGIES[0], **fixed) == UNLABELED[expected]).all()
    expected = bait_sampling(net, pool, 4, X_labeled=known)
    assert (query(STRATEGIES[1], **fixed) == UNLABELED[expected]).all()
    picks = query(STRATEGIES[2], seed=3, **fixed)
    rng = check_random_state(3, len(UNLABELED) + 1)  # the library's, as in its base
    drawn = power_margin_sampling(net, pool, 4, random_state=rng)
    assert (picks == UNLABELED[drawn]).all()


class Twice(nn.Module):
    """Features first, then what predicts."""

    def __init__(self, made):
        super().__init__()
        self.body, self.made = body(), made

    def forward(self, x):
        return x, self.made(self.body(x))


def softmax(z):
    return z.softmax(1)


@pytest.mark.parametrize(
    "params",
    [
        {"forward_outputs": {"proba": (1, nn.Softmax(dim=-1)), "emb": (0, None)}},
        {"forward_outputs": {"proba": (1, softmax)}},
        {"forward_outputs": {"proba": (1, None)}, "made": nn.Softmax(dim=-1)},
        {
            "forward_outputs": {"proba": (1, torch.exp)},
            "made": nn.LogSoftmax(dim=-1),
            "criterion": nn.NLLLoss,
        },
    ],
    ids=["logits", "own transform", "probabilities", "log-probabilities"],
)
def test_the_output_that_predicts_is_found(params):
    made = params.pop("made", nn.Identity())
    # labels for one output only: nothing is trained, the module's weights stay
    clf = skorch_classifier(Twice(made), **params)
    clf.initialize()
    plain = skorch_classifier()
    plain.initialize()
    at = {"fit_clf": False, "batch_size": 4, "return_utilities": True}
    picks, utilities = query(STRATEGIES[0], clf=clf, **at)
    expected, same = query(STRATEGIES[0], clf=plain, **at)
    assert (picks == expected).all()
    np.testing.assert_allclose(utilities, same, rtol=1e-6)


def test_nll_loss_means_log_probabilities_there():
    clf = skorch_classifier(
        nn.Sequential(body(), nn.LogSoftmax(dim=-1)), criterion=nn.NLLLoss
    )
    clf.initialize()
    plain = skorch_classifier()
    plain.initialize()
    picks = query(STRATEGIES[0], clf=clf, fit_clf=False, batch_size=4)
    assert (picks == query(STRATEGIES[0], clf=plain, fit_clf=False, batch_size=4)).all()


def test_a_skorch_net_and_images_inside_a_sklearn_classifier():
    images = np.random.default_rng(0).random((16, 1, 8, 8)).astype("float32")
    y = np.full(16, None, dtype=object)
    y[:4] = ["cat", "dog", "cat", "dog"]
    net = ResNet18Classifier(width=2, max_epochs=1, random_state=0)
    clf = SklearnClassifier(net, classes=["cat", "dog"], missing_label=None)
    strategy = FisherMaskQuery(60, missing_label=None, random_state=0)
    picks = strategy.query(images, y, clf, batch_size=3)
    fitted = clone(net).fit(images[:4], y[:4].astype(str))
    assert (4 + FisherMask(60, random_state=0).select(
        fitted, images[4:], 3, X_labeled=images[:4]) == picks).all()  # fmt: skip
    given = SklearnClassifier(fitted, classes=["cat", "dog"], missing_label=None)
    again = strategy.query(images, y, given, fit_clf=False, batch_size=3)
    assert (again == picks).all()


@every_strategy
def test_queries_repeat_and_leave_everything_as_it_was(strategy):
    clf = skorch_classifier(None).fit(X, Y)
    before = {k: v.clone() for k, v in clf.neural_net_.module_.state_dict().items()}
    criterion = clf.neural_net_.criterion_
    torch.manual_seed(7)
    rng = torch.get_rng_state()
    for fit_clf in (True, False):
        first = query(strategy, clf=clf, fit_clf=fit_clf, batch_size=3)
        second = query(strategy, clf=clf, fit_clf=fit_clf, batch_size=3)
        assert (first == second).all()
    assert (torch.get_rng_state() == rng).all()
    assert clf.neural_net_.criterion_ is criterion
    after = clf.neural_net_.module_.state_dict()
    assert all((before[k] == after[k]).all() for k in before)


@every_strategy
@pytest.mark.parametrize("n_labeled", [0, 1])
def test_without_labels_or_with_one(strategy, n_labeled):
    y = np.full(14, np.nan)
    y[:n_labeled] = 0
    picks = query(strategy, y=y, batch_size=3)
    assert len(picks) == 3
    assert min(picks) >= n_labeled


@every_strategy
def test_more_than_there_are(strategy):
    with pytest.warns(UserWarning, match="'batch_size=11' is larger"):
        assert len(query(strategy, batch_size=11)) == 10


def test_an_active_learning_cycle_inside_its_wrapper():
    truth, y = np.int64(X[:, 0] > 0), Y.copy()
    wrapped = SubSamplingWrapper(
        FisherMaskQuery(0.9, random_state=0), max_candidates=4, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            picks = wrapped.query(X, y, clf=skorch_classifier(), batch_size=2)
            assert np.isnan(y[picks]).all()
            y[picks] = truth[picks]
    assert np.isnan(y).sum() == 4


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            {"clf": ParzenWindowClassifier(classes=[0, 1])},
            TypeError,
            "and there is none in this ParzenWindowClassifier; pass",
        ),
        (
            {"clf": skorch_classifier(), "fit_clf": False},
            NotFittedError,
            "SkorchClassifier is not fitted yet; fit it, or query with fit_clf=True",
        ),
        ({"clf": "net"}, TypeError, "clf"),
        ({"clf": skorch_classifier(missing_label=-1)}, ValueError, "missing_label"),
        ({"fit_clf": "yes"}, TypeError, "fit_clf"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"return_utilities": 1}, TypeError, "return_utilities"),
    ],
)
def test_wrong_arguments(params, error, message):
    with pytest.raises(error, match=message):
        query(STRATEGIES[0], **params)


@pytest.mark.parametrize(
    "name", ["n_components", "n_information_samples", "candidates"]
)
def test_utilities_need_all_of_the_query(name):
    strategy = FisherMaskQuery(0.9, **{name: 3})
    assert len(query(strategy, batch_size=2)) == 2
    with pytest.raises(ValueError, match=f"{name}=3 spares some of them; set {name}="):
        query(strategy, batch_size=2, return_utilities=True)


def test_parameters_are_those_of_fisher_mask_with_its_defaults():
    here, there = FisherMaskQuery().get_params(), FisherMask().get_params()
    del here["missing_label"], there["verbose"]
    assert here == there


def test_without_scikit_activeml(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fishermask_sk.act")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skactiveml.base", None)
    with pytest.raises(ImportError, match=r"needs scikit-activeml .*; install it, for"):
        importlib.import_module("fishermask_sk.activeml")


@every_strategy
def test_parameters_clone_and_are_stored_as_they_are(strategy):
    for name in strategy.get_params():
        value = object()
        assert getattr(type(strategy)(**{name: value}), name) is value
    assert clone(strategy).get_params() == strategy.get_params()
