"""FisherMask: what a user sets, one query from net to picks, and what it would cost.

Knows all of `selection`, `memory`, `gradients`, `nets` and `scores`; never a loop or a
file. Offers `FisherMask`, `fisher_mask_sampling` and `check_network`; `query` has the
steps, `masks` and `ranking` the rules of a mask, `question` whom F̄ is a mean over,
`contract` what every strategy has from its learner and answers.
"""

from fishermask_sk.strategy.fisher_mask import FisherMask, fisher_mask_sampling
from fishermask_sk.strategy.network_report import NetworkReport, check_network

__all__ = ["FisherMask", "NetworkReport", "check_network", "fisher_mask_sampling"]
