"""Study 12: a pool with the same thing in it many times, 20 seeds.

Fixed before the first run: everything here. Digits: twelve images of each class, each
five times with noise of 0.03. CIFAR-10 (JPEG files, shrunk to 16×16 pixels): 75 images
of each of four classes (ten are too many for so few labels: random sampling ended at 19
% with one seed that is none of the study's), each eight times, moved by up to a pixel,
half of them flipped, up to a tenth darker or brighter. FashionMNIST (14×14): a hundred
images of each class, of which six are there 24 times and the others once, all with
noise of 0.03; batches of 60 labels, and of 20 and 180 beside them. In the runs that
gave the idea, which were not kept, FashionMNIST had all images eight times.

To be shown, in at least two of the three data sets (FashionMNIST in batches of 60): the
mean accuracy of FisherMask is above that of margin sampling. "Above": the 95 % interval
of the paired difference (BCa bootstrap over the seeds) is above zero, and p of the
paired t-test is below 0.05. That is one comparison in each data set; the tables have p
corrected by Holm for all strategies, too.
"""

from functools import partial

from common import (
    BASELINES,
    SMALL_NET,
    Setting,
    Study,
    all_repeated,
    filmed,
    load_pool_for_purpose,
    noisy,
    some_repeated,
)

from fishermask_sk import FisherMask, ResNet18Classifier

NAMES = ("random", "margin", "BADGE", "BAIT", "k-center")
STRATEGIES = {name: BASELINES[name] for name in NAMES} | {
    "FisherMask": FisherMask(),
    "last layer": FisherMask(layers="last"),
}


def setting(name, dataset, pool, estimator=SMALL_NET, **budget):
    """All classes of the pool are wanted, and there is no target."""
    return Setting(
        name=name,
        dataset=dataset,
        load=partial(
            load_pool_for_purpose,
            name=dataset,
            wanted=tuple(range(len(pool["pool"]))),
            n_target=0,
            **pool,
        ),
        estimator=estimator,
        strategies=STRATEGIES,
        **({"n_initial": 60, "n_instances": 60, "n_queries": 3} | budget),
    )


DIGITS = {
    "pool": dict.fromkeys(range(10), 12),
    "repeat": partial(all_repeated, times=5, vary=noisy),
}
CIFAR = {
    "pool": dict.fromkeys((0, 1, 6, 7), 75),  # airplane, automobile, frog, horse
    "side": 16,
    "n_test": 250,
    "repeat": partial(all_repeated, times=8, vary=filmed),
}
FASHION = {
    "pool": dict.fromkeys(range(10), 100),
    "side": 14,
    "n_test": 100,
    "repeat": partial(some_repeated, n_repeated=6, times=24, vary=noisy),
}

STUDY = Study(
    question="Does FisherMask choose better than margin sampling where the pool holds "
    "near-duplicates?",
    n_seeds=20,
    first_seed=100,
    settings=[
        setting("some many times", "fashion-mnist", FASHION),
        setting(
            "each five times",
            "digits",
            DIGITS,
            ResNet18Classifier(
                width=16, head_bias=False, classes=range(10), min_steps=30, lr=2e-3
            ),
            n_initial=10,
            n_instances=15,
            n_queries=4,
        ),
        setting(
            "each eight times",
            "cifar10",
            CIFAR,
            ResNet18Classifier(
                width=8, head_bias=False, classes=range(4), min_steps=40, lr=2e-3
            ),
        ),
        setting(
            "some many times, 180 a query",
            "fashion-mnist",
            FASHION,
            n_instances=180,
            n_queries=1,
        ),
        setting(
            "some many times, 20 a query",
            "fashion-mnist",
            FASHION,
            n_instances=20,
            n_queries=9,
        ),
    ],
)
