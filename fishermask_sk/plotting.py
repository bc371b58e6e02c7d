"""Pictures in scikit-learn's Display manner: learning curves, the images asked for, the mask.

Every display stores its data when it is made and draws it in ``plot``, which returns the display with its
``figure_`` and axes. matplotlib is imported only where something is drawn, so that the package works
without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fishermask_sk._rows import as_rows, take_rows

# Okabe and Ito's palette without its yellow, which white paper swallows. Line styles repeat with another
# period than colours and markers, so that curves stay apart in black and white as well.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINE_STYLES = ("-", "--", "-.", ":")

_BANDS = {"se": "±1 standard error", "std": "±1 standard deviation", "range": "lowest to highest", None: ""}


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plotting needs matplotlib, which is not installed; run: pip install 'fishermask-sk[plot]'."
        ) from error
    return plt


def _new_axes(ax: Any, **figure_options: Any) -> Any:
    return _pyplot().subplots(layout="constrained", **figure_options)[1] if ax is None else ax


def _columns(results: Any, names: Sequence[str]) -> list[np.ndarray]:
    """The named columns of tidy results, whether these come as rows, as columns or as a DataFrame."""
    if not isinstance(results, Mapping) and not hasattr(results, "columns"):
        rows = list(results)
        common = set.intersection(*(set(row) for row in rows)) if rows else set(names)
        results = {name: [row[name] for row in rows] for name in common}
    missing = [name for name in names if name not in results]
    if missing:
        raise ValueError(
            f"results have no column {missing[0]!r}, only {sorted(map(str, results))}; every row needs "
            f"{list(names)}."
        )
    columns = [np.asarray(results[name]) for name in names]
    if not len(columns[0]):
        raise ValueError("results are empty; expected at least one row.")
    return columns


class LearningCurveDisplay:
    """Learning curves of query strategies: the mean over seeds, with a band.

    Make it with :meth:`from_results`.

    Parameters
    ----------
    curves : mapping of str to (x, scores)
        For each strategy `x`, ndarray of shape (n_points,), increasing, and `scores`, ndarray of shape
        (n_points, n_seeds), NaN where a seed has no score.
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

    Examples
    --------
    >>> from fishermask_sk.plotting import LearningCurveDisplay
    >>> rows = [
    ...     {"strategy": "random", "seed": seed, "n_labels": n_labels, "accuracy": accuracy}
    ...     for seed, accuracies in enumerate([(0.5, 0.7), (0.6, 0.8)])
    ...     for n_labels, accuracy in zip((20, 40), accuracies)
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
        cls, results: Any, *, x: str = "n_labels", metric: str = "accuracy"
    ) -> LearningCurveDisplay:
        """Gather the curves from tidy results; nothing is drawn before ``plot``.

        Parameters
        ----------
        results : list of dict, mapping of columns, or DataFrame
            One row for each strategy, seed and round, with the columns "strategy", "seed", `x` and
            `metric`. Strategies keep the order in which they come. Rows may be missing, as in a run that
            is not finished, or have NaN for a score: each mean is over the seeds that have one.
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
            For a column that is not there, results without rows, or two rows for the same point.
        """
        table = _columns(results, ["strategy", "seed", x, metric])
        scored = np.isfinite(table[-1])
        strategy, seed, position, score = (column[scored] for column in table)
        seeds, seed_column = np.unique(seed, return_inverse=True)
        curves = {}
        for name in dict.fromkeys(strategy.tolist()):
            rows = strategy == name
            points, point_row = np.unique(position[rows], return_inverse=True)
            cells, counts = np.unique(np.stack([point_row, seed_column[rows]]), axis=1, return_counts=True)
            if counts.max() > 1:
                point, column = cells[:, counts.argmax()]
                raise ValueError(
                    f"results hold {counts.max()} rows for strategy {name!r}, seed {seeds[column]} and "
                    f"{x}={points[point]}; keep one of them."
                )
            scores = np.full((len(points), len(seeds)), np.nan)
            scores[point_row, seed_column[rows]] = score[rows]
            curves[str(name)] = (points, scores)
        return cls(curves, x=x, metric=metric)

    def plot(self, ax: Any = None, *, band: str | None = "se") -> LearningCurveDisplay:
        """Draw one line per strategy.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure for None.
        band : {"se", "std", "range"} or None, default="se"
            What the band around the mean shows: one standard error of the mean over the seeds (how well
            the mean is known), one standard deviation (how far single runs scatter), the lowest and
            highest seed, or nothing. The legend says which. One seed has no standard error: its band
            has no height.

        Returns
        -------
        self : LearningCurveDisplay

        Raises
        ------
        ValueError
            For an unknown `band`.
        """
        if band not in _BANDS:
            raise ValueError(f"band={band!r} is unknown; choose one of {list(_BANDS)}.")
        self.ax_ = _new_axes(ax)
        self.figure_ = self.ax_.figure
        self.lines_, self.bands_ = {}, {}
        for i, (name, (x, scores)) in enumerate(self.curves.items()):
            color = _COLORS[i % len(_COLORS)]
            mean, low, high = _mean_and_band(np.asarray(scores, dtype=float), band)
            (self.lines_[name],) = self.ax_.plot(
                x,
                mean,
                label=name,
                color=color,
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle=_LINE_STYLES[i % len(_LINE_STYLES)],
                markersize=5,
            )
            if band is not None:
                self.bands_[name] = self.ax_.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        n_seeds = sorted({int(np.isfinite(scores).any(axis=0).sum()) for _, scores in self.curves.values()})
        seeds = (
            f"{n_seeds[0]} seed{'s' * (n_seeds[0] > 1)}"
            if len(n_seeds) == 1
            else f"{n_seeds[0]}-{n_seeds[-1]} seeds"
        )
        title = f"mean of {seeds}" if band is None else f"mean of {seeds}, {_BANDS[band]}"
        self.ax_.legend(title=title, alignment="left", frameon=False)
        self.ax_.set_xlabel({"n_labels": "labels"}.get(self.x, self.x.replace("_", " ")))
        self.ax_.set_ylabel(self.metric.replace("_", " "))
        self.ax_.grid(alpha=0.3)
        self.ax_.spines[["top", "right"]].set_visible(False)
        return self


def _mean_and_band(scores: np.ndarray, band: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper edge over the seeds (columns) that have a score."""
    mean = np.nanmean(scores, axis=1)
    if band == "range":
        return mean, np.nanmin(scores, axis=1), np.nanmax(scores, axis=1)
    n_seeds = np.isfinite(scores).sum(axis=1)
    # ddof=1: five seeds are a sample of the seeds there are. A single one has no spread to show.
    squares = np.nansum((scores - mean[:, None]) ** 2, axis=1)
    half_width = np.sqrt(squares / np.maximum(n_seeds - 1, 1))
    if band == "se":
        half_width = half_width / np.sqrt(n_seeds)
    return mean, mean - half_width, mean + half_width


class QueryDisplay:
    """The images of one query, in the order in which they were picked.

    Every argument has one entry per pick, in pick order. :meth:`from_strategy` takes them from a query
    strategy that has just been called.

    Parameters
    ----------
    images : array-like of shape (n_instances, n_channels, height, width) or (n_instances, height, width)
        The images asked for, of one or three channels. Floats outside [0, 1], as normalised images have
        them, are stretched to each image's own range.
    query_idx : array-like of shape (n_instances,)
        Their positions in the pool.
    trace_reductions : array-like of shape (n_instances,), default=None
        The gain of each pick.
    y_pred : array-like of shape (n_instances,), default=None
        What the estimator guessed before the labels were known.
    y_true : array-like of shape (n_instances,), default=None
        The labels.
    classes : sequence of str or mapping, default=None
        Names of the classes: ``classes[label]`` is shown instead of the label.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes that were handed in, or new ones; they only bound the images.
    axes_ : ndarray of shape (n_shown,)
        The axes of the images.
    shares_ : ndarray of shape (n_instances,)
        The share of the query's whole gain that is reached after each pick; of :meth:`plot_gains`.
    bars_ : matplotlib BarContainer
        The gains; of :meth:`plot_gains`.
    line_ : matplotlib Line2D
        The shares in percent; of :meth:`plot_gains`.
    figure_ : matplotlib Figure

    Examples
    --------
    >>> import numpy as np
    >>> from fishermask_sk.plotting import QueryDisplay
    >>> images = np.random.default_rng(0).random((3, 1, 8, 8))
    >>> display = QueryDisplay(images, [7, 2, 5], y_pred=[0, 1, 1], y_true=[0, 0, 1], classes=["cat", "dog"])
    >>> print(display.plot().axes_[1].get_title())
    guess dog
    is cat
    """

    def __init__(
        self,
        images: Any,
        query_idx: Any,
        trace_reductions: Any = None,
        y_pred: Any = None,
        y_true: Any = None,
        classes: Any = None,
    ) -> None:
        self.images = images
        self.query_idx = query_idx
        self.trace_reductions = trace_reductions
        self.y_pred = y_pred
        self.y_true = y_true
        self.classes = classes

    @classmethod
    def from_strategy(
        cls, strategy: Any, X_pool: Any, *, estimator: Any = None, y_pool: Any = None, classes: Any = None
    ) -> QueryDisplay:
        """Take the picks and their gains from a query strategy, right after its query.

        Parameters
        ----------
        strategy : FisherMask
            With `query_idx_` and, where it has gains, `trace_reductions_`.
        X_pool : samples of shape (n_samples, ...)
            The pool that was queried, before the picks were taken out of it. Of a Dataset only the picks are read.
        estimator : object with predict, default=None
            Guesses the classes of the picks: the learner or its estimator, not yet taught the new labels.
        y_pool : array-like of shape (n_samples,), default=None
            Labels of the pool, where they are known.
        classes : sequence of str or mapping, default=None
            Names of the classes.

        Returns
        -------
        QueryDisplay

        Raises
        ------
        ValueError
            For a strategy that has not been called.
        """
        query_idx = getattr(strategy, "query_idx_", None)
        if query_idx is None:
            raise ValueError(f"{type(strategy).__name__} has no query_idx_; run a query with it first.")
        X_query = take_rows(as_rows(X_pool, "X_pool"), query_idx)
        return cls(
            _images(X_query),
            query_idx,
            trace_reductions=getattr(strategy, "trace_reductions_", None),
            y_pred=None if estimator is None else estimator.predict(X_query),
            y_true=None if y_pool is None else take_rows(as_rows(y_pool, "y_pool"), query_idx),
            classes=classes,
        )

    def plot(self, ax: Any = None, *, n_columns: int = 6, max_images: int = 24) -> QueryDisplay:
        """Draw the first images as a grid, row by row; a wrong guess has a thick frame.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Bounds the grid; a new figure for None.
        n_columns : int, default=6
            Images per row.
        max_images : int, default=24
            How many of the picks are shown.

        Returns
        -------
        self : QueryDisplay

        Raises
        ------
        ValueError
            For no picks, arguments that do not have one entry per pick, images that cannot be drawn, or
            an `ax` that was not made by ``plt.subplots`` or a grid specification.
        """
        n_picks = len(self.query_idx)
        if not n_picks:
            raise ValueError("there are no picks to draw; query_idx is empty.")
        for name in ("images", "trace_reductions", "y_pred", "y_true"):
            values = getattr(self, name)
            if values is not None and len(values) != n_picks:
                raise ValueError(
                    f"{name} has {len(values)} entries for {n_picks} picks; expected one per pick, as in "
                    f"{name}[query_idx]."
                )
        n_shown = min(n_picks, max_images)
        pictures = [_drawable(self.images[i]) for i in range(n_shown)]
        n_columns = min(n_columns, n_shown)
        n_rows = -(-n_shown // n_columns)
        titles = [self._title(i) for i in range(n_shown)]
        row_height = 1.05 + 0.13 * (titles[0].count("\n") + 1)
        self.ax_ = _new_axes(ax, figsize=(1.08 * n_columns, row_height * n_rows))
        self.ax_.set_axis_off()
        self.figure_ = self.ax_.figure
        place = self.ax_.get_subplotspec()
        if place is None:
            raise ValueError("ax has no place in a grid to be divided; make it with plt.subplots.")
        grid = place.subgridspec(n_rows, n_columns)
        self.axes_ = np.array([self.figure_.add_subplot(grid[divmod(i, n_columns)]) for i in range(n_shown)])
        for i, (image_ax, picture) in enumerate(zip(self.axes_, pictures, strict=True)):
            image_ax.imshow(picture, cmap="gray")
            image_ax.set_xticks([])
            image_ax.set_yticks([])
            image_ax.set_title(titles[i], fontsize=7, pad=3, linespacing=1.1)
            wrong = self.y_pred is not None and self.y_true is not None and self.y_pred[i] != self.y_true[i]
            image_ax.spines[:].set(linewidth=2.5 if wrong else 0.5, color="#D55E00" if wrong else "black")
        return self

    def plot_gains(self, ax: Any = None) -> QueryDisplay:
        """Draw how much each pick was worth: its gain, and the share of the whole query's gain reached with it.

        It shows how many of the picks were worth asking for, so that you can choose `n_instances` of later
        queries. Gains of different queries cannot be compared, since mask and information are others; they are
        no ground to stop labelling, and nothing in this package stops by them.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure for None.

        Returns
        -------
        self : QueryDisplay
            With `shares_`, `bars_` and `line_`.

        Raises
        ------
        ValueError
            Where there are no gains, not one per pick, or all are zero.

        Notes
        -----
        After a backward pass (``oversample`` above 1) the gains are those at which the picks that stayed were
        picked, beside others that did not stay; they need not fall then.

        Examples
        --------
        >>> import numpy as np
        >>> from fishermask_sk.plotting import QueryDisplay
        >>> display = QueryDisplay(np.zeros((3, 8, 8)), [7, 2, 5], trace_reductions=[6.0, 3.0, 1.0]).plot_gains()
        >>> display.shares_
        array([0.6, 0.9, 1. ])
        """
        if self.trace_reductions is None:
            raise ValueError("there are no gains to draw; pass trace_reductions, as FisherMask has them.")
        gains = np.asarray(self.trace_reductions, dtype=float)
        n_picks = len(self.query_idx)
        if len(gains) != n_picks:
            raise ValueError(
                f"trace_reductions has {len(gains)} entries for {n_picks} picks; expected one per pick."
            )
        if not gains.sum() > 0:
            raise ValueError(
                f"the gains add up to {gains.sum():.3g}, so that no pick has a share of them; the net is certain of "
                "every sample, or there are no picks."
            )
        self.shares_ = gains.cumsum() / gains.sum()
        self.ax_ = _new_axes(ax, figsize=(6.4, 3.6))
        self.figure_ = self.ax_.figure
        picks = np.arange(1, n_picks + 1)
        self.bars_ = self.ax_.bar(picks, gains, color=_COLORS[0], alpha=0.45, label="gain of the pick (left)")
        self.ax_.set_xlabel("pick")
        self.ax_.set_ylabel("gain (trace reduction)")
        self.ax_.xaxis.get_major_locator().set_params(integer=True)
        right = self.ax_.twinx()
        (self.line_,) = right.plot(
            picks,
            100 * self.shares_,
            color=_COLORS[1],
            marker="o",
            markersize=3,
            label="share reached (right)",
        )
        right.set_ylim(0, 105)
        right.set_ylabel("% of the query's whole gain")
        for axes in (self.ax_, right):
            axes.spines["top"].set_visible(False)
        # Below the axes: bars fill the left of the picture and the line its top.
        self.ax_.legend(
            handles=[self.bars_, self.line_],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=2,
            frameon=False,
        )
        return self

    def _title(self, i: int) -> str:
        def name(label: Any) -> str:
            return str(label if self.classes is None else self.classes[label])

        lines = []
        if self.y_pred is not None:
            lines.append(f"guess {name(self.y_pred[i])}")
        if self.y_true is not None:
            lines.append(f"is {name(self.y_true[i])}")
        if self.trace_reductions is not None:
            lines.append(f"gain {self.trace_reductions[i]:.3g}")
        return "\n".join(lines) or f"#{self.query_idx[i]}"


def _images(X_query: Any) -> Any:
    """The samples of a query; of a Dataset the first of each pair, for the second is a label."""
    if not isinstance(X_query, Dataset):
        return X_query
    samples = [X_query[i] for i in range(len(X_query))]  # type: ignore[arg-type]
    return [sample[0] if isinstance(sample, (tuple, list)) else sample for sample in samples]


def _drawable(image_like: Any) -> np.ndarray:
    """An image as imshow takes it: (height, width), or (height, width, 3) in [0, 1] or in bytes."""
    image: np.ndarray = np.asarray(image_like)
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
    elif image.ndim != 2:
        raise ValueError(
            f"an image of shape {image.shape} cannot be drawn; expected (height, width), "
            "(1, height, width) or (3, height, width)."
        )
    if image.ndim == 3 and image.dtype.kind == "f" and (image.min() < 0 or image.max() > 1):
        image = (image - image.min()) / (np.ptp(image) or 1)
    return image


class MaskDisplay:
    """How many weights of each layer the mask keeps, in the order of the network.

    Parameters
    ----------
    weights_per_layer : mapping of str to int
        Number of weights kept of each parameter, as ``FisherMask.weights_per_layer_`` has them.
    layer_sizes : mapping of str to int, default=None
        Number of weights of each parameter; where given, each bar names the share that is kept.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    bars_ : matplotlib BarContainer

    Examples
    --------
    >>> from fishermask_sk.plotting import MaskDisplay
    >>> display = MaskDisplay({"conv.weight": 3, "head.weight": 20}, {"conv.weight": 144, "head.weight": 20})
    >>> [label.get_text() for label in display.plot().ax_.texts]
    ['3 (2.08%)', '20 (100%)']
    """

    def __init__(
        self, weights_per_layer: Mapping[str, int], layer_sizes: Mapping[str, int] | None = None
    ) -> None:
        self.weights_per_layer = weights_per_layer
        self.layer_sizes = layer_sizes

    @classmethod
    def from_strategy(cls, strategy: Any, *, module: Any = None) -> MaskDisplay:
        """Take the counts from a FisherMask that has been called.

        Parameters
        ----------
        strategy : FisherMask
            With `weights_per_layer_`.
        module : torch.nn.Module, default=None
            The module that was queried; gives the sizes of its layers.

        Returns
        -------
        MaskDisplay

        Raises
        ------
        ValueError
            For a strategy that has not been called.
        """
        counts = getattr(strategy, "weights_per_layer_", None)
        if counts is None:
            raise ValueError(
                f"{type(strategy).__name__} has no weights_per_layer_; run a query with it first."
            )
        if module is None:
            return cls(counts)
        # A compiled module puts this in front of the names that it was written with.
        sizes = {name.removeprefix("_orig_mod."): p.numel() for name, p in module.named_parameters()}
        return cls(counts, sizes)

    def plot(self, ax: Any = None, *, empty: bool = False) -> MaskDisplay:
        """Draw one horizontal bar per layer, the first layer on top.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure for None.
        empty : bool, default=False
            Whether layers of which nothing is kept are drawn as well.

        Returns
        -------
        self : MaskDisplay

        Raises
        ------
        ValueError
            For a layer whose size is not given, or a mask that keeps nothing.
        """
        counts = {name: int(n) for name, n in self.weights_per_layer.items() if n or empty}
        if not counts:
            raise ValueError("weights_per_layer keeps no weight; expected at least one count above 0.")
        labels = [f"{n:,}" for n in counts.values()]
        if self.layer_sizes is not None:
            unknown = [name for name in counts if name not in self.layer_sizes]
            if unknown:
                raise ValueError(
                    f"layer_sizes lacks {unknown[0]!r}; give the size of every layer in weights_per_layer."
                )
            shares = [100 * n / self.layer_sizes[name] for name, n in counts.items()]
            labels = [f"{label} ({share:.3g}%)" for label, share in zip(labels, shares, strict=True)]
        self.ax_ = _new_axes(ax, figsize=(6.4, 0.8 + 0.22 * len(counts)))
        self.figure_ = self.ax_.figure
        self.bars_ = self.ax_.barh(list(counts), list(counts.values()), color=_COLORS[0])
        self.ax_.bar_label(self.bars_, labels, padding=3, fontsize=8)
        self.ax_.invert_yaxis()
        self.ax_.margins(x=0.18, y=0.02)
        self.ax_.set_xlabel("weights kept")
        self.ax_.tick_params(axis="y", labelsize=8)
        self.ax_.spines[["top", "right"]].set_visible(False)
        return self
