"""Study 11: a pool most of which is beside the point, 20 seeds.

Fixed before the first run: everything here. The test images are of the wanted classes
alone, and so are the unlabelled images of the target, which are not in the pool. The
runs that gave the idea were not kept: the wanted classes and the seeds were chosen
here, and no curve but random sampling's with seed 0 was looked at. Images of
FashionMNIST and CIFAR-10 (JPEG files) are shrunk to 14×14 and 16×16 pixels; digits have
the net and the budget of study 2.

To be shown, in each of the three settings: the mean accuracy of FisherMask with target
is above that of FisherMask without, and above that of margin sampling. "Above": the 95
% interval of the paired difference (BCa bootstrap over the seeds) is above zero, and p
of the paired t-test, corrected by Holm for all six comparisons of the three settings,
is below 0.05.
"""

from functools import partial
from typing import Any

from common import (
    FOR_PURPOSE,
    SMALL_NET,
    WITH_TARGET,
    Setting,
    Study,
    load_pool_for_purpose,
)

from fishermask_sk import ResNet18Classifier

TITLES = {"fashion-mnist": "FashionMNIST", "digits": "digits", "cifar10": "CIFAR-10"}
POOLS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {
        "wanted": (2, 5, 6, 9),  # pullover, sandal, shirt, ankle boot
        "pool": dict.fromkeys(range(10), 350) | dict.fromkeys((2, 5, 6, 9), 100),
        "n_target": 100,
        "side": 14,
        "n_test": 250,
    },
    "digits": {
        "wanted": (1, 3, 4, 7, 9),
        "pool": dict.fromkeys(range(10), 84) | dict.fromkeys((1, 3, 4, 7, 9), 24),
        "n_target": 50,
    },
    "cifar10": {
        "wanted": (0, 4, 9),  # airplane, deer, truck
        "pool": dict.fromkeys(range(10), 300) | dict.fromkeys((0, 4, 9), 130),
        "n_target": 130,
        "side": 16,
        "n_test": 250,
    },
}
IMAGES: dict[str, Any] = {
    "estimator": SMALL_NET,
    "n_initial": 60,
    "n_instances": 60,
    "n_queries": 3,
}
DIGITS: dict[str, Any] = {
    "estimator": ResNet18Classifier(
        width=16, head_bias=False, classes=range(10), min_steps=30, lr=2e-3
    ),
    "n_initial": 10,
    "n_instances": 15,
    "n_queries": 4,
}

STUDY = Study(
    question="Which strategy buys the right labels where most of the pool is beside "
    "the point?",
    n_seeds=20,
    first_seed=100,
    settings=[
        Setting(
            name=f"{TITLES[name]}, few wanted",
            dataset=name,
            load=partial(load_pool_for_purpose, name=name, **pool),
            strategies=FOR_PURPOSE,
            with_target=tuple(WITH_TARGET),
            **(DIGITS if name == "digits" else IMAGES),
        )
        for name, pool in POOLS.items()
    ],
)
