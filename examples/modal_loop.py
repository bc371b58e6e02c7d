"""FisherMask in a modAL loop
==========================

In a loop that you have already, one argument changes.

.. code-block:: sh

    python examples/modal_loop.py            # digits and a narrow ResNet-18
    python examples/modal_loop.py --quick    # a tiny net, hardly trained: does it run?
"""

import argparse

import numpy as np

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images
from fishermask_sk.modal import (
    ActiveLearner,
)  # modAL's, on every supported scikit-learn

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--quick", action="store_true", help="a tiny net, hardly trained")
quick = parser.parse_args().quick

# What a loop has anyway: a pool, a few labels to start from, an estimator.
images = load_images("digits", subset=dict.fromkeys(range(10), 30), random_state=0)
rng = np.random.default_rng(0)
first = rng.choice(len(images.X_train), 30, replace=False)
X_pool, y_pool = (
    np.delete(images.X_train, first, axis=0),
    np.delete(images.y_train, first),
)
net = ResNet18Classifier(
    width=4 if quick else 16,
    classes=range(10),  # the first labels may miss some classes
    max_epochs=1 if quick else 200,
    random_state=0,
)

learner = ActiveLearner(
    estimator=net,
    query_strategy=FisherMask(
        sparsity=0.01 if quick else 0.002, random_state=0
    ),  # was: uncertainty_sampling
    X_training=images.X_train[first],
    y_training=images.y_train[first],
)
print(
    f"{len(first)} labels: accuracy {learner.score(images.X_test, images.y_test):.3f}"
)

for _ in range(1 if quick else 4):
    query_idx, X_query = learner.query(X_pool, n_instances=15)
    learner.teach(X_query, y_pool[query_idx])  # your oracle goes here
    X_pool, y_pool = np.delete(X_pool, query_idx, axis=0), np.delete(y_pool, query_idx)
    accuracy = learner.score(images.X_test, images.y_test)
    print(f"{len(learner.y_training)} labels: accuracy {accuracy:.3f}")

# How many of the 15 were worth asking? The share of the whole query's gain that was
# reached after each pick. Gains of different queries cannot be compared: mask and
# information are new ones each time.
gains = learner.query_strategy.trace_reductions_
print(
    "share of the last query's gain after each pick:",
    *np.round(gains.cumsum() / gains.sum(), 2),
)
