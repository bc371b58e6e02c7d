"""What a query keeps and asks for
===============================

Four pictures of FisherMask at work: the images it asks for in three rounds, the weights
its mask keeps, how gains fall within a query, and where the picks lie among the
embeddings of the pool, beside those of margin sampling.

.. code-block:: sh

    python examples/pictures.py --output docs/images # digits and a narrow ResNet-18;
    keeps the pictures python examples/pictures.py --quick # a tiny net, hardly trained:
    does it run?
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.baselines import margin_sampling
from fishermask_sk.datasets import load_images
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.modal import ActiveLearner
from fishermask_sk.plotting import MaskDisplay, QueryDisplay

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--quick", action="store_true", help="a tiny net, hardly trained")
parser.add_argument("--output", type=Path, help="folder for the pictures")
args = parser.parse_args()
torch.set_flush_denormal(
    True
)  # training on few labels drifts into denormal numbers, which are slow


def keep(figure, name):
    if args.output is not None:
        figure.savefig(args.output / f"{name}.png", dpi=100)


images = load_images("digits", subset=dict.fromkeys(range(10), 30), random_state=0)
X_pool, y_pool, n = images.X_train, images.y_train, 30
training = {
    "max_epochs": 1 if args.quick else 200,
    "min_steps": 30,
    "lr": 2e-3,
    "random_state": 0,
}
net = ResNet18Classifier(
    4 if args.quick else 16, head_bias=False, classes=range(10), **training
)
strategy = FisherMask(0.02 if args.quick else 0.002, random_state=0)
learner = ActiveLearner(net, strategy, X_pool[:n], y_pool[:n])
X_pool, y_pool = X_pool[n:], y_pool[n:]

# %%
# Three rounds
# ------------
# A row is a round, its images from left to right in the order in which they were
# picked. A thick frame marks a guess that was wrong. Gains of different rounds cannot
# be compared.
figure = plt.figure(figsize=(8, 5.2), layout="constrained")
for row in figure.subfigures(3, 1):
    query_idx, X_query = learner.query(X_pool, n_instances=20)
    row.suptitle(
        f"{len(learner.X_training)} labels: the first 8 of 20 picks", fontsize=9
    )
    asked = QueryDisplay.from_strategy(
        strategy, X_pool, estimator=learner, y_pool=y_pool
    )
    asked.plot(row.subplots(), n_columns=8, max_images=8)
    learner.teach(X_query, y_pool[query_idx])
    X_pool, y_pool = np.delete(X_pool, query_idx, axis=0), np.delete(y_pool, query_idx)
keep(figure, "rounds")

# %%
# What the mask keeps
# -------------------
query_idx = strategy.select(net, X_pool, n_instances=20, X_labeled=learner.X_training)
keep(MaskDisplay.from_strategy(strategy, module=net.module_).plot().figure_, "mask")

# %%
# What the picks were worth
# -------------------------
# Bars are gains; the line is the share of the whole query's gain that is reached after
# each pick.
keep(QueryDisplay.from_strategy(strategy, X_pool).plot_gains().figure_, "gains")

# %%
# Where the picks lie
# -------------------
# Each point is an image's embedding, its gradients on the mask, in the two directions
# in which the pool varies most.
module, pixels = net.module_.eval(), torch.as_tensor(X_pool)
mask_indices = torch.as_tensor(strategy.mask_indices_)
embeddings = (
    PerSampleGradients(module, module, pixels)
    .embeddings(pixels, mask_indices)
    .flatten(1)
    .double()
)
centred = embeddings - embeddings.mean(0)
places = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
figure, panels = plt.subplots(
    1, 2, figsize=(8, 4), layout="constrained", sharex=True, sharey=True
)
by_margin = margin_sampling(net, X_pool, n_instances=20)
for ax, name, picks in zip(
    panels, ("FisherMask", "margin sampling"), (query_idx, by_margin), strict=True
):
    ax.scatter(*places.T, s=8, color="0.6", label="pool")
    ax.scatter(
        *places[picks].T,
        s=45,
        facecolors="#E69F00",
        edgecolors="black",
        marker="s",
        label="20 picks",
    )
    ax.legend(title=name, frameon=False)
keep(figure, "embeddings")
