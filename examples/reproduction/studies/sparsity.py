"""Study 3: how many weights, and of which layers, on study 1's pool made small, 10
seeds.

Fixed before the first run: everything here. On the small net the head has 256 weights;
a mask of 0.001 is 175 of them. Cut to fit two CPU cores: study 1's own pool, which was
planned, is left out.
"""

from common import Study, fashion_imbalanced_small

from fishermask_sk import FisherMask

STRATEGIES = {
    "FisherMask": FisherMask(),
    "sparsity 0.005": FisherMask(sparsity=0.005),
    "sparsity 0.001": FisherMask(sparsity=0.001),
    "last layer": FisherMask(layers="last"),
    "middle layers": FisherMask(layers="middle"),
    "sparsity 0.01": FisherMask(sparsity=0.01),
}

STUDY = Study(
    question="How many weights should be kept, and of which layers?",
    n_seeds=10,
    settings=[fashion_imbalanced_small(STRATEGIES)],
)
