"""A Vision Transformer
====================

First what a query on it would cost, then the loop, then another device.

.. code-block:: sh

    python examples/vision_transformer.py # digits, on two layers and 16 patches python
    examples/vision_transformer.py --quick # hardly trained: does it run?
"""

import argparse
import tempfile
from pathlib import Path

import joblib
import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import nn
from torchvision.models import VisionTransformer

from fishermask_sk import FisherMask, check_network
from fishermask_sk.datasets import load_images
from fishermask_sk.modal import ActiveLearner

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--quick", action="store_true", help="hardly trained")
quick = parser.parse_args().quick
torch.manual_seed(0)


class DigitTransformer(VisionTransformer):
    """Torchvision's, for one channel and 8 by 8 pixels."""

    def __init__(self):
        super().__init__(
            8,
            2,
            num_layers=2,
            num_heads=4,
            hidden_dim=32,
            mlp_dim=64,
            num_classes=10,
            dropout=0.1,
        )
        self.conv_proj = nn.Conv2d(1, 32, kernel_size=2, stride=2)


images = load_images(
    "digits", subset=dict.fromkeys(range(10), 10 if quick else 80), random_state=0
)
net = NeuralNetClassifier(
    DigitTransformer,
    criterion=nn.CrossEntropyLoss,  # the module returns logits
    optimizer=torch.optim.AdamW,
    optimizer__weight_decay=0.05,
    lr=2e-3,
    batch_size=16,
    max_epochs=2 if quick else 60,
    classes=range(10),  # the first labels may miss some classes
    train_split=None,
    verbose=0,
)
X_pool, y_pool, n = images.X_train, images.y_train, 40
learner = ActiveLearner(net, FisherMask(0.05, random_state=0), X_pool[:n], y_pool[:n])
X_pool, y_pool = X_pool[n:], y_pool[n:]

# Before anything is spent: how gradients are found, what the mask may touch, and a
# query on a pool of 60,000.
print(check_network(learner, X_pool, n_instances=20, n_pool=60_000))


def ask_and_teach():
    """One round; `y_pool` stands for whoever labels."""
    global X_pool, y_pool
    query_idx, X_query = learner.query(X_pool, n_instances=20)
    learner.teach(X_query, y_pool[query_idx])
    X_pool, y_pool = np.delete(X_pool, query_idx, axis=0), np.delete(y_pool, query_idx)
    print(
        f"{len(learner.X_training)} labels: accuracy "
        f"{learner.score(images.X_test, images.y_test):.3f}"
    )


for _ in range(1 if quick else 4):
    ask_and_teach()

# A saved learner goes on where it was, on whatever device the next machine has.
with tempfile.TemporaryDirectory() as folder:
    joblib.dump(learner, Path(folder) / "learner.pkl")
    learner = joblib.load(
        Path(folder) / "learner.pkl"
    )  # weights of an absent GPU come to the CPU
learner.estimator.set_params(device="cuda" if torch.cuda.is_available() else "cpu")
learner.estimator.module_.to(learner.estimator.device)
ask_and_teach()
