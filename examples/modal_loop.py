"""FisherMask in a modAL loop
==========================

In a loop that you have already, one argument changes. Half a minute on one core.
"""

# %%
# What a loop has anyway
# ----------------------
# A pool, a few labels to start from, and an estimator. FisherMask looks at gradients,
# so the estimator is a skorch net: here a narrow ResNet-18, and with a module of your
# own ``skorch.NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss)``. All classes
# are named, because the first labels may lack some.
import numpy as np

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images

WIDTH, MAX_EPOCHS = 16, 200
SPARSITY, N_ROUNDS = 0.002, 4

images = load_images("digits", subset=dict.fromkeys(range(10), 30), random_state=0)
X, y = images.X_train, images.y_train
first = np.random.default_rng(0).choice(len(X), 30, replace=False)
X_pool, y_pool = np.delete(X, first, axis=0), np.delete(y, first)
net = ResNet18Classifier(
    WIDTH, classes=range(10), max_epochs=MAX_EPOCHS, random_state=0
)

# %%
# The argument that changes
# -------------------------
# ``query_strategy`` was ``uncertainty_sampling``. The learner is modAL's own class, in
# a form that works on every supported scikit-learn.
from fishermask_sk.modal import ActiveLearner

learner = ActiveLearner(
    estimator=net,
    query_strategy=FisherMask(SPARSITY, random_state=0),
    X_training=X[first],
    y_training=y[first],
)
accuracy = learner.score(images.X_test, images.y_test)
print(f"{len(first)} labels: accuracy {accuracy:.3f}")

# %%
# The loop
# --------
# Nothing changes here. ``y_pool`` stands for the person who labels.
for _ in range(N_ROUNDS):
    query_idx, X_query = learner.query(X_pool, n_instances=15)
    learner.teach(X_query, y_pool[query_idx])
    X_pool, y_pool = np.delete(X_pool, query_idx, axis=0), np.delete(y_pool, query_idx)
    accuracy = learner.score(images.X_test, images.y_test)
    print(f"{len(learner.y_training)} labels: accuracy {accuracy:.3f}")

# %%
# How many picks were worth asking for?
# -------------------------------------
# The share of the last query's gain that was reached after each pick. Gains of
# different queries cannot be compared: mask and information are new each time.
gains = learner.query_strategy.trace_reductions_
print("share after each pick:", *np.round(gains.cumsum() / gains.sum(), 2))
# sphinx_gallery_thumbnail_path = 'images/rounds.svg'
