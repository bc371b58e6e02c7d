"""Study 13: a pool of bursts of near-duplicates in which most is beside the point, 20
seeds.

Fixed before the first run: everything here. Bursts are eight noisy copies of an image
(FashionMNIST) or eight frames of one scene (CIFAR-10, moved by a pixel, flipped, darker
or brighter). The wanted classes are a fifth of the pool; the test images are of these
classes alone, and so are the unlabelled images of the target, which are not in the
pool. The runs that gave the idea were not kept: the wanted classes and the seeds were
chosen here, and no curve but random sampling's with seed 0 was looked at. All images
are shrunk (14×14 and 16×16 pixels), so that a curve takes well under a minute.

To be shown, in at least one of the two settings: the mean accuracy of FisherMask with
target is above that of margin sampling, and above that of both rivals that know the
target (weighted margin, facility location). "Above": the 95 % interval of the paired
difference (BCa bootstrap over the seeds) is above zero, and p of the paired t-test,
corrected by Holm for all six comparisons of both settings, is below 0.05. If it is not
so, the page says it.
"""

from functools import partial
from typing import Any

from common import (
    FOR_PURPOSE,
    SMALL_NET,
    WITH_TARGET,
    Setting,
    Study,
    all_repeated,
    filmed,
    load_pool_for_purpose,
    noisy,
)

TITLES = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR-10"}
POOLS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {
        "wanted": (3, 4, 6, 9),  # dress, coat, shirt, ankle boot
        "pool": dict.fromkeys(range(10), 40) | dict.fromkeys((3, 4, 6, 9), 15),
        "n_target": 100,
        "side": 14,
        "n_test": 250,
        "repeat": partial(all_repeated, times=8, vary=noisy),
    },
    "cifar10": {
        "wanted": (1, 7, 8),  # automobile, horse, ship
        "pool": dict.fromkeys(range(10), 34) | dict.fromkeys((1, 7, 8), 20),
        "n_target": 130,
        "side": 16,
        "n_test": 250,
        "repeat": partial(all_repeated, times=8, vary=filmed),
    },
}

STUDY = Study(
    question="Which strategy buys the right labels where most of the pool is beside "
    "the point, and all of it is there eight times?",
    n_seeds=20,
    first_seed=100,
    settings=[
        Setting(
            name=f"{TITLES[name]}, a fifth wanted, each eight times",
            dataset=name,
            load=partial(load_pool_for_purpose, name=name, **pool),
            estimator=SMALL_NET,
            strategies=FOR_PURPOSE,
            with_target=tuple(WITH_TARGET),
            n_initial=60,
            n_instances=60,
            n_queries=3,
        )
        for name, pool in POOLS.items()
    ],
)
