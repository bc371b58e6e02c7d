"""Learning curves of query strategies; see `fishermask_sk.plotting`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fishermask_sk._types import Rows
from fishermask_sk.loops.results import LOWER_IS_BETTER, labels_to_reach
from fishermask_sk.plotting.axes import (
    COLORS,
    GREY,
    LINE_STYLES,
    MARKERS,
    new_axes,
    style_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BANDS = {
    "se": "±1 standard error",
    "std": "±1 standard deviation",
    "range": "lowest to highest",
    None: "",
}


class LearningCurveDisplay:
    """Learning curves of query strategies: the mean over seeds, with a band.

    Make it with :meth:`from_results`.

    Parameters
    ----------
    curves : mapping of str to (x, scores)
        For each strategy `x`, ndarray of shape (n_points,), increasing, and `scores`,
        ndarray of shape (n_points, n_seeds), NaN where a seed has no score.
    x : str, default="n_labels"
        What `x` counts; names the horizontal axis.
    metric : str, default="accuracy"
        What the scores are; names the vertical axis.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    lines_ : dict of str to matplotlib Line2D
        The drawn mean of each strategy.
    bands_ : dict of str to matplotlib collection
        The drawn band of each strategy; empty for ``band=None``.
    labels_saved_ : float
        Where `labels_saved` was given: how many labels fewer the first strategy needs
        than the second, as `ComparisonResults.summary` counts them.

    Examples
    --------
    >>> from fishermask_sk.plotting import LearningCurveDisplay
    >>> rows = [
    ...     {"strategy": "random", "seed": seed, "n_labels": n, "accuracy": accuracy}
    ...     for seed, accuracies in enumerate([(0.5, 0.7), (0.6, 0.8)])
    ...     for n, accuracy in zip((20, 40), accuracies)
    ... ]
    >>> display = LearningCurveDisplay.from_results(rows).plot()
    >>> display.lines_["random"].get_ydata().round(2).tolist()
    [0.55, 0.75]
    """

    def __init__(
        self,
        curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
        *,
        x: str = "n_labels",
        metric: str = "accuracy",
    ) -> None:
        self.curves = curves
        self.x = x
        self.metric = metric

    @classmethod
    def from_results(
        cls,
        results: Iterable[Mapping[str, Any]] | Mapping[str, Any] | Rows,
        *,
        x: str = "n_labels",
        metric: str = "accuracy",
    ) -> LearningCurveDisplay:
        """Gather the curves from tidy results; nothing is drawn before ``plot``.

        Parameters
        ----------
        results : list of dict, mapping of columns, or DataFrame
            One row for each strategy, seed and round, with the columns "strategy",
            "seed", `x` and `metric`. Strategies keep the order in which they come. Rows
            may be missing, as in a run that is not finished, or have NaN for a score:
            each mean is over the seeds that have one.
        x : str, default="n_labels"
            The column of the horizontal axis.
        metric : str, default="accuracy"
            The column of the vertical axis.

        Returns
        -------
        LearningCurveDisplay

        Raises
        ------
        ValueError
            For a column that is not there, results without rows, or two rows for the
            same point.
        """
        table = _columns(results, ["strategy", "seed", x, metric])
        scored = np.isfinite(table[-1])
        strategy, seed, position, score = (column[scored] for column in table)
        seeds, seed_column = np.unique(seed, return_inverse=True)
        curves = {}
        for name in dict.fromkeys(strategy.tolist()):
            rows = strategy == name
            points, point_row = np.unique(position[rows], return_inverse=True)
            cells, counts = np.unique(
                np.stack([point_row, seed_column[rows]]), axis=1, return_counts=True
            )
            if counts.max() > 1:
                point, column = cells[:, counts.argmax()]
                raise ValueError(
                    f"results hold {counts.max()} rows for strategy {name!r}, seed "
                    f"{seeds[column]} and {x}={points[point]}; keep one of them."
                )
            scores = np.full((len(points), len(seeds)), np.nan)
            scores[point_row, seed_column[rows]] = score[rows]
            curves[str(name)] = (points, scores)
        return cls(curves, x=x, metric=metric)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        band: str | None = "se",
        labels_saved: tuple[str, str] | None = None,
        highlight: Collection[str] | None = None,
    ) -> LearningCurveDisplay:
        """Draw one line per strategy.

        FisherMask and the baselines have the same colour in every picture, if they have
        the names that the documentation gives them ("FisherMask", "margin", "random").

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure for None.
        band : {"se", "std", "range"} or None, default="se"
            What the band around the mean shows: one standard error of the mean over the
            seeds (how well the mean is known), one standard deviation (how far single
            runs scatter), the lowest and highest seed, or nothing. The legend says
            which. One seed has no standard error: its band has no height.
        labels_saved : (str, str), default=None
            Two strategies: an arrow shows how many labels the first needs fewer than
            the second for the best score that both reach. As in
            `ComparisonResults.summary`, labels are counted seed by seed and then
            averaged, over the seeds that have all rounds of both. The ends of the arrow
            are such means too, and so need not lie on the mean curves.
        highlight : collection of str, default=None
            Strategies to draw in colour; the others are thin and grey. None draws all
            in colour.

        Returns
        -------
        self : LearningCurveDisplay

        Raises
        ------
        ValueError
            For an unknown `band` or strategy, for `labels_saved` over another axis than
            that of labels, and where no seed has all rounds of both.
        """
        if band not in _BANDS:
            raise ValueError(f"band={band!r} is unknown; choose one of {list(_BANDS)}.")
        self.ax_ = new_axes(ax)
        self.figure_ = self.ax_.figure
        self._check_names("highlight", highlight or ())
        self.lines_, self.bands_ = {}, {}
        for name, number in style_numbers(self.curves).items():
            x, scores = self.curves[name]
            grey = highlight is not None and name not in highlight
            color = GREY if grey else COLORS[number % len(COLORS)]
            mean, low, high = _mean_and_band(np.asarray(scores, dtype=float), band)
            (self.lines_[name],) = self.ax_.plot(
                x,
                mean,
                label=name,
                color=color,
                marker=MARKERS[number % len(MARKERS)],
                linestyle=LINE_STYLES[number % len(LINE_STYLES)],
                linewidth=1 if grey else 1.8,
                markersize=3 if grey else 5,
                zorder=1.5 if grey else 2,
            )
            if band is not None and not grey:
                self.bands_[name] = self.ax_.fill_between(
                    x, low, high, color=color, alpha=0.15, linewidth=0
                )
        if labels_saved is not None:
            self._draw_labels_saved(*labels_saved)
        n_seeds = sorted(
            {
                int(np.isfinite(scores).any(axis=0).sum())
                for _, scores in self.curves.values()
            }
        )
        seeds = (
            f"{n_seeds[0]} seed{'s' * (n_seeds[0] > 1)}"
            if len(n_seeds) == 1
            else f"{n_seeds[0]}-{n_seeds[-1]} seeds"
        )
        title = (
            f"mean of {seeds}" if band is None else f"mean of {seeds}, {_BANDS[band]}"
        )
        self.ax_.legend(title=title, alignment="left", frameon=False)
        self.ax_.set_xlabel(
            {"n_labels": "labels"}.get(self.x, self.x.replace("_", " "))
        )
        self.ax_.set_ylabel(self.metric.replace("_", " "))
        self.ax_.grid(alpha=0.3)
        self.ax_.spines[["top", "right"]].set_visible(False)
        return self

    def _check_names(self, parameter: str, names: Collection[str]) -> None:
        for name in names:
            if name not in self.curves:
                raise ValueError(
                    f"{parameter} names {name!r}, which is not among the strategies "
                    f"{list(self.curves)}."
                )

    def _draw_labels_saved(self, name: str, baseline: str) -> None:
        self._check_names("labels_saved", (name, baseline))
        if self.x != "n_labels":
            raise ValueError(
                f"labels_saved needs labels on the horizontal axis, got x={self.x!r}."
            )
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        found = []
        for own, other in self._pairs_of_whole_seeds(name, baseline):
            target = min((sign * curve[:, 1]).max() for curve in (own, other))
            reached = (labels_to_reach(target, curve, sign) for curve in (own, other))
            found.append((*reached, sign * target))
        own_labels, other_labels, height = np.mean(found, axis=0)
        self.labels_saved_ = float(other_labels - own_labels)
        self.ax_.annotate(
            "",
            xy=(own_labels, height),
            xytext=(other_labels, height),
            arrowprops={"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0},
        )
        fewer = "fewer" if self.labels_saved_ >= 0 else "more"
        self.ax_.annotate(
            f"{name}: {abs(self.labels_saved_):.0f} labels\n{fewer} than {baseline}",
            ((own_labels + other_labels) / 2, height),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
        )

    def _pairs_of_whole_seeds(
        self, name: str, baseline: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Both curves, with rows (labels, score), of each seed that has all rounds."""
        longest = max(
            np.isfinite(scores).sum(axis=0).max() for _, scores in self.curves.values()
        )
        pairs = []
        for columns in zip(
            self.curves[name][1].T, self.curves[baseline][1].T, strict=True
        ):
            if all(np.isfinite(column).sum() == longest for column in columns):
                own, other = (
                    np.column_stack([self.curves[wanted][0], column])
                    for wanted, column in zip((name, baseline), columns, strict=True)
                )
                pairs.append((own, other))
        if not pairs:
            raise ValueError(
                f"No seed has all {longest} rounds of both {name!r} and {baseline!r}; "
                "finish the comparison first, or leave out labels_saved."
            )
        return pairs


def _columns(results: Any, names: Sequence[str]) -> list[np.ndarray]:
    """The named columns of tidy results, whether these come as rows, as columns or as a
    DataFrame.
    """
    if not isinstance(results, Mapping) and not hasattr(results, "columns"):
        rows = list(results)
        common = set.intersection(*(set(row) for row in rows)) if rows else set(names)
        results = {name: [row[name] for row in rows] for name in common}
    missing = [name for name in names if name not in results]
    if missing:
        raise ValueError(
            f"results have no column {missing[0]!r}, only {sorted(map(str, results))}; "
            f"every row needs {list(names)}."
        )
    columns = [np.asarray(results[name]) for name in names]
    if not len(columns[0]):
        raise ValueError("results are empty; expected at least one row.")
    return columns


def _mean_and_band(
    scores: np.ndarray, band: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper edge over the seeds (columns) that have a score."""
    mean = np.nanmean(scores, axis=1)
    if band == "range":
        return mean, np.nanmin(scores, axis=1), np.nanmax(scores, axis=1)
    n_seeds = np.isfinite(scores).sum(axis=1)
    # ddof=1: five seeds are a sample of the seeds there are. A single one has no spread
    # to show.
    squares = np.nansum((scores - mean[:, None]) ** 2, axis=1)
    half_width = np.sqrt(squares / np.maximum(n_seeds - 1, 1))
    if band == "se":
        half_width = half_width / np.sqrt(n_seeds)
    return mean, mean - half_width, mean + half_width
