"""A ResNet-18 that asks for its own labels
========================================

FisherMask against margin and random sampling, in the loop of modAL.

.. code-block:: sh

    make demo # digits, about three minutes on two cores python examples/demo.py --data
    fashion-mnist # more and larger images, an hour or two

The pool is imbalanced, as pools often are, and the test set is balanced: the labels
worth paying for are those of the rare classes, and nobody knows where these are.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch starts: one thread for each of two processes
os.environ.setdefault("MPLBACKEND", "Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from modAL.uncertainty import margin_sampling
from tqdm import tqdm

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images
from fishermask_sk.modal import ActiveLearner
from fishermask_sk.plotting import LearningCurveDisplay, QueryDisplay

# Images of each class in the pool; labels at first and per query; how to train. Fixed
# before the first run, but for the training on digits, which was shortened once to save
# time.
SETTINGS = {
    "digits": {
        "pool": dict.fromkeys(range(3), 60) | dict.fromkeys(range(3, 10), 12),
        "n_initial": 24,
        "n_instances": 12,
        "n_queries": 5,
        "training": {"min_steps": 30, "lr": 2e-3},
    },
    "fashion-mnist": {
        "pool": {0: 250, 1: 5000, 2: 250, 3: 250},
        "n_initial": 60,
        "n_instances": 40,
        "n_queries": 8,
        "training": {},
    },
}


def random_sampling(random_state):
    """A query strategy is any function of learner and pool that returns positions in
    the pool.
    """
    rng = np.random.default_rng(random_state)
    return lambda learner, X_pool, n_instances: rng.choice(
        len(X_pool), n_instances, replace=False
    )


STRATEGIES = {
    "FisherMask": lambda seed: FisherMask(random_state=seed),
    "margin": lambda seed: margin_sampling,
    "random": random_sampling,
}


def use_one_thread():
    """Two processes on two cores get in each other's way if each wants both."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(
        True
    )  # training on few labels drifts into denormal numbers, which are slow


def play(data, name, seed, n_queries, training):
    """One strategy, all its rounds: the accuracies, and the images it asked for
    first.
    """
    use_one_thread()
    setting = SETTINGS[data]
    images = load_images(data, subset=setting["pool"], random_state=seed)
    X_pool, y_pool = images.X_train, images.y_train

    # The seed alone sets pool, first batch and training, so that all strategies start
    # from the same net.
    rng = np.random.default_rng(seed)
    first = rng.choice(len(X_pool), setting["n_initial"], replace=False)
    classes = range(len(images.classes))  # the first batch may miss some
    net = ResNet18Classifier(
        width=16, head_bias=False, classes=classes, random_state=seed, **training
    )
    learner = ActiveLearner(net, STRATEGIES[name](seed), X_pool[first], y_pool[first])
    X_pool, y_pool = np.delete(X_pool, first, axis=0), np.delete(y_pool, first)

    rows, first_query = [], None
    for i in range(n_queries + 1):
        row = {
            "strategy": name,
            "seed": seed,
            "round": i,
            "n_labels": len(learner.y_training),
        }
        rows.append(row | {"accuracy": learner.score(images.X_test, images.y_test)})
        if i == n_queries:
            return rows, first_query
        query_idx, X_query = learner.query(X_pool, n_instances=setting["n_instances"])
        if i == 0 and name == "FisherMask":
            first_query = QueryDisplay.from_strategy(
                learner.query_strategy,
                X_pool,
                estimator=learner,
                y_pool=y_pool,
                classes=images.classes,
            )
        learner.teach(
            X_query, y_pool[query_idx]
        )  # a person would label here; then the net trains anew
        X_pool, y_pool = (
            np.delete(X_pool, query_idx, axis=0),
            np.delete(y_pool, query_idx),
        )


def report(results):
    """Accuracy against labels, and FisherMask's lead on the same seeds."""
    cells = results.groupby(["n_labels", "strategy"])["accuracy"].agg(["mean", "sem"])
    print("\nAccuracy on balanced test images, mean ± standard error over seeds\n")
    print(
        cells.apply(lambda cell: f"{cell['mean']:.3f} ± {cell['sem']:.3f}", axis=1)
        .unstack()
        .to_string()
    )
    by_seed = results[results["round"] > 0].pivot_table("accuracy", "seed", "strategy")
    print("\nFisherMask's lead, averaged over the rounds after the first query")
    for other in ("margin", "random"):
        lead = by_seed["FisherMask"] - by_seed[other]
        ahead = f"{(lead > 0).sum()} of {len(lead)}"
        print(
            f"  over {other}: {lead.mean():+.3f} ± {lead.sem():.3f}, on {ahead} seeds"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--seeds", type=int, default=5, help="how many repetitions")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results"),
        help="folder for numbers and picture",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one query, hardly any training: does it run?",
    )
    args = parser.parse_args()
    n_queries = 1 if args.quick else SETTINGS[args.data]["n_queries"]
    training = SETTINGS[args.data]["training"] | (
        {"max_epochs": 1} if args.quick else {}
    )
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"demo-{args.data}"

    games = [(name, seed) for seed in range(args.seeds) for name in STRATEGIES]
    played = Parallel(n_jobs=2, return_as="generator")(
        delayed(play)(args.data, name, seed, n_queries, training)
        for name, seed in games
    )
    rows, queries = [], []
    for new_rows, query in tqdm(played, total=len(games), desc="strategies x seeds"):
        rows += new_rows
        queries.append(query)
        pd.DataFrame(rows).to_csv(
            path.with_suffix(".csv"), index=False
        )  # what is done is kept

    report(pd.DataFrame(rows))
    figure = plt.figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    left.suptitle(f"Accuracy on {args.data}")
    LearningCurveDisplay.from_results(rows).plot(left.subplots())
    right.suptitle("Asked for first by FisherMask (framed: wrong guess)")
    queries[0].plot(right.subplots(), n_columns=4, max_images=12)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(f"\nNumbers: {path}.csv\nPicture: {path}.png")


if __name__ == "__main__":
    main()
