"""Warnings that name the user's line instead of one of ours."""

from __future__ import annotations

import sys
import warnings

# Frames of these packages stand between the user's call and the warning: loops,
# searches and progress bars that call the strategy.
BETWEEN = (
    "fishermask_sk",
    "joblib",
    "modAL",
    "skactiveml",
    "sklearn",
    "skorch",
    "tqdm",
)


def warn_user(message: str) -> None:
    """Give a UserWarning that points at the line which called into this package,
    directly or through modAL, a search or a progress bar.
    """
    frame, level = sys._getframe(1), 2
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").split(".")[0] in BETWEEN
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
