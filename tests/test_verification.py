"""Whatever a layer does, its gradients are autograd's of one sample alone: by the
rule, by vmap or one by one, whichever is right, on every batch.
"""

import copy
from collections import UserDict

import numpy as np
import pytest
import reference
import torch
from networks import CLASSES, make_net
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from fishermask_sk import FisherMask, check_network
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.gradients.layer_rules import Rule
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.gradients.own_operations import Graph, Seen
from fishermask_sk.nets.skorch_adapter import fitted_net

N, LABELED, K = 15, 4, 25
pytestmark = pytest.mark.filterwarnings(
    "ignore:The mask keeps k=", "ignore:The gradients of"
)


def part(X, which):
    return {k: v[which] for k, v in X.items()} if isinstance(X, dict) else X[which]


def as_batch(X):
    return (
        default_collate([part(X, i) for i in range(len(next(iter(X.values()))))])
        if (isinstance(X, dict))
        else torch.as_tensor(X)
    )


def assert_equals_slow_twin(net, X, strategy, n_instances=3):
    """Mask, picks and gains, the last samples being labelled."""
    fitted, n = (
        fitted_net(net),
        len(next(iter(X.values())) if isinstance(X, dict) else X),
    )
    pool, labeled = part(X, slice(n - LABELED)), part(X, slice(n - LABELED, n))
    twin = copy.deepcopy(fitted.module).eval()
    every = reference.naive_embeddings(
        twin, as_batch(X), scores=fitted.scores, forward=lambda b: first(run(twin, b))
    ).numpy()
    query_idx = strategy.select(net, pool, n_instances, X_labeled=labeled)
    mask = strategy.mask_indices_
    if (
        strategy.mask == "fisher"
        and not strategy.keep_head
        and strategy.layers == "all"
    ):
        scores = (every**2).sum(1).mean(0)
        best = scores[reference.naive_top_k(scores, len(mask))]
        np.testing.assert_allclose(np.sort(scores[mask]), np.sort(best), rtol=1e-9)
    masked = every[..., mask]
    picks, gains = reference.naive_selection(
        masked[: n - LABELED], masked[n - LABELED :], n_instances, strategy.damping
    )
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-7)
    assert query_idx.tolist() == picks


def run(module, batch):
    return module(**batch) if isinstance(batch, dict) else module(batch)


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 0, 1)), self.weight, self.bias, self.stride)


class WithoutSettings(nn.Conv2d):
    """Holds a convolution's weight, and none of its other attributes."""

    def __init__(self):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


class OwnScale(nn.GroupNorm):
    """Uses its weight once more, on what it gives."""

    def forward(self, x):
        return super().forward(x) * (1 + self.weight.sum())


class Between(nn.Module):
    """A hidden layer, and what becomes of its output."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(input=self.change(self.body(input=x)).tanh())


class Reversed(torch.autograd.Function):
    """Twice the gradient, with the other sign."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -2 * g


def changed_in_place(x):
    x *= 2
    x[:, 0] = 0
    return x


class Experts(nn.Module):
    """Some samples see one layer, the others another."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        first, y = x[:, 0] > 0, torch.zeros_like(x)
        y[first], y[~first] = self.one(x[first]), self.other(x[~first])
        return self.head(y.tanh())


class Halves(nn.Module):
    """A layer that sees two rows for each sample, along the first axis."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.body(x.reshape(-1, 3)).tanh().reshape(len(x), 8))


class ChannelsFirst(nn.Linear):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelsLast(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Scaled(nn.Linear):
    """Equalised learning rate."""

    def forward(self, x):
        return F.linear(x, self.weight * 3, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        size = centred.square().sum((1, 2, 3), keepdim=True).sqrt()
        return F.conv2d(x, centred / size, self.bias)


class TwoOutputs(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class First(nn.Module):
    def forward(self, outputs):
        return outputs[0]


class SortsByLength(nn.Module):
    """Sort by length, run, sort back."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        order = (x != 0).sum(1).argsort(descending=True, stable=True)
        x = self.hidden(self.embed(x[order])).tanh().mean(1)
        return self.head(x[order.argsort()])


class SortsScores(SortsByLength):
    """The head sees the samples in another order."""

    def forward(self, x):
        order = (x != 0).sum(1).argsort(descending=True, stable=True)
        x = self.embed(x[order]).mean(1)
        return self.head(self.hidden(x).tanh())[order.argsort()]


class Absent(nn.Module):
    """Inputs that the first samples lack, whose layer is no ordinary one."""

    def __init__(self, layer):
        super().__init__()
        self.usual, self.rare = nn.Linear(4, 5), layer
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.usual(x[:, :4]).tanh() + self.rare(x[:, 4:]))


class UsedWhereRare(nn.Module):
    """A weight that is used once more, for some samples only."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        again = F.linear(x[:, 4:], self.body.weight[:, 4:])
        return self.head(self.body(x).tanh() + again)


class BranchesWhereRare(nn.Module):
    """Nothing that torch.func could follow, for some samples only."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

    def forward(self, x):
        if x[:, 4:].abs().sum() > 0:
            return self.head(x * self.scale)
        return self.head(x[:, :6] * self.scale + 0)


class Bag(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.layer(x)
        return self.head((x.mean(1) if x.ndim == 3 else x).tanh())


class WeightedBag(nn.EmbeddingBag):
    def forward(self, x):
        return super().forward(x, per_sample_weights=(x + 1).to(self.weight) / 9)


class WeightedWhereRare(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode="sum", padding_idx=0)

    def forward(self, x):
        long = (x[:, -1:] != 0).to(self.bag.weight)
        return self.bag(x, per_sample_weights=1 + long * x)


class BagInARow(nn.EmbeddingBag):
    def forward(self, x):
        offsets = torch.arange(0, x.numel(), x.shape[1], device=x.device)
        return super().forward(x.flatten(), offsets)


class OverTime(nn.Module):
    def __init__(self, layer, begins=None):
        super().__init__()
        self.layer, self.begins, self.head = layer, begins, nn.Linear(4, CLASSES)

    def forward(self, x):
        x = torch.stack([x, x.sin(), -x], 1 if self.layer.batch_first else 0)
        state = ()
        if self.begins is not None:
            state = (x.new_full((1, x.shape[1], 4), self.begins),)
        found = self.layer(x, *state)[0]
        return self.head(found[:, -1] if self.layer.batch_first else found[-1])


class WithoutNumbers(Between):
    def __init__(self):
        super().__init__(torch.tanh)
        self.none = nn.Parameter(torch.zeros(0, 3))


class Steered(nn.Module):
    """By the gradient of an energy, which `forward` takes by itself."""

    def __init__(self, by_func):
        super().__init__()
        self.by_func, self.layer, self.head = by_func, nn.Linear(6, 5), nn.Linear(6, 3)

    def energy(self, x):
        return self.layer(x).tanh().sum()

    def forward(self, x):
        if self.by_func:
            return self.head(torch.func.vmap(torch.func.grad(self.energy))(x))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.energy(x), x, create_graph=True)
        return self.head(g)


def convolutional(*layers, channels=4):
    return nn.Sequential(
        *layers,
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, CLASSES),
    )


def hooked(register, change):
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    getattr(net[0], register)(change)
    return net


def vectors(rng):
    X = rng.normal(size=(N, 6))
    X[:4, 4:] = 0
    return X


def images(rng):
    X = rng.normal(size=(N, 2, 5, 5))
    X[:4] = np.abs(X[:4])  # where PReLU's weight does nothing
    return X


def words(rng):
    X, lengths = rng.integers(1, 9, (N, 5)), rng.integers(2, 6, N)
    lengths[:4] = 5
    return np.where(np.arange(5) < lengths[:, None], X, 0)


# Nets, and whether the layer of interest may keep its rule.
NETS = {
    "layer norm over channels": (
        lambda: convolutional(nn.Conv2d(2, 4, 3), LayerNorm2d(4)),
        images,
    ),
    "padding itself": (lambda: convolutional(PadsItself(2, 4, 3, stride=2)), images),
    "without settings": (lambda: convolutional(WithoutSettings()), images),
    "linear over channels": (lambda: convolutional(ChannelsFirst(2, 4)), images),
    "group norm over the last": (
        lambda: convolutional(ChannelsFirst(2, 5), ChannelsLast(1, 5), channels=5),
        images,
    ),
    "standardised": (lambda: convolutional(Standardised(2, 4, 3)), images),
    "group norm, scaled": (
        lambda: convolutional(nn.Conv2d(2, 4, 3), OwnScale(2, 4)),
        images,
    ),
    "circular": (
        lambda: convolutional(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", dilation=2)
        ),
        images,
    ),
    "gradient reversed": (lambda: Between(Reversed.apply), vectors),
    "changed in place": (lambda: Between(changed_in_place), vectors),
    "experts": (Experts, vectors),
    "halves of samples": (Halves, vectors),
    "tuple": (
        lambda: nn.Sequential(
            TwoOutputs(6, 5), First(), nn.Tanh(), nn.Linear(5, CLASSES)
        ),
        vectors,
    ),
    "sorted by length": (SortsByLength, words),
    "sorted scores": (SortsScores, words),
    "absent input, scaled": (lambda: Absent(Scaled(2, 5)), vectors),
    "absent input, bilinear": (lambda: Absent(Squared(2, 5)), vectors),
    "used where rare": (UsedWhereRare, vectors),
    "branches where rare": (BranchesWhereRare, vectors),
    "hook on the input": (
        lambda: hooked("register_forward_pre_hook", lambda m, args: (args[0] * 2,)),
        vectors,
    ),
    "hook on the output": (
        lambda: hooked(
            "register_forward_hook", lambda m, args, out: out * m.weight[0, 0]
        ),
        vectors,
    ),
    "hook on the output where rare": (
        lambda: hooked(
            "register_forward_hook",
            lambda m, args, out: out * (1 + args[0][:, 4:].abs().sum(1, keepdim=True)),
        ),
        vectors,
    ),
    "hook that flips": (
        lambda: hooked("register_forward_hook", lambda m, args, out: out.flip(1)),
        vectors,
    ),
    "prelu": (lambda: convolutional(nn.Conv2d(2, 4, 3), nn.PReLU()), images),
    "prelu by channel": (
        lambda: convolutional(nn.Conv2d(2, 4, 3), nn.PReLU(4)),
        images,
    ),
    "embedding, sparse": (lambda: Bag(nn.Embedding(9, 4, sparse=True)), words),
    "embedding, norm": (lambda: Bag(nn.Embedding(9, 4, max_norm=0.5)), words),
    "embedding, frequency": (
        lambda: Bag(nn.Embedding(9, 4, scale_grad_by_freq=True)),
        words,
    ),
    "bag": (lambda: Bag(nn.EmbeddingBag(9, 4)), words),
    "bag, sum": (lambda: Bag(nn.EmbeddingBag(9, 4, mode="sum")), words),
    "bag, max": (lambda: Bag(nn.EmbeddingBag(9, 4, mode="max")), words),
    "bag, padded": (lambda: Bag(nn.EmbeddingBag(9, 4, padding_idx=0)), words),
    "bag, max, padded": (
        lambda: Bag(nn.EmbeddingBag(9, 4, mode="max", padding_idx=0)),
        words,
    ),
    "bag, weighted": (lambda: Bag(WeightedBag(9, 4, mode="sum")), words),
    "bag, weighted where rare": (lambda: Bag(WeightedWhereRare()), words),
    "bag, offsets": (lambda: Bag(BagInARow(9, 4)), words),
    "without numbers": (WithoutNumbers, vectors),
    "steered by torch.func": (lambda: Steered(True), vectors),
    "steered by autograd": (lambda: Steered(False), vectors),
    "lstm": (lambda: OverTime(nn.LSTM(6, 4, num_layers=2)), vectors),
    "lstm, both ways": (
        lambda: OverTime(nn.LSTM(6, 2, bidirectional=True, batch_first=True)),
        vectors,
    ),
    "lstm, projected": (lambda: OverTime(nn.LSTM(6, 5, proj_size=4)), vectors),
    "gru": (lambda: OverTime(nn.GRU(6, 4, batch_first=True)), vectors),
    "rnn": (lambda: OverTime(nn.RNN(6, 4, nonlinearity="relu")), vectors),
    "rnn, own state": (lambda: OverTime(nn.RNN(6, 4), begins=0.5), vectors),
    "bag, sparse": (lambda: Bag(nn.EmbeddingBag(9, 4, sparse=True)), words),
    "bag, norm": (lambda: Bag(nn.EmbeddingBag(9, 4, max_norm=0.5)), words),
}


class Squared(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.layer = nn.Bilinear(n_in, n_in, n_out)

    def forward(self, x):
        return self.layer(x, x)


def make(name, seed=0):
    module, draw = NETS[name]
    torch.manual_seed(seed)
    net = make_net(module().double()).initialize()
    return net, draw(np.random.default_rng(seed))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("name", NETS)
def test_a_query_equals_the_slow_twin(name, batch_size):
    net, X = make(name)
    strategy = FisherMask(
        K, keep_head=False, damping=0.1, batch_size=batch_size, random_state=0
    )
    assert_equals_slow_twin(net, X, strategy)


@pytest.mark.parametrize("name", ["sorted scores", "hook on the input"])
def test_a_head_alone(name):
    """Its product stands in for a backward pass where it is the scores, and only
    there.
    """
    net, X = make(name)
    strategy = FisherMask(12, layers="last", batch_size=6, random_state=0)
    assert_equals_slow_twin(net, X, strategy)


def test_a_head_alone_takes_no_backward_pass(monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    batch = torch.randn(6, 5).double()
    gradients = PerSampleGradients(module, module, batch)
    head = torch.arange(24, 39)
    every = reference.naive_embeddings(module, batch)

    def too_much(*args, **kwargs):
        raise AssertionError("a backward pass was made")

    monkeypatch.setattr(torch.autograd, "grad", too_much)
    found = gradients.embeddings(batch, head)
    torch.testing.assert_close(found, every[..., head], rtol=1e-9, atol=1e-12)
    assert gradients.check_seconds > 0


@pytest.mark.parametrize("name", ["sorted by length", "absent input, scaled"])
def test_what_the_first_samples_do_not_show_is_seen_on_the_batch(name):
    """Tried on samples that show nothing, and right from the first batch on."""
    net, X = make(name)
    module, batch = net.module_.eval(), torch.as_tensor(X)
    every = reference.naive_embeddings(module, batch)
    gradients = PerSampleGradients(module, module, batch[:4])
    assert gradients.reasons == {}
    scores = gradients.diagonal_fisher([batch[:6], batch[6:]])
    expected = every.square().sum(1).mean(0)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-14)
    assert all("autograd differ by" in reason for reason in gradients.reasons.values())
    gradients = PerSampleGradients(module, module, batch[:4])
    k = torch.arange(every.shape[2])
    torch.testing.assert_close(
        gradients.embeddings(batch, k), every, rtol=1e-9, atol=1e-12
    )
    assert gradients.generic


def test_a_zero_gradient_is_no_proof():
    """PReLU's weight on positive images: vmap is compared when it first matters."""
    net, X = make("prelu by channel")
    module, batch = net.module_.eval(), torch.as_tensor(X)
    module[0].weight.data.abs_()
    module[0].bias.data.abs_()
    gradients = PerSampleGradients(module, module, batch[:4])
    every = reference.naive_embeddings(module, batch)
    k = torch.arange(every.shape[2])
    torch.testing.assert_close(
        gradients.embeddings(batch, k), every, rtol=1e-9, atol=1e-12
    )


def test_only_what_may_be_masked_is_looked_at():
    """A large table costs nothing where it is left alone, and little where not."""
    n_words, width = 50_000, 64
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(n_words, width), Mean(), nn.Linear(width, 3))
    batch = torch.randint(n_words, (4, 500))
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes())
            return result

    for names, most in (
        (["2.weight", "2.bias"], 4 * batch.numel() * width),
        (None, 2 * 4 * n_words * width),
    ):
        sizes.clear()
        with Watch():
            PerSampleGradients(module, module, batch, names)
        assert max(size for size in sizes if size != 4 * n_words * width) <= most


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_the_draws_of_random_state_stay():
    """What is tried is drawn by a generator of its own."""
    net, X = make("tuple")
    rng, twin = np.random.RandomState(7), np.random.RandomState(7)
    FisherMask(K, random_state=rng).select(net, X, 2, X_labeled=X[:0])
    assert rng.randint(10**6) == twin.randint(10**6)


class AutocastNet(nn.Sequential):
    def __init__(self, dtype):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES)
        )
        self.dtype = dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inside_keeps_the_rules(dtype):
    torch.manual_seed(0)
    net = make_net(AutocastNet(dtype)).initialize()
    X = torch.rand(20, 1, 8, 8).numpy()
    report = check_network(net, X, 2, X_labeled=X[:0])
    assert {p.gradients for p in report.parameters} == {
        "rule of Conv2d",
        "rule of Linear",
    }
    strategy = FisherMask(0.3, keep_head=False, random_state=0)
    strategy.select(net, X, 2, X_labeled=X[:0])
    plain = nn.Sequential(*net.module_).eval()
    every = reference.naive_embeddings(plain, torch.as_tensor(X))
    scores = every.square().sum(1).mean(0)
    best = scores[reference.naive_top_k(scores, len(strategy.mask_indices_))].sum()
    assert scores[strategy.mask_indices_].sum() > 0.98 * best


class Rows(nn.Module):
    """A path for each sample, which no vmap can follow."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

    def forward(self, x):
        rows = [row * self.scale if row.sum() > 0 else row for row in x]
        return self.head(torch.stack(rows))


@pytest.mark.filterwarnings("default:The gradients of")
def test_one_by_one_is_said_with_the_reason():
    torch.manual_seed(0)
    net = make_net(Rows().double()).initialize()
    X = vectors(np.random.default_rng(0))
    with pytest.warns(
        UserWarning,
        match=r"gradients of 6 weights \(scale\) take.*slow: torch.func cannot batch",
    ) as caught:
        FisherMask(K, random_state=0).select(net, X, 2, X_labeled=X[:0])
    assert sum("slow" in str(w.message) for w in caught) == 1
    note = check_network(net, X, 2, X_labeled=X[:0]).notes[-1]
    assert "6 weights take a backward pass" in note
    assert "since torch.func cannot batch it" in note


class Encoding(UserDict):
    """What a tokenizer returns: a mapping, and no dict."""


def collate_encoded(samples):
    X, y = default_collate(samples)
    return Encoding(X), y


class TextNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.scale = nn.Embedding(9, 4), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens, mask):
        x = self.embed(tokens) * mask[..., None]
        return self.head(x.sum(1) * self.scale / mask.sum(1, keepdim=True))


def test_batches_that_are_mappings():
    torch.manual_seed(0)
    tokens = words(np.random.default_rng(0))
    X = {"tokens": tokens, "mask": (tokens != 0).astype("float64")}
    net = make_net(TextNet().double(), iterator_valid__collate_fn=collate_encoded)
    strategy = FisherMask(K, keep_head=False, batch_size=4, random_state=0)
    assert_equals_slow_twin(net.initialize(), X, strategy)
    report = check_network(net, X, 2)
    assert {p.name: p.gradients for p in report.parameters}["scale"] == "vmap"


def test_seconds_of_the_check_are_known():
    net, X = make("standardised")
    strategy = FisherMask(K, random_state=0)
    strategy.select(net, X, 2, X_labeled=X[:0])
    spent = strategy.timings_["mask"] + strategy.timings_["embeddings"]
    assert 0 < strategy.check_seconds_ < spent


# Nets drawn at random.


def drawn_net(rng):
    """A module for images of one to three channels, or for vectors, and its samples."""
    n_classes = int(rng.choice([2, 3, 5]))
    layers, width = [], int(rng.integers(1, 4))
    if rng.random() < 0.6:
        X = rng.normal(size=(N, width, 6, 6))
        for _ in range(rng.integers(1, 3)):
            wider = 2 * int(rng.integers(1, 4))
            kind = rng.choice(["conv", "pads", "transposed", "standardised"])
            layers.append(
                {
                    "conv": lambda a, b: nn.Conv2d(a, b, 3, stride=2, padding=1),
                    "pads": lambda a, b: PadsItself(a, b, 3, stride=2),
                    "transposed": lambda a, b: nn.ConvTranspose2d(a, b, 2),
                    "standardised": lambda a, b: Standardised(a, b, 2),
                }[kind](width, wider)
            )
            width = wider
            norms = [
                nn.BatchNorm2d(width),
                nn.GroupNorm(2, width),
                LayerNorm2d(width),
                nn.Identity(),
            ]
            layers.append(norms[rng.integers(len(norms))])
            ends = [nn.ReLU(inplace=True), nn.Tanh(), nn.PReLU(), nn.GELU()]
            layers.append(ends[rng.integers(len(ends))])
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        width *= 4
    else:
        width = int(rng.integers(3, 7))
        X = rng.normal(size=(N, width))
    for _ in range(rng.integers(0, 3)):
        wider = int(rng.integers(3, 7))
        kind = [nn.Linear, Scaled, Squared][rng.integers(3)]
        layers += [kind(width, wider), nn.LayerNorm(wider), nn.Tanh()]
        width = wider
    layers.append(nn.Linear(width, n_classes, bias=bool(rng.integers(2))))
    return nn.Sequential(*layers), X


def drawn_strategy(rng):
    mask = ["fisher", "fisher", "per_layer", "random"][rng.integers(4)]
    return FisherMask(
        [5, 30, 0.05][rng.integers(3)],
        mask=mask,
        keep_head=bool(rng.integers(2)),
        layers=["all", "all", "last", "*weight"][rng.integers(4)],
        batch_size=int(rng.choice([1, 2, 5, 100])),
        damping=float(rng.choice([0.01, 1.0])),
        random_state=0,
    )


def assert_drawn_net_is_right(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    module, X = drawn_net(rng)
    module = module.double()
    for p in module.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    net = make_net(module).initialize()
    assert_equals_slow_twin(net, X, drawn_strategy(rng), int(rng.integers(1, 4)))


@pytest.mark.parametrize("seed", range(12))
def test_drawn_nets_equal_the_slow_twin(seed):
    assert_drawn_net_is_right(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 100))
def test_more_drawn_nets_equal_the_slow_twin(seed):
    assert_drawn_net_is_right(seed)


@pytest.mark.parametrize("name", ["prelu", "sorted by length", "tuple"])
def test_the_module_is_left_as_found(name):
    net, X = make(name)
    before = {k: v.clone() for k, v in net.module_.state_dict().items()}
    with undisturbed(net.module_):
        PerSampleGradients(net.module_, net.module_, torch.as_tensor(X))
    after = net.module_.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in net.module_.parameters())


# Gradients that are no gradients.


class ChangedBackward(torch.autograd.Function):
    """What goes back is changed by a function."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.change(g), None


def by_hook(change):
    def with_hook(x):
        if x.requires_grad:
            x.register_hook(change)
        return x

    return with_hook


CHANGES = {
    "clipped": lambda g: g.clamp(-0.1, 0.1),
    "sign": torch.sign,
    "of length one": lambda g: g / g.norm(dim=1, keepdim=True).clamp_min(1e-9),
    "rounded": lambda g: (g * 8).round() / 8,
}


@pytest.mark.parametrize("way", ["function", "hook"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_backward_pass_that_is_not_linear_is_refused(change, way):
    """And the layers behind it are not concerned."""
    act = CHANGES[change]
    torch.manual_seed(0)
    within = by_hook(act) if way == "hook" else lambda x: ChangedBackward.apply(x, act)
    net = make_net(Between(within).double()).initialize()
    X = vectors(np.random.default_rng(0))
    with pytest.raises(
        ValueError,
        match=r"gradients of body\.weight, body\.bias are not linear in the gradient "
        r"at the scores.*differs from the sum by .* of the largest.*Look for a hook",
    ):
        FisherMask(K, random_state=0).select(net, X, 2, X_labeled=X[:0])
    strategy = FisherMask(12, layers="head.*", keep_head=False, random_state=0)
    assert_equals_slow_twin(net, X, strategy)


# What the check costs, and what it finds for that.


def on_node(change):
    def after(gradients, _):
        return tuple(None if g is None else change(g) for g in gradients)

    return after


# Where a hook may sit that a forward pass registers, on what the first layer gives.
HOOKS = {
    "tensor": lambda net, h, change: h.register_hook(change),
    "node": lambda net, h, change: h.grad_fn.register_hook(on_node(change)),
    "before a node": lambda net, h, change: h.grad_fn.register_prehook(
        lambda gradients: tuple(map(change, gradients))
    ),
    "weight": lambda net, h, change: (
        net.body.weight.register_hook(change) if net.body.weight.requires_grad else None
    ),
}


class HooksWherePositive(nn.Module):
    """On some batches alone, of which the first samples are none."""

    def __init__(self, register, change, early=False):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, CLASSES)
        self.register, self.change, self.early = register, change, early

    def forward(self, x):
        h = self.body(x)
        if not self.early:
            h = h.tanh()
        if x.sum() > 0 and h.requires_grad:
            self.register(self, h, self.change)
        return self.head(h.tanh())


def positive_later(rng):
    X = np.abs(vectors(rng))
    X[:8] *= -1
    return X


@pytest.mark.parametrize("batch_size", [1, 30])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("where", HOOKS)
def test_a_hook_that_clips_later_batches_is_refused(where, early, batch_size):
    torch.manual_seed(0)
    module = HooksWherePositive(HOOKS[where], lambda g: g.clamp(-0.01, 0.01), early)
    net = make_net(module.double()).initialize()
    strategy = FisherMask(K, batch_size=batch_size, random_state=0)
    X = positive_later(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"body\.weight.* are not linear"):
        strategy.select(net, X, 2, X_labeled=X[:0])


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("where", ["tensor", "node", "before a node"])
def test_a_hook_that_halves_gradients_is_followed(where, batch_size):
    torch.manual_seed(0)
    module = HooksWherePositive(HOOKS[where], lambda g: g / 2).double()
    net, X = make_net(module).initialize(), positive_later(np.random.default_rng(0))
    strategy = FisherMask(
        K, keep_head=False, damping=0.1, batch_size=batch_size, random_state=0
    )
    assert_equals_slow_twin(net, X, strategy)


class HookedHead(nn.Linear):
    def __init__(self, on, change):
        super().__init__(6, CLASSES)
        self.on, self.change = on, change

    def forward(self, x):
        scores = super().forward(x)
        hooked = scores if self.on == "scores" else self.weight
        if hooked.requires_grad:
            hooked.register_hook(self.change)
        return scores


@pytest.mark.parametrize("on", ["scores", "weight"])
def test_a_hook_on_a_head_is_seen(on):
    """Whose product alone would not show it."""
    torch.manual_seed(0)
    head = HookedHead(on, lambda g: g.clamp(-0.01, 0.01))
    net = make_net(nn.Sequential(nn.Tanh(), head).double()).initialize()
    X = vectors(np.random.default_rng(0))
    strategy = FisherMask(12, layers="last", random_state=0)
    with pytest.raises(ValueError, match="are not linear"):
        strategy.select(net, X, 2, X_labeled=X[:0])


class TokensInFront(nn.Module):
    """A layer that sees tokens along the first axis, samples along the second."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.body(x.transpose(0, 1)).tanh()
        return self.head((x * torch.arange(1, len(x) + 1)[:, None, None]).mean(0))


def assert_scores_are_right(gradients, module, *batches):
    every = torch.cat([reference.naive_embeddings(module, b) for b in batches])
    expected = every.square().sum(1).mean(0)
    torch.testing.assert_close(
        gradients.diagonal_fisher(batches), expected, rtol=1e-9, atol=1e-14
    )


def test_as_many_tokens_as_samples():
    """On the samples tried and on the batch, but with another number of them."""
    torch.manual_seed(0)
    module = TokensInFront().double().eval()
    gradients = PerSampleGradients(module, module, torch.randn(1, 1, 3).double())
    assert gradients.generic == set()
    assert_scores_are_right(gradients, module, torch.randn(24, 24, 3).double())
    assert gradients.generic == {"body.weight", "body.bias"}


def wrong_on_larger(rule, what):
    """A rule that errs where there are more samples than it was tried on."""

    def entries(module, wanted):
        of_seen = rule.entries(module, wanted)
        if what == "squares":
            return of_seen
        factor = torch.nan if what == "lost" else 2
        return lambda a: lambda g: of_seen(a)(g) * (1 if len(a) == 2 else factor)

    def squares(module, a):
        of_output = rule.squares(module, a)
        factor = 1 if len(a) == 2 or what == "entries" else 4
        return lambda g: of_output(g) * factor

    return Rule(entries, squares)


def wrong_on_one(rule):
    """A rule that errs on one sample of more than it was tried on."""

    def without_one(a):
        return a if len(a) == 2 else torch.cat([a[:3], 2 * a[3:4], a[4:]])

    def entries(module, wanted):
        of_seen = rule.entries(module, wanted)
        return lambda a: of_seen(without_one(a))

    return Rule(entries, lambda module, a: rule.squares(module, without_one(a)))


WRONG = {
    "squares": lambda rule: wrong_on_larger(rule, "squares"),
    "entries": lambda rule: wrong_on_larger(rule, "entries"),
    "both": lambda rule: wrong_on_larger(rule, "both"),
    "lost": lambda rule: wrong_on_larger(rule, "lost"),
    "alike on one sample": wrong_on_one,
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.bias", "5.weight"])
def test_a_rule_that_is_wrong_on_a_batch_is_found(name, what):
    if what == "alike on one sample" and name == "1.bias":
        pytest.skip("what a bias sees is no matter")
    torch.manual_seed(0)
    module = convolutional(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).double().eval()
    batch = torch.randn(30, 2, 5, 5).double()
    k = torch.arange(0, sum(p.numel() for p in module.parameters()), 2)

    def scores(gradients):
        assert_scores_are_right(gradients, module, batch)

    def embeddings(gradients):
        every = reference.naive_embeddings(module, batch)[..., k]
        found = gradients.embeddings(batch, k)
        torch.testing.assert_close(found, every, rtol=1e-9, atol=1e-14)

    for assert_right in (scores, embeddings):
        if what == "squares" and assert_right is embeddings:
            continue
        gradients = PerSampleGradients(module, module, batch[:2])
        routes = gradients._recorder.routes
        routes[name] = routes[name]._replace(rule=WRONG[what](routes[name].rule))
        places, _ = gradients._parts.few[name]
        rule = routes[name].rule.entries(routes[name].module, places.cpu())
        gradients._parts.few[name] = places, rule
        assert_right(gradients)
        assert gradients.generic == {name}
        assert "differ by" in gradients.reasons[name]


def by_positions(x, order):
    return x[order]


def by_rows(x, order):
    return torch.stack([x[i] for i in order.tolist()])


def by_parts(x, order):
    return torch.cat([x[i : i + 1] for i in order.tolist()])


def by_product(x, order):
    return torch.eye(len(x), dtype=x.dtype)[order] @ x


def in_place(x, order):
    changed = x.clone()
    for i in (7, 9):
        changed[i : i + 1] = x[order[i : i + 1]]
    return changed


class SwapsTwo(nn.Module):
    """Two of the samples change places, if the first says so, and then change back."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        order = torch.arange(len(x))
        if len(x) > 9 and x[0, 0] > 0:
            order[7], order[9] = 9, 7
        x = self.body(self.change(x, order)).tanh()
        return self.head(self.change(x, order))


@pytest.mark.parametrize(
    "change", [by_positions, by_rows, by_parts, by_product, in_place]
)
def test_two_samples_that_change_places_are_found(change):
    """Among many, of which only a few have a pass of their own."""
    torch.manual_seed(0)
    module, batch = SwapsTwo(change).double().eval(), torch.randn(60, 6).double()
    for sign in (1, -1):
        batch[0, 0] = sign
        every = reference.naive_embeddings(module, batch)
        gradients = PerSampleGradients(module, module, batch[:4])
        found = gradients.embeddings(batch, torch.arange(every.shape[2]))
        torch.testing.assert_close(found, every, rtol=1e-9, atol=1e-12)
        swapped = {"body.weight", "body.bias"} if sign > 0 else set()
        assert gradients.generic == swapped


@pytest.mark.parametrize("scores", [True, False])
def test_where_the_graph_vouches_no_full_pass_is_made(monkeypatch, scores):
    """Autograd's gradients of the weights come with one row's own backward pass, and a
    few samples have a pass of their own.
    """
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(4, 6, 3, groups=2), nn.GroupNorm(2, 6), nn.PReLU()]
    layers += [nn.AvgPool2d(3), nn.Flatten(1), nn.Unflatten(1, (1, 6))]
    layers += [nn.Linear(6, 5), nn.LayerNorm(5), nn.Flatten()]
    layers += [nn.Linear(5, CLASSES, bias=False)]
    module, batch = nn.Sequential(*layers).double(), torch.randn(40, 2, 5, 5).double()
    gradients = PerSampleGradients(module.eval(), module, batch[:4])
    asked, plain = [], torch.autograd.grad

    def counted(outputs, inputs, *args, **kwargs):
        n_weights = sum(isinstance(x, torch.Tensor) for x in inputs)
        asked.append((len(outputs), n_weights))
        return plain(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    if scores:
        found = gradients.diagonal_fisher([batch])
    else:
        found = gradients.embeddings(batch, torch.arange(gradients.n_parameters))
    n_weights, n_rows = len(list(module.parameters())), CLASSES - scores
    assert sorted(asked) == [(2, 0)] + [(40, 0)] * (n_rows - 1) + [(40, n_weights)]
    monkeypatch.undo()
    every = reference.naive_embeddings(module, batch)
    expected = every.square().sum(1).mean(0) if scores else every
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_half_precision_of_a_layer_alone_is_its_own_operation(bias, dtype):
    module, x = nn.Linear(3, 2, bias=bias), torch.randn(4, 3)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = module(x).float()
    node = logits.grad_fn.next_functions[0][0] if dtype else logits.grad_fn
    graph = Graph(logits)
    assert graph.in_order
    assert graph.vouches([Seen(p, module, node) for p in module.parameters()], [])
    assert not graph.vouches([], module.parameters())
    unused = [nn.Parameter(torch.zeros(1))]
    assert graph.vouches([], unused)
    assert not Graph(Reversed.apply(logits)).vouches([], unused)


def test_a_rule_that_does_not_fit_is_vmapped():
    """And not sent on once more, for the gradients that it did not give."""
    net, X = make("layer norm over channels")
    gradients = PerSampleGradients(net.module_.eval(), net.module_, torch.tensor(X[:4]))
    assert gradients.ways()["1.weight"] == "vmap"
    assert "does not fit its layout" in gradients.reasons["1.weight"]


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, ValueError, IndexError, TypeError]
)
def test_what_a_rule_may_raise(error):
    assert way_of_rule_raising(error) == "vmap"


@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, AssertionError])
def test_a_mistake_in_a_rule_is_not_hidden(error):
    with pytest.raises(error, match="oops"):
        way_of_rule_raising(error)


def way_of_rule_raising(error):
    """The way of a parameter whose rule raises this on a batch."""
    torch.manual_seed(0)
    module, batch = nn.Linear(3, 4).double().eval(), torch.randn(6, 3).double()
    gradients = PerSampleGradients(module, module, batch[:2])

    def raising(*args):
        raise error("oops")

    routes = gradients._recorder.routes
    routes["weight"] = routes["weight"]._replace(rule=Rule(raising, raising))
    assert_scores_are_right(gradients, module, batch)
    return gradients.ways()["weight"]


def test_a_layer_that_skips_its_class_is_vmapped():
    torch.manual_seed(0)
    module = convolutional(WithoutSettings()).double().eval()
    batch = torch.randn(6, 2, 5, 5).double()
    gradients = PerSampleGradients(module, module, batch[:2])
    assert gradients.ways()["0.weight"] == "vmap"
    assert_scores_are_right(gradients, module, batch)


@pytest.mark.slow
def test_convnext_of_torchvision():
    """Its layer norms are over channels, and its blocks have a bare scale."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    module = models.convnext_tiny(num_classes=2).double().eval()
    batch = torch.randn(2, 3, 32, 32).double()
    gradients = PerSampleGradients(module, module, batch)
    mask_indices = torch.arange(0, gradients.n_parameters, 9973)
    scores, rows = torch.zeros(gradients.n_parameters).double(), []
    for x in batch:
        log_p = module(x[None]).log_softmax(1)[0]
        for each in log_p:
            found = torch.autograd.grad(each, module.parameters(), retain_graph=True)
            row = torch.cat([g.flatten() for g in found]) * (each.detach() / 2).exp()
            scores += row.square() / len(batch)
            rows.append(row[mask_indices])
    expected = torch.stack(rows).unflatten(0, (2, 2))
    found = gradients.embeddings(batch, mask_indices)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    found = gradients.diagonal_fisher([batch])
    torch.testing.assert_close(found, scores, rtol=1e-8, atol=1e-14)
    ways = set(gradients.ways().values())
    assert ways == {"rule of Conv2d", "rule of Linear", "vmap", "rule of LayerNorm"}
