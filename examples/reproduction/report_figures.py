"""The figures of the results pages, each made from rows of a results file."""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")

import matplotlib.pyplot as plt
from report_tables import Rows, n_seeds, ordered, strategies_in, variants_in

from fishermask_sk.loops.results import ComparisonResults
from fishermask_sk.plotting import LearningCurveDisplay

# The same file from the same numbers, whenever it is drawn.
plt.rcParams["svg.hashsalt"] = "fishermask_sk"
# Drawn in colour; the others are grey.
HIGHLIGHT = ("FisherMask", "FisherMask with target", "margin", "random")
# Data whose test samples have equally many of each class, or nearly so.
BALANCED_TESTS = ("digits", "fashion-mnist", "cifar10")


def name_of(study: str, setting: str, kind: str = "") -> str:
    """The name of a figure's file."""
    words = f"results-{study}-{setting}{kind}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words) + ".svg"


def strategies_figure(rows: Rows) -> Any:
    """Learning curves, and each strategy's mean lead over margin sampling."""
    results = ordered(strategies_in(rows))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=[1.25, 1]
    )
    curves = LearningCurveDisplay.from_results(results)
    fisher_mask = next(
        row
        for row in results.summary("random")
        if row["strategy"].startswith("FisherMask")
    )
    curves.plot(
        left,
        # An arrow from flat curves would say more than the seeds do.
        labels_saved=(fisher_mask["strategy"], "random")
        if fisher_mask["saved_low"] > 0
        else None,
        highlight=[name for name in HIGHLIGHT if name in curves.curves],
    )
    left.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=4 if len(curves.curves) <= 8 else 3,
        fontsize=8,
        frameon=False,
    )
    balanced = results[0]["dataset"] in BALANCED_TESTS
    left.set_ylabel("accuracy on balanced test images" if balanced else "test accuracy")
    setting = f"{rows[0]['dataset']}, {rows[0]['setting']}"
    title = f"{setting}: mean of {n_seeds(rows)} seeds, ±1 SE"
    left.set_title(textwrap.fill(title, 55), fontsize=11)
    colours = {name: line.get_color() for name, line in curves.lines_.items()}
    forest(right, results, "margin", "mean accuracy minus margin sampling's", colours)
    return figure


def variants_figure(rows: Rows) -> Any:
    """Each variant's mean lead over the default."""
    results = ordered(variants_in(rows))
    names = dict.fromkeys(row["strategy"] for row in results)
    figure, ax = plt.subplots(figsize=(7, 1.2 + 0.3 * len(names)), layout="constrained")
    ax.set_title(f"{rows[0]['dataset']}, {rows[0]['setting']}", fontsize=11)
    forest(ax, results, "FisherMask", "mean accuracy minus the default's")
    return figure


def overview_figure(settings: dict[str, Rows]) -> Any:
    """FisherMask's lead over margin sampling in every setting."""
    rows = {}
    for name, own in settings.items():
        results = ordered(strategies_in(own))
        (rows[name],) = (
            row for row in results.summary("margin") if row["strategy"] == "FisherMask"
        )
    figure, ax = plt.subplots(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
    _draw_forest(ax, rows, dict.fromkeys(rows, "#0072B2"))
    ax.set_xlabel(
        "FisherMask's mean accuracy minus margin sampling's, 95 % interval\n"
        "(filled: p < 0.05 after Holm's correction)",
        fontsize=9,
    )
    return figure


def forest(
    ax: Any,
    results: ComparisonResults,
    baseline: str,
    label: str,
    colours: dict[str, str] | None = None,
) -> None:
    """One point and interval per strategy, without the baseline's."""
    rows = {
        row["strategy"]: row
        for row in results.summary(baseline)
        if row["strategy"] != baseline
    }
    dark = {  # a grey line is to be seen here
        name: colour if name in HIGHLIGHT else "0.45"
        for name, colour in (colours or {}).items()
    }
    _draw_forest(ax, rows, dict.fromkeys(rows, "#0072B2") | dark)
    ax.set_xlabel(
        f"{label},\npaired by seed, 95 % interval (filled: p < 0.05, Holm)",
        fontsize=9,
    )


def _draw_forest(
    ax: Any, rows: dict[str, dict[str, Any]], colours: dict[str, str]
) -> None:
    for place, (name, row) in enumerate(rows.items()):
        color = colours[name]
        ends = row["area_low"], row["area_high"]
        ax.plot(ends, [place, place], color=color, linewidth=1.5)
        fill = color if row["p_holm"] < 0.05 else "white"
        ax.plot(row["area_difference"], place, "o", color=color, markerfacecolor=fill)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.locator_params(axis="x", nbins=5)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
