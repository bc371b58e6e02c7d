"""Seven strategies, seed by seed
==============================

FisherMask and six other query strategies on an imbalanced pool, seed by seed.

.. code-block:: sh

    python examples/compare_strategies.py            # digits and a narrow ResNet-18
    python examples/compare_strategies.py --quick # a tiny net, hardly trained: does it
    run?

Stop it whenever you like and start it again: rounds that are in the results file are
not played again.
"""

import argparse
from pathlib import Path

from fishermask_sk import FisherMask, ResNet18Classifier, compare_strategies
from fishermask_sk.baselines import (
    badge_sampling,
    bait_sampling,
    entropy_sampling,
    kcenter_sampling,
    margin_sampling,
    random_sampling,
)
from fishermask_sk.datasets import load_images
from fishermask_sk.plotting import LearningCurveDisplay

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--quick", action="store_true", help="a tiny net, hardly trained")
parser.add_argument("--n-jobs", type=int, default=1, help="processes")
parser.add_argument(
    "--output",
    type=Path,
    default=Path("results"),
    help="folder for numbers and picture",
)
args = parser.parse_args()
args.output.mkdir(parents=True, exist_ok=True)

# Three common classes and seven rare ones in the pool, all as common as each other in
# the test set.
images = load_images(
    "digits",
    subset=dict.fromkeys(range(3), 60) | dict.fromkeys(range(3, 10), 12),
    random_state=0,
)
results = compare_strategies(
    ResNet18Classifier(
        width=4 if args.quick else 16,
        head_bias=False,
        classes=range(10),  # a first batch may miss some classes
        max_epochs=1 if args.quick else 200,
        min_steps=30,
        lr=2e-3,
    ),
    {
        "FisherMask": FisherMask(sparsity=0.05 if args.quick else 0.002),
        "BAIT": bait_sampling,
        "BADGE": badge_sampling,
        "core-set": kcenter_sampling,
        "margin": margin_sampling,
        "entropy": entropy_sampling,
        "random": random_sampling,
    },
    images.X_train,
    images.y_train,
    images.X_test,
    images.y_test,
    n_initial=24,
    n_instances=12,
    n_queries=1 if args.quick else 5,
    seeds=1 if args.quick else 5,
    n_jobs=args.n_jobs,
    results=args.output / ("compare-quick.jsonl" if args.quick else "compare.jsonl"),
    verbose=1,
)

print(results.summary(baseline="random", metric="balanced_accuracy"))
picture = args.output / "compare.png"
LearningCurveDisplay.from_results(
    results, metric="balanced_accuracy"
).plot().figure_.savefig(picture, dpi=110)
print(f"Picture: {picture}")
