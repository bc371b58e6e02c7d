"""Pictures in scikit-learn's Display manner: learning curves, the images asked for, the
mask.

Every display stores its data when it is made and draws it in ``plot``, which returns
the display with its ``figure_`` and axes. matplotlib is imported only where something
is drawn, so that the package works without it. Imports `loops.results` and `nets`; a
strategy is only asked for what it learned.
"""

from fishermask_sk.plotting.learning_curves import LearningCurveDisplay
from fishermask_sk.plotting.mask import MaskDisplay
from fishermask_sk.plotting.query import QueryDisplay

__all__ = ["LearningCurveDisplay", "MaskDisplay", "QueryDisplay"]
