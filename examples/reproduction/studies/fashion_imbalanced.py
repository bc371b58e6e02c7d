"""Study 1: FashionMNIST, 250/5,000/250/250 images of four classes, balanced test, 10 seeds.

Fixed before the first run: everything here, as the study was planned.
"""

from common import STRATEGIES, Study, fashion_imbalanced

STUDY = Study(
    question="Which strategy finds and learns the rare classes, on FashionMNIST?",
    n_seeds=10,
    settings=[fashion_imbalanced(STRATEGIES)],
)
