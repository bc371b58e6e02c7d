"""The torch side of `ResNet18Classifier`: its module, its augmentation, and
reproducible training.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import nn


def resnet18(
    n_channels: int,
    n_classes: int,
    width: int,
    stem: str,
    head_bias: bool,
    weights: Any,
    progress: bool = False,
) -> nn.Module:
    """Torchvision's ResNet-18 of any width as a Sequential, so that it pickles;
    parameter names are the same.
    """
    from torchvision.models import ResNet18_Weights
    from torchvision.models.resnet import BasicBlock, conv1x1

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "small":
        layers["conv1"] = nn.Conv2d(n_channels, width, 3, padding=1, bias=False)
    else:
        layers["conv1"] = nn.Conv2d(
            n_channels, width, 7, stride=2, padding=3, bias=False
        )
    layers["bn1"] = nn.BatchNorm2d(width)
    layers["relu"] = nn.ReLU(inplace=True)
    if stem == "imagenet":
        layers["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
    n_in = width
    for stage in range(4):
        n_out, stride = width * 2**stage, 1 if stage == 0 else 2
        shortcut = None
        if stage > 0:
            shortcut = nn.Sequential(
                conv1x1(n_in, n_out, stride), nn.BatchNorm2d(n_out)
            )
        layers[f"layer{stage + 1}"] = nn.Sequential(
            BasicBlock(n_in, n_out, stride, shortcut), BasicBlock(n_out, n_out)
        )
        n_in = n_out
    layers["avgpool"] = nn.AdaptiveAvgPool2d((1, 1))
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(n_in, n_classes, bias=head_bias)
    module = nn.Sequential(layers)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if weights is not None:
        try:
            chosen = ResNet18_Weights.verify(weights)
        except (KeyError, TypeError) as error:
            names = ", ".join(repr(name) for name in ResNet18_Weights.__members__)
            raise ValueError(
                f"weights={weights!r} is unknown to torchvision's resnet18; pass one "
                f"of {names}."
            ) from error
        # Trained on standardised images; the first BatchNorm, trained on, absorbs the
        # scale of [0, 1].
        try:
            # torch.hub announces a download, whatever progress says.
            with nullcontext() if progress else redirect_stdout(StringIO()):
                state = chosen.get_state_dict(progress=progress, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"weights={weights!r} could not be loaded from {chosen.url} ({error}); "
                "fit once with a network connection, put that file into "
                f"{torch.hub.get_dir()}/checkpoints, or set weights=None."
            ) from error
        head = {
            name: tensor
            for name, tensor in module.state_dict().items()
            if name.startswith("fc.")
        }
        body = {
            name: tensor for name, tensor in state.items() if not name.startswith("fc.")
        }
        module.load_state_dict({**body, **head})
    return module


def crop_and_flip(x: torch.Tensor) -> torch.Tensor:
    """Shift every image by up to an eighth of its side, and mirror half of them."""
    height, width = x.shape[-2:]
    dy, dx = height // 8, width // 8
    windows = (
        nn.functional.pad(x, (dx, dx, dy, dy))
        .unfold(-2, height, 1)
        .unfold(-2, width, 1)
    )
    # Drawn on the CPU, so that every device sees the same crops.
    row, column = (
        torch.randint(2 * dy + 1, (len(x),), device="cpu"),
        torch.randint(2 * dx + 1, (len(x),), device="cpu"),
    )
    flip = torch.rand(len(x), device="cpu") < 0.5
    x = windows[torch.arange(len(x), device="cpu"), ..., row, column, :, :]
    flip = flip.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(flip, x.flip(-1), x)


@contextmanager
def reproducible(random_state: Any, n_before: int = 0) -> Iterator[None]:
    """Seed torch's CPU generator, choose deterministic kernels, flush denormals; undo
    all of it afterwards.

    An int gives every `n_before` a seed of its own, so that training that goes on does
    not repeat itself. Nothing here draws from another generator. Adam's averages drift
    into denormal numbers, which a CPU computes several times more slowly.
    """
    if random_state is None:
        random_state = np.random.RandomState()
    n_draws = 1 if isinstance(random_state, np.random.RandomState) else 1 + n_before
    seed = check_random_state(random_state).randint(2**31 - 1, size=n_draws)[-1]
    cudnn = torch.backends.cudnn
    found = cudnn.deterministic, cudnn.benchmark
    flushed = (torch.tensor([1e-40]) * 1).item() == 0
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(int(seed))
            cudnn.deterministic, cudnn.benchmark = True, False
            torch.set_flush_denormal(True)
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = found
            torch.set_flush_denormal(flushed)
