"""Whatever skorch predicts from can be the pool: every container gives the picks that
its array gives.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from skorch import NeuralNetClassifier
from skorch.helper import SliceDataset, SliceDict
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fishermask_sk import ActiveLearningClassifier, FisherMask
from fishermask_sk.modal import ActiveLearner

SAMPLES = np.random.default_rng(0).normal(size=(60, 6)).astype("float32")
LABELS = np.where(SAMPLES[:, 0] > 0, 1, 2 * (SAMPLES[:, 1] > 0)).astype("int64")
N_LABELED, N_POOL = 20, 40


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, X):
        return self.head(torch.relu(self.body(X)))


class TwoInputs(TinyNet):
    def forward(self, left, right):
        return super().forward(torch.cat([left, right], dim=1))


def a_net(module=TinyNet, **params):
    return NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        train_split=None,
        verbose=0,
        max_epochs=5,
        lr=0.1,
        **params,
    )


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    return a_net().fit(SAMPLES[:N_LABELED], LABELS[:N_LABELED])


def with_weights(net, fitted):
    """A net of another kind with the weights of the fitted one."""
    net.initialize()
    net.module_.load_state_dict(fitted.module_.state_dict())
    return net


def picks(estimator, X_pool, X_labeled, n_instances=5):
    strategy = FisherMask(sparsity=20, keep_head=False, batch_size=16, random_state=0)
    return strategy.select(estimator, X_pool, n_instances, X_labeled=X_labeled).tolist()


@pytest.fixture(scope="module")
def expected(fitted):
    return picks(fitted, SAMPLES[N_LABELED:], SAMPLES[:N_LABELED])


def dataset(samples):
    labels = (
        LABELS if len(samples) == len(LABELS) else np.zeros(len(samples), dtype="int64")
    )
    return TensorDataset(torch.tensor(samples), torch.tensor(labels))


class Lazy(Dataset):
    """Samples that exist only while they are read, and count how many do."""

    def __init__(self, samples):
        self.samples = samples
        self.n_reads = self.n_alive = self.peak = 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        self.n_reads += 1
        return Counted(self, self.samples[i]), 0


class Counted(np.ndarray):
    """An array that tells its Dataset when it comes and goes."""

    def __new__(cls, owner, values):
        counted = np.array(values).view(cls)
        counted.owner = owner
        owner.n_alive += 1
        owner.peak = max(owner.peak, owner.n_alive)
        return counted

    def __array_finalize__(self, base):
        self.owner = None  # only what __new__ made is counted, not its views

    def __del__(self):
        if self.owner is not None:
            self.owner.n_alive -= 1


@pytest.mark.parametrize(
    "wrap",
    [
        torch.tensor,
        dataset,
        lambda samples: SliceDataset(dataset(samples)),
        lambda samples: Subset(
            dataset(np.concatenate([samples, samples])), range(len(samples))
        ),
        lambda samples: {"X": samples},
    ],
    ids=["tensor", "dataset", "slice_dataset", "subset", "dict_of_one"],
)
@pytest.mark.parametrize("n_instances", [1, 2, N_POOL])
def test_containers_give_the_picks_of_their_array(fitted, wrap, n_instances):
    expected = picks(fitted, SAMPLES[N_LABELED:], SAMPLES[:N_LABELED], n_instances)
    assert (
        picks(fitted, wrap(SAMPLES[N_LABELED:]), wrap(SAMPLES[:N_LABELED]), n_instances)
        == expected
    )


@pytest.mark.parametrize(
    "wrap", [torch.tensor, dataset, lambda samples: SliceDataset(dataset(samples))]
)
def test_pool_and_labelled_samples_may_come_in_different_containers(
    fitted, expected, wrap
):
    assert picks(fitted, wrap(SAMPLES[N_LABELED:]), SAMPLES[:N_LABELED]) == expected


def test_a_dict_of_arrays_feeds_a_module_of_several_inputs(fitted, expected):
    net = with_weights(a_net(TwoInputs), fitted)

    def split(samples):
        return {"left": samples[:, :2], "right": samples[:, 2:]}

    assert (
        picks(net, split(SAMPLES[N_LABELED:]), split(SAMPLES[:N_LABELED])) == expected
    )


def test_a_dataframe_goes_through_the_steps_of_its_pipeline():
    frame = pd.DataFrame(SAMPLES, columns=list("abcdef"))
    frame["kind"] = np.where(SAMPLES[:, 5] > 0, "x", "y")  # dropped by the pipeline
    scaler = make_column_transformer((StandardScaler(), list("abcdef")))
    to_float32 = FunctionTransformer(lambda X: X.astype("float32"))
    pipe = make_pipeline(scaler, to_float32, a_net())
    torch.manual_seed(0)
    pipe.fit(frame[:N_LABELED], LABELS[:N_LABELED])
    transformed = pipe[:-1].transform(frame)
    expected = picks(pipe[-1], transformed[N_LABELED:], transformed[:N_LABELED])
    assert picks(pipe, frame[N_LABELED:], frame[:N_LABELED]) == expected


def test_a_lazy_dataset_is_never_loaded_whole(fitted, expected):
    pool, labeled = Lazy(SAMPLES[N_LABELED:]), Lazy(SAMPLES[:N_LABELED])
    assert picks(fitted, pool, labeled) == expected
    # Every sample once to rank the weights and once to embed it, and batches of 16 to
    # look at their shape first.
    assert pool.n_reads <= 2 * N_POOL + 2 * 16
    assert pool.peak <= 16 + 1
    assert pool.n_alive == 0


def test_transforms_are_those_of_prediction(fitted, expected):
    """A net that augments in training does so in `get_iterator(training=True)`, and is
    not asked for that.
    """

    class Augmenting(NeuralNetClassifier):
        def get_iterator(self, dataset, training=False):
            assert not training
            return super().get_iterator(dataset, training=training)

    net = Augmenting(
        TinyNet, criterion=nn.CrossEntropyLoss, train_split=None, verbose=0
    )
    assert (
        picks(
            with_weights(net, fitted),
            dataset(SAMPLES[N_LABELED:]),
            dataset(SAMPLES[:N_LABELED]),
        )
        == expected
    )


def test_worker_processes_read_the_pool(fitted, expected):
    net = with_weights(a_net(iterator_valid__num_workers=2), fitted)
    pool = Lazy(SAMPLES[N_LABELED:])
    assert picks(net, pool, Lazy(SAMPLES[:N_LABELED])) == expected
    assert pool.n_reads == 0  # not in this process


# --- searches take what scikit-learn can split
# --------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        torch.tensor,
        lambda samples: SliceDataset(dataset(samples)),
        lambda samples: SliceDict(X=samples),
    ],
    ids=["tensor", "slice_dataset", "slice_dict"],
)
def test_searches_split_tensors_slice_datasets_and_slice_dicts(wrap):
    loop = ActiveLearningClassifier(
        a_net(classes=[0, 1, 2]),
        FisherMask(20, keep_head=False),
        n_initial=10,
        n_instances=3,
        n_queries=1,
        random_state=0,
    )
    search = GridSearchCV(
        loop,
        {"query_strategy__sparsity": [10, 20]},
        cv=2,
        scoring="accuracy",
        error_score="raise",
    )
    scores = [
        clone(search).fit(X, LABELS).cv_results_["mean_test_score"].tolist()
        for X in (SAMPLES, wrap(SAMPLES))
    ]
    assert scores[0] == scores[1]


# --- modAL's learner: it joins and checks the rows that are taught, and so sets the
# limits ------------------


@pytest.mark.parametrize("wrap", [np.asarray, torch.tensor], ids=["array", "tensor"])
def test_modals_learner_is_taught_arrays_and_tensors(wrap):
    learner = ActiveLearner(
        a_net(), FisherMask(20, keep_head=False), wrap(SAMPLES[:20]), wrap(LABELS[:20])
    )
    query_idx, X_query = learner.query(wrap(SAMPLES[20:]), n_instances=3)
    assert type(X_query) is type(learner.X_training)
    learner.teach(X_query, wrap(LABELS[20:])[query_idx])
    assert len(learner.X_training) == 23


def test_modals_learner_is_taught_data_frames():
    frame = pd.DataFrame(SAMPLES, columns=list("abcdef"))
    pipe = make_pipeline(FunctionTransformer(lambda X: X.to_numpy()), a_net())
    learner = ActiveLearner(
        pipe, FisherMask(20, keep_head=False), frame[:20], LABELS[:20]
    )
    query_idx, X_query = learner.query(frame[20:], n_instances=3)
    learner.teach(X_query, LABELS[20:][query_idx])
    assert learner.X_training.shape == (23, 6)


@pytest.mark.parametrize(
    "X", [{"X": SAMPLES}, dataset(SAMPLES)], ids=["dict", "dataset"]
)
def test_modals_learner_is_not_taught_dicts_and_datasets(X):
    with pytest.raises((ValueError, TypeError)):  # the words are scikit-learn's
        ActiveLearner(a_net(), X_training=X, y_training=LABELS)


def test_modals_learner_adds_no_rows_to_a_slice_dataset():
    X = SliceDataset(dataset(SAMPLES))
    learner = ActiveLearner(a_net(), FisherMask(20, keep_head=False), X, LABELS)
    query_idx, X_query = learner.query(X, n_instances=2)
    with pytest.raises(TypeError):  # the words are modAL's
        learner.teach(X_query, LABELS[query_idx])


def test_modals_learner_may_query_a_dataset(fitted, expected):
    learner = ActiveLearner(
        fitted, FisherMask(20, keep_head=False, batch_size=16, random_state=0)
    )
    query_idx, X_query = learner.query(
        dataset(SAMPLES[N_LABELED:]),
        n_instances=5,
        X_labeled=dataset(SAMPLES[:N_LABELED]),
    )
    assert query_idx.tolist() == expected
    assert len(X_query) == 5
