"""Samples and positions: whatever the net's loader does, the picks are those of the
plain one, or it is refused by name. And what a pool may be: file names, row numbers,
objects, Datasets.
"""

import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from modAL.uncertainty import margin_sampling as modal_margin_sampling
from PIL import Image
from scipy import sparse
from sklearn.ensemble import VotingClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from skorch.dataset import Dataset as SkorchDataset
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from fishermask_sk import ActiveLearningClassifier, FisherMask, check_network
from fishermask_sk.baselines import (
    badge_sampling,
    bait_sampling,
    entropy_sampling,
    kcenter_sampling,
    least_confidence_sampling,
    margin_sampling,
    power_margin_sampling,
)
from fishermask_sk.loops.learner import PoolLearner
from fishermask_sk.modal import ActiveLearner
from fishermask_sk.plotting import QueryDisplay

pytestmark = [
    # skorch's, while it is set up, and what is said of tiny nets
    pytest.mark.filterwarnings("ignore:You set iterator_valid__shuffle=True"),
    pytest.mark.filterwarnings("ignore:The mask keeps k=20 weights"),
    pytest.mark.filterwarnings("ignore:No labelled samples"),
]

N_LABELED, N_POOL, CLASSES = 10, 30, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N_LABELED + N_POOL, 5))
Y = (np.arange(len(X)) % CLASSES).astype("int64")
KNOWN, POOL = X[:N_LABELED], X[N_LABELED:]

STRATEGIES = {
    "fisher": FisherMask(20, keep_head=False, batch_size=7, random_state=0),
    "bait": partial(bait_sampling, batch_size=7),
    "kcenter": partial(kcenter_sampling, batch_size=7),
    "badge": partial(badge_sampling, batch_size=7, random_state=0),
    "margin": margin_sampling,
    "entropy": entropy_sampling,
    "least confidence": least_confidence_sampling,
    "power margin": partial(power_margin_sampling, random_state=0),
}


def a_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def a_net(cls=NeuralNetClassifier, **params):
    """The same weights every time."""
    settings = {"criterion": nn.CrossEntropyLoss, "classes": range(CLASSES)}
    settings |= {"train_split": None, "verbose": 0, "batch_size": 8}
    return cls(a_module(), **{**settings, **params}).initialize()


def picks(net, strategy, pool=POOL, known=KNOWN, n_instances=5):
    learner = PoolLearner(net, strategy, known, Y[:N_LABELED])
    return learner.query(pool, n_instances)[0].tolist()


@pytest.fixture(scope="module")
def expected():
    return {name: picks(a_net(), strategy) for name, strategy in STRATEGIES.items()}


class Shuffling(DataLoader):
    """A sampler of its own, as in skorch's issue 489."""

    def __init__(self, dataset, **kwargs):
        super().__init__(dataset, sampler=RandomSampler(dataset), **kwargs)


class Batching(DataLoader):
    """A batch sampler of its own that shuffles and drops."""

    def __init__(self, dataset, batch_size=1, **kwargs):
        sampler = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
        super().__init__(dataset, batch_sampler=sampler, **kwargs)


class ToFloat64(DataLoader):
    """Keeps the order, and does something to the batches."""

    def __iter__(self):
        for samples, labels in super().__iter__():
            yield samples.double(), labels


def function_that_shuffles(dataset, batch_size=1, **kwargs):
    return DataLoader(dataset, batch_size, shuffle=True)


def plain_batches(dataset, batch_size=1):
    """No DataLoader at all."""
    for start in range(0, len(dataset), batch_size):
        rows = [
            dataset[i][0] for i in range(start, min(start + batch_size, len(dataset)))
        ]
        yield torch.tensor(np.array(rows)), torch.zeros(len(rows))


class Overriding(NeuralNetClassifier):
    def get_iterator(self, dataset, training=False):
        return DataLoader(dataset, self.batch_size, shuffle=True)


IN_ORDER = {
    "shuffle": {"iterator_valid__shuffle": True},
    "drop_last": {"iterator_valid__drop_last": True},
    "sampler": {"iterator_valid__sampler": WeightedRandomSampler([1.0] * 4, 4)},
    "batch sampler": {
        "iterator_valid__batch_sampler": BatchSampler(RandomSampler(range(4)), 2, True),
        "iterator_valid__batch_size": 1,
    },
    "loader with a sampler": {"iterator_valid": Shuffling},
    "loader with a batch sampler": {"iterator_valid": Batching},
    "function": {"iterator_valid": function_that_shuffles},
    "net with a loader": {"cls": Overriding},
    "loader with its own iteration": {"iterator_valid": ToFloat64},
    "generator": {"iterator_valid": plain_batches},
}


@pytest.mark.parametrize("loader", IN_ORDER)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_picks_are_those_of_the_plain_loader(expected, strategy, loader):
    net = a_net(**IN_ORDER[loader])
    assert picks(net, STRATEGIES[strategy]) == expected[strategy]
    assert "get_iterator" not in vars(net)


@pytest.mark.parametrize("strategy", ["fisher", "kcenter", "margin"])
def test_workers_that_shuffle(expected, strategy):
    net = a_net(iterator_valid__shuffle=True, iterator_valid__num_workers=1)
    assert picks(net, STRATEGIES[strategy]) == expected[strategy]


@pytest.mark.parametrize("n_instances", [1, 2, N_POOL])
def test_gains_are_those_of_the_plain_loader(n_instances):
    strategies = [FisherMask(20, random_state=0) for _ in range(2)]
    found = [
        picks(net, strategy, n_instances=n_instances)
        for net, strategy in zip(
            [a_net(), a_net(iterator_valid=Shuffling)], strategies, strict=True
        )
    ]
    assert found[0] == found[1]
    first, second = (strategy.trace_reductions_ for strategy in strategies)
    np.testing.assert_allclose(first, second, rtol=1e-9)


class Sorting(DataLoader):
    """Yields the samples by their first value, after it has read them in order."""

    def __iter__(self):
        batches = list(super().__iter__())
        samples = torch.cat([batch[0] for batch in batches])
        order = samples[:, 0].argsort()
        yield samples[order], torch.zeros(len(samples))


def shuffled_batches(dataset, batch_size=1, **kwargs):
    positions = random.Random(0).sample(range(len(dataset)), len(dataset))
    yield from plain_batches(Subset(dataset, positions), batch_size)


def too_few(dataset, batch_size=1, **kwargs):
    yield from plain_batches(Subset(dataset, range(max(1, len(dataset) - 1))))


@pytest.mark.parametrize("loader", [Sorting, shuffled_batches, too_few])
@pytest.mark.parametrize("strategy", ["fisher", "kcenter", "margin"])
def test_loaders_that_mix_up_the_samples_are_refused_by_name(strategy, loader):
    with pytest.raises(
        ValueError,
        match=rf"iterator_valid={loader.__name__} gives the samples of .* in another "
        "order than that of their positions.*torch.utils.data.DataLoader",
    ):
        picks(a_net(iterator_valid=loader), STRATEGIES[strategy])


def test_a_loader_that_loses_samples_of_large_pools_is_refused():
    def until_20(dataset, batch_size=1):
        return plain_batches(Subset(dataset, range(min(20, len(dataset)))), batch_size)

    with pytest.raises(
        ValueError, match="gave 20 of the 30 samples of X_pool; let iterator_valid give"
    ):
        picks(a_net(iterator_valid=until_20), STRATEGIES["fisher"])


def test_a_loader_without_batches_is_refused():
    class NoBatches(DataLoader):
        def __init__(self, dataset, batch_size=None, **kwargs):
            super().__init__(dataset, batch_size=None, **kwargs)

    with pytest.raises(ValueError, match=r"iterator_valid=NoBatches has no batches"):
        picks(a_net(iterator_valid=NoBatches), STRATEGIES["fisher"])


def test_predictions_and_scores_of_learners_and_loops_are_in_order():
    plain, mixed = a_net(), a_net(iterator_valid=Shuffling)
    p, predicted = plain.predict_proba(POOL), plain.predict(POOL)
    np.testing.assert_array_equal(
        PoolLearner(mixed, None, KNOWN, Y).predict_proba(POOL), p
    )
    learner = ActiveLearner(mixed, modal_margin_sampling)
    np.testing.assert_array_equal(learner.predict_proba(POOL), p)
    np.testing.assert_array_equal(learner.predict(POOL), predicted)
    assert learner.score(POOL, predicted) == 1
    assert PoolLearner(mixed, None, KNOWN, Y).score(POOL, predicted) == 1
    # modAL's own strategies ask the learner.
    assert learner.query(POOL, 1)[0].tolist() == picks(
        plain, margin_sampling, n_instances=1
    )


def test_pictures_of_picks_have_their_own_predictions():
    strategy = FisherMask(20, keep_head=False, random_state=0)
    images = np.random.default_rng(0).normal(size=(30, 1, 2, 2))

    def net(**params):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, CLASSES))
        return NeuralNetClassifier(
            module.double(), criterion=nn.CrossEntropyLoss, verbose=0, **params
        ).initialize()

    strategy.select(net(), images, 20, X_labeled=images[:0])
    mixed = net(iterator_valid=Shuffling)
    shown = QueryDisplay.from_strategy(strategy, images, estimator=mixed)
    np.testing.assert_array_equal(
        shown.y_pred, net().predict(images)[strategy.query_idx_]
    )


def test_a_loop_scores_each_sample_with_its_own_label():
    accuracies = []
    for params in ({}, {"iterator_valid__shuffle": True}):
        loop = ActiveLearningClassifier(
            NeuralNetClassifier(
                a_module(),
                criterion=nn.CrossEntropyLoss,
                classes=range(CLASSES),
                train_split=None,
                verbose=0,
                **params,
            ),
            margin_sampling,
            n_initial=9,
            n_instances=3,
            n_queries=1,
            random_state=0,
        )
        loop.fit(X, Y, eval_set=(X, Y))
        np.testing.assert_array_equal(
            loop.predict(X), loop.predict_proba(X).argmax(axis=1)
        )
        accuracies.append(loop.learning_curve_)
    assert accuracies[0] == accuracies[1]


def test_an_ensemble_of_nets_predicts_in_order():
    def voting(**params):
        ensemble = VotingClassifier([("net", a_net(**params))], voting="soft")
        ensemble.estimators_ = [a_net(**params)]
        ensemble.le_, ensemble.classes_ = None, np.arange(CLASSES)
        return ensemble

    for strategy in (margin_sampling, partial(badge_sampling, random_state=0)):
        assert picks(voting(iterator_valid=Shuffling), strategy) == picks(
            voting(), strategy
        )


# --- what the net's own Dataset understands
# --------------------------------------------------------------


class Files(SkorchDataset):
    """File names, as in skorch's issue 305."""

    def transform(self, X, y):
        pixels = torch.tensor(np.array(Image.open(str(X))), dtype=torch.float64)
        return pixels[0] / 255, torch.tensor(0 if y is None else y)


TABLE = torch.tensor(np.round(np.abs(np.tanh(X)) * 255) / 255)


class Rows(Dataset):
    """Row numbers of a table that is somewhere else."""

    def __init__(self, X, y=None):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        return TABLE[int(self.X[i])], 0 if self.y is None else self.y[i]


class Entry:
    """An object that only its Dataset understands."""

    def __init__(self, number):
        self.number = number


class Entries(Rows):
    def __getitem__(self, i):
        return TABLE[self.X[i].number], 0 if self.y is None else self.y[i]


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """By kind: all samples, and the net's Dataset."""
    folder = tmp_path_factory.mktemp("images")
    names = []
    for i, row in enumerate(TABLE.numpy()):
        names.append(folder / f"{i}.png")
        Image.fromarray(np.uint8(np.round(row * 255))[None]).save(names[-1])
    entries = [Entry(i) for i in range(len(X))]
    return {
        "file names": (np.array([str(name) for name in names]), Files),
        "paths": (np.array(names, dtype=object), Files),
        "list of file names": ([str(name) for name in names], RowsOfFiles),
        "row numbers": (np.arange(len(X)), Rows),
        "objects": (np.array(entries, dtype=object), Entries),
        "list of objects": (entries, Entries),
    }


class RowsOfFiles(Rows):
    def __getitem__(self, i):
        return Files.transform(self, self.X[i], None)[0], (
            0 if self.y is None else self.y[i]
        )


KINDS = [
    "file names",
    "paths",
    "list of file names",
    "row numbers",
    "objects",
    "list of objects",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_picks_from_names_are_those_from_what_they_name(pools, strategy, kind):
    samples, dataset = pools[kind]
    known, pool = samples[:N_LABELED], samples[N_LABELED:]
    expected = picks(
        a_net(), STRATEGIES[strategy], TABLE[N_LABELED:], TABLE[:N_LABELED]
    )
    net = a_net(dataset=dataset)
    assert picks(net, STRATEGIES[strategy], pool, known) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_a_loop_and_a_learner_take_names(pools, kind):
    samples, dataset = pools[kind]
    net = a_net(dataset=dataset)
    report = check_network(net, samples, 3, query_strategy=FisherMask(20))
    assert (report.n_pool, report.n_classes) == (len(X), CLASSES)
    strategy = FisherMask(20, random_state=0)
    loop = ActiveLearningClassifier(
        net, strategy, n_initial=9, n_instances=2, n_queries=1, random_state=0
    )
    plain = ActiveLearningClassifier(**{**loop.get_params(deep=False)})
    plain.set_params(estimator=a_net())
    np.testing.assert_array_equal(
        loop.fit(samples, Y).labeled_indices_, plain.fit(TABLE, Y).labeled_indices_
    )
    learner = ActiveLearner(net, strategy, samples[:N_LABELED], Y[:N_LABELED])
    query_idx, X_query = learner.query(samples[N_LABELED:], n_instances=2)
    learner.teach(X_query, Y[N_LABELED:][query_idx])
    assert len(learner.X_training) == N_LABELED + 2


def test_names_go_through_a_pipeline(pools):
    samples, dataset = pools["row numbers"]
    pipe = make_pipeline(FunctionTransformer(lambda X: X - 1), a_net(dataset=dataset))
    assert picks(
        pipe, STRATEGIES["fisher"], samples[N_LABELED:] + 1, samples[:N_LABELED] + 1
    ) == picks(a_net(), STRATEGIES["fisher"], TABLE[N_LABELED:], TABLE[:N_LABELED])


def test_values_that_the_nets_own_dataset_reads_are_its_own_matter():
    class Imputing(SkorchDataset):
        def transform(self, X, y):
            return torch.tensor(np.nan_to_num(X)), torch.tensor(0 if y is None else y)

    broken = POOL.copy()
    broken[3, 2] = np.nan
    for strategy in STRATEGIES.values():
        assert picks(a_net(dataset=Imputing), strategy, broken) == picks(
            a_net(), strategy, np.nan_to_num(broken)
        )


@pytest.mark.parametrize("strategy", ["kcenter", "badge"])
def test_features_that_are_not_finite(strategy):
    class NoChecks(SkorchDataset):
        pass

    broken = POOL.copy()
    broken[20, 2] = np.nan
    with pytest.raises(
        ValueError, match="gives NaN or infinite values for sample 20 of X_pool; drop"
    ):
        picks(a_net(dataset=NoChecks), STRATEGIES[strategy], broken)


def test_names_without_a_dataset_that_reads_them(pools):
    samples, _ = pools["file names"]
    for strategy in ("fisher", "kcenter"):
        with pytest.raises(TypeError, match="give the net a dataset= that reads what"):
            picks(a_net(), STRATEGIES[strategy], samples[N_LABELED:], samples[:9])


@pytest.mark.parametrize(
    "kind", [sparse.csr_matrix, sparse.csr_array, sparse.coo_array]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sparse_rows_that_the_net_takes(strategy, kind):
    thin = np.where(X > 0.5, X, 0)
    known, pool = thin[:N_LABELED], thin[N_LABELED:]
    if strategy in ("fisher", "bait", "kcenter", "badge"):
        # skorch itself predicts from rows of a csr matrix only
        assert picks(a_net(), STRATEGIES[strategy], kind(pool), kind(known)) == picks(
            a_net(), STRATEGIES[strategy], pool, known
        )
    broken = sparse.csr_array(pool)
    broken.data[0] = np.inf
    with pytest.raises(ValueError, match="X_pool holds NaN or infinite"):
        picks(a_net(), STRATEGIES["fisher"], broken, known)


# --- pools as deep active learning code has them
# --------------------------------------------------------


class Bare(Dataset):
    """Samples without labels."""

    def __init__(self, wrap=lambda row, i: row):
        self.wrap = wrap

    def __len__(self):
        return N_POOL

    def __getitem__(self, i):
        return self.wrap(torch.tensor(POOL[i]), i)


WORKING = {
    "bare samples": Bare(),
    "no labels": TensorDataset(torch.tensor(POOL)),
    "labels": TensorDataset(torch.tensor(POOL), torch.zeros(N_POOL)),
    "lists": Bare(lambda row, i: [row, 0]),
    "subset": Subset(TensorDataset(torch.tensor(X)), range(N_LABELED, len(X))),
}


@pytest.mark.parametrize("pool", WORKING)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_datasets_with_labels_and_without(expected, strategy, pool):
    assert picks(a_net(), STRATEGIES[strategy], WORKING[pool]) == expected[strategy]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(row, 0) for row in POOL])


class SizedStream(Stream):
    def __len__(self):
        return N_POOL


class NoLength(Dataset):
    def __getitem__(self, i):
        return POOL[i], 0


AN_IMAGE = Image.new("L", (4, 4))
REFUSED = {
    "triples": (
        Bare(lambda row, i: (row, 0, i)),
        ValueError,
        "a Dataset that gives 3 values a sample, and skorch takes two: return",
    ),
    "loader": (
        DataLoader(TensorDataset(torch.tensor(POOL), torch.zeros(N_POOL))),
        TypeError,
        "X_pool is a DataLoader.*pass loader.dataset",
    ),
    "stream": (Stream(), TypeError, "X_pool is a Stream, an IterableDataset.*no pos"),
    "sized stream": (SizedStream(), TypeError, "a SizedStream, an IterableDataset"),
    "no length": (NoLength(), TypeError, "X_pool is a NoLength without __len__; say"),
    "labels of None": (
        Bare(lambda row, i: (row, None)),
        ValueError,
        "make no batch: its Dataset gives None.*return any number, such as 0",
    ),
    "PIL images": (
        Bare(lambda row, i: (AN_IMAGE, 0)),
        ValueError,
        r"make no batch: its Dataset gives .*PIL.Image.*ToTensor\(\)",
    ),
    "unequal sizes": (
        Bare(lambda row, i: (row[: 3 + i % 2], 0)),
        ValueError,
        r"make no batch: they differ in shape \(\(3,\), \(4,\)\); resize, crop or pad",
    ),
    "unequal arrays": (
        Bare(lambda row, i: (row.numpy()[: 3 + i % 2], 0)),
        ValueError,
        r"make no batch: they differ in shape \(\(3,\), \(4,\)\); resize, crop or pad",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("strategy", ["fisher", "bait", "kcenter", "badge", "margin"])
def test_pools_that_cannot_be_answered_for(strategy, kind):
    pool, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        STRATEGIES[strategy](a_net(), pool, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked there alone")
@pytest.mark.parametrize("kind", ["labels of None", "unequal sizes"])
def test_what_workers_say_of_samples_is_explained(kind):
    pool, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        FisherMask().select(a_net(iterator_valid__num_workers=1), pool, 3)


def test_images_of_unequal_size_and_images_of_pil_in_a_list():
    sizes = [np.zeros((3, 4 + i % 2)) for i in range(6)]
    for samples in (sizes, [AN_IMAGE] * 6):
        with pytest.raises(ValueError, match=r"X_pool is a list.*pass one array"):
            FisherMask().select(a_net(), samples, 2, X_labeled=KNOWN)


def test_errors_of_a_dataset_are_its_own():
    def broken(row, i):
        raise FileNotFoundError(f"{i}.png")

    with pytest.raises(FileNotFoundError, match=r"0.png"):
        FisherMask().select(a_net(), Bare(broken), 2, X_labeled=KNOWN)

    def wrong(row, i):
        raise ValueError("no such row")

    with pytest.raises(ValueError, match=r"^no such row$"):
        FisherMask().select(a_net(), Bare(wrong), 2, X_labeled=KNOWN)


@pytest.mark.parametrize("kind", ["loader", "stream", "sized stream", "no length"])
def test_loops_refuse_them_too(kind):
    pool, error, message = REFUSED[kind]
    loop = ActiveLearningClassifier(a_net(), margin_sampling)
    with pytest.raises(error, match=message.replace("X_pool", "X")):
        loop.fit(pool, Y[:N_POOL])
