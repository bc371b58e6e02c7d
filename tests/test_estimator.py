"""A trained torch module goes in by `as_estimator`: right probabilities, the picks of
the same net in skorch, and errors in words.
"""

import copy
import io
import pickle
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from sklearn.base import clone
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import (
    ActiveLearningClassifier,
    FisherMask,
    as_estimator,
    check_network,
)
from fishermask_sk.baselines import (
    badge_sampling,
    bait_sampling,
    entropy_sampling,
    kcenter_sampling,
    margin_sampling,
)
from fishermask_sk.modal import ActiveLearner

LABELS = ["bee", "ant", "fly"]  # the module's order, not the alphabet's
X = np.random.default_rng(0).normal(size=(40, 5)).astype("float32")


def body(n_outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, n_outputs)
    )


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dict whose entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class WithOutput(nn.Module):
    """A net in the style of a library: `made` puts the logits into its output."""

    def __init__(self, made, n_outputs=3):
        super().__init__()
        self.body, self.made = body(n_outputs), made

    def forward(self, x):
        return self.made(self.body(x))


def in_model_output(logits):
    return ModelOutput(loss=None, logits=logits)


def in_dict(logits):
    return {"features": logits * 0, "logits": logits}


def in_tuple(logits):
    return logits, logits * 0


Auxiliary = namedtuple("Auxiliary", ["aux", "logits"])


def in_namedtuple(logits):
    return Auxiliary(logits * 0, logits)


def as_probabilities(logits):
    return logits.softmax(1)


def as_log_probabilities(logits):
    return logits.log_softmax(1)


FORMS = {
    "plain": (nn.Identity(), "logits"),
    "ModelOutput": (in_model_output, "logits"),
    "dict": (in_dict, "logits"),
    "tuple": (in_tuple, "logits"),
    "namedtuple": (in_namedtuple, "logits"),
    "probabilities": (as_probabilities, "probabilities"),
    "log_probabilities": (as_log_probabilities, "log_probabilities"),
}


def expected_probabilities(module=None):
    module = (module or body()).eval()
    with torch.no_grad():
        return module(torch.as_tensor(X)).double().softmax(1).numpy()


def in_skorch(dtype=torch.float32):
    net = NeuralNetClassifier(
        body().to(dtype), criterion=nn.CrossEntropyLoss, train_split=None, verbose=0
    )
    return net.initialize()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_output_gives_the_same_probabilities_and_classes(form):
    made, scores = FORMS[form]
    net = as_estimator(WithOutput(made), classes=LABELS, scores=scores)
    p = expected_probabilities()
    np.testing.assert_allclose(net.predict_proba(X), p, atol=1e-6)
    assert (net.predict(X) == np.array(LABELS)[p.argmax(1)]).all()
    assert net.score(X, np.array(LABELS)[p.argmax(1)]) == 1.0
    assert list(net.classes_) == LABELS


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_output_gives_the_picks_of_the_net_in_skorch(form):
    made, scores = FORMS[form]
    net = as_estimator(WithOutput(made).double(), classes=LABELS, scores=scores)
    wide = X.astype("float64")
    expected = FisherMask(0.7, random_state=0)
    expected.select(in_skorch(torch.float64), wide[8:], 6, X_labeled=wide[:8])
    strategy = FisherMask(0.7, random_state=0)
    strategy.select(net, wide[8:], 6, X_labeled=wide[:8])
    assert (strategy.query_idx_ == expected.query_idx_).all()
    assert (strategy.mask_indices_ == expected.mask_indices_).all()
    np.testing.assert_allclose(
        strategy.trace_reductions_, expected.trace_reductions_, rtol=1e-9
    )


@pytest.mark.parametrize("flat", [False, True], ids=["(n, 1)", "(n,)"])
def test_one_logit_is_that_of_the_second_class(flat):
    made = nn.Flatten(0) if flat else nn.Identity()
    net = as_estimator(
        WithOutput(made, n_outputs=1), classes=["no", "yes"], scores="logit"
    )
    with torch.no_grad():
        p = body(1).eval()(torch.as_tensor(X)).double().sigmoid()[:, 0].numpy()
    np.testing.assert_allclose(net.predict_proba(X), np.stack([1 - p, p], 1), atol=1e-6)
    assert (net.predict(X) == np.where(p > 0.5, "yes", "no")).all()
    assert FisherMask(0.7).select(net, X[8:], 3, X_labeled=X[:8]).shape == (3,)


@pytest.mark.parametrize(
    "strategy",
    [
        margin_sampling,
        entropy_sampling,
        kcenter_sampling,
        badge_sampling,
        bait_sampling,
    ],
)
def test_baselines_pick_as_from_the_net_in_skorch(strategy):
    more = {"X_labeled": X[:8]} if strategy in (kcenter_sampling, bait_sampling) else {}
    net = as_estimator(WithOutput(in_model_output), classes=LABELS)
    picked = strategy(net, X[8:], n_instances=4, random_state=0, **more)
    assert (
        picked == strategy(in_skorch(), X[8:], n_instances=4, random_state=0, **more)
    ).all()


def test_check_network_and_a_learner_that_only_queries():
    net = as_estimator(WithOutput(in_dict), classes=LABELS)
    report = check_network(net, X, 5, query_strategy=FisherMask(0.7), n_pool=1000)
    assert report.head == ("body.3.weight", "body.3.bias")
    assert report.n_classes == 3
    learner = ActiveLearner(net, FisherMask(0.7, random_state=0))
    query_idx, X_query = learner.query(X[8:], n_instances=4, X_labeled=X[:8])
    direct = FisherMask(0.7, random_state=0).select(net, X[8:], 4, X_labeled=X[:8])
    assert (query_idx == direct).all()
    assert X_query.shape == (4, 5)


def test_keyword_inputs_as_of_a_text_model():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(20, 6), nn.Linear(6, 2)

        def forward(self, input_ids, attention_mask):
            kept = attention_mask[..., None].float()
            mean = (self.words(input_ids) * kept).sum(1) / kept.sum(1)
            return in_model_output(self.head(mean))

    torch.manual_seed(0)
    net = as_estimator(Reader(), classes=["neg", "pos"], batch_size=7)
    ids = np.random.default_rng(0).integers(20, size=(30, 4))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    assert net.predict_proba(inputs).shape == (30, 2)
    assert FisherMask(0.3).select(net, inputs, 3, X_labeled=[]).shape == (3,)


def test_module_is_kept_and_left_as_it_was():
    module = body().train()
    before = copy.deepcopy(module.state_dict())
    net = as_estimator(module, classes=LABELS)
    net.predict(X)
    FisherMask(0.7).select(net, X[8:], 3, X_labeled=X[:8])
    assert net.module_ is module
    assert all(m.training for m in module.modules())
    assert all((before[k] == v).all() for k, v in module.state_dict().items())
    with torch.no_grad():  # trained on in its own loop
        module[3].bias += torch.tensor([0.0, 50.0, 0.0])
    assert set(net.predict(X)) == {"ant"}


def test_clone_and_pickle_are_fitted_and_have_the_weights_once():
    net = as_estimator(WithOutput(in_dict), classes=LABELS, batch_size=16)
    file = io.BytesIO()
    pickle.dump(net, file)
    again = pickle.loads(file.getvalue())
    assert again.module is again.module_
    for other in (again, clone(net), copy.deepcopy(net)):
        assert other.module_ is not net.module_
        assert other.batch_size == 16
        np.testing.assert_array_equal(other.predict_proba(X), net.predict_proba(X))
        assert list(other.predict(X)) == list(net.predict(X))
    weights = [t.numel() for t in net.module_.state_dict().values()]
    big = as_estimator(nn.Linear(4000, 3), classes=LABELS)
    assert sum(weights) < 200
    assert len(pickle.dumps(big)) < 1.5 * 4 * 12_003
    assert repr(net) == (
        "TrainedNetClassifier(WithOutput, n_classes=3, scores='logits', device='cpu')"
    )


def test_training_it_says_how_to_train():
    net, y = as_estimator(body(), classes=LABELS), np.array(LABELS)[np.arange(40) % 3]
    how = "train it in its own loop and query again .* skorch.NeuralNetClassifier"
    with pytest.raises(TypeError, match=how):
        net.fit(X, y)
    with pytest.raises(TypeError, match=how):
        net.partial_fit(X, y)
    with pytest.raises(TypeError, match=how):
        ActiveLearner(net, FisherMask()).teach(X, y)
    with pytest.raises(TypeError, match=how):
        ActiveLearner(net, FisherMask(), X_training=X, y_training=y)
    with pytest.raises(TypeError, match=how):
        ActiveLearningClassifier(net, FisherMask(), n_initial=6, n_queries=1).fit(X, y)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"module": nn.Linear}, TypeError, "is the class Linear; pass the trained obj"),
        ({"module": "resnet18"}, TypeError, "is a str; pass the torch.nn.Module in it"),
        ({"module": in_skorch()}, TypeError, "a skorch net: .* pass its module_"),
        ({"module": nn.Tanh()}, ValueError, "a Tanh without weights"),
        ({"classes": 3}, TypeError, r"classes=3 .* range\(10\)"),
        ({"classes": "abc"}, TypeError, "classes='abc' is no list of labels"),
        ({"classes": None}, TypeError, "classes=None is no list of labels"),
        ({"classes": ["a", "b", "a"]}, ValueError, "each once, in the order"),
        ({"classes": ["a"]}, ValueError, "two labels or more"),
        ({"scores": "softmax"}, ValueError, "scores='softmax' is unknown; pass one of"),
        ({"scores": "logit"}, ValueError, "second of two classes, and classes has 3"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be an int >= 1"),
    ],
)
def test_wrong_parameters(params, error, message):
    params = {"module": body(), "classes": LABELS, **params}
    with pytest.raises(error, match=message):
        as_estimator(params.pop("module"), **params)


def test_weights_in_several_places_need_a_device():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="weights lie on cpu, meta; pass device="):
        as_estimator(module, classes=[0, 1])


@pytest.mark.parametrize(
    "use",
    [
        lambda net: FisherMask(0.7).select(net, X[8:], 2, X_labeled=X[:8]),
        lambda net: badge_sampling(net, X[8:], 2, random_state=0),
        lambda net: net.predict_proba(X),
    ],
    ids=["select", "badge", "predict_proba"],
)
@pytest.mark.parametrize(
    ("made", "params", "message"),
    [
        (nn.Identity(), {"classes": range(4)}, "3 scores .* classes= names 4 labels"),
        (
            nn.Identity(),
            {"classes": LABELS, "scores": "probabilities"},
            "takes the module's outputs for probabilities, and these are none",
        ),
        (
            nn.Identity(),
            {"classes": ["a", "b"], "scores": "logit"},
            "Under scores='logit' the module must return one logit",
        ),
        (
            nn.Flatten(0),
            {"classes": LABELS},
            "Under scores='logits' the module must return class scores",
        ),
        (lambda z: {"out": z}, {"classes": LABELS}, "module returned dict; expected"),
    ],
)
def test_outputs_that_are_not_what_was_said(made, params, message, use):
    net = as_estimator(WithOutput(made), **params)
    with pytest.raises(ValueError, match=message):
        use(net)


def test_probabilities_taken_for_logits_are_warned_about():
    net = as_estimator(WithOutput(as_probabilities), classes=LABELS)
    with pytest.warns(UserWarning, match="as_estimator: scores='probabilities'"):
        net.predict_proba(X)


def test_a_loss_of_your_own():
    class Focal(nn.Module):
        def forward(self, logits, y):
            p = logits.softmax(1)[torch.arange(len(y)), y]
            return -((1 - p) ** 2 * p.log()).mean()

    y = np.int64(X[:, 0] > 0) + np.int64(X[:, 1] > 1)
    net = NeuralNetClassifier(body(), criterion=Focal, train_split=None, verbose=0)
    net.fit(X[:16], y[:16])
    with pytest.raises(ValueError, match=r"as_estimator\(net.module_, classes="):
        FisherMask(0.7).select(net, X[16:], 4, X_labeled=X[:16])
    trained = as_estimator(net.module_, classes=[0, 1, 2], scores="logits")
    picks = FisherMask(0.7, random_state=0).select(trained, X[16:], 4, X_labeled=X[:16])
    assert len(set(picks.tolist())) == 4
    # the same by hand: the net under cross-entropy
    net.set_params(criterion=nn.CrossEntropyLoss, verbose=0)
    again = FisherMask(0.7, random_state=0).select(net, X[16:], 4, X_labeled=X[:16])
    assert (picks == again).all()


def test_no_samples_give_no_probabilities():
    assert as_estimator(body(), classes=LABELS).predict_proba(X[:0]).shape == (0, 3)


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=30, dim=8, n_heads=2, n_layers=1, hidden_dim=8, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(config)
    net = as_estimator(model, classes=LABELS)
    ids = np.random.default_rng(0).integers(1, 30, size=(20, 5))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with torch.no_grad():
        logits = model.eval()(
            **{k: torch.as_tensor(v) for k, v in inputs.items()}
        ).logits
    np.testing.assert_allclose(net.predict_proba(inputs), logits.softmax(1), atol=1e-6)
    assert FisherMask(0.3).select(net, inputs, 3, X_labeled=[]).shape == (3,)
