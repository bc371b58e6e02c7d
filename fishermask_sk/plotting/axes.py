"""What the pictures share: colours that stay apart, and matplotlib imported only where
something is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

# A strategy has the same colour in every picture, whatever stands next to it. The
# colours are Okabe and Ito's, without the yellow that white paper swallows, and a brown
# and a violet. Line styles repeat with another period than colours and markers, so that
# curves stay apart in black and white as well.
STRATEGY_NAMES = (
    "FisherMask",
    "margin",
    "BAIT",
    "BADGE",
    "k-center",
    "least confidence",
    "random",
    "entropy",
    "FisherMask with target",
)
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C5A2B",
    "#5D3A9B",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
GREY = "0.75"


def style_numbers(names: Iterable[str]) -> dict[str, int]:
    """The place of each strategy in `COLORS`, `MARKERS` and `LINE_STYLES`: fixed for
    those of `STRATEGY_NAMES`, the first that is free for all others.
    """
    names = list(names)
    fixed = {
        name: STRATEGY_NAMES.index(name) for name in names if name in STRATEGY_NAMES
    }
    free = (number for number in count() if number not in fixed.values())
    return {name: fixed[name] if name in fixed else next(free) for name in names}


def pyplot() -> Any:
    """Import matplotlib's pyplot, or say how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plotting needs matplotlib, which is not installed; run: pip install "
            "'fishermask-sk[plot]'."
        ) from error
    return plt


def new_axes(ax: Any, **figure_options: Any) -> Any:
    """These axes, or those of a new figure."""
    return (
        pyplot().subplots(layout="constrained", **figure_options)[1]
        if ax is None
        else ax
    )
