"""The images of one query, and its gains; see `fishermask_sk.plotting`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from fishermask_sk._rows import as_rows, take_rows
from fishermask_sk._types import Learner, Rows, Samples
from fishermask_sk.nets.loaders import predictions_in_order
from fishermask_sk.plotting.axes import COLORS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fishermask_sk.strategy.fisher_mask import FisherMask


class QueryDisplay:
    """The images of one query, in the order in which they were picked.

    Every argument has one entry per pick, in pick order. :meth:`from_strategy` takes
    them from a query strategy that has just been called.

    Parameters
    ----------
    images : array-like of shape (n_instances, [n_channels,] height, width)
        The images asked for, of one or three channels. Floats outside [0, 1], as
        normalised images have them, are stretched to each image's own range.
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
        The share of the query's whole gain that is reached after each pick; of
        :meth:`plot_gains`.
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
    >>> display = QueryDisplay(
    ...     images, [7, 2, 5],
    ...     y_pred=[0, 1, 1], y_true=[0, 0, 1], classes=["cat", "dog"],
    ... )
    >>> print(display.plot().axes_[1].get_title())
    guess dog
    is cat
    """

    def __init__(
        self,
        images: Rows,
        query_idx: Sequence[int] | np.ndarray,
        trace_reductions: Sequence[float] | np.ndarray | None = None,
        y_pred: Rows | None = None,
        y_true: Rows | None = None,
        classes: Rows | None = None,
    ) -> None:
        self.images = images
        self.query_idx = query_idx
        self.trace_reductions = trace_reductions
        self.y_pred = y_pred
        self.y_true = y_true
        self.classes = classes

    @classmethod
    def from_strategy(
        cls,
        strategy: FisherMask,
        X_pool: Samples,
        *,
        estimator: Learner | None = None,
        y_pool: Rows | None = None,
        classes: Rows | None = None,
    ) -> QueryDisplay:
        """Take the picks and their gains from a query strategy, right after its query.

        Parameters
        ----------
        strategy : FisherMask
            With `query_idx_` and, where it has gains, `trace_reductions_`.
        X_pool : samples of shape (n_samples, ...)
            The pool that was queried, before the picks were taken out of it. Of a
            Dataset only the picks are read.
        estimator : object with predict, default=None
            Guesses the classes of the picks: the learner or its estimator, not yet
            taught the new labels.
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
            raise ValueError(
                f"{type(strategy).__name__} has no query_idx_; run a query with it "
                "first."
            )
        X_query = take_rows(as_rows(X_pool, "X_pool"), query_idx)
        with predictions_in_order(estimator):
            y_pred = None if estimator is None else estimator.predict(X_query)
        return cls(
            _images(X_query),
            query_idx,
            trace_reductions=getattr(strategy, "trace_reductions_", None),
            y_pred=y_pred,
            y_true=None
            if y_pool is None
            else take_rows(as_rows(y_pool, "y_pool"), query_idx),
            classes=classes,
        )

    def plot(
        self, ax: Axes | None = None, *, n_columns: int = 6, max_images: int = 24
    ) -> QueryDisplay:
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
            For no picks, arguments that do not have one entry per pick, images that
            cannot be drawn, or an `ax` that was not made by ``plt.subplots`` or a grid
            specification.
        """
        n_picks = len(self.query_idx)
        if not n_picks:
            raise ValueError("there are no picks to draw; query_idx is empty.")
        for name in ("images", "trace_reductions", "y_pred", "y_true"):
            values = getattr(self, name)
            if values is not None and len(values) != n_picks:
                raise ValueError(
                    f"{name} has {len(values)} entries for {n_picks} picks; expected "
                    f"one per pick, as in {name}[query_idx]."
                )
        n_shown = min(n_picks, max_images)
        pictures = [_drawable(self.images[i]) for i in range(n_shown)]
        n_columns = min(n_columns, n_shown)
        n_rows = -(-n_shown // n_columns)
        titles = [self._title(i) for i in range(n_shown)]
        row_height = 1.05 + 0.13 * (titles[0].count("\n") + 1)
        self.ax_ = new_axes(ax, figsize=(1.08 * n_columns, row_height * n_rows))
        self.ax_.set_axis_off()
        self.figure_ = self.ax_.figure
        place = self.ax_.get_subplotspec()
        if place is None:
            raise ValueError(
                "ax has no place in a grid to be divided; make it with plt.subplots."
            )
        grid = place.subgridspec(n_rows, n_columns)
        self.axes_ = np.array(
            [
                self.figure_.add_subplot(grid[divmod(i, n_columns)])
                for i in range(n_shown)
            ]
        )
        for i, (image_ax, picture) in enumerate(zip(self.axes_, pictures, strict=True)):
            image_ax.imshow(picture, cmap="gray")
            image_ax.set_xticks([])
            image_ax.set_yticks([])
            image_ax.set_title(titles[i], fontsize=7, pad=3, linespacing=1.1)
            wrong = (
                self.y_pred is not None
                and self.y_true is not None
                and self.y_pred[i] != self.y_true[i]
            )
            image_ax.spines[:].set(
                linewidth=2.5 if wrong else 0.5, color="#D55E00" if wrong else "black"
            )
        return self

    def plot_gains(self, ax: Axes | None = None) -> QueryDisplay:
        """Draw how much each pick was worth: its gain, and the share of the whole
        query's gain reached with it.

        It shows how many of the picks were worth asking for, so that you can choose
        `n_instances` of later queries. Gains of different queries cannot be compared,
        since mask and information are others; they are no ground to stop labelling, and
        nothing in this package stops by them.

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
        After a backward pass (``oversample`` above 1) the gains are those at which the
        picks that stayed were picked, among others that did not stay; they need not
        fall then.

        Examples
        --------
        >>> import numpy as np
        >>> from fishermask_sk.plotting import QueryDisplay
        >>> display = QueryDisplay(
        ...     np.zeros((3, 8, 8)), [7, 2, 5], trace_reductions=[6.0, 3.0, 1.0]
        ... )
        >>> display.plot_gains().shares_
        array([0.6, 0.9, 1. ])
        """
        if self.trace_reductions is None:
            raise ValueError(
                "there are no gains to draw; pass trace_reductions, as FisherMask has "
                "them."
            )
        gains = np.asarray(self.trace_reductions, dtype=float)
        n_picks = len(self.query_idx)
        if len(gains) != n_picks:
            raise ValueError(
                f"trace_reductions has {len(gains)} entries for {n_picks} picks; "
                "expected one per pick."
            )
        if not gains.sum() > 0:
            raise ValueError(
                f"the gains add up to {gains.sum():.3g}, so that no pick has a share "
                "of them; the net is certain of every sample, or there are no picks."
            )
        self.shares_ = gains.cumsum() / gains.sum()
        self.ax_ = new_axes(ax, figsize=(6.4, 3.6))
        self.figure_ = self.ax_.figure
        picks = np.arange(1, n_picks + 1)
        self.bars_ = self.ax_.bar(
            picks, gains, color=COLORS[0], alpha=0.45, label="gain of the pick (left)"
        )
        self.ax_.set_xlabel("pick")
        self.ax_.set_ylabel("gain (trace reduction)")
        self.ax_.xaxis.get_major_locator().set_params(integer=True)
        right = self.ax_.twinx()
        (self.line_,) = right.plot(
            picks,
            100 * self.shares_,
            color=COLORS[1],
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
    """The samples of a query; of a Dataset the first of each pair, for the second is a
    label.
    """
    if not isinstance(X_query, Dataset):
        return X_query
    samples = [X_query[i] for i in range(len(X_query))]  # type: ignore[arg-type]
    return [
        sample[0] if isinstance(sample, (tuple, list)) else sample for sample in samples
    ]


def _drawable(image_like: Any) -> np.ndarray:
    """An image as imshow takes it: (height, width), or (height, width, 3) in [0, 1] or
    in bytes.
    """
    image: np.ndarray = np.asarray(image_like)
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
    elif image.ndim != 2:
        raise ValueError(
            f"an image of shape {image.shape} cannot be drawn; expected (height, "
            "width), (1, height, width) or (3, height, width). Of samples that are no "
            "images, plot_gains draws the gains."
        )
    if (
        image.ndim == 3
        and image.dtype.kind == "f"
        and (image.min() < 0 or image.max() > 1)
    ):
        image = (image - image.min()) / (np.ptp(image) or 1)
    return image
