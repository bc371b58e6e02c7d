"""Study 9: balanced FashionMNIST and CIFAR-10 to 7,000 labels on a GPU, 5 seeds.

Fixed before the first run: everything here. "paper" is the paper's protocol; "strong"
is a learner with a schedule, crop and flip, whose published mark on CIFAR-10 is 0.82 at
7,000 random labels. The pool is the whole training set in the paper; here it is half of
it, so that a query's embeddings fit beside its matrices.
"""

from functools import partial

import torch
from common import STRATEGIES, Setting, Study, load_pool
from skorch.callbacks import LRScheduler

from fishermask_sk import ResNet18Classifier

PAPER = ResNet18Classifier(
    width=16, head_bias=False, classes=range(10), crop_and_flip=True, device="cuda"
)
STRONG = ResNet18Classifier(
    classes=range(10),
    crop_and_flip=True,
    optimizer=torch.optim.SGD,
    optimizer__momentum=0.9,
    optimizer__weight_decay=5e-4,
    lr=0.05,
    max_epochs=100,
    stop_accuracy=None,
    batch_size=64,
    callbacks=[("schedule", LRScheduler(policy="CosineAnnealingLR", T_max=100))],
    device="cuda",
)

STUDY = Study(
    question=(
        "What is left of the differences with thousands of labels and a strong learner?"
    ),
    n_seeds=5,
    settings=[
        Setting(
            name=f"{name}, balanced, {learner}",
            dataset=name,
            load=partial(load_pool, name=name, pool=dict.fromkeys(range(10), 2500)),
            estimator=estimator,
            strategies=STRATEGIES,
            n_initial=500,
            n_instances=500,
            n_queries=13,
        )
        for learner, estimator in (("paper", PAPER), ("strong", STRONG))
        for name in ("fashion-mnist", "cifar10")
    ],
)
