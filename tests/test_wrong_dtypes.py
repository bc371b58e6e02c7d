"""float64 samples and labels that skorch cannot take, wherever they come in."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import (
    ActiveLearningClassifier,
    FisherMask,
    as_estimator,
    check_network,
    compare_strategies,
)
from fishermask_sk.baselines import (
    badge_sampling,
    entropy_sampling,
    kcenter_sampling,
    margin_sampling,
    power_margin_sampling,
    random_sampling,
)
from fishermask_sk.modal import ActiveLearner

WIDE = np.random.default_rng(0).normal(size=(24, 4))
X = WIDE.astype("float32")
Y = np.int64(X[:, 0] > 0)
IMAGES = WIDE.reshape(24, 1, 2, 2)


def make_net(module=None):
    torch.manual_seed(0)
    return NeuralNetClassifier(
        module or nn.Linear(4, 2),
        criterion=nn.CrossEntropyLoss,
        train_split=None,
        max_epochs=1,
        verbose=0,
    )


def convolution():
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten())


def loop(estimator=None):
    return ActiveLearningClassifier(
        estimator or make_net(),
        margin_sampling,
        n_initial=9,
        n_instances=3,
        n_queries=1,
    )


def compare(X, y):
    return compare_strategies(
        make_net(), {"random": random_sampling}, X, y, X, y,
        n_initial=9, n_instances=3, n_queries=1, seeds=1,
    )  # fmt: skip


FITS = {
    "learner": lambda X, y: ActiveLearner(make_net(), margin_sampling, X, y),
    "teach": lambda X, y: ActiveLearner(make_net(), margin_sampling).teach(X, y),
    "loop": lambda X, y: loop().fit(X, y),
    "comparison": compare,
    "pipeline": lambda X, y: loop(make_pipeline(StandardScaler(), make_net())).fit(
        X, y
    ),
}
every_fit = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)


@every_fit
def test_fitting_on_float64(fit):
    message = (
        r'X is float64, and the net.s weights are not .* pass X.astype\("float32"\)'
    )
    with pytest.raises(ValueError, match=message):
        fit(WIDE, Y)


@pytest.mark.parametrize(
    ("module", "samples"),
    [
        (convolution(), IMAGES),
        (convolution(), torch.as_tensor(IMAGES)),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), WIDE),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), WIDE),
        (nn.Linear(4, 2), torch.as_tensor(WIDE)),
    ],
)
def test_fitting_other_layers_on_float64(module, samples):
    with pytest.raises(ValueError, match="X is float64, and the net's weights are not"):
        ActiveLearner(make_net(module), margin_sampling, samples, Y)


@every_fit
@pytest.mark.parametrize(
    ("y", "shown"),
    [
        (np.where(Y == 0, -1, 1), "-1, 1, of dtype int64"),
        (Y + 1, "1, 2, of dtype int64"),
        (Y * 3, "0, 3, of dtype int64"),
        (np.array(["no", "yes"])[Y], "'no', 'yes', of dtype <U3"),
        (np.int32(Y), "0, 1, of dtype int32"),
        (np.float64(Y), "0.0, 1.0, of dtype float64"),
    ],
    ids=["-1", "from 1", "gap", "strings", "int32", "float64"],
)
def test_labels_that_are_no_column_numbers(fit, y, shown):
    message = f"y holds {shown}, .* 0, 1, ... of dtype int64 .*LabelEncoder"
    with pytest.raises(ValueError, match=message):
        fit(X, y)


QUERIES = {
    "select": lambda net, X: FisherMask(1.0).select(net, X, 2, X_labeled=[]),
    "check_network": lambda net, X: check_network(net, X, 2),
    "kcenter": lambda net, X: kcenter_sampling(net, X, 2, X_labeled=X[:2]),
    "badge": lambda net, X: badge_sampling(net, X, 2),
    "predict_proba": lambda net, X: net.predict_proba(X),
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_querying_float64(query):
    net = as_estimator(nn.Linear(4, 2), classes=[0, 1])
    message = "its weights are float32: cast the samples, X.astype\\('float32'\\)"
    with pytest.raises(ValueError, match=message):
        query(net, WIDE)
    wide = as_estimator(nn.Linear(4, 2).double(), classes=[0, 1])
    with pytest.raises(ValueError, match="its weights are float64: cast the samples"):
        query(wide, X)


@pytest.mark.parametrize(
    "strategy", [margin_sampling, entropy_sampling, power_margin_sampling]
)
def test_uncertainty_of_float64(strategy):
    net = make_net().fit(X, Y)
    with pytest.raises(ValueError, match="X is float64, and the net's weights are not"):
        strategy(net, WIDE, 2)


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ActiveLearner(make_net(nn.Linear(5, 2)), margin_sampling, X, Y)
    frame = pd.DataFrame(WIDE)
    assert loop(LogisticRegression()).fit(frame, np.where(Y == 0, -1, 1))
