"""scikit-activeml's requirements of a pool query strategy, by the names in its template
for tests, asked of ours.

Its wheel and its sdist on the package index (1.0.1) hold no tests, so that these are
written anew, each for all of our strategies at once. The template's checks of a
regressor, of `sample_weight` and of `utility_weight` ask nothing of strategies that
have no such parameters.
"""

import inspect
from copy import deepcopy

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.naive_bayes import GaussianNB
from torch import nn

pytest.importorskip("skactiveml")
from skactiveml.classifier import SkorchClassifier
from skactiveml.utils import is_labeled, unlabeled_indices

from fishermask_sk.activeml import (
    BaitQuery,
    FacilityLocationQuery,
    FisherMaskQuery,
    PowerMarginQuery,
    WeightedMarginQuery,
)

STRATEGIES = {
    "FisherMask": FisherMaskQuery(0.9, random_state=42),
    "BAIT": BaitQuery(random_state=42),
    "PowerMargin": PowerMarginQuery(random_state=42),
    "WeightedMargin": WeightedMarginQuery(random_state=42),
    "FacilityLocation": FacilityLocationQuery(random_state=42),
}
X = np.random.default_rng(0).normal(size=(12, 2))
Y = np.full(12, np.nan)
Y[[1, 4, 6]] = [0, 1, 0]
UNLABELED = unlabeled_indices(Y)


class Nothing:
    """Fits no parameter."""


def a_classifier(**params):
    torch.manual_seed(0)
    return SkorchClassifier(
        nn.Linear(2, 2).double(),
        sample_dtype=np.float64,
        neural_net_param_dict={"verbose": 0, "train_split": None, "max_epochs": 1},
        **{"classes": [0, 1], **params},
    )


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return clone(STRATEGIES[request.param])


def query(strategy, **params):
    """With valid arguments, but for those that are given."""
    given = {"X": X, "y": Y, "clf": a_classifier(), **params}
    if "X_target" in inspect.signature(strategy.query).parameters:
        given.setdefault("X_target", X[:3] + 1)
    return strategy.query(**given)


def refuses(error, strategy, **params):
    with pytest.raises(error):  # the words are scikit-activeml's or ours
        query(strategy, **params)


def test_init_param_random_state(strategy):
    for wrong in (np.nan, "state"):
        refuses(ValueError, clone(strategy).set_params(random_state=wrong))
    assert len(query(strategy.set_params(random_state=1))) == 1


def test_init_param_missing_label(strategy):
    refuses(TypeError, clone(strategy).set_params(missing_label=Nothing))
    assert len(query(strategy.set_params(missing_label=np.nan))) == 1


def test_init_param_test_assignments(strategy):
    for name in strategy.get_params(deep=False):
        marker = Nothing()
        made = type(strategy)(**{name: marker})
        assert getattr(made, name) is marker


def test_query_param_X(strategy):
    for wrong in ("string", Nothing):
        refuses((ValueError, TypeError), strategy, X=wrong)
    refuses(ValueError, strategy, X=np.vstack([X, X]))


@pytest.mark.parametrize(
    ("missing", "classes", "dtype"),
    [
        (np.nan, [1.0, 2.0], float),
        (0, [1, 2], int),
        (None, [1, 2], object),
        (None, ["A", "B"], object),
        ("", ["A", "B"], str),
    ],
)
def test_query_param_y(strategy, missing, classes, dtype):
    for wrong in (np.nan, Nothing):
        refuses(TypeError, strategy, y=wrong)
    refuses(ValueError, strategy, y=np.vstack([Y, Y]))
    y = np.full(12, missing, dtype=dtype)
    y[:2] = classes
    clf = a_classifier(classes=classes, missing_label=missing)
    picks = query(strategy.set_params(missing_label=missing), y=y, clf=clf)
    assert picks[0] >= 2


def test_query_param_candidates(strategy):
    refuses(ValueError, strategy, candidates=np.nan)
    refuses(TypeError, strategy, candidates=Nothing)
    assert query(strategy, candidates=[UNLABELED[0]]) == [UNLABELED[0]]


def test_query_param_batch_size(strategy):
    refuses(ValueError, strategy, batch_size=0)
    refuses(TypeError, strategy, batch_size=1.2)
    assert query(strategy, batch_size=1).shape == (1,)


def test_query_param_return_utilities(strategy):
    for wrong in ("string", Nothing):
        refuses(TypeError, strategy, return_utilities=wrong)
    picks, utilities = query(strategy, return_utilities=True)
    assert (picks.shape, utilities.shape) == ((1,), (1, 12))


def test_query_param_clf(strategy):
    for wrong in (np.nan, "state", Nothing(), GaussianNB()):
        refuses(TypeError, strategy, clf=wrong)
    clf = a_classifier()
    before = deepcopy(vars(clf))
    query(strategy, clf=clf)
    assert vars(clf).keys() == before.keys()  # not fitted in place


def test_query_param_fit_clf(strategy):
    for wrong in (np.nan, "state"):
        refuses(TypeError, strategy, fit_clf=wrong)
    fitted = a_classifier().fit(X, Y)
    probabilities = fitted.predict_proba(X)
    for fit_clf in (False, True):
        query(strategy, clf=fitted, fit_clf=fit_clf)
        np.testing.assert_array_equal(fitted.predict_proba(X), probabilities)


def test_query_reproducibility(strategy):
    strategy.set_params(random_state=np.random.RandomState(0))
    first, second = (query(strategy, return_utilities=True) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_allclose(first[1], second[1])
    assert len(first[1][0]) == len(X)


@pytest.mark.parametrize("n_labeled", [0, 1, 8])
def test_query_al_cycles(strategy, n_labeled):
    y = np.full(12, np.nan)
    y[:n_labeled] = 0
    pick = query(strategy, y=y)
    assert np.isnan(y[pick]).all()


def test_query_batch_variation(strategy):
    picks, utilities = query(strategy, batch_size=5, return_utilities=True)
    assert len(set(picks)) == len(utilities) == 5
    assert np.isnan(utilities[0]).sum() == is_labeled(Y).sum()
    with pytest.warns(UserWarning, match="batch_size"):
        picks = query(strategy, batch_size=len(UNLABELED) + 1)
    assert sorted(picks) == UNLABELED.tolist()


def test_query_candidate_variation(strategy):
    all_of_them, given, few, as_samples = (
        query(strategy, candidates=candidates, return_utilities=True)[1]
        for candidates in (None, UNLABELED, UNLABELED[:1], X[UNLABELED])
    )
    np.testing.assert_allclose(all_of_them, given)
    assert np.flatnonzero(~np.isnan(few[0])).tolist() == [UNLABELED[0]]
    np.testing.assert_allclose(all_of_them[0][UNLABELED], as_samples[0])


def test_param_test_availability():
    """Every parameter of `query` has its test here."""
    tests = {name for name in globals() if name.startswith("test_query_param_")}
    for strategy in STRATEGIES.values():
        for name in inspect.signature(strategy.query).parameters:
            assert f"test_query_param_{name}" in tests or name == "X_target"
