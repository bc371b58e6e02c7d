"""A ResNet-18 that asks for its own labels
========================================

FisherMask against margin and random sampling, in the loop of modAL.

.. code-block:: sh

    make demo # three seeds, about three minutes on two cores
    python examples/demo.py --seeds 5

The pool is as scraped and filmed pools are: the model will read the digits 5 to 9, most
of the pool are others, and everything is in it four times. FisherMask plays twice. Once
it is told what the model is for, by a hundred unlabelled images of the digits 5 to 9.
It looks at the last layer's weights alone, as the page "Choose for a purpose" advises.
"""

import argparse
import os
from functools import partial
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

# All of this, and the seeds 0 to 4, were fixed before the first run; the last layer
# came later, before its own, when two studies had found it better than the default mask
# (docs/studies/variants.md, near_duplicates.md). Without --seeds the first three seeds
# are played, to save time.
WANTED = range(5, 10)
N_OTHERS, N_WANTED, N_TARGET = 32, 8, 20  # images a digit
N_FRAMES, NOISE = 4, 0.03
N_INITIAL, N_INSTANCES, N_QUERIES = 20, 15, 4
TRAINING = {"min_steps": 30, "lr": 2e-3}


def load(seed):
    """Pool, its labels and which image each frame is of; target; test images of the
    wanted digits.
    """
    counts = dict.fromkeys(range(10), N_OTHERS)
    counts |= dict.fromkeys(WANTED, N_WANTED + N_TARGET)
    digits = load_images("digits", subset=counts, random_state=seed)
    X, y = digits.X_train, digits.y_train
    target = np.concatenate([np.flatnonzero(y == c)[:N_TARGET] for c in WANTED])

    rng = np.random.default_rng(seed)
    image = np.repeat(np.setdiff1d(np.arange(len(X)), target), N_FRAMES)
    image = rng.permutation(image)
    frames = X[image] + rng.normal(scale=NOISE, size=X[image].shape)
    tested = np.isin(digits.y_test, WANTED)
    return (
        np.clip(frames, 0, 1).astype("float32"),
        y[image],
        image,
        X[target],
        digits.X_test[tested],
        digits.y_test[tested],
    )


def random_sampling(seed):
    """A query strategy is any function of learner and pool that returns positions in
    the pool.
    """
    rng = np.random.default_rng(seed)
    return lambda learner, X_pool, n_instances: rng.choice(
        len(X_pool), n_instances, replace=False
    )


STRATEGIES = {
    "FisherMask with target": lambda seed, X_target: partial(
        FisherMask(layers="last", random_state=seed), X_target=X_target
    ),
    "FisherMask": lambda seed, X_target: FisherMask(layers="last", random_state=seed),
    "margin": lambda seed, X_target: margin_sampling,
    "random": lambda seed, X_target: random_sampling(seed),
}


def play(name, seed, n_queries, training):
    """One strategy, all its rounds: what they scored, and the first query's images."""
    # Two processes on two cores get in each other's way if each wants both. Training on
    # few labels drifts into denormal numbers, which are slow.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    X_pool, y_pool, image, X_target, X_test, y_test = load(seed)

    # The seed alone sets pool, first batch and training, so that all strategies start
    # from the same net.
    first = np.random.default_rng(seed).choice(len(X_pool), N_INITIAL, replace=False)
    net = ResNet18Classifier(
        width=16, head_bias=False, classes=range(10), random_state=seed, **training
    )
    strategy = STRATEGIES[name](seed, X_target)
    learner = ActiveLearner(net, strategy, X_pool[first], y_pool[first])
    left, bought = np.setdiff1d(np.arange(len(X_pool)), first), first

    rows, display = [], None
    for i in range(n_queries + 1):
        of_wanted = np.isin(y_pool[bought], WANTED)
        rows.append(
            {
                "strategy": name,
                "seed": seed,
                "round": i,
                "n_labels": len(bought),
                "accuracy": learner.score(X_test, y_test),
                "wanted": of_wanted.sum(),
                "different": len(np.unique(image[bought[of_wanted]])),
            }
        )
        if i == n_queries:
            return rows, display
        query_idx, X_query = learner.query(X_pool[left], n_instances=N_INSTANCES)
        picked = left[query_idx]
        if display is None:
            guesses = learner.predict(X_query)
            display = QueryDisplay(X_query, query_idx, None, guesses, y_pool[picked])
        # A person would label here; then the net trains anew.
        learner.teach(X_query, y_pool[picked])
        left, bought = np.setdiff1d(left, picked), np.r_[bought, picked]


def report(results):
    """Accuracy against labels, leads on the same seeds, and what was bought."""
    cells = results.groupby(["n_labels", "strategy"])["accuracy"].agg(["mean", "sem"])
    print("\nAccuracy on the digits 5 to 9, mean ± standard error over seeds\n")
    cells = cells.apply(lambda cell: f"{cell['mean']:.3f} ± {cell['sem']:.3f}", axis=1)
    print(cells.unstack()[list(STRATEGIES)].to_string())
    by_seed = results[results["round"] > 0].pivot_table("accuracy", "seed", "strategy")
    print("\nLead over margin sampling, averaged over the rounds after the first query")
    for name in STRATEGIES:
        if name != "margin":
            lead = by_seed[name] - by_seed["margin"]
            ahead = f"{(lead > 0).sum()} of {len(lead)}"
            print(f"  {name}: {lead.mean():+.3f} ± {lead.sem():.3f}, on {ahead} seeds")
    last = results[results["n_labels"] == results["n_labels"].max()]
    bought = last.groupby("strategy")[["wanted", "different"]].mean()
    print(f"\nOf {last['n_labels'].iloc[0]} labels")
    for name in STRATEGIES:
        wanted, different = bought.loc[name]
        print(f"  {name}: {wanted:.0f} of wanted digits, {different:.0f} images apart")


def draw(rows, queries):
    """The curves, and what two strategies asked for first."""
    figure = plt.figure(figsize=(12, 4.8), layout="constrained")
    left, *first_queries = figure.subfigures(
        1, 3, width_ratios=[1.2, 1, 1], squeeze=False
    ).flat
    left.suptitle("Accuracy on the digits 5 to 9")
    ax = left.subplots()
    LearningCurveDisplay.from_results(rows).plot(ax)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    for part, name in zip(
        first_queries, ("margin", "FisherMask with target"), strict=True
    ):
        part.suptitle(f"Asked for first by {name}")
        queries[name].plot(part.subplots(), n_columns=4, max_images=12)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many repetitions")
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
    n_queries = 1 if args.quick else N_QUERIES
    training = TRAINING | ({"max_epochs": 1} if args.quick else {})
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "demo-digits"

    games = [(name, seed) for seed in range(args.seeds) for name in STRATEGIES]
    played = Parallel(n_jobs=2, return_as="generator")(
        delayed(play)(name, seed, n_queries, training) for name, seed in games
    )
    rows, queries = [], {}
    for new_rows, query in tqdm(played, total=len(games), desc="strategies x seeds"):
        rows += new_rows
        queries.setdefault(new_rows[0]["strategy"], query)
        pd.DataFrame(rows).to_csv(
            path.with_suffix(".csv"), index=False
        )  # what is done is kept

    report(pd.DataFrame(rows))
    figure = draw(rows, queries)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(f"\nNumbers: {path}.csv\nPicture: {path}.png")


if __name__ == "__main__":
    main()
