"""Study 15: does a target do harm where the pool is clean and balanced? 20 seeds.

Fixed before the first run: everything here. The balanced pools, nets and budgets of
studies 2 (digits) and 4 (FashionMNIST), with other seeds. The target is drawn from the
pool itself: 100 of 300 digits, 400 of 4,000 images; it tells FisherMask nothing new.

To be shown, in both settings, of FisherMask with target: the lower end of the 95 %
interval (BCa bootstrap over the seeds) of its mean accuracy beside margin sampling's is
no lower than −0.01.
"""

import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import BASELINES, Study, load_with_target_of_pool

from fishermask_sk import FisherMask

HERE = Path(__file__).parent
BALANCED = {
    study: next(
        setting
        for setting in runpy.run_path(str(HERE / f"{study}.py"))["STUDY"].settings
        if setting.name.startswith("balanced")
    )
    for study in ("digits", "fashion_balanced")
}
N_TARGET = {"digits": 100, "fashion_balanced": 400}
STRATEGIES = {name: BASELINES[name] for name in ("random", "margin")} | {
    "FisherMask": FisherMask(),
    "FisherMask with target": FisherMask(),
}

STUDY = Study(
    question="Does a target do harm on a clean, balanced pool?",
    n_seeds=20,
    first_seed=100,
    settings=[
        replace(
            setting,
            load=partial(
                load_with_target_of_pool,
                n_target=N_TARGET[study],
                **setting.load.keywords,
            ),
            strategies=STRATEGIES,
            with_target=("FisherMask with target",),
        )
        for study, setting in BALANCED.items()
    ],
)
