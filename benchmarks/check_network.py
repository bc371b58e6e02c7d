"""How near `check_network` comes: its estimate beside a real query, for pools of 1,000
to 60,000 samples.

Both are in seconds of one thread's processor time, so that other programs on the
machine are not measured.

python benchmarks/check_network.py                        # all nets, four sizes
python benchmarks/check_network.py --net mlp --pool 1000
"""

import argparse
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import nn
from torchvision.models import VisionTransformer

from fishermask_sk import (
    FisherMask,
    ResNet18Classifier,
    as_estimator,
    check_network,
)
from fishermask_sk.datasets import load_images
from fishermask_sk.strategy import network_report, progress, selection_costs

torch.set_num_threads(1)
torch.set_flush_denormal(True)
digits = load_images("digits", random_state=0)


class DigitTransformer(VisionTransformer):
    def __init__(self):
        super().__init__(
            8, 2, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
        )
        self.conv_proj = nn.Conv2d(1, 32, kernel_size=2, stride=2)


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )


def gib(field):
    """Memory of this process now (VmRSS), or the most of it since the last reset
    (VmHWM), on Linux.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 2**20


def trained(module):
    return NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=2e-3,
        batch_size=16,
        max_epochs=10,
        classes=range(10),
        train_split=None,
        verbose=0,
    )


def probe(n_classes):
    """A linear head on 512 features; nothing is trained."""
    module = nn.Linear(512, n_classes)
    nn.init.normal_(module.weight, std=2 / 512**0.5)
    return as_estimator(module, classes=range(n_classes))


PROBES = {
    "probe": (10, FisherMask(1.0, random_state=0)),
    "part of it": (10, FisherMask(1_000, random_state=0)),
    "100 classes": (100, FisherMask(5_000, n_top_classes=5, random_state=0)),
}
NETS = {
    "mlp": lambda: trained(MLP),
    "resnet": lambda: ResNet18Classifier(
        width=8, classes=range(10), max_epochs=3, min_steps=30, random_state=0
    ),
    "transformer": lambda: trained(DigitTransformer),
}
N_KEPT = 400  # the embeddings of 60,000 samples take 0.8 GiB

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--net", nargs="+", choices=[*NETS, *PROBES], default=[*NETS, *PROBES]
    )
    parser.add_argument(
        "--pool", nargs="+", type=int, default=[1_000, 4_000, 16_000, 60_000]
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for module in (network_report, progress, selection_costs):
        mock.patch.object(module, "perf_counter", time.process_time).start()
    print(
        "net          pool    mask  embeddings  selection  total s (estimate / real)   "
        "     ratio  GiB"
    )
    for name in args.net:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        if name in PROBES:
            n_classes, strategy = PROBES[name]
            net = probe(n_classes)
            X_labeled = rng.normal(size=(200, 512)).astype("float32")
        else:
            X_labeled = digits.X_train[:200]
            net = NETS[name]().fit(X_labeled, digits.y_train[:200])
            strategy = FisherMask(N_KEPT, keep_head=False, random_state=0)
        for n in args.pool:
            if name in PROBES:
                X = rng.normal(size=(n, 512)).astype("float32")
            else:
                X = digits.X_train[rng.integers(0, len(digits.X_train), n)]
                X = (X + 0.05 * rng.normal(size=X.shape)).astype("float32")
            report = check_network(
                net, X, 50, query_strategy=strategy, X_labeled=X_labeled
            )
            Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
            before = gib("VmRSS")
            strategy.select(net, X, 50, X_labeled=X_labeled)
            peak = gib("VmHWM") - before
            real = {**strategy.timings_, "total": sum(strategy.timings_.values())}
            steps = "  ".join(
                f"{report.seconds[step]:.1f} / {real[step]:.1f}" for step in real
            )
            ratio = report.seconds["total"] / real["total"]
            print(
                f"{name:12}{n:>6}  {steps}  {ratio:.2f}  "
                f"{report.bytes['total'] / 2**30:.2f} / {peak:.2f}",
                flush=True,
            )
