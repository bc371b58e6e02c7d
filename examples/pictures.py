"""What a query keeps and asks for
===============================

Four pictures of FisherMask at work. A minute on one core.
"""

# %%
# A learner with 30 labels
# ------------------------
import numpy as np
import torch

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images
from fishermask_sk.modal import ActiveLearner

WIDTH, MAX_EPOCHS, SPARSITY = 16, 200, 0.002
images = load_images("digits", subset=dict.fromkeys(range(10), 30), random_state=0)
X_pool, y_pool, n = images.X_train, images.y_train, 30
training = {"max_epochs": MAX_EPOCHS, "min_steps": 30, "lr": 2e-3, "random_state": 0}
net = ResNet18Classifier(WIDTH, head_bias=False, classes=range(10), **training)
strategy = FisherMask(SPARSITY, random_state=0)
learner = ActiveLearner(net, strategy, X_pool[:n], y_pool[:n])
X_pool, y_pool = X_pool[n:], y_pool[n:]

# %%
# Three rounds
# ------------
# A row is a round, in the order of picking. A thick frame marks a wrong guess. Gains of
# different rounds cannot be compared.
import matplotlib.pyplot as plt

from fishermask_sk.plotting import MaskDisplay, QueryDisplay

rounds = plt.figure(figsize=(8, 5.2), layout="constrained")
for row in rounds.subfigures(3, 1, squeeze=False).flat:
    query_idx, X_query = learner.query(X_pool, n_instances=20)
    row.suptitle(f"{len(learner.X_training)} labels: the first 8 of 20 picks")
    seen = QueryDisplay.from_strategy(
        strategy, X_pool, estimator=learner, y_pool=y_pool
    )
    seen.plot(row.subplots(), n_columns=8, max_images=8)
    learner.teach(X_query, y_pool[query_idx])
    X_pool, y_pool = np.delete(X_pool, query_idx, axis=0), np.delete(y_pool, query_idx)

# %%
# What the mask keeps
# -------------------
# How many weights of each layer, and which share of the layer that is.
query_idx = strategy.select(net, X_pool, n_instances=20, X_labeled=learner.X_training)
mask = MaskDisplay.from_strategy(strategy, module=net.module_).plot().figure_

# %%
# What the picks were worth
# -------------------------
# Bars are gains, the line their sum as a share of the whole query's.
gains = QueryDisplay.from_strategy(strategy, X_pool).plot_gains().figure_

# %%
# Where the picks are
# -------------------
# Each point is an image's gradients on the mask, in two directions.
from sklearn.decomposition import PCA

from fishermask_sk.baselines import margin_sampling
from fishermask_sk.gradients import PerSampleGradients

module, pixels = net.module_.eval(), torch.as_tensor(X_pool)
gradients = PerSampleGradients(module, module, pixels)
positions = torch.as_tensor(strategy.mask_indices_)
places = PCA(2).fit_transform(gradients.embeddings(pixels, positions).flatten(1))
embeddings, panels = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
panels[0].set_ylabel("second principal direction")
margin = margin_sampling(net, X_pool, n_instances=20)
picks = [("FisherMask", query_idx, "#0072B2"), ("margin sampling", margin, "#D55E00")]
for ax, (name, chosen, color) in zip(panels, picks, strict=True):
    ax.scatter(*places.T, s=8, color="0.6", label="pool")
    ax.scatter(*places[chosen].T, s=40, marker="s", color=color, label="20 picks")
    ax.set_xlabel("first principal direction of the embeddings")
    ax.legend(title=name, frameon=False)
