"""Study 1: FashionMNIST, 250/5,000/250/250 images of four classes, balanced test, 10
seeds.

Fixed before the first run: everything here. Cut to fit two CPU cores: three queries of
40 labels, to 180, where eight, to 380, were planned (examples/demo.py plays three of
the strategies to 380), and 500 test images a class.
"""

from common import STRATEGIES, Study, fashion_imbalanced

STUDY = Study(
    question="Which strategy finds and learns the rare classes, on FashionMNIST?",
    n_seeds=10,
    settings=[fashion_imbalanced(STRATEGIES, n_queries=3)],
)
