"""Study 2: digits (8×8), a balanced and an imbalanced pool, very few labels, 20 seeds.

Fixed before the first run: everything here. The imbalanced pool and the short training
are those of examples/demo.py. Cut to fit two CPU cores: four queries of 15 labels, to
70, where nine of 10, to 100, were planned, and a balanced pool of 300 images instead of
1,200.
"""

from functools import partial

from common import STRATEGIES, Setting, Study, load_pool

from fishermask_sk import ResNet18Classifier

POOLS = {
    "imbalanced": dict.fromkeys(range(3), 60) | dict.fromkeys(range(3, 10), 12),
    "balanced": dict.fromkeys(range(10), 30),
}

STUDY = Study(
    question="Which strategy makes most of very few labels, on digits?",
    n_seeds=20,
    settings=[
        Setting(
            name=name,
            dataset="digits",
            load=partial(load_pool, name="digits", pool=pool),
            estimator=ResNet18Classifier(
                width=16, head_bias=False, classes=range(10), min_steps=30, lr=2e-3
            ),
            strategies=STRATEGIES,
            n_initial=10,
            n_instances=15,
            n_queries=4,
        )
        for name, pool in POOLS.items()
    ],
)
