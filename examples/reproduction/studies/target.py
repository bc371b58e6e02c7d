"""Study 16: how many images a target needs, and what a wrong one does, 20 seeds.

Fixed before the first run: everything here. The first setting of study 11
(FashionMNIST, four wanted classes of ten), its pools and its seeds. FisherMask is
handed 25, 100 or 400 unlabelled images of the wanted classes, or 400 of which a tenth
or a third is of the other classes (test images of these, which nothing is tested on).
There is no claim: the page "Choose for a purpose" gives the numbers.
"""

import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from common import BASELINES, Study, load_pool, load_pool_for_purpose

from fishermask_sk import FisherMask

IRRELEVANT = runpy.run_path(str(Path(__file__).with_name("irrelevant.py")))["STUDY"]
FIRST = IRRELEVANT.settings[0]


def load_with_other_target(seed, data_home=None, *, n_kept, n_foreign, **options):
    """The same pool, and a target of so many images, some of unwanted classes."""
    data = load_pool_for_purpose(seed, data_home, **options)
    rng = np.random.RandomState(seed)
    own = rng.permutation(len(data.X_target))[: n_kept - n_foreign]
    data.X_target = data.X_target[own]
    if n_foreign:
        unwanted = sorted(set(options["pool"]) - set(options["wanted"]))
        others = load_pool(
            seed,
            data_home,
            name=options["name"],
            pool=dict.fromkeys(unwanted, 1),
            side=options["side"],
        )
        foreign = rng.permutation(len(others.X_test))[:n_foreign]
        data.X_target = np.concatenate([data.X_target, others.X_test[foreign]])
    return data


TARGETS = {
    "400 in the target": (400, 0),
    "100 in the target": (100, 0),
    "25 in the target": (25, 0),
    "400, a tenth foreign": (400, 40),
    "400, a third foreign": (400, 133),
}

STUDY = Study(
    question="How many images does a target need, and what does a wrong one do?",
    n_seeds=IRRELEVANT.n_seeds,
    first_seed=IRRELEVANT.first_seed,
    settings=[
        replace(
            FIRST,
            strategies={
                "random": BASELINES["random"],
                "margin": BASELINES["margin"],
                "FisherMask": FisherMask(),
            },
            with_target=(),
        ),
        *(
            replace(
                FIRST,
                load=partial(
                    load_with_other_target,
                    n_kept=n_kept,
                    n_foreign=n_foreign,
                    **FIRST.load.keywords,
                ),
                strategies={name: FisherMask()},
                with_target=(name,),
            )
            for name, (n_kept, n_foreign) in TARGETS.items()
        ),
    ],
)
