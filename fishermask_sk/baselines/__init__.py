"""Query strategies to compare FisherMask with, called as it is called, for modAL and
for our own loops.

Each is a function ``(learner, X_pool, n_instances=1, *, ...)`` that returns what the
caller's modAL expects. The features of a net are the inputs of its head. An estimator
that holds no net (a logistic regression) has its own inputs for features, after the
earlier steps of its pipeline.

May import `strategy`, for BAIT is one of its settings, and all below it. `shared` has
the checks of all; tests are in `tests/test_baselines.py`.
"""

from fishermask_sk.baselines.bait import bait_sampling
from fishermask_sk.baselines.diversity import badge_sampling, kcenter_sampling
from fishermask_sk.baselines.targeted import (
    facility_location_sampling,
    weighted_margin_sampling,
)
from fishermask_sk.baselines.uncertainty import (
    entropy_sampling,
    least_confidence_sampling,
    margin_sampling,
    power_margin_sampling,
    random_sampling,
)

__all__ = [
    "badge_sampling",
    "bait_sampling",
    "entropy_sampling",
    "facility_location_sampling",
    "kcenter_sampling",
    "least_confidence_sampling",
    "margin_sampling",
    "power_margin_sampling",
    "random_sampling",
    "weighted_margin_sampling",
]
