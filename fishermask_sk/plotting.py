"""Pictures in scikit-learn's Display manner: learning curves, the images asked for, the
mask.

Every display stores its data when it is made and draws it in ``plot``, which returns
the display with its ``figure_`` and axes. matplotlib is imported only where something
is drawn, so that the package works without it.
"""

from fishermask_sk._learning_curves import LearningCurveDisplay
from fishermask_sk._mask_picture import MaskDisplay
from fishermask_sk._query_pictures import QueryDisplay

__all__ = ["LearningCurveDisplay", "MaskDisplay", "QueryDisplay"]
