"""Study 6: CIFAR-10, imbalanced as in study 1, all strategies and the sparsities, 5
seeds: intervals only.

Fixed before the first run: everything here. Cut to fit two CPU cores: three queries of
40 labels, to 180, where eight, to 380, were planned, and 500 test images a class. A
learner's speed and its accuracy with random labels were looked at for one seed. Of the
sparsities 0.005 was cut before the second part was played, and 0.01 when its first
query, of 7,006 weights on one thread, had taken a quarter of an hour.
"""

from functools import partial

from common import STRATEGIES, Setting, Study, load_pool

from fishermask_sk import FisherMask, ResNet18Classifier

STUDY = Study(
    question="Which strategy finds and learns the rare classes, on CIFAR-10?",
    n_seeds=5,
    settings=[
        Setting(
            name="imbalanced",
            dataset="cifar10",
            load=partial(
                load_pool,
                name="cifar10",
                pool={0: 250, 1: 5000, 2: 250, 3: 250},
                n_test=500,
            ),
            estimator=ResNet18Classifier(
                width=16, head_bias=False, classes=range(4), crop_and_flip=True
            ),
            strategies=strategies,
            n_initial=60,
            n_instances=40,
            n_queries=3,
        )
        for strategies in (
            STRATEGIES,
            {f"sparsity {sparsity}": FisherMask(sparsity) for sparsity in (0.001,)},
        )
    ],
)
