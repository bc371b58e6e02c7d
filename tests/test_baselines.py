"""Baselines against slow twins, a published implementation where it is installed, and
both forms of answer.
"""

from functools import partial, wraps

import numpy as np
import pytest
import sklearn
import torch
from modAL.models import ActiveLearner, Committee
from modAL.uncertainty import (
    classifier_entropy,
    classifier_margin,
    classifier_uncertainty,
)
from reference import (
    naive_facility_location,
    naive_log_density_ratio,
    naive_power_draw,
)
from scipy import sparse
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fishermask_sk import FisherMask
from fishermask_sk.baselines import (
    badge_sampling,
    bait_sampling,
    entropy_sampling,
    facility_location_sampling,
    kcenter_sampling,
    least_confidence_sampling,
    margin_sampling,
    power_margin_sampling,
    random_sampling,
    weighted_margin_sampling,
)
from fishermask_sk.loops.learner import PoolLearner

X, Y = load_digits(return_X_y=True)
# Grey values are multiples of 1/16, so that distances tie; the noise keeps ties out of
# where none are meant.
X = X[:90] / 16 + np.random.default_rng(0).normal(scale=0.01, size=(90, 64))
Y = Y[:90].astype("int64")
X_LABELED, Y_LABELED, X_POOL = X[:40], Y[:40], X[40:]
X_TARGET = X_POOL[np.isin(Y[40:], (3, 5))] + 0.02
UNCERTAINTY = [least_confidence_sampling, margin_sampling, entropy_sampling]
TARGETED = [facility_location_sampling, weighted_margin_sampling]


def with_target(strategy):
    """Bound to the target, called as it is without."""
    return wraps(strategy)(partial(strategy, X_target=X_TARGET))


ALL = [random_sampling, *UNCERTAINTY, kcenter_sampling, badge_sampling, bait_sampling]
ALL += [power_margin_sampling, *map(with_target, TARGETED)]


class Net(nn.Module):
    """A tiny convolutional net with batch normalisation, so that training and
    evaluation differ.
    """

    def __init__(self, n_outputs=10, probabilities=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(3),
            nn.Flatten(),
        )
        self.output = nn.Linear(12, n_outputs)
        self.dropout, self.probabilities = nn.Dropout(0.5), probabilities

    def features(self, X):
        return self.dropout(self.body(X.reshape(-1, 1, 8, 8)))

    def forward(self, X):
        scores = self.output(self.features(X))
        return scores.softmax(1) if self.probabilities else scores


class Float64Net(NeuralNetClassifier):
    """A net in float64, where twins agree pick by pick."""

    def initialize_module(self):
        super().initialize_module()
        self.module_.double()
        return self


def fitted_net(X=X_LABELED, y=Y_LABELED, criterion=nn.CrossEntropyLoss, **params):
    torch.manual_seed(0)
    net = Float64Net(
        Net,
        criterion=criterion,
        classes=list(range(10)),
        train_split=None,
        verbose=0,
        max_epochs=5,
        lr=0.1,
        **params,
    )
    return net.fit(X, y)


@pytest.fixture(scope="module")
def net():
    return fitted_net()


@pytest.fixture(scope="module")
def learner(net):
    return PoolLearner(net, None, X_LABELED, Y_LABELED)


@pytest.fixture(scope="module")
def regression():
    return LogisticRegression(max_iter=300).fit(X_LABELED, Y_LABELED)


def features_and_probabilities(net, X):
    net.module_.eval()
    with torch.no_grad():
        X = torch.tensor(X)
        return net.module_.features(X).numpy(), net.module_(X).softmax(1).numpy()


# --- slow twins, from the papers
# ----------------------------------------------------------------------------


def naive_kcenter(pool, labeled, b):
    """Algorithm 1 of arXiv 1708.00489: u = argmax over the pool of the least distance
    to any centre.
    """
    centers, picks = list(labeled), []
    for _ in range(b):
        distances = [min(np.linalg.norm(x - c) for c in centers) for x in pool]
        distances = [-1 if i in picks else d for i, d in enumerate(distances)]
        picks.append(int(np.argmax(distances)))
        centers.append(pool[picks[-1]])
    return picks


def naive_badge(features, p, b, seed, centers=()):
    """Algorithm 1 of arXiv 1906.03671 with whole embeddings; the first pick is the
    longest, as in the code.
    """
    g = np.stack(
        [
            np.outer(q - np.eye(len(q))[q.argmax()], h).ravel()
            for q, h in zip(p, features, strict=True)
        ]
    )
    rng = sklearn.utils.check_random_state(seed)
    picks = [int(np.argmax((g**2).sum(1)))]
    while len(picks) < b:
        squared = np.array(
            [min(((x - c) ** 2).sum() for c in (*g[picks], *centers)) for x in g]
        )
        squared[picks] = 0
        picks.append(int(rng.choice(len(g), p=squared / squared.sum())))
    return picks


@pytest.mark.parametrize("b", [1, 2, 10, 50])
def test_kcenter_is_its_slow_twin(net, learner, b):
    pool, labeled = (
        features_and_probabilities(net, part)[0] for part in (X_POOL, X_LABELED)
    )
    query_idx, distances = kcenter_sampling(learner, X_POOL, b)
    assert query_idx.tolist() == naive_kcenter(pool, labeled, b)
    assert (np.diff(distances) <= 1e-12).all()


@pytest.mark.parametrize("b", [1, 2, 10, 50])
def test_badge_is_its_slow_twin(net, learner, b):
    query_idx, _ = badge_sampling(learner, X_POOL, b, random_state=3)
    assert query_idx.tolist() == naive_badge(
        *features_and_probabilities(net, X_POOL), b, seed=3
    )


def test_badge_metrics_are_squared_distances(net, learner):
    query_idx, metrics = badge_sampling(learner, X_POOL, 5, random_state=0)
    h, p = features_and_probabilities(net, X_POOL)
    g = ((p - np.eye(10)[p.argmax(1)])[:, :, None] * h[:, None]).reshape(len(p), -1)
    expected = [(g[query_idx[0]] ** 2).sum()]
    for n, i in enumerate(query_idx[1:], start=1):
        expected.append(min(((g[i] - g[j]) ** 2).sum() for j in query_idx[:n]))
    np.testing.assert_allclose(metrics, expected, rtol=1e-9)


@pytest.mark.parametrize("b", [1, 2, 10, 50])
@pytest.mark.parametrize("copies", [1, 3])
def test_facility_location_is_its_slow_twin(net, learner, b, copies):
    # copies: each sample that often, so that candidates tie
    pool = np.repeat(X_POOL[::copies], copies, axis=0)[:50]
    h, t = (features_and_probabilities(net, part)[0] for part in (pool, X_TARGET))
    query_idx, gains = facility_location_sampling(learner, pool, b, X_target=X_TARGET)
    expected, expected_gains = naive_facility_location(h, t, b)
    assert query_idx.tolist() == expected
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-9)


def test_facility_location_looks_at_many_blocks_of_candidates(regression):
    rng = np.random.default_rng(0)
    pool, target = rng.normal(size=(600, 64)), rng.normal(size=(5, 64))
    pool[::7] = 0.0  # no direction: its similarity is 0
    query_idx = facility_location_sampling(regression, pool, 4, X_target=target)
    assert query_idx.tolist() == naive_facility_location(pool, target, 4)[0]


@pytest.mark.parametrize("b", [1, 2, 50])
def test_weighted_margin_is_its_slow_twin(net, learner, b):
    (h, p), (t, _) = (
        features_and_probabilities(net, part) for part in (X_POOL, X_TARGET)
    )
    ratio = naive_log_density_ratio(h, t)
    best = np.sort(p, axis=1)[:, ::-1]
    score = np.log(1 - (best[:, 0] - best[:, 1])) + ratio
    query_idx, found = weighted_margin_sampling(learner, X_POOL, b, X_target=X_TARGET)
    np.testing.assert_allclose(found, score[query_idx], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, np.sort(score)[::-1][:b], rtol=1e-4, atol=1e-4)


def test_power_margin_draws_in_proportion(regression):
    pool = X_POOL[:6]
    best = np.sort(regression.predict_proba(pool), axis=1)[:, ::-1]
    uncertainty = 1 - (best[:, 0] - best[:, 1])
    rng, n = np.random.default_rng(0), 600
    counts = np.zeros((2, 6))
    for seed in range(n):
        counts[0, power_margin_sampling(regression, pool, 3, random_state=seed)] += 1
        counts[1, naive_power_draw(uncertainty, 3, rng)] += 1
    spread = np.sqrt(counts.sum(0) / 2 * (1 - counts.sum(0) / (2 * n)) * 2)
    assert (np.abs(counts[0] - counts[1]) < 4 * np.maximum(spread, 1)).all()
    first = [
        power_margin_sampling(regression, pool, 1, random_state=seed)[0]
        for seed in range(n)
    ]
    share = uncertainty / uncertainty.sum()
    assert (np.abs(np.bincount(first, minlength=6) / n - share) < 0.08).all()


def test_power_margin_draws_the_certain_last():
    class Certain:
        def predict_proba(self, X):
            p = np.repeat([[1.0, 0.0]], len(X), axis=0)
            p[:2] = 0.5
            return p

    draws = [
        power_margin_sampling(Certain(), X_POOL[:9], 4, random_state=seed).tolist()
        for seed in range(20)
    ]
    assert all(set(draw[:2]) == {0, 1} for draw in draws)
    assert len({tuple(draw[2:]) for draw in draws}) > 5


@pytest.mark.parametrize("b", [1, 2, 10, 50])
def test_bait_is_fisher_mask_on_the_whole_head(learner, b):
    strategy = FisherMask(sparsity=1.0, layers="last", oversample=2)
    expected = strategy.select(learner, X_POOL, b)
    np.testing.assert_array_equal(bait_sampling(learner, X_POOL, b)[0], expected)
    assert strategy.weights_per_layer_["output.weight"] == 120
    assert sum(strategy.weights_per_layer_.values()) == 130


@pytest.mark.parametrize("estimator", ["net", "regression"])
@pytest.mark.parametrize("b", [1, 2, 50])
@pytest.mark.parametrize(
    ("strategy", "measure", "sign"),
    list(
        zip(
            UNCERTAINTY,
            [classifier_uncertainty, classifier_margin, classifier_entropy],
            [-1, 1, -1],
            strict=True,
        )
    ),
)
def test_uncertainty_is_modals_in_order(strategy, measure, sign, b, estimator, request):
    estimator = request.getfixturevalue(estimator)
    values = measure(estimator, X_POOL)
    np.testing.assert_array_equal(
        strategy(estimator, X_POOL, b), np.argsort(sign * values, kind="stable")[:b]
    )


@pytest.mark.parametrize("strategy", [margin_sampling, power_margin_sampling])
def test_one_class_alone_has_no_margin(strategy):
    class Certain:
        def predict_proba(self, X):
            return np.ones((len(X), 1))

    assert sorted(strategy(Certain(), X_POOL, 50)) == list(range(50))
    np.testing.assert_array_equal(classifier_margin(Certain(), X_POOL), 0)


# --- a published implementation: scikit-activeml, where it is installed
# ----------------------------------------


@pytest.mark.parametrize("b", [1, 10, 50])
def test_kcenter_is_scikit_activemls_core_set(regression, b):
    pool = pytest.importorskip(
        "skactiveml.pool", reason="scikit-activeml is not installed"
    )
    everything = np.r_[X_LABELED, X_POOL]
    y = np.r_[Y_LABELED.astype(float), np.full(len(X_POOL), np.nan)]
    expected = pool.CoreSet(random_state=0).query(everything, y, batch_size=b)
    query_idx = kcenter_sampling(regression, X_POOL, b, X_labeled=X_LABELED)
    np.testing.assert_array_equal(query_idx + len(X_LABELED), expected)


@pytest.mark.parametrize("b", [1, 10, 50])
def test_badges_twin_is_scikit_activemls(regression, b):
    """It takes the origin for one more centre, from the second pick on, which paper and
    authors' code do not.
    """
    pool = pytest.importorskip(
        "skactiveml.pool", reason="scikit-activeml is not installed"
    )
    from skactiveml.classifier import SklearnClassifier
    from skactiveml.utils import check_random_state

    classes = np.arange(10)
    clf = SklearnClassifier(LogisticRegression(max_iter=300), classes=classes)
    everything = np.r_[X_LABELED, X_POOL]
    y = np.r_[Y_LABELED.astype(float), np.full(len(X_POOL), np.nan)]
    expected = pool.Badge(random_state=7).query(everything, y, clf, batch_size=b)
    rng = check_random_state(
        7, len(X_POOL) + 1
    )  # it mixes its seed with the number of unlabelled samples
    origin = np.zeros(640)
    twin = naive_badge(
        X_POOL, regression.predict_proba(X_POOL), b, rng, centers=[origin]
    )
    np.testing.assert_array_equal(np.array(twin) + len(X_LABELED), expected)


# --- what a net is, and is not
# -------------------------------------------------------------------------------


def test_features_are_those_that_the_net_predicts_with(net, learner):
    in_batches = kcenter_sampling(learner, X_POOL, 5, batch_size=7)[0]
    np.testing.assert_array_equal(
        in_batches, kcenter_sampling(learner, X_POOL, 5, head="output")[0]
    )


@pytest.mark.parametrize(
    "strategy",
    [
        kcenter_sampling,
        badge_sampling,
        bait_sampling,
        *map(with_target, TARGETED),
    ],
)
def test_the_net_is_as_before(net, learner, strategy):
    net.module_.train()
    state = {name: value.clone() for name, value in net.module_.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    strategy(learner, X_POOL, 3, random_state=0)
    assert net.module_.training
    assert all(
        torch.equal(value, state[name])
        for name, value in net.module_.state_dict().items()
    )
    assert all(p.requires_grad for p in net.module_.parameters())
    assert not net.module_.output._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state  # noqa: NPY002


def test_probabilities_under_nll_loss():
    probabilistic = fitted_net(criterion=nn.NLLLoss, module__probabilities=True)
    h, _ = features_and_probabilities(probabilistic, X_POOL)
    with torch.no_grad():
        p = probabilistic.module_(torch.tensor(X_POOL)).numpy()
    assert badge_sampling(
        probabilistic, X_POOL, 6, random_state=0
    ).tolist() == naive_badge(h, p, 6, seed=0)


def test_one_logit_under_bce():
    class Binary(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(64, 1)

        def forward(self, X):
            return self.output(X).squeeze(1)

    from skorch import NeuralNetBinaryClassifier

    torch.manual_seed(0)
    net = NeuralNetBinaryClassifier(Binary, train_split=None, verbose=0, max_epochs=3)
    net.fit(X_LABELED.astype("float32"), (Y_LABELED > 4).astype("float32"))
    pool = X_POOL.astype("float32")
    with torch.no_grad():
        logit = net.module_(torch.tensor(pool)).double()
    p = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)], 1).numpy()
    assert badge_sampling(net, pool, 6, random_state=0).tolist() == naive_badge(
        pool.astype("float64"), p, 6, seed=0
    )


def test_parametrized_and_root_heads():
    torch.manual_seed(0)
    for module in (
        nn.Linear(64, 10),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)),
    ):
        for wrapped in (module, nn.Sequential(nn.Flatten(), module)):
            plain = NeuralNetClassifier(
                wrapped, criterion=nn.CrossEntropyLoss, verbose=0
            ).initialize()
            query_idx = kcenter_sampling(
                plain,
                X_POOL.astype("float32"),
                4,
                X_labeled=X_LABELED.astype("float32"),
            )
            assert query_idx.tolist() == naive_kcenter(X_POOL, X_LABELED, 4)


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling, bait_sampling])
def test_earlier_steps_of_a_pipeline_are_applied_once(strategy):
    scaler = StandardScaler().fit(X_LABELED)
    pipe = make_pipeline(StandardScaler(), fitted_net(scaler.transform(X_LABELED)))
    pipe.steps[0] = ("standardscaler", scaler)
    bare = strategy(
        pipe[-1],
        scaler.transform(X_POOL),
        5,
        **labeled(strategy, scaler.transform(X_LABELED)),
    )
    in_pipe = strategy(pipe, X_POOL, 5, **labeled(strategy, X_LABELED))
    np.testing.assert_array_equal(in_pipe, bare)


def labeled(strategy, X_labeled):
    seed = {"random_state": 0}
    return seed if strategy is badge_sampling else {**seed, "X_labeled": X_labeled}


@pytest.mark.parametrize("strategy", TARGETED)
def test_earlier_steps_are_applied_to_the_target_once(strategy):
    scaler = StandardScaler().fit(X_LABELED)
    pipe = make_pipeline(StandardScaler(), fitted_net(scaler.transform(X_LABELED)))
    pipe.steps[0] = ("standardscaler", scaler)
    bare = strategy(
        pipe[-1], scaler.transform(X_POOL), 5, X_target=scaler.transform(X_TARGET)
    )
    in_pipe = strategy(pipe, X_POOL, 5, X_target=X_TARGET)
    np.testing.assert_array_equal(in_pipe, bare)


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling])
def test_without_a_net_features_are_the_inputs_after_the_pipeline(strategy):
    pipe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(
        X_LABELED, Y_LABELED
    )
    pool, known = pipe[0].transform(X_POOL), pipe[0].transform(X_LABELED)
    expected = (
        naive_kcenter(pool, known, 6)
        if strategy is kcenter_sampling
        else naive_badge(pool, pipe.predict_proba(X_POOL), 6, seed=0)
    )
    assert (
        strategy(pipe, X_POOL, 6, **labeled(strategy, X_LABELED)).tolist() == expected
    )


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling])
def test_a_search_around_a_pipeline_is_that_pipeline(strategy):
    pipe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    scale = np.geomspace(1, 1e3, X_POOL.shape[1])
    search = GridSearchCV(pipe, {"logisticregression__C": [1.0]}, cv=2).fit(
        X_LABELED * scale, Y_LABELED
    )
    expected = strategy(
        search.best_estimator_,
        X_POOL * scale,
        6,
        **labeled(strategy, X_LABELED * scale),
    )
    found = strategy(search, X_POOL * scale, 6, **labeled(strategy, X_LABELED * scale))
    np.testing.assert_array_equal(found, expected)
    bare = strategy(
        pipe[-1].fit(X_LABELED * scale, Y_LABELED),
        X_POOL * scale,
        6,
        **labeled(strategy, X_LABELED * scale),
    )
    assert found.tolist() != bare.tolist()


# --- ties, duplicates, no labels
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling])
def test_duplicates_are_picked_once_each_and_last(learner, strategy):
    pool = np.repeat(X_POOL[:4], 3, axis=0)
    query_idx, metrics = strategy(learner, pool, 12, random_state=0)
    assert sorted(query_idx) == list(range(12))
    assert {i // 3 for i in query_idx[:4]} == {0, 1, 2, 3}
    np.testing.assert_allclose(metrics[4:], 0, atol=1e-6)


def test_kcenter_without_labelled_samples_starts_at_the_middle(regression):
    center = np.linalg.norm(X_POOL - X_POOL.mean(0), axis=1).argmin()
    query_idx = kcenter_sampling(regression, X_POOL, 4, X_labeled=X_POOL[:0])
    assert query_idx.tolist() == [center, *naive_kcenter(X_POOL, [X_POOL[center]], 3)]


def test_kcenter_warns_where_nobody_says_what_is_labelled(regression):
    with pytest.warns(UserWarning, match="No labelled samples") as caught:
        kcenter_sampling(regression, X_POOL, 2)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    "strategy",
    [*UNCERTAINTY, kcenter_sampling, badge_sampling, *map(with_target, TARGETED)],
)
def test_ties_go_to_the_lowest_index_or_to_chance(learner, strategy):
    pool = np.repeat(X_POOL[:1], 30, axis=0)
    assert strategy(learner, pool, 1)[0].tolist() == [0]
    picks = [
        strategy(learner, pool, 1, random_tie_break=True, random_state=seed)[0][0]
        for seed in range(8)
    ]
    assert len(set(picks)) > 1
    again = [
        strategy(learner, pool, 1, random_tie_break=True, random_state=seed)[0][0]
        for seed in range(8)
    ]
    assert picks == again


def test_random_is_seeded_and_every_sample_is_as_likely():
    draws = [
        random_sampling(None, X_POOL[:5], 2, random_state=seed) for seed in range(2000)
    ]
    counts = np.bincount(np.concatenate(draws), minlength=5)
    assert (np.abs(counts - 800) < 5 * np.sqrt(800 * 0.6)).all()
    assert all(len(set(draw)) == 2 for draw in draws)
    np.testing.assert_array_equal(
        random_sampling(None, X_POOL, 9, random_state=1),
        random_sampling(None, X_POOL, 9, random_state=1),
    )


# --- the contract with modAL
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_instances", [1, 2, 5])
@pytest.mark.parametrize("strategy", ALL)
def test_answers_have_the_form_that_the_caller_expects(
    net, learner, strategy, n_instances
):
    query_idx, metrics = strategy(learner, X_POOL, n_instances)
    assert query_idx.shape == metrics.shape == (n_instances,)
    assert query_idx.dtype.kind == "i"
    bare = (
        partial(strategy, X_labeled=X_LABELED)
        if strategy in (kcenter_sampling, bait_sampling)
        else strategy
    )
    assert bare(net, X_POOL, n_instances, return_metrics=True).shape == (n_instances,)


@pytest.mark.parametrize("n_instances", [1, 2])
@pytest.mark.parametrize("strategy", ALL)
def test_in_modals_active_learner(net, strategy, n_instances):
    # Made without training data, so that no modAL checks these with keywords that
    # scikit-learn dropped.
    modal_learner = ActiveLearner(net, query_strategy=strategy)
    modal_learner.X_training, modal_learner.y_training = X_LABELED, Y_LABELED
    query_idx, X_query = modal_learner.query(X_POOL, n_instances=n_instances)
    assert query_idx.shape == (n_instances,)
    np.testing.assert_array_equal(X_query, X_POOL[query_idx])


# --- refusals
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize(
    ("n_instances", "error", "message"),
    [
        (0, ValueError, "n_instances=0 must be 1 or more"),
        (51, ValueError, "n_instances=51 exceeds the pool of 50 samples"),
        (2.0, TypeError, "n_instances=2.0 must be an int"),
    ],
)
def test_batch_sizes_that_cannot_be(learner, strategy, n_instances, error, message):
    with pytest.raises(error, match=message):
        strategy(learner, X_POOL, n_instances)


@pytest.mark.parametrize("strategy", TARGETED)
def test_targets_that_cannot_be(net, learner, regression, strategy):
    with pytest.raises(TypeError, match="required keyword-only argument: 'X_target'"):
        strategy(learner, X_POOL, 2)
    with pytest.raises(ValueError, match="X_target is None; pass the samples"):
        strategy(learner, X_POOL, 2, X_target=None)
    with pytest.raises(ValueError, match="X_target is empty; pass unlabelled samples"):
        strategy(learner, X_POOL, 2, X_target=X_TARGET[:0])
    broken = X_TARGET.copy()
    broken[1, 3] = np.nan
    with pytest.raises(ValueError, match="X_target holds NaN or infinite values"):
        strategy(learner, X_POOL, 2, X_target=broken)
    without_net = PoolLearner(regression, None, X_LABELED, Y_LABELED)
    with pytest.raises(ValueError, match=r"those of X_target of shape \(63,\); pass"):
        strategy(without_net, X_POOL, 2, X_target=X_TARGET[:, 1:])
    with pytest.raises(ValueError, match="have 64 features and X_target's 63; pass"):
        strategy(without_net, X_POOL, 2, X_target=X_TARGET[:, 1:].tolist())


@pytest.mark.parametrize("strategy", TARGETED)
def test_the_target_draws_the_picks(learner, strategy):
    """Half of the pool is moved away from the target: none of it is picked."""
    pool = X_POOL.copy()
    pool[::2] = 1 - pool[::2]
    query_idx = strategy(learner, pool, 5, X_target=X_POOL[1::2])[0]
    assert (query_idx % 2 == 1).all()


@pytest.mark.parametrize("strategy", ALL)
def test_unknown_keywords(learner, strategy):
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_instance'"):
        strategy(learner, X_POOL, n_instance=3)


@pytest.mark.parametrize("strategy", ALL)
def test_an_empty_pool(learner, strategy):
    with pytest.raises(ValueError, match="X_pool is empty"):
        strategy(learner, X_POOL[:0], 1)


@pytest.mark.parametrize("strategy", UNCERTAINTY)
def test_nan_probabilities(strategy):
    class Broken:
        def predict_proba(self, X):
            return np.full((len(X), 2), np.nan)

    with pytest.raises(ValueError, match="predict_proba gave NaN for 50 of 50 samples"):
        strategy(Broken(), X_POOL, 2)


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling])
def test_committees(net, strategy):
    committee = Committee([ActiveLearner(net), ActiveLearner(net)])
    with pytest.raises(TypeError, match="A Committee has several estimators"):
        strategy(committee, X_POOL, 2)


@pytest.mark.parametrize(
    "strategy", [*UNCERTAINTY, kcenter_sampling, badge_sampling, bait_sampling]
)
def test_a_net_that_is_not_fitted(strategy):
    with pytest.raises(NotFittedError, match=r"is not (fitted|initialized) yet"):
        strategy(
            PoolLearner(NeuralNetClassifier(Net), None, X_LABELED, Y_LABELED), X_POOL, 2
        )


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling])
def test_samples_with_nan(learner, regression, strategy):
    broken = X_POOL.copy()
    broken[3] = np.nan
    with pytest.raises(ValueError, match="X_pool holds NaN or infinite values"):
        strategy(learner, broken, 2)
    with pytest.raises(ValueError, match="Input X_pool contains NaN"):
        strategy(PoolLearner(regression, None, X_LABELED, Y_LABELED), broken, 2)


@pytest.mark.parametrize(
    "kind", [sparse.csr_matrix, sparse.csr_array, sparse.coo_array]
)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("n_instances", [1, 2, len(X_POOL)])
def test_sparse_samples_give_the_picks_of_dense_ones(
    regression, kind, labelled, n_instances
):
    known = X_LABELED if labelled else X_LABELED[:0]
    duplicated = np.concatenate([X_POOL[:-2], X_POOL[:2]])
    pool = kind(duplicated)
    assert (
        kcenter_sampling(regression, pool, n_instances, X_labeled=kind(known)).tolist()
        == kcenter_sampling(
            regression, duplicated, n_instances, X_labeled=known
        ).tolist()
    )
    assert (
        badge_sampling(regression, pool, n_instances, random_state=0).tolist()
        == badge_sampling(regression, duplicated, n_instances, random_state=0).tolist()
    )


def test_texts_of_a_pipeline_stay_sparse():
    texts = [
        f"{a} {b}"
        for a in ["red", "blue", "green", "grey"]
        for b in ["cat", "dog", "ox"]
    ]
    pipe = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(
        texts[::2], [0, 1] * 3
    )
    dense = make_pipeline(
        TfidfVectorizer(),
        FunctionTransformer(lambda X: X.toarray()),
        LogisticRegression(),
    ).fit(texts[::2], [0, 1] * 3)
    for strategy in (kcenter_sampling, badge_sampling):
        kwargs = {"X_labeled": texts[:2]} if strategy is kcenter_sampling else {}
        assert (
            strategy(pipe, texts[2:], 4, random_state=0, **kwargs).tolist()
            == strategy(dense, texts[2:], 4, random_state=0, **kwargs).tolist()
        )


def test_sparse_targets(regression):
    target = X_POOL[:4]
    assert (
        weighted_margin_sampling(
            regression, sparse.csr_array(X_POOL), 3, X_target=sparse.csr_array(target)
        ).tolist()
        == weighted_margin_sampling(regression, X_POOL, 3, X_target=target).tolist()
    )


@pytest.mark.parametrize(
    "strategy", [random_sampling, margin_sampling, kcenter_sampling]
)
@pytest.mark.parametrize(
    ("X_pool", "message"),
    [
        ("abcdef", "X_pool is 'abcdef'; pass samples, one a row"),
        (b"abcdef", "X_pool is b'abcdef'; pass samples, one a row"),
        ({1, 2, 3}, r"X_pool is \{1, 2, 3\}; pass samples, one a row"),
        (
            DataLoader(TensorDataset(torch.zeros(9, 2)), batch_size=3),
            "X_pool is a DataLoader.*pass loader.dataset, whose samples have positions",
        ),
    ],
)
def test_what_is_no_pool(regression, strategy, X_pool, message):
    with pytest.raises(TypeError, match=message):
        strategy(regression, X_pool, 2)


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling])
def test_a_bare_parameter_as_the_head_shows_no_features(strategy):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.rows = nn.Linear(64, 20), nn.Parameter(torch.randn(20, 10))

        def forward(self, X):
            return self.body(X).tanh() @ self.rows

    net = NeuralNetClassifier(
        Bare, criterion=nn.CrossEntropyLoss, verbose=0
    ).initialize()
    with pytest.raises(
        ValueError,
        match=r"'rows' is a parameter of a Bare that holds other layers.*Make it the",
    ):
        strategy(
            PoolLearner(net, None, X_LABELED.astype("float32"), Y_LABELED),
            X_POOL.astype("float32"),
            2,
        )


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling])
def test_a_net_without_a_head(strategy):
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(64, 20)

        def forward(self, X):
            return self.body(X).reshape(-1, 10, 2).amax(2)

    net = NeuralNetClassifier(
        Headless, criterion=nn.CrossEntropyLoss, verbose=0
    ).initialize()
    with pytest.raises(
        ValueError,
        match="no layer's output dimension is the number of classes; name it with head",
    ):
        strategy(
            PoolLearner(net, None, X_LABELED.astype("float32"), Y_LABELED),
            X_POOL.astype("float32"),
            2,
        )
