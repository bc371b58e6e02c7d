"""Study 3: how many weights, and of which layers, on study 1's pool made small and then on study 1's own.

Fixed before the first run: everything here. On the small net the head has 256 weights; a mask of 0.001 is 175 of them.
"""

from common import Study, fashion_imbalanced, fashion_imbalanced_small

from fishermask_sk import FisherMask

STRATEGIES = {
    "0.002 (default)": FisherMask(),
    "0.005": FisherMask(sparsity=0.005),
    "0.001": FisherMask(sparsity=0.001),
    "last layer": FisherMask(layers="last"),
    "middle layers": FisherMask(layers="middle"),
    "0.01": FisherMask(sparsity=0.01),
}

STUDY = Study(
    question="How many weights should be kept, and of which layers?",
    n_seeds=10,
    settings=[fashion_imbalanced_small(STRATEGIES), fashion_imbalanced(STRATEGIES)],
)
