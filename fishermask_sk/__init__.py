"""FisherMask for modAL and scikit-learn: which samples to label next, by sparse Fisher information."""

from fishermask_sk._version import __version__
from fishermask_sk.query_strategy import FisherMask, fisher_mask_sampling
from fishermask_sk.resnet import ResNet18Classifier

__all__ = ["FisherMask", "ResNet18Classifier", "__version__", "fisher_mask_sampling"]
