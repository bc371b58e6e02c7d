"""modAL's own requirements of its learner, by the names of its tests, asked of ours.

modAL's sdists on the package index (0.3.6 to 0.4.2.1) hold no tests, so that these are
written anew: each class and each name is one of its `core_tests.py`, and says what that
test asks of an `ActiveLearner`. What asks nothing of a learner (its strategies alone,
its Bayesian optimiser, its dropout) has no place here.

What ours does otherwise is in `DEVIATIONS`, each with its reason and its test.
`test_modal_versions.py` runs this file with both modAL versions.
"""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from modAL.batch import uncertainty_batch_sampling
from modAL.models import Committee, CommitteeRegressor
from modAL.multilabel import SVM_binary_minimum
from modAL.uncertainty import entropy_sampling, margin_sampling, uncertainty_sampling
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.metrics import confusion_matrix
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC

from fishermask_sk.modal import ActiveLearner

DEVIATIONS = {
    "the strategy's pair is read as positions and metrics": (
        "modAL 0.4.1 hands what a strategy returns to the user as it is, 0.4.2.1 reads "
        "positions and metrics; ours reads these under both, and takes the samples "
        "from the pool itself."
    ),
    "samples taught with only_new are remembered": (
        "0.4.2.1 forgets them, 0.4.1 and the docstrings of both remember them; a "
        "strategy that asks what is labelled has to know them."
    ),
    "a failed teach leaves nothing": (
        "modAL keeps the samples of a teach whose fit raised; ours does not."
    ),
    "force_all_finite is a keyword": (
        "modAL's is the last positional one; ours takes scikit-learn's 'allow-nan' too."
    ),
    "a class is no strategy": (
        "modAL takes whatever is callable, and a class fails at the first query."
    ),
}


class Says(BaseEstimator):
    """An estimator that answers what it was told to, and remembers its fits."""

    def __init__(self, predict=None, proba=None, score=None, classes=None):
        self.predict_, self.proba_, self.score_ = predict, proba, score
        self.fits = []
        if classes is not None:
            self.classes_ = np.asarray(classes)

    def fit(self, X, y):
        self.fits.append((X, y))
        return self

    def predict(self, X):
        return self.predict_

    def predict_proba(self, X):
        return self.proba_

    def score(self, X, y):
        return self.score_


def rng():
    return np.random.default_rng(0)


def samples(n, d=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def labels(n, n_classes=2):
    return np.arange(n) % n_classes


def forest():
    return RandomForestClassifier(n_estimators=2, random_state=0)


TWICE = list(product([True, False], [True, False]))


class TestActiveLearner:
    @pytest.mark.parametrize(
        ("n", "n_new", "d"), list(product([1, 2, 7], [1, 5], [1, 4]))
    )
    def test_add_training_data(self, n, n_new, d):
        X, X_new, y, y_new = (
            samples(n, d),
            samples(n_new, d, 1),
            labels(n),
            labels(n_new),
        )
        learner = ActiveLearner(Says(), X_training=X, y_training=y)
        learner._add_training_data(X_new, y_new)
        np.testing.assert_array_equal(learner.X_training, np.vstack([X, X_new]))
        np.testing.assert_array_equal(learner.y_training, np.concatenate([y, y_new]))
        # several columns of labels
        y, y_new = np.tile(y[:, None], (1, 3)), np.tile(y_new[:, None], (1, 3))
        learner = ActiveLearner(Says(), X_training=X, y_training=y)
        learner._add_training_data(X_new, y_new)
        np.testing.assert_array_equal(learner.y_training, np.concatenate([y, y_new]))
        # samples that are single numbers
        flat = ActiveLearner(Says(), X_training=X[:, 0], y_training=labels(n))
        flat._add_training_data(X_new[:, 0], labels(n_new))
        assert flat.X_training.shape == (n + n_new,)
        for wrong in (
            (X_new, labels(2 * n_new)),
            (samples(n_new, 2 * d), labels(n_new)),
        ):
            with pytest.raises(ValueError, match="hand in"):
                learner._add_training_data(*wrong)

    @pytest.mark.parametrize("n", [1, 2, 30])
    def test_predict(self, n):
        told = labels(n)
        assert ActiveLearner(Says(predict=told)).predict(samples(n)) is told

    @pytest.mark.parametrize("n", [1, 2, 30])
    def test_predict_proba(self, n):
        told = samples(n)
        assert ActiveLearner(Says(proba=told)).predict_proba(samples(n)) is told

    @pytest.mark.parametrize("n", [1, 2, 30])
    def test_query(self, n):
        X, i = samples(n), n - 1
        learner = ActiveLearner(None, lambda learner, X_pool: (i, 0.5))
        query_idx, X_query = learner.query(X)
        assert query_idx == i
        np.testing.assert_array_equal(X_query, X[i])
        *same, metrics = learner.query(X, return_metrics=True)
        assert (same[0], metrics) == (i, 0.5)

    def test_score(self):
        assert ActiveLearner(Says(score=0.25)).score(samples(5), labels(5)) == 0.25

    @pytest.mark.parametrize(("bootstrap", "only_new"), TWICE)
    @pytest.mark.parametrize("n", [1, 2, 9])
    def test_teach(self, bootstrap, only_new, n):
        learner = ActiveLearner(Says(), X_training=samples(10), y_training=labels(10))
        learner.teach(samples(n), labels(n), bootstrap=bootstrap, only_new=only_new)
        X, y = learner.estimator.fits[-1]
        assert len(X) == len(y) == (n if only_new else 10 + n)
        assert len(learner.X_training) == len(learner.y_training) == 10 + n

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_nan(self, value):
        X, y = np.full((10, 2), value), labels(10)
        learner = ActiveLearner(
            Says(), X_training=X, y_training=y, force_all_finite=False
        )
        learner.teach(X, y)
        assert len(learner.X_training) == 20
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            ActiveLearner(Says(), X_training=X, y_training=y)

    def test_sklearn(self):
        learner = ActiveLearner(
            forest(), X_training=samples(10, 10), y_training=labels(10)
        )
        learner.fit(samples(10, 10, 1), labels(10))
        predicted = learner.predict(samples(10, 10, 2))
        assert learner.predict_proba(samples(10, 10, 2)).shape == (10, 2)
        assert confusion_matrix(labels(10), predicted).sum() == 10

    @pytest.mark.parametrize("layout", ["lil", "csc", "csr"])
    @pytest.mark.parametrize(
        "strategy", [uncertainty_sampling, entropy_sampling, margin_sampling]
    )
    def test_sparse_matrices(self, layout, strategy):
        dense = np.where(samples(12, 4) > 0, samples(12, 4), 0)
        X = sparse.csr_matrix(dense).asformat(layout)
        learner = ActiveLearner(forest(), strategy, X[:5], labels(5))
        query_idx, X_query = learner.query(X)
        np.testing.assert_array_equal(X_query.toarray(), dense[query_idx])
        learner.teach(X[query_idx], labels(12)[query_idx])
        assert learner.X_training.shape == (6, 4)

    def test_on_transformed(self):
        X = pd.DataFrame(samples(10, 5))
        pipe = make_pipeline(FunctionTransformer(pd.DataFrame.to_numpy), forest())
        learner = ActiveLearner(
            pipe, uncertainty_batch_sampling, X.iloc[:2], labels(2), on_transformed=True
        )
        query_idx, X_query = learner.query(X)
        pd.testing.assert_frame_equal(X_query, X.iloc[query_idx])
        learner.teach(X.iloc[query_idx], labels(10)[query_idx])

    def test_on_transformed_with_variable_transformation(self):
        """A vectorizer has more columns after the pool's words were taught."""
        pool = ["plane", "house"]
        learner = ActiveLearner(
            make_pipeline(CountVectorizer(), forest()),
            uncertainty_batch_sampling,
            ["dog", "cat", "tree"],
            [0, 1, 1],
            on_transformed=True,
        )
        for _ in pool:
            query_idx, _ = learner.query(pool, n_instances=1)
            learner.teach([pool[query_idx[0]]], [0])
        assert len(learner.X_training) == 5

    def test_old_query_strategy_interface(self):
        """A strategy may return positions and samples."""
        X, chosen = samples(10, 5), np.array([7, 2])
        learner = ActiveLearner(
            forest(), lambda learner, X_pool: (chosen, X_pool[chosen]), X[:2], labels(2)
        )
        query_idx, X_query = learner.query(X)
        np.testing.assert_array_equal(query_idx, chosen)
        np.testing.assert_array_equal(X_query, X[chosen])
        learner.teach(X_query, labels(2))


class TestEER:
    @pytest.mark.parametrize(
        "kind", [sparse.csr_matrix, pd.DataFrame, np.array, list], ids=str
    )
    def test_eer(self, kind):
        try:
            from modAL.expected_error import expected_error_reduction
        except AttributeError:
            pytest.skip("modAL's own module uses np.float, which NumPy has no more")
        X, pool = kind(samples(10, 2).tolist()), kind(samples(5, 2, 1).tolist())
        learner = ActiveLearner(forest(), X_training=X, y_training=labels(10))
        for params in ({}, {"loss": "binary"}, {"p_subsample": 0.5, "loss": "log"}):
            query_idx = positions_of(expected_error_reduction(learner, pool, **params))
            assert len(np.atleast_1d(query_idx)) == 1


def positions_of(answer):
    """Positions, of a strategy of either modAL."""
    return answer[0] if isinstance(answer, tuple) else answer


def a_committee(n_learners):
    """Of learners that answer at random; with their votes (n, learners) and
    probabilities (n, learners, classes).
    """
    votes = rng().integers(3, size=(6, n_learners))
    proba = rng().dirichlet(np.ones(3), size=(6, n_learners))
    members = [
        ActiveLearner(Says(votes[:, i], proba[:, i], classes=range(3)))
        for i in range(n_learners)
    ]
    return Committee(members), votes, proba


class TestCommittee:
    def test_set_classes(self):
        unfitted = Committee([ActiveLearner(GaussianNB()) for _ in range(3)])
        assert (unfitted.classes_, unfitted.n_classes_) == (None, 0)
        fitted = Committee([ActiveLearner(Says(classes=[i])) for i in range(4)])
        np.testing.assert_array_equal(fitted.classes_, range(4))

    @pytest.mark.parametrize("n_learners", [1, 2, 5])
    def test_predict(self, n_learners):
        committee, _, proba = a_committee(n_learners)
        np.testing.assert_array_equal(
            committee.predict(samples(6)), proba.mean(axis=1).argmax(axis=1)
        )

    @pytest.mark.parametrize("n_learners", [1, 2, 5])
    def test_predict_proba(self, n_learners):
        committee, _, proba = a_committee(n_learners)
        np.testing.assert_allclose(
            committee.predict_proba(samples(6)), proba.mean(axis=1)
        )

    @pytest.mark.parametrize("n_learners", [1, 2, 5])
    def test_vote(self, n_learners):
        committee, votes, _ = a_committee(n_learners)
        np.testing.assert_array_equal(committee.vote(samples(6)), votes)

    @pytest.mark.parametrize("n_learners", [1, 2, 5])
    def test_vote_proba(self, n_learners):
        committee, _, proba = a_committee(n_learners)
        np.testing.assert_array_equal(committee.vote_proba(samples(6)), proba)

    @pytest.mark.parametrize(("bootstrap", "only_new"), TWICE)
    def test_teach(self, bootstrap, only_new):
        committee = Committee(
            [
                ActiveLearner(
                    Says(classes=[0, 1]), X_training=samples(10), y_training=labels(10)
                )
                for _ in range(2)
            ]
        )
        committee.teach(samples(4), labels(4), bootstrap=bootstrap, only_new=only_new)
        for learner in committee:
            assert len(learner.estimator.fits[-1][0]) == (4 if only_new else 14)

    def test_on_transformed(self):
        X = pd.DataFrame(samples(10, 5))
        committee = Committee(
            [
                ActiveLearner(
                    make_pipeline(FunctionTransformer(pd.DataFrame.to_numpy), forest()),
                    X_training=X.iloc[i : i + 3],
                    y_training=labels(3),
                )
                for i in range(3)
            ],
            query_strategy=uncertainty_batch_sampling,
            on_transformed=True,
        )
        query_idx, _ = committee.query(X, n_instances=1)
        committee.teach(X.iloc[query_idx], labels(10)[query_idx])
        assert [len(learner.X_training) for learner in committee] == [4, 4, 4]


class TestCommitteeRegressor:
    def test_predict(self):
        votes = samples(6, 3)
        committee = CommitteeRegressor([ActiveLearner(Says(v)) for v in votes.T])
        np.testing.assert_allclose(committee.predict(samples(6)), votes.mean(axis=1))
        mean, std = committee.predict(samples(6), return_std=True)
        np.testing.assert_allclose([mean, std], [votes.mean(axis=1), votes.std(axis=1)])

    def test_vote(self):
        votes = samples(6, 3)
        committee = CommitteeRegressor([ActiveLearner(Says(v)) for v in votes.T])
        np.testing.assert_array_equal(committee.vote(samples(6)), votes)

    def test_on_transformed(self):
        X = pd.DataFrame(samples(10, 5))
        committee = CommitteeRegressor(
            [
                ActiveLearner(
                    make_pipeline(
                        FunctionTransformer(pd.DataFrame.to_numpy),
                        GaussianProcessRegressor(),
                    ),
                    X_training=X.iloc[i : i + 2],
                    y_training=np.arange(2.0),
                )
                for i in range(2)
            ],
            query_strategy=lambda committee, X_pool: [3],
            on_transformed=True,
        )
        query_idx = committee.query(X)[0]
        committee.teach(X.iloc[query_idx], np.zeros(1))
        assert [len(learner.X_training) for learner in committee] == [3, 3]


class TestMultilabel:
    def test_strategies(self):
        y = np.column_stack([labels(10), 1 - labels(10), labels(10)])
        learner = ActiveLearner(
            OneVsRestClassifier(SVC()), SVM_binary_minimum, samples(10), y
        )
        chosen = positions_of(SVM_binary_minimum(learner, samples(4, seed=1)))
        assert np.ravel(chosen)[0] in range(4)
        learner.teach(samples(2, seed=2), y[:2])
        assert learner.y_training.shape == (12, 3)


# What ours does otherwise
# --------------------------------------------------------------------------------


class Breaks(Says):
    def fit(self, X, y):
        if len(X) > 10:
            raise MemoryError("full")
        return super().fit(X, y)


def reads_pairs():
    for answer in (np.array([2, 1]), (np.array([2, 1]), np.array([0.3, 0.1]))):
        learner = ActiveLearner(None, lambda learner, X_pool, answer=answer: answer)
        query_idx, X_query = learner.query(samples(5))
        np.testing.assert_array_equal(query_idx, [2, 1])
        np.testing.assert_array_equal(X_query, samples(5)[[2, 1]])


def remembers_only_new():
    learner = ActiveLearner(Says(), X_training=samples(10), y_training=labels(10))
    learner.teach(samples(2), labels(2), only_new=True)
    assert len(learner.X_training) == 12


def forgets_what_failed():
    learner = ActiveLearner(Breaks(), X_training=samples(10), y_training=labels(10))
    with pytest.raises(MemoryError, match="full"):
        learner.teach(samples(2), labels(2))
    assert len(learner.X_training) == 10


def takes_allow_nan():
    def learner(value):
        X = np.full((3, 2), value)
        return ActiveLearner(
            Says(), X_training=X, y_training=[0, 1, 0], force_all_finite="allow-nan"
        )

    learner(np.nan)
    with pytest.raises(ValueError, match="infinity"):
        learner(np.inf)


def refuses_classes():
    with pytest.raises(TypeError, match="query_strategy must be a function"):
        ActiveLearner(Says(), Says)


@pytest.mark.parametrize(
    ("deviation", "check"),
    list(
        zip(
            DEVIATIONS,
            [
                reads_pairs,
                remembers_only_new,
                forgets_what_failed,
                takes_allow_nan,
                refuses_classes,
            ],
            strict=True,
        )
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deviations(deviation, check):
    check()
