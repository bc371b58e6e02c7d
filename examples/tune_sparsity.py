"""Tune the sparsity by cross-validation
=====================================

What decides is the score after the label budget is spent.

.. code-block:: sh

    python examples/tune_sparsity.py # digits and the paper's narrow ResNet-18 python
    examples/tune_sparsity.py --quick # a tiny net, hardly trained: does it run?

This needs a data set that is **labelled already**. A search plays active learning many
times over and judges by held-out labels; on the pool that is to be labelled, that would
cost more labels than it could ever save. Take a labelled set that resembles yours, a
proxy, and carry the sparsity over.
"""

import argparse

from sklearn.model_selection import GridSearchCV, StratifiedKFold

from fishermask_sk import ActiveLearningClassifier, FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images
from fishermask_sk.results import Table

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--quick", action="store_true", help="a tiny net, hardly trained")
parser.add_argument(
    "--n-jobs",
    type=int,
    default=1,
    help="processes; each holds a pool and its k×k matrices",
)
args = parser.parse_args()

# Imbalanced, as pools often are: three common classes and seven rare ones.
pool = dict.fromkeys(range(3), 60) | dict.fromkeys(
    range(3, 10), 12 if args.quick else 20
)
images = load_images("digits", subset=pool, random_state=0)

net = ResNet18Classifier(
    width=4 if args.quick else 16,
    head_bias=False,
    classes=range(10),  # a batch may miss some classes
    max_epochs=1 if args.quick else 200,
    min_steps=30,
    lr=2e-3,
)
loop = ActiveLearningClassifier(
    net,
    # At a width of 4, a thousandth of the weights is less than the head; at 16
    # FisherMask warns that it is.
    FisherMask(keep_head=not args.quick),
    n_initial=24,
    n_instances=24 if args.quick else 48,
    # A hundredth of the weights makes matrices of 7,014 rows: queries take most of the
    # time.
    n_queries=1,
    # The same first batch and the same training noise for every sparsity.
    random_state=0,
)
search = GridSearchCV(
    loop,
    {"query_strategy__sparsity": [0.01, 0.005, 0.002, 0.001]},
    scoring="balanced_accuracy",
    cv=StratifiedKFold(2, shuffle=True, random_state=0),
    n_jobs=args.n_jobs,
)
search.fit(images.X_train, images.y_train)

results = search.cv_results_
print(
    Table(
        {
            "sparsity": sparsity,
            "balanced accuracy": float(results["mean_test_score"][i]),
            "± over folds": float(results["std_test_score"][i]),
        }
        for i, sparsity in enumerate(results["param_query_strategy__sparsity"])
    )
)
print(f"best sparsity: {search.best_params_['query_strategy__sparsity']}")
print(
    f"labels spent per candidate: {len(search.best_estimator_.labeled_indices_)} of "
    f"{len(images.y_train)}"
)
print(
    f"accuracy on the test images: {search.score(images.X_test, images.y_test):.3f} "
    "(balanced)"
)
