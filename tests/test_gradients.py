"""Per-sample gradients by layer rules, and the generic way, against one backward pass a
sample and class.
"""

from contextlib import nullcontext

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.gradients.layer_rules import find_rule
from fishermask_sk.gradients.modules import undisturbed

N, CLASSES = 6, 3


def flat_classifier(*layers, features):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, CLASSES))


class TiedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(5, 5),
            nn.Linear(5, 5),
            nn.Linear(5, CLASSES),
        )
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.block(self.block(x).tanh()))


class UsedDirectly(nn.Module):
    """The first layer's weight also enters the sum on its own, where no hook sees
    it.
    """

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.first(x).tanh() + F.linear(x, self.first.weight[:5]))


class SequenceFirst(nn.Module):
    """As many positions as the comparison has samples, in front: the right sum over the
    first axis, wrong parts.
    """

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(2, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.embed(x.reshape(-1, 4, 2).transpose(0, 1)).tanh().sum(0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x.reshape(-1, 4, 2))[0][:, -1])


class Branching(nn.Module):
    """The path depends on each sample, so that no batch rule and no vmap can follow
    it.
    """

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = (
            nn.Linear(5, 4),
            nn.Linear(5, 4),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x):
        rows = [self.left(row) if row.sum() > 0 else self.right(row) for row in x]
        return self.head(torch.stack(rows).relu())


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(5)), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.scale * x)


class Tokens(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4, **kwargs), nn.Linear(4, CLASSES)

    def forward(self, tokens):
        return self.head(self.embed(tokens).tanh().sum(1))


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(input=x)


def images(channels=2, size=6, n=N):
    return torch.randn(n, channels, size, size, dtype=torch.float64)


def signals(channels=2, length=9):
    return torch.randn(N, channels, length, dtype=torch.float64)


def vectors(features=5):
    return torch.randn(N, features, dtype=torch.float64)


def tokens():
    return torch.randint(0, 7, (N, 5))


class HungTwice(nn.Module):
    """One module in two places, and a transposed convolution that needs the generic
    way.
    """

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.ConvTranspose1d(1, 1, 2)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.head(self.b(self.a(x[:, None]).tanh())[:, 0])


NETS = {
    "linear": lambda: (nn.Linear(5, CLASSES), vectors()),
    "mlp with in-place activations": lambda: (
        nn.Sequential(
            nn.Linear(5, 6),
            nn.ReLU(inplace=True),
            nn.Linear(6, 6),
            nn.ReLU(inplace=True),
            nn.Linear(6, CLASSES),
        ),
        vectors(),
    ),
    "linear over positions": lambda: (
        flat_classifier(nn.Linear(6, 4), nn.Tanh(), features=2 * 6 * 4),
        images(),
    ),
    "conv": lambda: (
        flat_classifier(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), features=48),
        images(),
    ),
    "conv stride padding dilation": lambda: (
        flat_classifier(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
            features=63,
        ),
        images(),
    ),
    "conv groups": lambda: (
        flat_classifier(nn.Conv2d(4, 6, 3, groups=2), features=96),
        images(4),
    ),
    "conv depthwise": lambda: (
        flat_classifier(nn.Conv2d(4, 4, 3, groups=4, padding=1), features=144),
        images(4),
    ),
    "conv same reflect": lambda: (
        flat_classifier(
            nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), features=108
        ),
        images(),
    ),
    "conv1d": lambda: (
        flat_classifier(nn.Conv1d(2, 3, 3, stride=2, padding=1), features=15),
        signals(),
    ),
    "conv3d": lambda: (
        flat_classifier(nn.Conv3d(1, 2, 2), features=2 * 27),
        torch.randn(N, 1, 4, 4, 4, dtype=torch.float64),
    ),
    "batch norm": lambda: (
        flat_classifier(
            nn.Conv2d(2, 3, 3, bias=False),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            features=48,
        ),
        images(),
    ),
    "batch norm 1d": lambda: (
        nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, CLASSES)),
        vectors(),
    ),
    "layer norm": lambda: (
        flat_classifier(nn.LayerNorm((6, 6)), nn.Tanh(), features=72),
        images(),
    ),
    "layer norm on vectors": lambda: (
        nn.Sequential(nn.LayerNorm(5), nn.Linear(5, CLASSES)),
        vectors(),
    ),
    "group norm": lambda: (
        flat_classifier(nn.GroupNorm(2, 4), nn.Tanh(), features=144),
        images(4),
    ),
    "embedding": lambda: (Tokens(), tokens()),
    "embedding with padding": lambda: (Tokens(padding_idx=0), tokens()),
    "keyword input": lambda: (Keyword(), vectors()),
    "tied": lambda: (TiedLinear(), vectors()),
    "called twice": lambda: (CalledTwice(), vectors()),
    "hung twice": lambda: (HungTwice(), vectors()),
    "used directly": lambda: (UsedDirectly(), vectors()),
    "sequence first": lambda: (SequenceFirst(), vectors(8)),
    "recurrent": lambda: (Recurrent(), vectors(8)),
    "branching": lambda: (Branching(), vectors()),
    "own parameter": lambda: (OwnParameter(), vectors()),
    "transposed conv": lambda: (
        flat_classifier(nn.ConvTranspose2d(2, 3, 2), features=147),
        images(),
    ),
}
GENERIC = {
    "hung twice": {"a.weight", "a.bias"},
    "tied": {"first.weight"},
    "called twice": {"block.weight", "block.bias"},
    "used directly": {"first.weight"},
    "sequence first": {"embed.weight", "embed.bias"},
    "recurrent": {
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "rnn.bias_ih_l0",
        "rnn.bias_hh_l0",
    },
    "branching": {"left.weight", "left.bias", "right.weight", "right.bias"},
    "own parameter": {"scale"},
    "transposed conv": {"0.weight", "0.bias"},
}


def make(name, device):
    torch.manual_seed(0)
    module, batch = NETS[name]()
    module = module.double().train()
    for _ in range(3):  # BatchNorm's statistics move away from 0 and 1
        module(batch)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval().to(device), batch.to(device)


@pytest.mark.parametrize("name", NETS)
def test_embeddings_and_diagonal_fisher_equal_the_slow_twin(name, device):
    module, batch = make(name, device)
    every = reference.naive_embeddings(module, batch)
    before = [(m, dict(m.named_parameters(recurse=False))) for m in module.modules()]
    with undisturbed(module):
        gradients = PerSampleGradients(module, module, batch)
        scores = gradients.diagonal_fisher([batch[:4], batch[4:]])
        p = len(scores)
        few = (
            torch.randperm(p, generator=torch.Generator().manual_seed(1))[
                : max(3, p // 5)
            ]
            .sort()
            .values
        )
        for mask_indices in (
            few.to(device),
            torch.arange(p, device=device),
            torch.tensor([p - 1], device=device),
        ):
            found = gradients.embeddings(batch, mask_indices)
            torch.testing.assert_close(
                found, every[:, :, mask_indices], rtol=1e-9, atol=1e-11
            )
            reduced = gradients.embeddings(batch, mask_indices, reduced=True)
            assert reduced.shape[1] == CLASSES - 1
            torch.testing.assert_close(
                reduced.mT @ reduced, found.mT @ found, rtol=1e-9, atol=1e-11
            )
        uniform = gradients.embeddings(batch, few.to(device), "uniform")
    assert gradients.generic == GENERIC.get(name, set())
    assert all(m._parameters[key] is p for m, own in before for key, p in own.items())
    torch.testing.assert_close(
        scores, reference.naive_diagonal_fisher(module, batch), rtol=1e-9, atol=1e-12
    )
    expected = reference.naive_embeddings(module, batch, weighting="uniform")[
        :, :, few.to(device)
    ]
    torch.testing.assert_close(uniform, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
@pytest.mark.parametrize(
    ("n_inputs", "n_outputs", "n_positions"),
    [(6, 4, 4), (6, 4, 5), (400, 500, 5), (1000, 1100, 5)],
    ids=["pairs of positions", "many at a time", "a few, summed singly", "one"],
)
def test_every_way_to_sum_squares(kind, n_inputs, n_outputs, n_positions, device):
    """The sizes of a layer and its number of positions say which way is taken."""
    torch.manual_seed(0)
    layer, shape = nn.Linear(n_inputs, n_outputs), (n_positions, n_inputs)
    if kind is nn.Conv1d:
        layer = nn.Conv1d(n_inputs // 2, n_outputs, 2)
        shape = (n_inputs // 2, n_positions + 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(n_outputs, 2)

        def forward(self, x):
            seen = self.layer(x).tanh()
            return self.head(seen.mean(2 if kind is nn.Conv1d else 1))

    module = Net().double().to(device)
    batch = torch.randn(3, *shape, dtype=torch.float64, device=device)
    scores = PerSampleGradients(module, module, batch).diagonal_fisher([batch])
    assert (scores >= 0).all()
    torch.testing.assert_close(
        scores, reference.naive_diagonal_fisher(module, batch), rtol=1e-9, atol=1e-12
    )


def test_scores_of_the_head_alone_need_no_gradients_below_it(device):
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, CLASSES)
    module = nn.Sequential(body, head).double().to(device).eval()
    batch = torch.randn(5, 4, dtype=torch.float64, device=device)
    gradients = PerSampleGradients(module, module, batch)
    has_graph = []
    body.register_forward_hook(
        lambda module, args, output: has_graph.append(output.requires_grad)
    )
    scores = gradients.diagonal_fisher([batch], names=["1.weight", "1.bias"])
    every = gradients.diagonal_fisher([batch])
    assert has_graph == [False, False, True, True]  # of the samples drawn, too
    n_body = sum(p.numel() for p in body.parameters())
    assert (scores[:n_body] == 0).all()
    assert torch.equal(scores[n_body:], every[n_body:])


@pytest.mark.parametrize("name", ["conv groups", "batch norm", "called twice"])
def test_single_samples_and_frozen_weights(name, device):
    module, batch = make(name, device)
    next(module.parameters()).requires_grad_(False)
    n_frozen = next(module.parameters()).numel()
    expected = reference.naive_embeddings(module, batch[:1])
    gradients = PerSampleGradients(module, module, batch[:1])
    scores = gradients.diagonal_fisher([batch[:1]])
    assert (scores[:n_frozen] == 0).all()
    mask_indices = torch.arange(n_frozen, len(scores), device=device)
    found = gradients.embeddings(batch[:1], mask_indices)
    torch.testing.assert_close(
        found, expected[:, :, mask_indices], rtol=1e-9, atol=1e-11
    )
    assert [p.requires_grad for p in module.parameters()] == [False] + [True] * (
        len(list(module.parameters())) - 1
    )


def test_a_layer_without_a_rule_is_known():
    assert find_rule(nn.ConvTranspose2d(1, 1, 1), "weight") is None
    assert find_rule(nn.BatchNorm2d(3, track_running_stats=False), "weight") is None
    assert find_rule(nn.Embedding(3, 2, scale_grad_by_freq=True), "weight") is None
    assert find_rule(nn.Linear(2, 2), "weight") is not None


def test_float32_keeps_its_dtype_and_bfloat16_gets_float32():
    module, batch = make("conv", "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        net, x = module.to(dtype), batch.to(dtype)
        gradients = PerSampleGradients(net, lambda b, net=net: net(b).float(), x)
        assert gradients.embeddings(x, torch.arange(4)).dtype == torch.float32
        assert gradients.diagonal_fisher([x]).dtype == torch.float32


def test_autocast_inside_the_net():
    """What a layer sees is float32 there, what comes out of it bfloat16."""

    class Mixed(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    torch.manual_seed(0)
    layers = nn.Linear(7, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, CLASSES)
    plain, mixed, x = (
        nn.Sequential(*layers).eval(),
        Mixed(*layers).eval(),
        torch.randn(20, 7),
    )
    every = torch.arange(sum(p.numel() for p in plain.parameters()))
    expected, found = (PerSampleGradients(net, net, x) for net in (plain, mixed))
    assert found.generic == set()
    for name in ("embeddings", "diagonal_fisher"):
        arguments = (x, every) if name == "embeddings" else ([x],)
        right, close = (
            getattr(gradients, name)(*arguments) for gradients in (expected, found)
        )
        assert close.dtype == torch.float32
        torch.testing.assert_close(
            close, right, rtol=0, atol=5e-2 * float(right.abs().max())
        )


def test_squares_of_float16_do_not_overflow():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    with torch.no_grad():
        net[2].weight.mul_(1e-3)  # probabilities away from 0 and 1, whatever comes in
    x = 500 * torch.randn(20, 7)
    right = PerSampleGradients(net, net, x).diagonal_fisher([x])
    half = net.half()
    found = PerSampleGradients(
        half, lambda b: half(b).float(), x.half()
    ).diagonal_fisher([x.half()])
    torch.testing.assert_close(
        found, right, rtol=0, atol=5e-2 * float(right.abs().max())
    )


def test_no_score_depends_on_the_mask():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.aux, self.head = nn.Linear(7, 5), nn.Linear(7, CLASSES)

        def forward(self, x):
            return self.head(x), self.aux(x)

    net, x = Auxiliary().eval(), torch.randn(6, 7)
    gradients = PerSampleGradients(net, lambda b: net(b)[0], x)
    assert not gradients.embeddings(x, torch.arange(10)).any()
    assert not gradients.diagonal_fisher([x])[:40].any()


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_found(fails):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(5, CLASSES)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            if fails and self.calls > 1:
                raise RuntimeError("lost the connection")
            return super().forward(x)

    module = nn.Sequential(nn.Linear(5, 5), nn.Dropout(), Counting()).double().train()
    module[1].eval()
    module[0].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    batch = vectors()
    outcome = (
        pytest.raises(RuntimeError, match="lost the connection")
        if fails
        else nullcontext()
    )
    with outcome, undisturbed(module):
        PerSampleGradients(module, module, batch).embeddings(batch, torch.arange(5))
    assert [m.training for m in module.modules()] == [True, True, False, True]
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in module.parameters())
    assert all(
        torch.equal(value, state[name]) for name, value in module.state_dict().items()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
