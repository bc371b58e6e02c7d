"""What a first stage costs in gain: picks among few candidates against picks among all,
on digits.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python benchmarks/candidates.py

The share is of the sum of all trace reductions; what the pool needs to know comes from
all samples either way.
"""

from functools import partial

import numpy as np
from skorch import NeuralNetClassifier
from torch import manual_seed, nn

from fishermask_sk import FisherMask
from fishermask_sk.baselines import margin_sampling, random_sampling
from fishermask_sk.datasets import load_images

N_LABELED, N_POOL, N_INSTANCES = 100, 1100, 50


def main():
    digits = load_images("digits", random_state=0)
    X, y = (
        digits.X_train.reshape(len(digits.X_train), -1).astype("float32"),
        digits.y_train,
    )
    shares: dict[tuple[str, int], list[float]] = {}
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(X))
        known, pool = X[order[:N_LABELED]], X[order[N_LABELED:][:N_POOL]]
        manual_seed(seed)
        module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        net = NeuralNetClassifier(
            module,
            criterion=nn.CrossEntropyLoss,
            lr=0.3,
            max_epochs=60,
            verbose=0,
            train_split=None,
        ).fit(known, np.int64(y[order[:N_LABELED]]))
        strategy = FisherMask(500, random_state=0)

        def gain(candidates, strategy=strategy, net=net, pool=pool, known=known):
            strategy.select(
                net, pool, N_INSTANCES, X_labeled=known, candidates=candidates
            )
            return strategy.trace_reductions_.sum()

        exact = gain(None)
        for proposer in (margin_sampling, random_sampling):
            for n in (50, 75, 100, 150, 200, 300, 600):
                proposed = partial(proposer, n_instances=n, random_state=seed)
                shares.setdefault((proposer.__name__, n), []).append(
                    gain(proposed) / exact
                )
    print(
        f"{N_INSTANCES} picks from {len(pool):,} digits, k = 500, {N_LABELED} labels, "
        "mean of 3 nets (range)"
    )
    for (name, n), found in shares.items():
        print(
            f"{name:18}{n:6}{np.mean(found):8.3f}  ({min(found):.3f} to "
            f"{max(found):.3f})"
        )


if __name__ == "__main__":
    main()
