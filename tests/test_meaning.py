"""What outputs mean: own losses, several outputs, own predict_proba, several modules;
the query agrees with the slow twins on what they must mean, or says what is true of
this net.
"""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask, check_network
from fishermask_sk.baselines import badge_sampling, kcenter_sampling

RNG = np.random.default_rng(0)
X = RNG.normal(size=(26, 4))
Y = (np.arange(26) % 3).astype("int64")
KNOWN, POOL = X[:8], X[8:]


class Body(nn.Module):
    """Two layers; `end` makes of hidden features and logits what is returned."""

    def __init__(self, n_outputs=3, end=lambda hidden, logits: logits):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, n_outputs)
        self.end = end

    def forward(self, x):
        hidden = self.a(x).tanh()
        return self.end(hidden, self.b(hidden))


def a_net(module, criterion=nn.CrossEntropyLoss, cls=NeuralNetClassifier, **params):
    """Not trained: its weights are what matters."""
    settings = {"train_split": None, "verbose": 0, **params}
    if issubclass(cls, NeuralNetClassifier):
        settings.setdefault("classes", range(3))
    torch.manual_seed(0)
    return cls(module.double(), criterion=criterion, **settings).initialize()


def body(n_outputs=3, end=lambda hidden, logits: logits):
    torch.manual_seed(1)
    return Body(n_outputs, end)


def query(net, **kwargs):
    strategy = FisherMask(1.0, random_state=0, **kwargs)
    picks = strategy.select(net, POOL, 4, X_labeled=KNOWN)
    return picks.tolist(), strategy.trace_reductions_


def expected(n_outputs=3, scores="logits"):
    """By dense inverses, from a net of the same weights that returns its scores."""
    module = body(n_outputs).double()
    v = reference.naive_embeddings(module, torch.tensor(X), scores=scores).numpy()
    return reference.naive_selection(v[8:], v[:8], 4)


def assert_as_expected(net, n_outputs=3, scores="logits"):
    picks, gains = query(net)
    right, right_gains = expected(n_outputs, scores)
    assert picks == right
    np.testing.assert_allclose(gains, right_gains, rtol=1e-6)


# --- losses of one's own
# ----------------------------------------------------------------


class Focal(nn.Module):
    def forward(self, logits, target):
        ce = F.cross_entropy(logits, target, reduction="none")
        return ((1 - (-ce).exp()) ** 2 * ce).mean()


class FocalOfOneLogit(nn.Module):
    def forward(self, logit, target):
        ce = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
        return ((1 - (-ce).exp()) ** 2 * ce).mean()


def of_one(outputs):
    p = outputs.sigmoid().reshape(-1)
    return torch.stack([1 - p, p], 1)


def two_of_one_probability(p):
    return torch.stack([1 - p.reshape(-1), p.reshape(-1)], 1)


OWN = {
    "logits": (lambda h, z: z, lambda z: z.softmax(-1), 3, "logits"),
    "probabilities": (lambda h, z: z.softmax(1), "auto", 3, "logits"),
    "log-probabilities": (lambda h, z: z.log_softmax(1), torch.exp, 3, "logits"),
    "one logit": (lambda h, z: z, of_one, 1, "logit"),
    "one probability": (lambda h, z: z.sigmoid(), two_of_one_probability, 1, "logit"),
}


@pytest.mark.parametrize("kind", OWN)
def test_own_losses_are_read_by_predict_proba(kind):
    end, nonlinearity, n_outputs, scores = OWN[kind]
    net = a_net(body(n_outputs, end), Focal, predict_nonlinearity=nonlinearity)
    assert_as_expected(net, n_outputs, scores)
    report = check_network(net, POOL, 4, query_strategy=FisherMask(1.0))
    assert report.n_classes == (3 if n_outputs == 3 else 2)


def test_a_trained_net_with_a_loss_of_its_own():
    net = a_net(body(), Focal, predict_nonlinearity=lambda z: z.softmax(-1))
    net.fit(KNOWN, Y[:8])
    twin = a_net(body())
    twin.module_.load_state_dict(net.module_.state_dict())
    assert query(net)[0] == query(twin)[0]


@pytest.mark.parametrize("strategy", [kcenter_sampling, badge_sampling])
def test_baselines_read_own_losses(strategy):
    kwargs = {"X_labeled": KNOWN} if strategy is kcenter_sampling else {}
    own = a_net(body(), Focal, predict_nonlinearity=lambda z: z.softmax(-1))
    picks = [
        strategy(net, POOL, 4, random_state=0, **kwargs).tolist()
        for net in (own, a_net(body()))
    ]
    assert picks[0] == picks[1]


def test_an_own_predict_proba_says_it():
    class Tempered(NeuralNetClassifier):
        def predict_proba(self, X):
            return torch.tensor(self.forward(X)).softmax(1).numpy()

    assert_as_expected(a_net(body(), Focal, Tempered))


def test_one_probability_under_bce():
    net = a_net(
        body(1, lambda h, z: z.sigmoid()), nn.BCELoss, NeuralNetBinaryClassifier
    )
    assert_as_expected(net, 1, "logit")


# --- NLLLoss as torch means it
# ---------------------------------------------------------


def test_log_softmax_under_nll_in_a_plain_net():
    net = a_net(body(end=lambda h, z: z.log_softmax(1)), nn.NLLLoss, NeuralNet)
    assert_as_expected(net)


def test_a_loss_of_ones_own_around_nll():
    class TakesLogarithms(NeuralNetClassifier):
        def get_loss(self, y_pred, y_true, *args, **kwargs):
            return self.criterion_(y_pred, torch.as_tensor(y_true))

    class TakesProbabilities(NeuralNet):
        def get_loss(self, y_pred, y_true, *args, **kwargs):
            return self.criterion_(y_pred.log(), torch.as_tensor(y_true))

    net = a_net(body(end=lambda h, z: z.log_softmax(1)), nn.NLLLoss, TakesLogarithms)
    assert_as_expected(net)
    net = a_net(body(end=lambda h, z: z.softmax(1)), nn.NLLLoss, TakesProbabilities)
    assert_as_expected(net)


# --- several outputs
# -----------------------------------------------------------------------


def test_an_embedding_before_the_scores_is_seen_by_the_number_of_classes():
    net = a_net(body(end=lambda h, z: (h, z)))
    with pytest.warns(
        UserWarning,
        match=r"2 outputs, \(8, 5\), \(8, 3\): only output 1 has as many columns as",
    ):
        assert_as_expected(net)
    with pytest.warns(UserWarning, match="only output 1"):
        report = check_network(net, POOL, 4, query_strategy=FisherMask(1.0))
    assert (report.n_classes, report.head) == (3, ("b.weight", "b.bias"))


class TakesTheSecond(NeuralNetClassifier):
    """skorch's way for several outputs: predict_proba of the user's own."""

    def evaluation_step(self, batch, training=False):
        return super().evaluation_step(batch, training)[1]

    def get_loss(self, y_pred, *args, **kwargs):
        return super().get_loss(y_pred[1], *args, **kwargs)


@pytest.mark.parametrize("n_hidden", ["other", "as many as classes"])
@pytest.mark.filterwarnings("error")
def test_an_embedding_before_the_scores_is_seen_by_predict_proba(n_hidden):
    end = {
        "other": lambda h, z: (h, z),
        "as many as classes": lambda h, z: (h[:, :3], z),
    }[n_hidden]
    net = a_net(body(end=end), cls=TakesTheSecond)
    assert_as_expected(net)
    assert badge_sampling(net, POOL, 4, random_state=0).tolist() == (
        badge_sampling(a_net(body()), POOL, 4, random_state=0).tolist()
    )


@pytest.mark.filterwarnings("error")
def test_scores_before_an_embedding_need_nothing():
    assert_as_expected(a_net(body(end=lambda h, z: (z, h))))
    assert_as_expected(a_net(body(end=lambda h, z: (z, h)), classes=None))


def test_an_embedding_that_predict_proba_takes_for_the_scores():
    net = a_net(body(end=lambda h, z: (h, z)), classes=None)
    net.classes_inferred_ = np.arange(3)
    with pytest.warns(
        UserWarning,
        match=r"predict_proba is made of output 0, and the net's labels had 3 classes, "
        r"as many as output 1 has columns.*return it first; if not, name all",
    ):
        query(net)


@pytest.mark.parametrize("n_outputs", [2, 5])
def test_features_alone_are_seen_by_the_number_of_classes(n_outputs):
    with pytest.warns(
        UserWarning,
        match=f"returns {n_outputs} scores a sample, and the net was told 3 classes",
    ):
        query(a_net(body(n_outputs)))


@pytest.mark.filterwarnings("error")
def test_classes_that_are_not_told_may_be_fewer():
    net = a_net(body(5), classes=None)
    net.classes_inferred_ = np.arange(3)
    query(net)


def test_several_outputs_with_a_column_for_each_class():
    net = a_net(body(end=lambda h, z: (h, z, 2 * z)))
    with pytest.raises(
        ValueError, match=r"several have. Return the class scores first"
    ):
        query(net)


def test_probabilities_that_predict_proba_has_from_elsewhere():
    net = a_net(body(), predict_nonlinearity=lambda z: (z / 5).softmax(-1))
    with pytest.warns(
        UserWarning,
        match="predict_proba gives other probabilities than the module's outputs under "
        "CrossEntropyLoss, up to 0.[0-9]+ apart: a query takes the latter",
    ):
        assert_as_expected(net)


# --- what cannot be read, in words that are true of it
# -------------------------------------


REFUSED = {
    "own loss without probabilities": (
        lambda: a_net(body(), Focal),
        "Focal is no loss of which skorch knows.*predict_nonlinearity=lambda z: z.soft",
    ),
    "own loss, probabilities from elsewhere": (
        lambda: a_net(
            body(), Focal, predict_nonlinearity=lambda z: (z / 5).softmax(-1)
        ),
        "Under Focal FisherMask takes from predict_proba.*neither these nor their soft",
    ),
    "own regression": (
        lambda: a_net(body(1), Focal, NeuralNet),
        "Focal is no loss of .*regression has no class probabilities",
    ),
    "mean squared error": (
        lambda: a_net(body(1), nn.MSELoss, NeuralNet),
        "this NeuralNet was fitted with MSELoss.*regression has no class",
    ),
    "several labels, logits": (
        lambda: a_net(body(), nn.BCEWithLogitsLoss, NeuralNet),
        r"it returned \(8, 3\). Under BCEWithLogitsLoss each of these outputs says yes "
        "or no for itself.*modAL.multilabel",
    ),
    "several labels, probabilities": (
        lambda: a_net(body(end=lambda h, z: z.sigmoid()), nn.BCELoss, NeuralNet),
        r"Under BCELoss each of these outputs says yes or no",
    ),
    "several labels, soft margin": (
        lambda: a_net(body(), nn.MultiLabelSoftMarginLoss, NeuralNet),
        "Under MultiLabelSoftMarginLoss each of these outputs says yes or no",
    ),
    "logits under NLLLoss in a plain net": (
        lambda: a_net(body(), nn.NLLLoss, NeuralNet),
        r"hands the module's outputs to NLLLoss as they are.*log_softmax\(1\)",
    ),
    "logarithms under NLLLoss in a classifier": (
        lambda: a_net(body(end=lambda h, z: z.log_softmax(1)), nn.NLLLoss),
        "not log_softmax: skorch takes the logarithm",
    ),
    "no probability under BCELoss": (
        lambda: a_net(body(1), nn.BCELoss, NeuralNet),
        "Under BCELoss the module's output must be a probability.*with sigmoid",
    ),
    "own loss, diverged": (
        lambda: a_net(body(end=lambda h, z: z / 0), Focal),
        "outputs hold NaN or infinite values; it diverged",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_nets_that_cannot_be_read(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        query(make())
    if "several labels" in kind:
        assert "use CrossEntropyLoss" not in str(caught.value)


def small_net():
    return NeuralNetClassifier(
        body().double(), criterion=nn.CrossEntropyLoss, train_split=None, verbose=0
    )


ENSEMBLES = {
    "VotingClassifier": (
        lambda: VotingClassifier([("a", small_net()), ("b", small_net())]),
        r"holds 2 nets .*VotingClassifier\).estimators_\[0\]",
    ),
    "BaggingClassifier": (
        lambda: BaggingClassifier(small_net(), n_estimators=3),
        r"holds 3 nets .*BaggingClassifier\).estimators_\[0\]",
    ),
    "StackingClassifier": (
        lambda: StackingClassifier(
            [("scaled", make_pipeline(FunctionTransformer(), small_net()))],
            LogisticRegression(),
            cv=2,
        ),
        r"holds a net .*StackingClassifier\).estimators_\[0\]",
    ),
    "OneVsRestClassifier": (
        lambda: OneVsRestClassifier(small_net()),
        r"holds 3 nets .*OneVsRestClassifier\).estimators_\[0\]",
    ),
}


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_ensembles_say_that_they_hold_nets(kind):
    make, message = ENSEMBLES[kind]
    with pytest.raises(NotFittedError, match=f"This {kind} is not fitted yet"):
        query(make())
    ensemble = make().fit(X, Y)
    with pytest.raises(TypeError, match=f"one net, and this {kind} {message}"):
        query(ensemble)
    FisherMask(0.9).select(ensemble.estimators_[0], POOL, 2, X_labeled=KNOWN)


def test_an_ensemble_without_nets():
    forest = VotingClassifier([("a", LogisticRegression())]).fit(X, Y)
    with pytest.raises(TypeError, match="there is none in this VotingClassifier"):
        query(forest)


# --- several modules in one net
# ------------------------------------------------------------------


def encoder(kind):
    torch.manual_seed(2)
    return {
        "plain": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh()),
        "batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)),
    }[kind]().double()


class TwoModules(NeuralNetClassifier):
    """skorch's pull request 751."""

    kind = "plain"

    def initialize_module(self):
        super().initialize_module()
        self.encoder_ = encoder(self.kind)
        return self

    def infer(self, x, **kwargs):
        return self.module_(self.encoder_(torch.as_tensor(x)))


class NoModule(NeuralNetClassifier):
    """None of its modules is called `module_`."""

    def initialize_module(self):
        self.first_, self.last_ = encoder("plain"), head()
        return self

    def infer(self, x, **kwargs):
        return self.last_(self.first_(torch.as_tensor(x)))


class Overlapping(NeuralNetClassifier):
    """One registered module lies in another, and one has two names."""

    def initialize_module(self):
        super().initialize_module()
        self.encoder_ = self.module_[0]
        self.again_ = self.module_
        return self


class SharedLayer(NeuralNetClassifier):
    """Two registered modules own the same layer."""

    def initialize_module(self):
        super().initialize_module()
        layer = encoder("plain")
        self.left_ = nn.Sequential(layer)
        self.right_ = nn.Sequential(layer, nn.Tanh())
        return self

    def infer(self, x, **kwargs):
        x = torch.as_tensor(x)
        return self.module_(self.left_(x) + self.right_(x))


def head():
    torch.manual_seed(3)
    return nn.Linear(5, 3).double()


def trained(cls, module=None, **attributes):
    net = type(cls.__name__, (cls,), attributes)(
        module or head(),
        criterion=nn.CrossEntropyLoss,
        classes=range(3),
        train_split=None,
        verbose=0,
        max_epochs=2,
    )
    return net.fit(X, Y)


def as_one(*modules):
    """A net of one module with the trained weights, and its float64 twin's answer."""
    return a_net(nn.Sequential(*modules))


@pytest.mark.parametrize("kind", ["plain", "dropout", "batch norm"])
def test_two_modules_are_one_net(kind):
    net = trained(TwoModules, kind=kind)
    before = {name: value.clone() for name, value in net.encoder_.state_dict().items()}
    modes = net.encoder_.train(), net.module_.train()
    strategy = FisherMask(20, keep_head=False, random_state=0)
    picks = strategy.select(net, POOL, 4, X_labeled=KNOWN).tolist()
    assert all(module.training for module in modes)
    for name, value in net.encoder_.state_dict().items():
        assert torch.equal(value, before[name])
    twin = FisherMask(20, keep_head=False, random_state=0)
    one = as_one(net.module_.eval(), net.encoder_.eval())  # in the order of the names
    one.infer = lambda x: net.module_(net.encoder_(torch.as_tensor(x)))
    assert picks == twin.select(one, POOL, 4, X_labeled=KNOWN).tolist()
    np.testing.assert_array_equal(strategy.mask_indices_, twin.mask_indices_)
    assert list(strategy.weights_per_layer_)[:3] == [
        "module_.weight",
        "module_.bias",
        "encoder_.0.weight",
    ]
    assert sum(strategy.weights_per_layer_.values()) == 20
    assert strategy.weights_per_layer_["encoder_.0.weight"] > 0


def test_two_modules_against_the_slow_twin():
    net = trained(TwoModules)
    one = nn.Sequential(net.encoder_, net.module_)
    v = reference.naive_embeddings(one, torch.tensor(X)).numpy()
    assert query(net)[0] == reference.naive_selection(v[8:], v[:8], 4)[0]


def test_head_stem_and_patterns_go_by_the_names_of_the_modules():
    net = trained(TwoModules)
    strategy = FisherMask(1.0, layers="last")
    strategy.select(net, POOL, 2, X_labeled=KNOWN)
    kept = {name for name, n in strategy.weights_per_layer_.items() if n}
    assert kept == {"module_.weight", "module_.bias"}
    FisherMask(1.0, layers="encoder_.*", head="module_").select(
        net, POOL, 2, X_labeled=KNOWN
    )
    report = check_network(net, POOL, 2, query_strategy=strategy)
    assert report.stem == ("encoder_.0.weight", "encoder_.0.bias")
    assert report.head == ("module_.weight", "module_.bias")


def test_baselines_see_several_modules():
    net = trained(TwoModules, kind="batch norm")
    statistics = net.encoder_[1].running_mean.clone()
    net.encoder_.train()
    features = net.encoder_.eval()(torch.tensor(POOL)).detach().numpy()
    net.encoder_.train()
    picks = kcenter_sampling(net, POOL, 4, X_labeled=KNOWN[:0]).tolist()
    nearest = np.square(features - features.mean(0)).sum(1).argmin()
    assert picks[0] == nearest
    assert torch.equal(net.encoder_[1].running_mean, statistics)
    assert net.encoder_.training


def test_no_module_of_skorchs_name():
    net = trained(NoModule, nn.Identity())
    one = nn.Sequential(net.first_, net.last_)
    v = reference.naive_embeddings(one, torch.tensor(X)).numpy()
    assert query(net)[0] == reference.naive_selection(v[8:], v[:8], 4)[0]


def test_modules_inside_others_keep_the_names_of_one_module():
    module = nn.Sequential(encoder("plain"), head())
    net = trained(Overlapping, module)
    strategy = FisherMask(1.0)
    picks = strategy.select(net, POOL, 4, X_labeled=KNOWN).tolist()
    assert next(iter(strategy.weights_per_layer_)) == "0.0.weight"
    assert picks == query(as_one(*net.module_))[0]


def test_a_layer_that_two_modules_share_has_its_weights_once():
    net = trained(SharedLayer)
    strategy = FisherMask(1.0)
    picks = strategy.select(net, POOL, 4, X_labeled=KNOWN).tolist()
    assert sum(strategy.weights_per_layer_.values()) == 5 * 3 + 3 + 5 * 4 + 5

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = net.left_, net.right_, net.module_

        def forward(self, x):
            return self.head(self.left(x) + self.right(x))

    v = reference.naive_embeddings(One(), torch.tensor(X)).numpy()
    assert picks == reference.naive_selection(v[8:], v[:8], 4)[0]


def test_a_refit_makes_new_modules():
    net = trained(TwoModules)
    first = query(net)[1]
    net.fit(X[::-1].copy(), Y[::-1].copy())
    assert not np.allclose(query(net)[1], first)
