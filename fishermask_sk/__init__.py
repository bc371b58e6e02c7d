"""FisherMask for modAL and scikit-learn: which samples to label next, by sparse Fisher
information.

Where things are, from the maths up: `gradients` (per-sample gradients; `modules` puts
a net into evaluation mode and back), `selection` (the greedy choice; `gains` has what a
pick is worth), `memory` (what fits), `nets`, `scores` (margins and features),
`strategy` (`FisherMask`; `query` has its steps), `baselines` (a new one goes there),
`loops` (`results_file` reads and writes a file of results), and next to these
`datasets`, `plotting`, `modal` and `activeml`. All public names: `docs/api.rst`.
"""

from fishermask_sk import _moved as _moved  # old paths load, for one release
from fishermask_sk._version import __version__
from fishermask_sk.loops.classifier import ActiveLearningClassifier
from fishermask_sk.loops.comparison import compare_strategies
from fishermask_sk.loops.results import load_results
from fishermask_sk.nets.resnet import ResNet18Classifier
from fishermask_sk.nets.trained import as_estimator
from fishermask_sk.strategy.fisher_mask import FisherMask, fisher_mask_sampling
from fishermask_sk.strategy.network_report import check_network

__all__ = [
    "ActiveLearningClassifier",
    "FisherMask",
    "ResNet18Classifier",
    "__version__",
    "as_estimator",
    "check_network",
    "compare_strategies",
    "fisher_mask_sampling",
    "load_results",
]
