"""Every kind of network that the docs promise: its gradients, its query, its layout,
and a real modAL loop.
"""

import matplotlib

matplotlib.use("Agg")
import warnings

import joblib
import matplotlib.pyplot as plt
import networks
import numpy as np
import pytest
import reference
import torch
from conftest import DEVICES
from networks import FIRST_FIVE, NETS, N, make
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch.exceptions import DeviceWarning
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.gradients.layers import find_layout
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.modal import ActiveLearner
from fishermask_sk.nets.skorch_adapter import fitted_net
from fishermask_sk.plotting import MaskDisplay

pytestmark = pytest.mark.filterwarnings("ignore:The mask keeps k=")

ATTENTION = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
# What each net's head and stem are, and which parameters no layer rule explains.
LAYOUTS = {
    "mlp": ("head", "body.0", []),
    "vision transformer": (
        "heads.head",
        "conv_proj",
        [
            f"encoder.layers.encoder_layer_{i}.self_attention.{p}"
            for i in (0, 1)
            for p in ATTENTION
        ]
        + ["class_token", "encoder.pos_embedding"],
    ),
    "mobile net": ("head", "stem", ["block.layer_scale"]),
    "packed gru": (
        "head",
        "embed",
        [
            f"rnn.{p}_l0{way}"
            for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            for way in ("", "_reverse")
        ],
    ),
    "text transformer": (
        "head",
        "words places",
        [f"encoder.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ATTENTION]
        + ["places.weight"],
    ),
    "vgg": ("classifier.3", "features.0", []),
    "densenet": ("classifier", "features.conv0", []),
    "tied weights": (
        "classes",
        "encode",
        ["classes", "encode.weight", "encode.bias", "decode.weight"],
    ),
    "adapters": ("backbone.head", "backbone.body.0", ["backbone.hidden.down"]),
    "weight norm": (
        "head",
        "first",
        [
            f"{m}.parametrizations.weight.original{i}"
            for m in ("first", "head")
            for i in (0, 1)
        ]
        + ["old.weight_g", "old.weight_v", "spectral.parametrizations.weight.original"],
    ),
    "compiled": ("head", "first", []),
    "channels last": ("head", "first", []),
    "bfloat16": ("head", "body.0", []),
    "checkpointed": ("head", "body.0", []),
    "one logit": ("head", "body", []),
    "tuple": ("head", "body.0", []),
}


def parts(name, n_samples=N):
    """The fitted net, its samples as one batch, and the whole embeddings by the slow
    twin.
    """
    net, X = make(name)
    fitted = fitted_net(net)
    dataset, _ = fitted.dataset(X, "X")
    with undisturbed(fitted.module):
        batch = next(fitted.batches(dataset, n_samples))
        every = reference.naive_embeddings(
            fitted.module, batch, scores=fitted.scores, forward=fitted.outputs
        )
    return net, fitted, X, batch, every


def rows(X, part):
    return (
        {key: values[part] for key, values in X.items()}
        if isinstance(X, dict)
        else X[part]
    )


def belongs_to(name, modules):
    return any(
        name == module or name.startswith(f"{module}.") for module in modules.split()
    )


def close(found, expected):
    """To rounding: of a product in float64, or of every layer's activations in
    bfloat16.
    """
    half = expected.dtype == torch.bfloat16
    atol = (2e-2 if half else 1e-11) * float(expected.abs().max())
    torch.testing.assert_close(
        found, expected.to(found.dtype), rtol=0 if half else 1e-9, atol=atol
    )


@pytest.mark.parametrize("name", NETS)
def test_embeddings_and_diagonal_fisher_equal_the_slow_twin(name):
    _, fitted, _, batch, every = parts(name)
    trainable = [
        p.requires_grad for p in fitted.module.parameters() for _ in range(p.numel())
    ]
    mask_indices = torch.tensor(trainable).nonzero()[:, 0]
    few = mask_indices[
        torch.randperm(len(mask_indices), generator=torch.Generator().manual_seed(0))[
            :40
        ]
    ]
    with undisturbed(fitted.module):
        gradients = PerSampleGradients(fitted.module, fitted.logits, batch)
        scores = gradients.diagonal_fisher([batch])
        for wanted in (mask_indices, few.sort().values):
            close(gradients.embeddings(batch, wanted), every[:, :, wanted])
    close(scores, every.square().sum(1).mean(0))
    assert gradients.generic == set(LAYOUTS[name][2])


@pytest.mark.parametrize("name", ["mlp", "mobile net", "checkpointed"])
def test_a_mask_in_one_parameter_alone(name):
    """All others are frozen then, also where a part of the net is computed again in the
    backward pass.
    """
    _, fitted, _, batch, every = parts(name)
    with undisturbed(fitted.module):
        gradients = PerSampleGradients(fitted.module, fitted.logits, batch)
        for parameter, place in gradients.slices.items():
            wanted = torch.arange(place.start, place.stop)
            close(gradients.embeddings(batch, wanted), every[:, :, wanted])
            scores = gradients.diagonal_fisher([batch], names=[parameter])
            close(scores[wanted], every[:, :, wanted].square().sum(1).mean(0))


@pytest.mark.parametrize("n_instances", [1, 4])
@pytest.mark.parametrize("name", [name for name in NETS if name != "bfloat16"])
def test_a_query_equals_the_slow_twin(name, n_instances):
    net, _, X, _, every = parts(name)
    strategy = FisherMask(30, keep_head=False, batch_size=4, random_state=0)
    strategy.select(net, X, n_instances, X_labeled=rows(X, slice(0)))
    scores, mask = every.square().sum(1).mean(0), strategy.mask_indices_
    best = scores[
        reference.naive_top_k(scores, 30)
    ]  # a class token and its position have the same scores
    torch.testing.assert_close(
        scores[mask].sort().values, best.sort().values, rtol=1e-9, atol=0
    )
    picks, gains = reference.naive_selection(
        every[:, :, mask].numpy(), every[:0, :, mask].numpy(), n_instances
    )
    assert strategy.query_idx_.tolist() == picks
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-7)


def test_slow_gradients_are_told_once_in_a_loop():
    net, X = make("packed gru")
    strategy = FisherMask(30, keep_head=False, random_state=0)
    with pytest.warns(UserWarning, match="is slow: torch.func cannot batch it"):
        strategy.select(net, X, 1, X_labeled=rows(X, slice(0)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*which is slow")
        strategy.select(net, X, 1, X_labeled=rows(X, slice(0)))


@pytest.mark.parametrize("name", NETS)
def test_head_and_stem_are_found(name):
    _, fitted, _, batch, _ = parts(name, n_samples=2)
    with undisturbed(fitted.module):
        n_outputs = fitted.outputs(batch)[0].numel()
        layout = find_layout(fitted.module, lambda: fitted.outputs(batch), n_outputs)
    head, stem, _ = LAYOUTS[name]
    names = [n for n, _ in fitted.module.named_parameters()]
    assert sorted(layout.head) == sorted(n for n in names if belongs_to(n, head))
    assert sorted(layout.stem) == sorted(n for n in names if belongs_to(n, stem))


@pytest.mark.parametrize("name", [name for name in NETS if name != "one logit"])
def test_a_mask_of_middle_layers_and_its_display(name):
    net, X = make(name)
    strategy = FisherMask(12, layers="middle", random_state=0)
    strategy.select(net, X, 2, X_labeled=rows(X, slice(0)))
    head, stem, _ = LAYOUTS[name]
    kept = {parameter: n for parameter, n in strategy.weights_per_layer_.items() if n}
    assert sum(kept.values()) == 12
    assert not any(belongs_to(parameter, f"{head} {stem}") for parameter in kept)
    display = MaskDisplay.from_strategy(strategy, module=net.module_).plot()
    assert [label.get_text() for label in display.ax_.get_yticklabels()] == list(kept)
    assert [bar.get_width() for bar in display.bars_] == list(kept.values())
    plt.close(display.figure_)


def test_a_net_of_two_layers_has_no_middle():
    net, X = make("one logit")
    with pytest.raises(
        ValueError,
        match=r"layers='middle' leaves no trainable weight.*head is \['head.weight'",
    ):
        FisherMask(layers="middle").select(net, X, 2, X_labeled=X[:0])


def stacked(X):
    """Rows that modAL can carry: of a dict the arrays side by side, for a Pipeline to
    take apart.
    """
    return np.stack(list(X.values()), axis=1) if isinstance(X, dict) else X


def to_text(X):
    return {"input_ids": X[:, 0], "attention_mask": X[:, 1]}


def a_learner(name, device="cpu"):
    """The net, modAL's learner around it after twelve labels, and all samples and
    labels.
    """
    module, draw, _ = NETS[name]
    X = stacked(draw(np.random.default_rng(1), 40))
    y = np.arange(40) % networks.CLASSES
    torch.manual_seed(0)
    net = networks.make_net(module().double(), device=device)
    pipe = (
        make_pipeline(FunctionTransformer(to_text), net)
        if name == "text transformer"
        else net
    )
    return (
        net,
        ActiveLearner(pipe, FisherMask(0.1, random_state=0), X[:12], y[:12]),
        X,
        y,
    )


@pytest.mark.parametrize("name", FIRST_FIVE)
def test_a_modal_loop(name):
    _, learner, X, y = a_learner(name)
    X_pool, y_pool = X[12:], y[12:]
    for n_labels in (15, 18):
        query_idx, X_query = learner.query(X_pool, n_instances=3)
        assert len(set(query_idx.tolist())) == 3
        learner.teach(X_query, y_pool[query_idx])
        X_pool, y_pool = (
            np.delete(X_pool, query_idx, axis=0),
            np.delete(y_pool, query_idx),
        )
        assert len(learner.X_training) == n_labels
        assert (learner.query_strategy.trace_reductions_ > 0).all()
    assert learner.predict(X_pool).shape == (22,)


def test_a_dict_of_arrays_in_a_loop_of_ones_own():
    net, X = make("text transformer")
    y, labeled = np.arange(N) % networks.CLASSES, [0, 1, 2]
    for _ in range(2):
        net.fit(rows(X, labeled), y[labeled])
        pool = [i for i in range(N) if i not in labeled]
        query_idx = FisherMask(0.1, random_state=0).select(
            net, rows(X, pool), 2, X_labeled=rows(X, labeled)
        )
        labeled += [pool[i] for i in query_idx]
    assert len(set(labeled)) == 7


def test_a_forward_that_returns_a_tuple_gives_the_picks_of_its_first_output():
    (net, X), (plain, _) = make("tuple"), make("mlp")
    picks = [
        FisherMask(30, random_state=0).select(n, X, 4, X_labeled=X[:0]).tolist()
        for n in (net, plain)
    ]
    assert picks[0] == picks[1]


def test_a_compiled_net_gives_the_picks_of_the_plain_one():
    net, X = make("compiled")
    plain = networks.make_net(net.module_._orig_mod).initialize()
    strategies = [FisherMask(40, random_state=0) for _ in range(2)]
    for strategy, each in zip(strategies, (net, plain), strict=True):
        strategy.select(each, X, 4, X_labeled=X[:0])
    assert strategies[0].query_idx_.tolist() == strategies[1].query_idx_.tolist()
    assert strategies[0].weights_per_layer_ == strategies[1].weights_per_layer_


def test_bfloat16_samples_reach_a_bfloat16_net():
    net, X = make("bfloat16")
    X = torch.as_tensor(X, dtype=torch.bfloat16)
    assert len(FisherMask(30, random_state=0).select(net, X, 4, X_labeled=X[:0])) == 4


@pytest.mark.parametrize("destination", DEVICES)
@pytest.mark.parametrize("name", ["vision transformer", "text transformer"])
def test_a_saved_learner_goes_on_on_another_device(name, device, destination, tmp_path):
    """As `examples/vision_transformer.py` does it; on a machine without a GPU the
    device stays the same.
    """
    _, learner, X, y = a_learner(name, device)
    joblib.dump(learner, tmp_path / "learner.pkl")
    loaded = joblib.load(tmp_path / "learner.pkl")
    loaded_net = (
        loaded.estimator[-1] if name == "text transformer" else loaded.estimator
    )
    loaded_net.set_params(device=destination)
    loaded_net.module_.to(destination)
    before, _ = learner.query(X[12:], n_instances=3)
    query_idx, X_query = loaded.query(X[12:], n_instances=3)
    assert query_idx.tolist() == before.tolist()
    loaded.teach(X_query, y[12:][query_idx])
    assert len(loaded.X_training) == 15
    assert (
        next(loaded_net.module_.parameters()).device.type
        == torch.device(destination).type
    )
    loaded.query(X[12:], n_instances=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to load onto")
def test_a_learner_saved_on_a_gpu_loads_where_there_is_none(tmp_path):
    net, learner, X, _ = a_learner("vision transformer", "cpu")
    before, _ = learner.query(X[12:], n_instances=3)
    net.device = "cuda"  # as it would have been there
    joblib.dump(learner, tmp_path / "learner.pkl")
    with pytest.warns(
        DeviceWarning,
        match="no CUDA devices are available|requested device .* not available",
    ):
        loaded = joblib.load(tmp_path / "learner.pkl")
    assert str(loaded.estimator.device) == "cpu"
    assert loaded.query(X[12:], n_instances=3)[0].tolist() == before.tolist()


class HuggingFace(nn.Module):
    """What skorch's documentation does with a model of transformers: hand on its
    logits.
    """

    def __init__(self, transformers, as_tuple):
        super().__init__()
        config = transformers.DistilBertConfig(
            vocab_size=networks.WORDS,
            max_position_embeddings=networks.LENGTH,
            dim=8,
            n_layers=2,
            n_heads=2,
            hidden_dim=12,
            num_labels=networks.CLASSES,
        )
        self.bert, self.as_tuple = (
            transformers.DistilBertForSequenceClassification(config),
            as_tuple,
        )

    def forward(self, input_ids, attention_mask):
        answer = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            return_dict=not self.as_tuple,
        )
        return answer if self.as_tuple else answer.logits


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_model_of_transformers(as_tuple):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    module = HuggingFace(transformers, as_tuple).double()
    net = networks.make_net(module).initialize()
    fitted = fitted_net(net)
    X = networks.text(np.random.default_rng(0), N)
    batch = {key: torch.as_tensor(values) for key, values in X.items()}
    with undisturbed(module):
        every = reference.naive_embeddings(module, batch, forward=fitted.outputs)
        gradients = PerSampleGradients(module, fitted.logits, batch)
        close(gradients.embeddings(batch, torch.arange(every.shape[2])), every)
        close(gradients.diagonal_fisher([batch]), every.square().sum(1).mean(0))
        layout = find_layout(module, lambda: fitted.outputs(batch), networks.CLASSES)
    assert layout.head == ("bert.classifier.weight", "bert.classifier.bias")
    assert "bert.distilbert.embeddings.word_embeddings.weight" in layout.stem
    picks = FisherMask(30, random_state=0).select(
        net, X, 3, X_labeled=rows(X, slice(0))
    )
    assert len(set(picks.tolist())) == 3
