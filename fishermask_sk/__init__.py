"""FisherMask for modAL and scikit-learn: which samples to label next, by sparse Fisher
information.
"""

from fishermask_sk._version import __version__
from fishermask_sk.active_learning import ActiveLearningClassifier
from fishermask_sk.comparison import compare_strategies
from fishermask_sk.estimator import as_estimator
from fishermask_sk.network_report import check_network
from fishermask_sk.query_strategy import FisherMask, fisher_mask_sampling
from fishermask_sk.resnet import ResNet18Classifier
from fishermask_sk.results import load_results

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
