"""Results of a comparison of query strategies, and what they say.

Sees rows of numbers, no estimators and no files but the one it reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fishermask_sk.loops.results_file import read

__all__ = ["ComparisonResults", "Table", "holm", "load_results"]

LOWER_IS_BETTER = ("log_loss",)


class Table(list[dict[str, Any]]):
    """A list of rows, each a dict with the same keys, that prints as a table.

    Examples
    --------
    >>> rows = [{"strategy": "random", "area": 0.5}]
    >>> print(Table([*rows, {"strategy": "margin", "area": 0.61234}]))
    strategy    area
    random    0.5
    margin    0.6123
    """

    def to_frame(self) -> Any:
        """Rows as a pandas DataFrame.

        Returns
        -------
        DataFrame

        Raises
        ------
        ImportError
            Where pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_frame needs pandas, which is not installed; run pip install "
                "pandas, or use the rows as they are."
            ) from error
        return pd.DataFrame(list(self))

    def __str__(self) -> str:
        if not self:
            return "(no rows)"
        header = list(self[0])
        cells = [header] + [[_cell(row[name]) for name in header] for row in self]
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                text.ljust(width) for text, width in zip(line, widths, strict=True)
            ).rstrip()
            for line in cells
        )


class ComparisonResults(Table):
    """Tidy rows of :func:`~fishermask_sk.compare_strategies`: one per strategy, seed
    and round.

    Each row is a dict with

    - "strategy" (str), "seed" (int), "round" (int; 0 is the first batch),
    - "n_labels": labels used so far,
    - "accuracy", "balanced_accuracy", "log_loss" on the test set, after the round's
      fit; the log loss is NaN for estimators without `predict_proba`,
    - "class_counts": dict from class, as str, to how many samples of it are labelled
      so far,
    - "query_seconds", "fit_seconds": wall time,
    - "indices": positions in `X` of the samples labelled in this round, in pick order.

    Examples
    --------
    >>> rows = [
    ...     {
    ...         "strategy": name, "seed": seed, "round": i,
    ...         "n_labels": 10 * (i + 1), "accuracy": level + 0.1 * i,
    ...     }
    ...     for name, levels in {"random": (0.5, 0.6), "margin": (0.6, 0.7)}.items()
    ...     for seed, level in enumerate(levels) for i in range(3)
    ... ]
    >>> row = ComparisonResults(rows).summary("random")[1]
    >>> row["strategy"], round(row["area_difference"], 3), round(row["labels_saved"], 3)
    ('margin', 0.1, 10.0)
    """

    def summary(
        self,
        baseline: str,
        *,
        metric: str = "accuracy",
        test: str = "t",
        confidence: float = 0.95,
        n_bootstrap: int = 10_000,
        random_state: int = 0,
    ) -> Table:
        """Compare every strategy with a baseline, seed by seed.

        Parameters
        ----------
        baseline : str
            Name of the strategy to compare with.
        metric : {"accuracy", "balanced_accuracy", "log_loss"}, default="accuracy"
            The column to compare.
        test : {"t", "wilcoxon"}, default="t"
            The paired test of equal areas: Student's t, or Wilcoxon's signed ranks,
            which assumes no normal distribution but with n seeds gives no p below
            2^(1−n): with five seeds never below 0.06.
        confidence : float, default=0.95
            Level of the intervals.
        n_bootstrap : int, default=10000
            Resamples of the seeds.
        random_state : int, default=0
            Seeds the resamples.

        Returns
        -------
        Table
            One row per strategy, in the order of the results, the baseline included:

            - "n_seeds": seeds that both have all rounds of,
            - "final": mean of the metric after the last round,
            - "area": mean area under the curve, divided by the range of labels: the
              metric averaged over the budget,
            - "area_difference", "area_low", "area_high": mean difference of areas,
              strategy minus baseline on the same seed, with its bootstrap interval,
            - "p", "p_holm": of the paired test, and corrected by Holm's method for
              all strategies tested,
            - "labels_saved", "saved_low", "saved_high": how many labels fewer than
              the baseline it needs for the best score that both reach on that seed,
              with its bootstrap interval.

            What needs two seeds is NaN for one. For the baseline the differences are 0
            and p is NaN, as it is for t where all seeds differ by the same amount.

        Raises
        ------
        ValueError
            For an unknown baseline, metric or test, and where no seed is complete.

        Notes
        -----
        Labels to reach a score are counted where the running best of a curve, drawn
        with straight lines between rounds, first gets there. Intervals are BCa
        bootstrap intervals (bias-corrected and accelerated) of the mean over seeds.
        From a handful of seeds they are still too narrow; they show the scatter, and
        the test decides.
        Rounds that are missing (a run that is not finished) leave the whole seed out.

        References
        ----------
        .. [1] S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure",
           Scand. J. Statist. 6, 1979.
        .. [2] B. Efron, "Better Bootstrap Confidence Intervals", JASA 82, 1987.
        """
        if test not in ("t", "wilcoxon"):
            raise ValueError(f"test={test!r} is unknown; choose 't' or 'wilcoxon'.")
        curves = self._curves(metric)
        if baseline not in curves:
            raise ValueError(
                f"baseline={baseline!r} is not among the strategies; choose one of "
                f"{list(curves)}."
            )
        longest = max(
            len(curve) for seeds in curves.values() for curve in seeds.values()
        )
        rng = np.random.default_rng(random_state)
        sign = -1 if metric in LOWER_IS_BETTER else 1
        rows = Table()
        for name, seeds in curves.items():
            shared = [
                seed
                for seed, curve in seeds.items()
                if len(curve) == len(curves[baseline].get(seed, ())) == longest
            ]
            if not shared:
                raise ValueError(
                    f"There is no seed with all rounds of both {name!r} and "
                    f"{baseline!r}; finish the comparison first."
                )
            pairs = [
                (np.array(seeds[seed]), np.array(curves[baseline][seed]))
                for seed in shared
            ]
            areas = np.array([[_area(*curve.T) for curve in pair] for pair in pairs])
            saved = np.array([_labels_saved(own, other, sign) for own, other in pairs])
            difference = areas[:, 0] - areas[:, 1]
            low, high = _interval(difference, confidence, n_bootstrap, rng)
            saved_low, saved_high = _interval(saved, confidence, n_bootstrap, rng)
            rows.append(
                {
                    "strategy": name,
                    "n_seeds": len(shared),
                    "final": float(np.mean([own[-1, 1] for own, _ in pairs])),
                    "area": float(areas[:, 0].mean()),
                    "area_difference": float(difference.mean()),
                    "area_low": low,
                    "area_high": high,
                    "p": float("nan")
                    if name == baseline
                    else _p_value(difference, test),
                    "p_holm": float("nan"),
                    "labels_saved": float(saved.mean()),
                    "saved_low": saved_low,
                    "saved_high": saved_high,
                }
            )
        tested = [row for row in rows if np.isfinite(row["p"])]
        for row, corrected in zip(
            tested, holm(row["p"] for row in tested), strict=True
        ):
            row["p_holm"] = corrected
        return rows

    def _curves(self, metric: str) -> dict[str, dict[int, list[tuple[float, float]]]]:
        """For each strategy and seed its points (labels, metric)."""
        curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for row in sorted(self, key=lambda row: row["round"]):
            if metric not in row:
                raise ValueError(
                    f"metric={metric!r} is not among the columns {list(row)}."
                )
            curves.setdefault(row["strategy"], {}).setdefault(row["seed"], []).append(
                (row["n_labels"], row[metric])
            )
        order = dict.fromkeys(row["strategy"] for row in self)
        return {name: curves[name] for name in order}


def load_results(path: str | Path) -> ComparisonResults:
    """Read the rows of a results file, also of a comparison that is still running or
    was killed.

    Parameters
    ----------
    path : str or Path
        As handed to `compare_strategies`.

    Returns
    -------
    ComparisonResults
        In the order of the file.

    Raises
    ------
    ValueError
        Where it is no results file.

    Examples
    --------
    >>> load_results("pyproject.toml")
    Traceback (most recent call last):
    ...
    ValueError: results='pyproject.toml' is not a file of compare_strategies; ...
    """
    _, _, rounds = read(Path(path))
    return ComparisonResults(row for curve in rounds.values() for row in curve)


def holm(p_values: Iterable[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method.

    Parameters
    ----------
    p_values : iterable of float
        One per hypothesis.

    Returns
    -------
    list of float
        In the same order: the i-th smallest of m becomes max over j ≤ i of (m − j +
        1)·p_(j), at most 1.

    Examples
    --------
    >>> holm([0.25, 0.0625, 0.5])
    [0.5, 0.1875, 0.5]
    """
    p = np.array(list(p_values), dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(
        np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0
    )
    return [float(value) for value in corrected]


def _area(n_labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the straight lines between rounds, over the range of labels; the score
    itself for one round.
    """
    if len(scores) == 1:
        return float(scores[0])
    return float(np.trapezoid(scores, n_labels) / (n_labels[-1] - n_labels[0]))


def _labels_saved(own: np.ndarray, other: np.ndarray, sign: int) -> float:
    """Labels that `other` needs more than `own` for the best score that both reach."""
    target = min((sign * own[:, 1]).max(), (sign * other[:, 1]).max())
    return labels_to_reach(target, other, sign) - labels_to_reach(target, own, sign)


def labels_to_reach(target: float, curve: np.ndarray, sign: int) -> float:
    """Where the running best of a curve of rows (labels, score), drawn with straight
    lines, first gets to `target`.
    """
    n_labels, best = curve[:, 0], np.maximum.accumulate(sign * curve[:, 1])
    i = int(np.argmax(best >= target))
    if i == 0:
        return float(n_labels[0])
    share = (target - best[i - 1]) / (best[i] - best[i - 1])
    return float(n_labels[i - 1] + share * (n_labels[i] - n_labels[i - 1]))


def _interval(
    values: np.ndarray, confidence: float, n_bootstrap: int, rng: np.random.Generator
) -> tuple[float, float]:
    """BCa bootstrap interval of the mean over seeds."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float("nan"), float("nan")
    if not _has_spread(values):  # there is no acceleration to estimate
        return float(values.mean()), float(values.mean())
    low, high = bootstrap(
        (values,),
        np.mean,
        n_resamples=n_bootstrap,
        confidence_level=confidence,
        method="BCa",
        random_state=rng,
    ).confidence_interval
    return float(low), float(high)


def _has_spread(values: np.ndarray) -> bool:
    """Whether values differ by more than rounding."""
    return bool(np.ptp(values) > 1e-9 * np.abs(values).max())


def _p_value(difference: np.ndarray, test: str) -> float:
    from scipy.stats import ttest_1samp, wilcoxon

    if len(difference) < 2:
        return float("nan")
    if not difference.any():
        return 1.0
    if test == "t" and not _has_spread(difference):
        return float("nan")  # nothing to divide by
    return float(
        ttest_1samp(difference, 0.0).pvalue
        if test == "t"
        else wilcoxon(difference).pvalue
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
