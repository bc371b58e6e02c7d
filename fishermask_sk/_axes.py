"""What the pictures share: colours that stay apart, and matplotlib imported only where
something is drawn.
"""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette without its yellow, which white paper swallows. Line styles
# repeat with another period than colours and markers, so that curves stay apart in
# black and white as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":")


def pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plotting needs matplotlib, which is not installed; run: pip install "
            "'fishermask-sk[plot]'."
        ) from error
    return plt


def new_axes(ax: Any, **figure_options: Any) -> Any:
    return (
        pyplot().subplots(layout="constrained", **figure_options)[1]
        if ax is None
        else ax
    )
