"""Images with channels last: the same numbers, and only for nets that take them."""

import numpy as np
import pytest
import torch
from torch import nn

from fishermask_sk import FisherMask, as_estimator
from fishermask_sk.nets.channels_last import channels_last
from fishermask_sk.nets.skorch_adapter import fitted_net


class Viewed(nn.Module):
    """Takes no layout but the first: `.view` does not copy."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().view(len(x), -1))


class ByStride(Viewed):
    """Scores that depend on how the images lie."""

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1)) * x.stride(1)


def flattened(n_channels=2):
    return nn.Sequential(
        nn.Conv2d(n_channels, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )


def strided(n_channels):
    """As ResNets halve their images."""
    return nn.Sequential(
        nn.Conv2d(2, n_channels, 3),
        nn.Conv2d(n_channels, 4, 1, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )


class Functional(nn.Module):
    """A strided convolution that is no layer."""

    def __init__(self, n_channels):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, n_channels, 3), nn.Linear(4 * 9, 3)
        self.shortcut = nn.Parameter(torch.empty(4, n_channels, 1, 1))

    def forward(self, x):
        x = nn.functional.conv2d(self.conv(x), self.shortcut, stride=2)
        return self.head(x.flatten(1))


def images(n=30, n_channels=2):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, n_channels, 8, 8)).astype("float32")


def net_of(module):
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return as_estimator(module, classes=range(3))


@pytest.mark.parametrize("n_channels", [1, 2])
def test_same_numbers_and_other_strides(n_channels):
    batch = {"images": torch.from_numpy(images(5, n_channels)), "n": torch.arange(5)}
    found = channels_last(batch)
    assert torch.equal(found["images"], batch["images"])
    assert found["images"].stride() == (64 * n_channels, 1, 8 * n_channels, n_channels)
    assert found["n"] is batch["n"]
    convolved = nn.Conv2d(n_channels, 4, 3)(found["images"])
    assert convolved.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (flattened, True),
        (lambda: flattened().double(), False),
        (lambda: strided(16), True),
        (lambda: strided(15), False),
        (lambda: Functional(16), True),
        (lambda: Functional(15), False),
        (Viewed, False),
        (ByStride, False),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), False),
    ],
)
def test_who_takes_channels_last(make, taken):
    fitted = fitted_net(net_of(make()))
    dtype = next(fitted.module.parameters()).dtype
    fitted.lay_out(torch.from_numpy(images()).to(dtype))
    assert fitted.takes_channels_last == taken


@pytest.mark.parametrize("make", [flattened, Viewed, ByStride])
def test_picks_are_those_of_images_as_they_were(make):
    X = images(60)

    def picks():
        return FisherMask(1.0, random_state=0).select(
            net_of(make()), X[10:], 8, X_labeled=X[:10]
        )

    found = picks()
    with torch.backends.mkldnn.flags(enabled=False):
        assert found.tolist() == picks().tolist()


def test_the_weights_lie_as_before():
    module = flattened()
    strides = [p.stride() for p in module.parameters()]
    X = images(40)
    FisherMask(1.0, random_state=0).select(net_of(module), X[5:], 4, X_labeled=X[:5])
    assert [p.stride() for p in module.parameters()] == strides
