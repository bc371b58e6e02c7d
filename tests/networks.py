"""Small networks of every kind that FisherMask claims to take, each with a few samples;
nothing is downloaded.

`NETS` maps a name to a function that gives a skorch net, not yet initialised, and its
samples.
"""

import warnings

import numpy as np
import torch
import torchvision
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlock
from torchvision.ops import SqueezeExcitation

N, CLASSES, WORDS, LENGTH = 9, 3, 12, 6


class TabularMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3)
        )
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.hidden(self.body(x)).relu())


def vision_transformer():
    return torchvision.models.VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=CLASSES,
        dropout=0.2,
        attention_dropout=0.1,
    )


class MobileNet(nn.Module):
    """Depthwise, dilated and grouped convolutions, layer scale and squeeze-excite."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.block = CNBlock(
            8, layer_scale=0.5, stochastic_depth_prob=0.1
        )  # depthwise, 7 by 7
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.norm, self.squeeze = nn.GroupNorm(2, 8), SqueezeExcitation(8, 4)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.block(self.stem(x))
        x = self.squeeze(F.hardswish(self.norm(self.dilated(x)), inplace=True))
        return self.head(x.mean((2, 3)))


class PackedGRU(nn.Module):
    """A text classifier over words 1, 2, ...; 0 pads."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 5, padding_idx=0)
        self.rnn = nn.GRU(5, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        lengths = (tokens != 0).sum(1).cpu()
        packed = pack_padded_sequence(
            self.embed(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        _, last = self.rnn(packed)
        return self.head(torch.cat([last[0], last[1]], dim=1))


class TextTransformer(nn.Module):
    """A text classifier with the inputs of Hugging Face's models."""

    def __init__(self):
        super().__init__()
        self.words, self.places = (
            nn.Embedding(WORDS, 8, padding_idx=0),
            nn.Embedding(LENGTH, 8),
        )
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.places(
            torch.arange(input_ids.shape[1], device=input_ids.device)
        )
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        weights = attention_mask.to(x.dtype)[..., None]
        return self.head((weights * x).sum(1) / weights.sum(1))


def vgg():
    with torch.device(
        "meta"
    ):  # its classifier has 100 million weights before it is replaced
        net = torchvision.models.VGG(nn.Identity(), init_weights=False)
    net.features = torchvision.models.vgg.make_layers([4, "M", 6, "M"], batch_norm=True)
    net.features[0] = nn.Conv2d(2, 4, 3, padding=1)
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier = nn.Sequential(
        nn.Linear(24, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, CLASSES)
    )
    return net


def densenet():
    net = torchvision.models.DenseNet(
        growth_rate=3,
        block_config=(2, 1),
        num_init_features=4,
        bn_size=2,
        num_classes=CLASSES,
    )
    net.features.conv0 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    return net


class TiedWeights(nn.Module):
    """An autoencoder's layer used both ways, and an embedding that is also the head."""

    def __init__(self):
        super().__init__()
        self.classes = nn.Parameter(torch.randn(CLASSES, 6))
        self.encode, self.decode = nn.Linear(7, 6), nn.Linear(6, 7)
        self.decode.weight = nn.Parameter(torch.randn(7, 6))
        self.again = nn.Linear(6, 7, bias=False)
        self.again.weight = self.decode.weight

    def forward(self, x):
        x = self.encode(x).tanh()
        x = self.encode(self.decode(x).tanh() + self.again(x))
        return F.linear(x, self.classes)


class LowRank(nn.Module):
    """A frozen linear layer, and two small ones whose product is learnt."""

    def __init__(self, frozen, rank=2):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features))
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, x):
        return self.frozen(x) + self.up(F.linear(x, self.down))


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = TabularMLP()
        for p in self.backbone.parameters():
            p.requires_grad_(False)
        self.backbone.hidden = LowRank(self.backbone.hidden)
        self.backbone.head.requires_grad_(True)

    def forward(self, x):
        return self.backbone(x)


class WeightNorm(nn.Module):
    """Weight norm in its new form and in the old one, spectral norm, and a plain layer
    among them.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(7, 6))
        self.plain = nn.Linear(6, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.old = nn.utils.weight_norm(nn.Linear(6, 6))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES))

    def forward(self, x):
        return self.head(
            self.spectral(
                self.old(self.plain(self.first(x).tanh()).tanh()).tanh()
            ).tanh()
        )


class SmallConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, groups=2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))


class ChannelsLast(SmallConv):
    def __init__(self):
        super().__init__()
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return super().forward(x.to(memory_format=torch.channels_last))


class BFloat16(TabularMLP):
    def forward(self, x):
        return super().forward(x.to(self.head.weight.dtype))


class OneLogit(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(7, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh())


class Tuple(TabularMLP):
    def forward(self, x):
        x = self.hidden(self.body(x)).relu()
        return self.head(x), x


def vectors(rng, n):
    return rng.normal(size=(n, 7))


def images(rng, n, channels=2):
    return rng.normal(size=(n, channels, 8, 8))


def words(rng, n):
    tokens = rng.integers(1, WORDS, (n, LENGTH))
    lengths = rng.integers(2, LENGTH + 1, n)
    return np.where(np.arange(LENGTH) < lengths[:, None], tokens, 0)


def text(rng, n):
    tokens = words(rng, n)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).astype("int64")}


class Checkpointed(TabularMLP):
    """A part that is computed again in the backward pass, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.again = nn.Sequential(
            nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()
        )

    def forward(self, x):
        return self.head(
            checkpoint(self.again, self.hidden(self.body(x)), use_reentrant=False)
        )


def make_net(module, *, cls=NeuralNetClassifier, **params):
    params.setdefault(
        "criterion",
        nn.BCEWithLogitsLoss
        if cls is NeuralNetBinaryClassifier
        else nn.CrossEntropyLoss,
    )
    settings = {
        "max_epochs": 2,
        "lr": 0.01,
        "batch_size": 8,
        "verbose": 0,
        "train_split": None,
    }
    return cls(module, **settings, **params)


# Module, how its samples are drawn, and what skorch needs to be told.
NETS = {
    "mlp": (TabularMLP, vectors, {}),
    "vision transformer": (vision_transformer, lambda rng, n: images(rng, n, 3), {}),
    "mobile net": (MobileNet, images, {}),
    "packed gru": (PackedGRU, words, {}),
    "text transformer": (TextTransformer, text, {}),
    "vgg": (vgg, images, {}),
    "densenet": (densenet, images, {}),
    "tied weights": (TiedWeights, vectors, {}),
    "adapters": (Adapted, vectors, {}),
    "weight norm": (WeightNorm, vectors, {}),
    "compiled": (SmallConv, images, {"compile": True, "compile__backend": "eager"}),
    "channels last": (ChannelsLast, images, {}),
    "bfloat16": (BFloat16, vectors, {}),
    "checkpointed": (Checkpointed, vectors, {}),
    "one logit": (OneLogit, vectors, {"cls": NeuralNetBinaryClassifier}),
    "tuple": (Tuple, vectors, {}),
}
FIRST_FIVE = list(NETS)[:5]


def make(name, device="cpu", seed=0):
    """An initialised skorch net in float64, its weights away from zero, and N
    samples.
    """
    module, draw, params = NETS[name]
    torch.manual_seed(seed)
    module = module().double()
    for m in module.modules():  # statistics away from 0 and 1
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if name == "bfloat16":
        module = module.bfloat16()
    net = make_net(module, device=device, **params).initialize()
    return net, draw(np.random.default_rng(seed), N)
