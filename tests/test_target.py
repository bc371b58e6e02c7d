"""Labels for a purpose: F̄ and the mask from a target, or from a weighted pool; and two
stages. Against the slow twins, with real nets and real modAL.
"""

import pickle
from functools import partial

import numpy as np
import pytest
import reference
import torch
from modAL.models import ActiveLearner as StockLearner
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask, check_network, fisher_mask_sampling
from fishermask_sk.baselines import bait_sampling, margin_sampling
from fishermask_sk.modal import ActiveLearner

N_POOL, N_LABELED, N_TARGET, CLASSES = 26, 9, 11, 3
K = 40


def samples(n, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, size=(n, 5))


POOL, LABELED, TARGET = samples(N_POOL, 0), samples(N_LABELED, 1), samples(11, 2, 0.7)
Y = np.arange(N_LABELED) % CLASSES
WEIGHTS = np.random.default_rng(3).uniform(size=N_TARGET) * (np.arange(N_TARGET) != 4)
POOL_WEIGHTS = np.random.default_rng(4).uniform(size=N_POOL) ** 4


def make_net(hidden=6):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(5, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, 3)
    )
    net = NeuralNetClassifier(
        module.double(),
        criterion=nn.CrossEntropyLoss,
        max_epochs=3,
        lr=0.1,
        verbose=0,
        train_split=None,
    )
    return net.fit(LABELED, Y)


NET = make_net()


def rows(X):
    return reference.naive_embeddings(NET.module_.eval(), torch.as_tensor(X)).numpy()


def expected(averaged, weights=None, n_instances=5, ranked=None, **settings):
    """Mask, picks and gains with F̄ a weighted mean over `averaged`, by slow twins."""
    v = rows(averaged)
    ranked = np.arange(len(v)) if ranked is None else ranked
    w = np.ones(len(v)) if weights is None else np.asarray(weights)
    scores = (w[ranked, None] * (v[ranked] ** 2).sum(1)).sum(0) / w[ranked].sum()
    n_head = sum(p.numel() for p in NET.module_[-1].parameters())
    head = list(range(len(scores) - n_head, len(scores)))
    best = reference.naive_top_k(scores[:-n_head], K - n_head)
    mask = sorted(best + head)
    picks, gains = reference.naive_selection(
        rows(POOL)[:, :, mask],
        rows(LABELED)[:, :, mask],
        n_instances,
        target_information=reference.naive_mean_information(v[:, :, mask], w),
        **settings,
    )
    return mask, picks, gains


def assert_is(strategy, found):
    mask, picks, gains = found
    assert strategy.mask_indices_.tolist() == mask
    assert strategy.query_idx_.tolist() == picks
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-9)


@pytest.mark.parametrize("n_instances", [1, 2, 7, N_POOL])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("batch_size", [1, 4, 128])
def test_with_a_target_f_bar_and_the_mask_are_those_of_the_target(
    n_instances, weights, batch_size
):
    strategy = FisherMask(K, batch_size=batch_size, random_state=0)
    strategy.select(
        NET,
        POOL,
        n_instances,
        X_labeled=LABELED,
        X_target=TARGET,
        target_weight=weights,
    )
    assert_is(strategy, expected(TARGET, weights, n_instances))


@pytest.mark.parametrize("settings", [{"damping": 1e-3}, {"oversample": 2.0}])
def test_the_target_with_other_settings(settings):
    strategy = FisherMask(K, **settings)
    strategy.select(NET, POOL, 5, X_labeled=LABELED, X_target=TARGET)
    assert_is(strategy, expected(TARGET, **settings))


def test_a_pool_without_labelled_samples_has_a_target_too():
    strategy = FisherMask(K)
    strategy.select(NET, POOL, 5, X_labeled=LABELED[:0], X_target=TARGET)
    v = rows(TARGET)
    mask = strategy.mask_indices_
    picks, gains = reference.naive_selection(
        rows(POOL)[:, :, mask],
        np.zeros((0, CLASSES, K)),
        5,
        target_information=reference.naive_mean_information(v[:, :, mask]),
    )
    assert strategy.query_idx_.tolist() == picks
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-9)


def test_weights_without_a_target_weigh_the_pool_and_labelled_count_as_its_mean():
    strategy = FisherMask(K)
    strategy.select(NET, POOL, 5, X_labeled=LABELED, target_weight=POOL_WEIGHTS)
    weights = np.r_[POOL_WEIGHTS, np.full(N_LABELED, POOL_WEIGHTS.mean())]
    assert_is(strategy, expected(np.r_[POOL, LABELED], weights))


def test_equal_weights_of_the_pool_change_nothing():
    plain, weighted = FisherMask(K), FisherMask(K)
    plain.select(NET, POOL, 7, X_labeled=LABELED)
    weighted.select(NET, POOL, 7, X_labeled=LABELED, target_weight=np.full(N_POOL, 3))
    assert weighted.query_idx_.tolist() == plain.query_idx_.tolist()
    np.testing.assert_allclose(
        weighted.trace_reductions_, plain.trace_reductions_, rtol=1e-9
    )


def test_pool_and_labelled_as_the_target_change_nothing():
    plain, targeted = FisherMask(K), FisherMask(K)
    plain.select(NET, POOL, 7, X_labeled=LABELED)
    targeted.select(NET, POOL, 7, X_labeled=LABELED, X_target=np.r_[POOL, LABELED])
    assert targeted.mask_indices_.tolist() == plain.mask_indices_.tolist()
    assert targeted.query_idx_.tolist() == plain.query_idx_.tolist()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_mask_samples_are_drawn_uniformly_and_averaged_with_their_weights(weights):
    strategy = FisherMask(K, n_mask_samples=6, random_state=3)
    strategy.select(
        NET, POOL, 5, X_labeled=LABELED, X_target=TARGET, target_weight=weights
    )
    drawn = np.sort(np.random.RandomState(3).choice(N_TARGET, 6, replace=False))
    assert_is(strategy, expected(TARGET, weights, ranked=drawn))


def many_weights(X_labeled=LABELED, **of_call):
    """A query with more weights than the samples have rows."""
    net = make_net(hidden=800)
    strategy = FisherMask(6_500, random_state=0)
    strategy.select(net, POOL, 5, X_labeled=X_labeled, **of_call)
    v = {
        name: reference.naive_embeddings(net.module_.eval(), torch.as_tensor(X))
        for name, X in (("pool", POOL), ("labeled", X_labeled), ("target", TARGET))
    }
    of_mask = {
        name: rows.numpy()[:, :, strategy.mask_indices_] for name, rows in v.items()
    }
    return strategy, of_mask


def dual_selection(pool, labeled, averaged, n_instances, n_labeled):
    """The greedy choice by the samples' inner products alone: with more weights than
    rows, dense k×k inverses would take too long.
    """
    r = np.concatenate([pool, labeled, averaged]).reshape(-1, pool.shape[2])
    q = np.linalg.qr(r.T)[0]  # an orthonormal basis of all rows
    rotated = [each @ q for each in (pool, labeled, averaged)]
    return reference.naive_selection(
        rotated[0],
        rotated[1],
        n_instances,
        target_information=sum(v.T @ v for v in rotated[2]),
    )


@pytest.mark.parametrize(
    "kind", ["target", "weighted target", "weighted pool", "drawn"]
)
def test_many_weights_on_few_samples_go_without_matrices(kind):
    if kind == "weighted pool":
        strategy, v = many_weights(target_weight=POOL_WEIGHTS)
        weights = np.r_[POOL_WEIGHTS, np.full(N_LABELED, POOL_WEIGHTS.mean())]
        averaged = np.r_[v["pool"], v["labeled"]]
    else:
        weights = WEIGHTS if kind == "weighted target" else np.ones(N_TARGET)
        strategy, v = many_weights(X_target=TARGET, target_weight=weights)
        averaged = v["target"]
    weights = weights / weights.sum()
    picks, gains = dual_selection(
        v["pool"],
        v["labeled"],
        averaged * np.sqrt(weights)[:, None, None],
        5,
        N_LABELED,
    )
    assert strategy.query_idx_.tolist() == picks
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-7)


# Two stages


def test_f_bar_over_drawn_samples():
    strategy = FisherMask(K, n_information_samples=12, random_state=5)
    strategy.select(NET, POOL, 5, X_labeled=LABELED)
    everything = np.r_[POOL, LABELED]
    drawn = np.sort(np.random.RandomState(5).choice(len(everything), 12, replace=False))
    mask, _, _ = expected(everything)
    assert strategy.mask_indices_.tolist() == mask
    picks, gains = reference.naive_selection(
        rows(POOL)[:, :, mask],
        rows(LABELED)[:, :, mask],
        5,
        target_information=reference.naive_mean_information(
            rows(everything[drawn])[:, :, mask]
        ),
    )
    assert strategy.query_idx_.tolist() == picks
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-9)


def test_more_information_samples_than_there_are_is_all_of_them():
    plain, drawn = FisherMask(K), FisherMask(K, n_information_samples=10**6)
    assert np.array_equal(
        plain.select(NET, POOL, 5, X_labeled=LABELED),
        drawn.select(NET, POOL, 5, X_labeled=LABELED),
    )
    assert np.array_equal(plain.trace_reductions_, drawn.trace_reductions_)


def most_uncertain(n):
    p = np.sort(NET.predict_proba(POOL), axis=1)
    return np.sort(np.argsort(p[:, -1] - p[:, -2], kind="stable")[:n])


@pytest.mark.parametrize("of_call", [{}, {"X_target": TARGET}])
@pytest.mark.parametrize("n_information", [None, 7])
def test_a_number_of_candidates_is_the_most_uncertain_by_margin(of_call, n_information):
    settings = {"n_information_samples": n_information, "random_state": 0}
    by_number = FisherMask(K, candidates=3, **settings)
    by_position = FisherMask(K, **settings)
    by_number.select(NET, POOL, 4, X_labeled=LABELED, **of_call)
    by_position.select(
        NET, POOL, 4, X_labeled=LABELED, candidates=most_uncertain(12), **of_call
    )
    assert by_number.query_idx_.tolist() == by_position.query_idx_.tolist()
    np.testing.assert_allclose(
        by_number.trace_reductions_, by_position.trace_reductions_, rtol=1e-9
    )
    assert set(by_number.query_idx_) <= set(most_uncertain(12))


def test_candidates_beyond_the_pool_are_all_of_it():
    plain, limited = FisherMask(K), FisherMask(K, candidates=10)
    assert np.array_equal(
        plain.select(NET, POOL, 4, X_labeled=LABELED),
        limited.select(NET, POOL, 4, X_labeled=LABELED),
    )


def test_select_overrides_the_constructors_candidates():
    strategy = FisherMask(K, candidates=1)
    everyone = strategy.select(NET, POOL, 4, X_labeled=LABELED, candidates="all")
    assert everyone.tolist() == expected(np.r_[POOL, LABELED], n_instances=4)[1]
    some = strategy.select(NET, POOL, 2, X_labeled=LABELED, candidates=[3, 8, 9])
    assert set(some) <= {3, 8, 9}


def test_a_callable_draws_from_the_querys_random_state():
    seeds = []

    def proposal(estimator, X_pool, random_state=None):
        seeds.append(random_state)
        return np.random.RandomState(random_state).permutation(len(X_pool))[:6]

    first, again, other = (
        FisherMask(K, candidates=proposal, random_state=seed) for seed in (0, 0, 1)
    )
    picks = [s.select(NET, POOL, 4, X_labeled=LABELED) for s in (first, again, other)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert np.array_equal(picks[0], picks[1])
    assert not np.array_equal(picks[0], picks[2])


def test_a_callable_that_binds_its_seed_keeps_it():
    def proposal(estimator, X_pool, random_state=None):
        assert random_state == 7
        return np.arange(6)

    strategy = FisherMask(K, candidates=partial(proposal, random_state=7))
    assert set(strategy.select(NET, POOL, 4, X_labeled=LABELED)) <= set(range(6))


def test_candidates_are_a_parameter_like_any_other():
    strategy = FisherMask(K, candidates=5, n_information_samples=9)
    assert clone(strategy).get_params() == strategy.get_params()
    again = pickle.loads(pickle.dumps(strategy))
    assert again.get_params() == strategy.get_params()
    assert strategy.set_params(candidates=None).candidates is None
    margin = partial(margin_sampling, n_instances=8)
    assert clone(FisherMask(candidates=margin)).candidates.func is margin_sampling


# At home


@pytest.mark.parametrize("learner_class", [StockLearner, ActiveLearner])
def test_a_modal_learner_hands_the_target_on(learner_class):
    learner = learner_class(NET, FisherMask(K))
    learner.X_training = LABELED
    query_idx, X_query = learner.query(
        POOL, n_instances=5, X_target=TARGET, target_weight=WEIGHTS
    )
    assert query_idx.tolist() == expected(TARGET, WEIGHTS)[1]
    assert np.array_equal(X_query, POOL[query_idx])


def test_a_pipelines_steps_are_applied_to_the_target_once():
    pipeline = make_pipeline(FunctionTransformer(lambda X: X / 2), NET)
    strategy = FisherMask(K)
    strategy.select(pipeline, POOL * 2, 5, X_labeled=LABELED * 2, X_target=TARGET * 2)
    assert_is(strategy, expected(TARGET))


@pytest.mark.parametrize(
    "target",
    [
        torch.as_tensor(TARGET),
        torch.utils.data.TensorDataset(torch.as_tensor(TARGET), torch.zeros(N_TARGET)),
    ],
    ids=["tensor", "Dataset"],
)
def test_the_target_may_be_what_a_pool_may_be(target):
    strategy = FisherMask(K)
    strategy.select(NET, POOL, 5, X_labeled=LABELED, X_target=target)
    assert_is(strategy, expected(TARGET))


def test_functions_take_the_target_too():
    of_call = {"X_labeled": LABELED, "X_target": TARGET, "target_weight": WEIGHTS}
    assert (
        fisher_mask_sampling(NET, POOL, 5, sparsity=K, **of_call).tolist()
        == (expected(TARGET, WEIGHTS)[1])
    )
    head = FisherMask(1.0, layers="last", oversample=2.0)
    assert np.array_equal(
        bait_sampling(NET, POOL, 5, **of_call), head.select(NET, POOL, 5, **of_call)
    )


def test_the_target_is_forgotten_and_the_net_left_alone():
    before = {name: t.clone() for name, t in NET.module_.state_dict().items()}
    strategy = FisherMask(K)
    strategy.select(NET, POOL, 5, X_labeled=LABELED, X_target=TARGET)
    assert not any("target" in name for name in vars(strategy))
    assert len(pickle.dumps(strategy)) < 5_000
    after = NET.module_.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_check_network_counts_the_target():
    def embedding_seconds(**settings):
        return check_network(
            NET,
            POOL,
            2,
            query_strategy=FisherMask(K, candidates=5),
            X_labeled=LABELED,
            n_pool=10_000,
            **settings,
        ).seconds["embeddings"]

    assert embedding_seconds(n_target=10**6) > 5 * embedding_seconds(n_target=10)


# Bad input


@pytest.mark.parametrize(
    ("of_call", "error", "message"),
    [
        (
            {"X_target": TARGET[:, :4]},
            ValueError,
            r"X_pool has samples of shape \(5,\) and those of X_target of shape \(4,\)",
        ),
        (
            {"X_target": np.where(TARGET > 1, np.nan, TARGET)},
            ValueError,
            "X_target holds NaN or infinite values",
        ),
        ({"X_target": TARGET[:0]}, ValueError, "X_target is empty; pass samples of"),
        ({"X_target": 3}, TypeError, "X_target is 3; pass samples, one a row"),
        (
            {"X_target": TARGET, "target_weight": WEIGHTS[:5]},
            ValueError,
            r"target_weight has shape \(5,\), and X_target has 11 samples; pass one",
        ),
        (
            {"target_weight": WEIGHTS},
            ValueError,
            r"target_weight has shape \(11,\), and X_pool has 26 samples; pass one",
        ),
        (
            {"X_target": TARGET, "target_weight": WEIGHTS - 1},
            ValueError,
            "target_weight goes from -.* weights must be finite and not negative",
        ),
        (
            {"X_target": TARGET, "target_weight": np.full(11, np.inf)},
            ValueError,
            "target_weight goes from inf to inf; weights must be finite",
        ),
        (
            {"X_target": TARGET, "target_weight": np.zeros(11)},
            ValueError,
            "target_weight is zero for every sample; give those that matter",
        ),
        (
            {"target_weight": ["many"] * 26},
            ValueError,
            "target_weight must be numbers, one for each sample of X_pool; got",
        ),
        ({"candidates": "most"}, ValueError, "candidates='most' is unknown; pass"),
        ({"candidates": 0}, ValueError, "candidates=0 must be None, an int >= 1"),
        ({"candidates": True}, ValueError, "candidates=True must be None, an int >= 1"),
    ],
)
def test_what_a_query_refuses(of_call, error, message):
    with pytest.raises(error, match=message):
        FisherMask(K).select(NET, POOL, 5, X_labeled=LABELED, **of_call)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"candidates": 0}, "candidates=0 must be None, an int >= 1"),
        ({"candidates": [1, 2]}, "positions themselves go to select"),
        ({"n_information_samples": 0}, "n_information_samples=0 must be an int >= 1"),
    ],
)
def test_parameters_that_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        FisherMask(K, **params).select(NET, POOL, 5, X_labeled=LABELED)


def test_drawn_samples_without_any_weight_are_refused():
    drawn = np.random.RandomState(0).choice(N_TARGET, 1, replace=False)[0]
    weights = np.eye(N_TARGET)[drawn - 1]
    with pytest.raises(ValueError, match="that were drawn have target_weight 0; leave"):
        FisherMask(K, n_mask_samples=1, random_state=0).select(
            NET, POOL, 5, X_labeled=LABELED, X_target=TARGET, target_weight=weights
        )


def test_a_sample_that_breaks_the_margins_is_named():
    class Breaks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) / (x[:, :1] != 9)

    net = make_net()
    net.module_.__class__ = Breaks
    X = POOL.copy()
    X[17, 0] = 9
    with pytest.raises(ValueError, match="outputs on sample 17 of X_pool hold NaN or"):
        FisherMask(K, candidates=2).select(
            net, X, 3, X_labeled=LABELED, X_target=TARGET
        )
