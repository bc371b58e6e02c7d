"""Study 5: all strategies, and one change to FisherMask at a time, on study 1 made
small, 10 seeds.

Fixed before the first run: everything here. The parts are played in this order, so that
what is most asked for is there first. Cut to fit two busy CPU cores: three queries of
60 labels, to 240, where eight of 40, to 380, were planned; λ in four steps instead of
five; no mask of 4,096 samples (the pool has 2,300); 250 test images a class.
"""

from common import (
    BASELINES,
    STRATEGIES,
    PickWeighsOne,
    Study,
    WithoutLabeled,
    fashion_imbalanced_small,
)

from fishermask_sk import FisherMask

BATCHES = {name: BASELINES[name] for name in ("random", "margin")} | {
    "FisherMask": FisherMask()
}

STUDY = Study(
    question=(
        "What in FisherMask matters, and how does it stand beside the others, "
        "on a small imbalanced pool?"
    ),
    n_seeds=10,
    settings=[
        fashion_imbalanced_small(STRATEGIES),
        fashion_imbalanced_small(
            {
                "without √p": FisherMask(weighting="uniform"),
                "head not kept": FisherMask(keep_head=False),
                "random mask": FisherMask(mask="random"),
                "per-layer mask": FisherMask(mask="per_layer"),
                "oversample 2": FisherMask(oversample=2),
                "without labelled": WithoutLabeled(),
                "pick weighs 1/(L+b)": PickWeighsOne(),
            }
        ),
        fashion_imbalanced_small(
            {
                "λ = 0.001": FisherMask(damping=1e-3),
                "λ = 0.1": FisherMask(damping=0.1),
                "λ = 10": FisherMask(damping=10.0),
                "256 mask samples": FisherMask(n_mask_samples=256),
            }
        ),
        fashion_imbalanced_small(
            BATCHES, "imbalanced 14x14, 180 a query", n_instances=180, n_queries=1
        ),
        fashion_imbalanced_small(
            BATCHES, "imbalanced 14x14, 20 a query", n_instances=20, n_queries=9
        ),
    ],
)
