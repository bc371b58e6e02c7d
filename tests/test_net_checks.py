"""Nets that cannot be right are refused in words, before anything expensive, by every
way in.
"""

import numpy as np
import pytest
import reference
import torch
from networks import CLASSES, N, make_net, vectors
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from torch import nn
from torch.nn import functional as F

from fishermask_sk import FisherMask, check_network
from fishermask_sk.strategy.plan import TRIED

X = vectors(np.random.default_rng(0), N)


class Body(nn.Module):
    """A small classifier whose ways of going wrong are given as functions."""

    def __init__(self, middle=None, end=None, outputs=CLASSES):
        super().__init__()
        self.body, self.head = nn.Linear(7, 6), nn.Linear(6, outputs)
        self.middle, self.end = middle, end

    def forward(self, x):
        x = self.body(x).tanh()
        x = self.head(x if self.middle is None else self.middle(x))
        return x if self.end is None else self.end(x)


class SequenceFirst(nn.Module):
    """Attention that takes the samples for tokens, since nobody said
    batch_first=True.
    """

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(1, 1), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = x[:, :, None]
        return self.head(self.attention(x, x, x)[0][:, :, 0])


class Counting(Body):
    """A forward that remembers."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + self.calls * torch.arange(CLASSES)


class Flattened(nn.Module):
    """Scores a token, not a sample."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, CLASSES)

    def forward(self, x):
        return self.head(x.reshape(-1, 1))


def under_no_grad(x):
    return x.detach()


def query(module, layers="all", cls=None, **params):
    torch.manual_seed(0)
    net = make_net(
        module.double(), **({} if cls is None else {"cls": cls}), **params
    ).initialize()
    return FisherMask(10, layers=layers, keep_head=False).select(
        net, X, 2, X_labeled=X[:0]
    )


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Body(nn.BatchNorm1d(6, track_running_stats=False)),
            r"takes 8 samples but not one alone: Expected more than 1 value.*"
            r"track_running_stats=True",
        ),
        (
            Body(lambda x: x - x.mean(0)),
            r"depend on the others of its batch: alone they differ by [\d.]+ "
            r"of the largest.*LayerNorm",
        ),
        (SequenceFirst(), r"depend on the others of its batch.*batch_first=True"),
        (
            Body(
                lambda x: torch.cat([x[:1], x[1:] + x[:-1]])
            ),  # the first sample alone would not show it
            "depend on the others of its batch",
        ),
        (
            Body(F.dropout),
            r"differ by .* from one pass to the next.*training=self.training",
        ),
        (
            Body(lambda x: x + torch.randn_like(x)),
            "expected the same scores. Turn off what draws random numbers",
        ),
        (Counting(), "from one pass to the next, in evaluation mode.*keeps state"),
        (
            Body(end=lambda x: x.squeeze(0)),
            r"returned shape \(3,\) for one sample and \(8, 3\).*squeeze\(-1\)",
        ),
        (
            Flattened(),
            "returned 56 rows of scores for 8 samples; expected one row a sample",
        ),
        (
            Body(end=lambda x: x.argmax(1)[:, None]),
            "numbers of dtype int64; expected class scores.*not the classes",
        ),
        (
            Body(end=lambda x: {"logits": x}),
            "returned dict; expected a tensor.*a Hugging Face model its logits",
        ),
        (
            Body(end=under_no_grad),
            r"depend on none of its 4 trainable parameters.*torch.no_grad\(\)",
        ),
        (
            Body(end=lambda x: torch.as_tensor(x.detach().numpy())),
            "expected a differentiable path to some. Look for",
        ),
    ],
)
def test_nets_that_cannot_be_right(module, message):
    """And are refused on a few samples, before gradients are asked for."""
    sizes = []
    module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with pytest.raises(ValueError, match=message):
        query(module)
    assert TRIED not in sizes


def test_candidates_behind_a_detach():
    with pytest.raises(
        ValueError,
        match=r"layers='body\.\*' allows body.weight, body.bias, and.*"
        r"they do on head.bias, head.weight. Choose",
    ):
        query(Body(under_no_grad), layers="body.*")
    assert len(query(Body(under_no_grad), layers="last")) == 2


def test_many_names_are_cut_short():
    deep = nn.Sequential(*[nn.Linear(7, 7) for _ in range(4)])
    with pytest.raises(
        ValueError, match=r"allows middle.0.weight, .*middle.2.weight and 3 more, and"
    ):
        query(Detached(deep), layers="middle.*")


class Detached(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.middle, self.head = middle, nn.Linear(7, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            x = self.middle(x)
        return self.head(x)


def test_one_logit_whose_samples_axis_is_squeezed_away():
    with pytest.raises(
        ValueError,
        match=r"returned shape \(\) for one sample and \(8,\) for 8; expected \(1,\)",
    ):
        query(Body(outputs=1, end=torch.squeeze), criterion=nn.BCEWithLogitsLoss)
    # skorch's binary net puts the axis back.
    assert (
        len(query(Body(outputs=1, end=torch.squeeze), cls=NeuralNetBinaryClassifier))
        == 2
    )


def test_regression():
    with pytest.raises(
        ValueError, match=r"fitted with MSELoss.*regression has no class probabilities"
    ):
        query(Body(outputs=1), cls=NeuralNetRegressor, criterion=nn.MSELoss)


def test_coarse_arithmetic_is_no_fault():
    """In float32 and bfloat16 a sample alone is summed in another order."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        wide = nn.Sequential(
            nn.Linear(7, 500),
            nn.ReLU(),
            nn.Linear(500, 500),
            nn.ReLU(),
            nn.Linear(500, CLASSES),
        )
        net = make_net(wide.to(dtype)).initialize()
        samples = torch.as_tensor(X, dtype=dtype)
        assert (
            len(
                FisherMask(10, keep_head=False).select(
                    net, samples, 1, X_labeled=samples[:0]
                )
            )
            == 1
        )


def test_a_pool_of_one_sample_is_no_batch():
    assert query(Body()).shape == (2,)
    net = make_net(Body().double()).initialize()
    assert FisherMask(10, keep_head=False).select(
        net, X[:1], 1, X_labeled=X[:0]
    ).tolist() == [0]


class Untrained(NeuralNetClassifier):
    """Modules that no optimiser would take."""

    def _initialize_optimizer(self, reason=None):
        return self


@pytest.mark.parametrize("ask", [FisherMask().select, check_network])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Identity(), "The module has no parameters; FisherMask ranks"),
        (
            nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(CLASSES)),
            r"0.weight, 0.bias, .* have no shape yet.*run it once on a batch",
        ),
        (
            torch.jit.trace(nn.Linear(7, CLASSES), torch.zeros(2, 7)),
            "holds a TopLevelTracedModule, which torch.jit made.*as it was written",
        ),
    ],
)
def test_modules_that_no_query_can_work_on(ask, module, message):
    net = make_net(module, cls=Untrained).initialize()
    with pytest.raises(ValueError, match=message):
        ask(net, X, 2, X_labeled=X[:0])


@pytest.mark.slow
def test_an_exported_graph_is_refused():
    exported = torch.export.export(nn.Linear(7, CLASSES), (torch.zeros(2, 7),))
    net = make_net(exported.module(), cls=Untrained).initialize()
    with pytest.raises(ValueError, match=r"a graph that torch.export made.*as it was"):
        FisherMask().select(net, X, 2, X_labeled=X[:0])


class Complex(nn.Module):
    """A filter in the frequencies, as neural operators have it."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=7))


def test_complex_weights_are_left_out_or_refused():
    torch.manual_seed(0)
    net = make_net(Complex()).initialize()
    net.module_.head.double()
    with pytest.raises(ValueError, match=r"filter are complex; .* layers=\.\.\."):
        FisherMask(10).select(net, X, 2, X_labeled=X[:0])
    strategy = FisherMask(10, layers="head.*", random_state=0)
    strategy.select(net, X, 2, X_labeled=X[:0])
    assert strategy.weights_per_layer_["filter"] == 0


class MeanOverPadding(nn.Module):
    """Padded tokens count, and in prediction the fast path makes them zero."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.embed = nn.Embedding(12, 8)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, CLASSES)

    def forward(self, x):
        padded = self.encoder(self.embed(x), src_key_padding_mask=x == 0)
        return self.head(padded.mean(1))


@pytest.mark.parametrize("layers", ["all", "last"])
def test_the_fast_path_of_attention_is_not_taken(layers):
    torch.manual_seed(0)
    net = make_net(MeanOverPadding().double()).initialize()
    tokens = np.random.default_rng(0).integers(1, 12, (N, 5))
    tokens[:, 3:] = 0
    net.module_.eval()
    every = reference.naive_embeddings(net.module_, torch.as_tensor(tokens))
    strategy = FisherMask(20, layers=layers, random_state=0)
    with pytest.warns(UserWarning, match=r"without gradients, .* differ by .* padding"):
        strategy.select(net, tokens, 3, X_labeled=tokens[:0])
    masked = every[:, :, strategy.mask_indices_].numpy()
    picks, gains = reference.naive_selection(masked, masked[:0], 3)
    assert strategy.query_idx_.tolist() == picks
    np.testing.assert_allclose(strategy.trace_reductions_, gains, rtol=1e-8)
    assert torch.backends.mha.get_fastpath_enabled()
