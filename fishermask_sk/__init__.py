"""FisherMask for modAL and scikit-learn: which samples to label next, by sparse Fisher information."""

from fishermask_sk._version import __version__

__all__ = ["__version__"]
