"""Two stages from the constructor, wherever scikit-learn takes an estimator's
parameters.
"""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier

from fishermask_sk import ActiveLearningClassifier, FisherMask
from fishermask_sk.baselines import power_margin_sampling

X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
y = np.int64(X[:, 0] > 0)
PROPOSE = partial(power_margin_sampling, n_instances=12)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return NeuralNetClassifier(
        torch.nn.Linear(4, 2),
        criterion=torch.nn.CrossEntropyLoss,
        classes=[0, 1],
        train_split=None,
        max_epochs=2,
        verbose=0,
    ).fit(X[:10], y[:10])


@pytest.mark.parametrize("candidates", [None, 2, PROPOSE])
def test_a_copy_asks_the_same(net, candidates):
    strategy = FisherMask(
        1.0, candidates=candidates, n_information_samples=20, random_state=0
    )
    copies = [clone(strategy), pickle.loads(pickle.dumps(strategy))]
    picks = strategy.select(net, X[10:], 3, X_labeled=X[:10]).tolist()
    for copy in copies:
        assert copy.candidates is strategy.candidates or callable(candidates)
        assert copy.select(net, X[10:], 3, X_labeled=X[:10]).tolist() == picks


def test_candidates_are_a_nested_parameter_that_can_be_searched_over(net):
    strategy = FisherMask(1.0, n_information_samples=20, random_state=0)
    learner = ActiveLearningClassifier(
        net, strategy, n_initial=10, n_instances=2, n_queries=1, random_state=0
    )
    learner.set_params(query_strategy__candidates=PROPOSE)
    assert learner.get_params()["query_strategy__candidates"] is PROPOSE
    values = [None, 5, 10]
    search = GridSearchCV(
        learner, {"query_strategy__candidates": values}, cv=2, error_score="raise"
    ).fit(X, y)
    tried = [
        each["query_strategy__candidates"] for each in search.cv_results_["params"]
    ]
    assert tried == values
    best = search.best_estimator_.query_strategy_
    assert best.candidates == search.best_params_["query_strategy__candidates"]
