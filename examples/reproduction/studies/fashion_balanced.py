"""Study 4: FashionMNIST, a balanced pool of 4,000 images of ten classes, 10 seeds.

Fixed before the first run: everything here. Cut to fit two CPU cores: images of 14×14
pixels with the short training of study 5, and three queries of 100 labels, to 400,
where five, to 600, were planned; 100 test images a class. Half of the pool and two
queries of 28×28 images would have taken twice as long. The net has width 16: at width 8
the head alone, 640 weights for ten classes, would be more than the mask.
"""

from functools import partial

from common import STRATEGIES, Setting, Study, load_pool

from fishermask_sk import ResNet18Classifier

STUDY = Study(
    question="Does choosing pay where all classes are equally common, on FashionMNIST?",
    n_seeds=10,
    settings=[
        Setting(
            name="balanced 14x14",
            dataset="fashion-mnist",
            load=partial(
                load_pool,
                name="fashion-mnist",
                pool=dict.fromkeys(range(10), 400),
                side=14,
                n_test=100,
            ),
            estimator=ResNet18Classifier(
                width=16, head_bias=False, classes=range(10), min_steps=40, lr=2e-3
            ),
            strategies=STRATEGIES,
            n_initial=100,
            n_instances=100,
            n_queries=3,
        )
    ],
)
