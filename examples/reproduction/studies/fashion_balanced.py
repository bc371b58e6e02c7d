"""Study 4: FashionMNIST, a balanced pool of 2,000 images of ten classes, 10 seeds.

Fixed before the first run: everything here. Cut to fit two CPU cores: two queries of 100 labels, to 300, where five, to
600, were planned, a pool of 2,000 instead of 4,000 images, and 200 test images a class.
"""

from functools import partial

from common import STRATEGIES, Setting, Study, load_pool

from fishermask_sk import ResNet18Classifier

STUDY = Study(
    question="Does choosing pay where all classes are equally common, on FashionMNIST?",
    n_seeds=10,
    settings=[
        Setting(
            name="balanced",
            dataset="fashion-mnist",
            load=partial(load_pool, name="fashion-mnist", pool=dict.fromkeys(range(10), 200), n_test=200),
            estimator=ResNet18Classifier(width=16, head_bias=False, classes=range(10)),
            strategies=STRATEGIES,
            n_initial=100,
            n_instances=100,
            n_queries=2,
        )
    ],
)
