"""Study 17: what do the cheaper forms of a query cost in accuracy? 20 seeds.

Fixed before the first run: everything here. The pools are the first of study 11
(irrelevant, with its target), the first of study 12 (near-duplicates), study 5's
(imbalanced) and study 4's (balanced), with seeds of their own. Next to the exact
default and margin sampling: two stages, whose candidates are the ten times n_instances
most uncertain, or as many drawn by power margin sampling, with 256 samples for F̄ and
the mask; the last layer alone; and a part of the last layer (1,000 weights of study 4's
net, 500 of 640 and 200 of 256 of the small ones).

To be shown, for each cheaper form on each pool: the lower end of the 95 % interval (BCa
bootstrap over the seeds) of its mean accuracy beside the exact default's is no lower
than −0.01. The choosing page recommends the cheapest form of which this holds on all
four pools, and says where it does not.
"""

from functools import partial
from typing import Any

from common import BASELINES, Study, fashion_imbalanced_small, setting_of

from fishermask_sk import FisherMask
from fishermask_sk.baselines import power_margin_sampling

FEW: dict[str, Any] = {"n_information_samples": 256, "n_mask_samples": 256}


def strategies(n_instances, part_of_head):
    drawn = partial(power_margin_sampling, n_instances=10 * n_instances)
    return {
        "margin": BASELINES["margin"],
        "FisherMask": FisherMask(),
        "two stages": FisherMask(candidates=10, **FEW),
        "two stages, drawn": FisherMask(candidates=drawn, **FEW),
        "last layer": FisherMask(1.0, layers="last"),
        "part of the last layer": FisherMask(part_of_head, layers="last"),
    }


SMALL = strategies(60, 500)
STUDY = Study(
    question="What do the cheaper forms of a query cost in accuracy?",
    n_seeds=20,
    first_seed=200,
    settings=[
        setting_of(
            "near_duplicates", 0, name="cheaper, near-duplicates", strategies=SMALL
        ),
        setting_of(
            "irrelevant",
            0,
            name="cheaper, irrelevant",
            strategies=SMALL,
            with_target=tuple(name for name in SMALL if name != "margin"),
        ),
        fashion_imbalanced_small(strategies(60, 200), "cheaper, imbalanced"),
        setting_of(
            "fashion_balanced",
            0,
            name="cheaper, balanced",
            strategies=strategies(60, 1_000),
        ),
    ],
)
