"""Make every table and figure of the results page from the files in docs/results alone.

    python examples/reproduction/report.py

Tables go into docs/results.md between `<!-- report: kind | study | setting -->` and
`<!-- end -->`, figures to docs/images/results-*.png. No net is trained, and nothing is
read but the files and the page.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")

import matplotlib.pyplot as plt
import numpy as np

from fishermask_sk.plotting import LearningCurveDisplay
from fishermask_sk.results import ComparisonResults

DOCS = Path(__file__).resolve().parents[2] / "docs"
STRATEGIES = (
    "FisherMask",
    "BAIT",
    "BADGE",
    "k-center",
    "margin",
    "least confidence",
    "entropy",
    "random",
)
BLOCK = re.compile(r"(<!-- report: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBERS = {"seed": int, "round": int, "n_labels": int}
MISSING = "*Not run yet.*"
# Data whose test samples have equally many of each class, or nearly so.
BALANCED_TESTS = ("digits", "fashion-mnist", "cifar10")
# More bands than this hide each other.
MAX_BANDS = 4

Rows = list[dict[str, Any]]


def read(folder: Path, study: str, setting: str | None = None) -> Rows:
    """Rows of a study, of one setting or of all; none where it was not run."""
    path = folder / f"{study}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            {key: _value(key, text) for key, text in row.items()}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if setting is None or row["setting"] == setting]


def _value(key: str, text: str) -> Any:
    if key in NUMBERS:
        return NUMBERS[key](text)
    if key == "class_counts":
        return {
            int(label): int(n)
            for label, n in (pair.split(":") for pair in text.split())
        }
    try:
        return float(text)
    except ValueError:
        return text


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(row: dict[str, Any], name: str = "area", digits: int = 3) -> str:
    """A mean difference and its interval, bold where Holm's p is below 0.05."""
    mean = row["area_difference"] if name == "area" else row["labels_saved"]
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if row["p_holm"] < 0.05 and name == "area" else text


def p_value(p: float) -> str:
    return "–" if np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def ordered(rows: Rows) -> ComparisonResults:
    """The eight strategies in the order of the page, then others in that of the
    file.
    """
    names = [*STRATEGIES, *dict.fromkeys(row["strategy"] for row in rows)]
    return ComparisonResults(sorted(rows, key=lambda row: names.index(row["strategy"])))


def rare_labels(rows: Rows, strategy: str) -> float:
    """Labels outside the classes that random sampling bought most of, at the end, mean
    over seeds.
    """
    if "class_counts" not in rows[0]:
        return float("nan")
    last = max(row["round"] for row in rows)
    at_end = [row for row in rows if row["round"] == last]
    counts: dict[int, int] = {}
    for row in at_end:
        if row["strategy"] == "random":
            for label, n in row["class_counts"].items():
                counts[label] = counts.get(label, 0) + n
    common = {label for label, n in counts.items() if n > 0.5 * max(counts.values())}
    own = [row["class_counts"] for row in at_end if row["strategy"] == strategy]
    return float(
        np.mean(
            [sum(n for label, n in each.items() if label not in common) for each in own]
        )
    )


# ---------------------------------------------------------------------- tables


def strategies_table(rows: Rows) -> str:
    """Every strategy beside random sampling and beside margin sampling."""
    results = ordered([row for row in rows if row["strategy"] in STRATEGIES])
    over_random, over_margin = (
        results.summary(baseline) for baseline in ("random", "margin")
    )
    lines = []
    for random, margin in zip(over_random, over_margin, strict=True):
        name = random["strategy"]
        lines.append(
            [
                name,
                str(random["n_seeds"]),
                f"{random['final']:.3f}",
                f"{random['area']:.3f}",
                "–" if name == "random" else interval(random),
                p_value(random["p_holm"]),
                "–" if name == "margin" else interval(margin),
                p_value(margin["p_holm"]),
                "–" if name == "random" else interval(random, "saved", 0),
                f"{rare_labels(rows, name):.0f}".replace("nan", "–"),
            ]
        )
    labels = max(row["n_labels"] for row in rows)
    header = [
        "strategy",
        "seeds",
        f"accuracy at {labels} labels",
        "mean accuracy",
        *("over random", "p", "over margin", "p"),
        "labels saved against random",
        "labels of rare classes",
    ]
    return markdown(header, lines)


def variants_table(rows: Rows, baseline: str = "FisherMask") -> str:
    """Every variant beside the default, on the seeds that both have."""
    kept = [
        row
        for row in rows
        if row["strategy"] == baseline or row["strategy"] not in STRATEGIES
    ]
    lines = [
        [
            row["strategy"] + " (default)" * (row["strategy"] == "FisherMask"),
            str(row["n_seeds"]),
            f"{row['final']:.3f}",
            f"{row['area']:.3f}",
            "–" if row["strategy"] == baseline else interval(row),
            p_value(row["p"]),
            p_value(row["p_holm"]),
        ]
        for row in ordered(kept).summary(baseline)
    ]
    return markdown(
        [
            "variant",
            "seeds",
            "accuracy at the end",
            "mean accuracy",
            "over the default",
            "p",
            "p (Holm)",
        ],
        lines,
    )


def curves_table(rows: Rows) -> str:
    """Mean accuracy and its standard error, round by round."""
    rows = [row for row in ordered(rows) if row["strategy"] in STRATEGIES]
    names, labels = (
        list(dict.fromkeys(row[key] for row in rows))
        for key in ("strategy", "n_labels")
    )
    lines = []
    for name in names:
        cells = []
        for n in labels:
            scores = [
                row["accuracy"]
                for row in rows
                if (row["strategy"], row["n_labels"]) == (name, n)
            ]
            cells.append(
                f"{np.mean(scores):.3f} ± "
                f"{np.std(scores, ddof=1) / len(scores) ** 0.5:.3f}"
            )
        lines.append([name, *cells])
    return markdown(["labels", *map(str, labels)], lines)


def costs_table(rows: Rows) -> str:
    """Seconds of a query and of the training after it."""
    lines = []
    for name in dict.fromkeys(row["strategy"] for row in ordered(rows)):
        own = [row for row in rows if row["strategy"] == name and row["round"] > 0]
        query, fit = (
            np.array([row[key] for row in own])
            for key in ("query_seconds", "fit_seconds")
        )
        low, high = np.quantile(query, [0.1, 0.9])
        share = np.median(query) / (np.median(query) + np.median(fit))
        lines.append(
            [
                name,
                f"{np.median(query):.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{np.median(fit):.2f}",
                f"{share:.0%}",
            ]
        )
    return markdown(
        [
            "strategy",
            "seconds a query",
            "middle 80 %",
            "seconds of training a round",
            "query's share of both",
        ],
        lines,
    )


def sizes_table(rows: Rows) -> str:
    """What a query costs when one size changes: medians over the seeds, with the range
    of the whole.
    """
    sizes = ("N", "C", "k", "b")
    lines = []

    def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["varied"], row["layers"], *(int(row[size]) for size in sizes)

    for place in dict.fromkeys(map(place_of, rows)):
        own = [row for row in rows if place_of(row) == place]
        column = {key: [row[key] for row in own] for key in rows[0]}
        parts = [
            f"{np.median(column[f'{step}_seconds']):.1f}"
            for step in ("mask", "embeddings", "selection")
        ]
        whole = column["query_seconds"]
        lines.append(
            [
                f"**{place[1]}**" if place[0] == "layers" else place[1],
                *(
                    f"**{n:,}**" if size == place[0] else f"{n:,}"
                    for size, n in zip(sizes, place[2:], strict=True)
                ),
                f"{np.median(whole):.1f}"
                + f" ({min(whole):.1f} to {max(whole):.1f})" * (len(whole) > 1),
                *parts,
                f"{np.median(column['fit_seconds']):.1f}",
                f"{np.median(column['bytes']) / 1e6:,.0f}",
            ]
        )
    return markdown(
        [
            "layers",
            *sizes,
            "seconds a query",
            "mask",
            "embeddings",
            "selection",
            "seconds of training",
            "MB",
        ],
        lines,
    )


def masks_table(rows: Rows) -> str:
    """Where the weights of the mask are, and what they carry, by part of the net."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    lines = []
    for labels in sorted({row["n_labels"] for row in rows}):
        cells = []
        for part in parts:
            own = [
                row for row in rows if (row["n_labels"], row["part"]) == (labels, part)
            ]
            weights, of_mask = (
                np.mean([row[key] for row in own])
                for key in ("weights", "share_of_mask")
            )
            cells.append(f"{weights:.0f} / {of_mask:.0%}")
        whole = [
            sum(
                row["share_of_net"]
                for row in rows
                if (row["n_labels"], row["seed"]) == (labels, seed)
            )
            for seed in sorted({row["seed"] for row in rows})
        ]
        lines.append([str(int(labels)), *cells, f"{np.mean(whole):.0%}"])
    return markdown(["labels", *parts, "mask's share of the whole net's"], lines)


def runs_table(folder: Path) -> str:
    """What the files hold, and with which sources it was made."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        about, rows = (
            json.loads(path.read_text(encoding="utf-8")),
            read(folder, path.stem),
        )
        for setting in dict.fromkeys(row["setting"] for row in rows):
            own = [row for row in rows if row["setting"] == setting]
            seeds = {
                name: len({row["seed"] for row in own if row["strategy"] == name})
                for name in dict.fromkeys(row["strategy"] for row in own)
            }
            n_seeds = sorted(set(seeds.values()))
            labels = sorted({row["n_labels"] for row in own})
            step = (
                f", +{labels[1] - labels[0]} to {labels[-1]}" if len(labels) > 1 else ""
            )
            commits = ", ".join(commit[:7] for commit in about["commits"])
            lines.append(
                [
                    f"`{path.stem}`",
                    f"{own[0]['dataset']}, {setting}",
                    str(len(seeds)),
                    f"{labels[0]}{step}",
                    " to ".join(map(str, n_seeds)) + f" of {about['seeds']}",
                    f"`{commits}`",
                ]
            )
    return markdown(
        ["study", "data and setting", "strategies", "labels", "seeds", "commit"], lines
    )


TABLES: dict[str, Callable[[Rows], str]] = {
    "strategies": strategies_table,
    "variants": variants_table,
    "curves": curves_table,
    "costs": costs_table,
    "sizes": sizes_table,
    "masks": masks_table,
}


def filled(page: str, folder: Path) -> str:
    """The page with every table made anew."""

    def table(block: re.Match[str]) -> str:
        kind, *place = (word.strip() for word in block[2].split("|"))
        if kind == "runs":
            body = runs_table(folder)
        else:
            rows = read(folder, *place[:2])
            body = TABLES[kind](rows, *place[2:]) if rows else MISSING
        return f"{block[1]}{body}\n{block[3]}"

    return BLOCK.sub(table, page)


# ---------------------------------------------------------------------- figures


def strategies_figure(rows: Rows, title: str) -> Any:
    """Learning curves, and each strategy's mean lead over margin sampling with its
    interval.
    """
    results = ordered([row for row in rows if row["strategy"] in STRATEGIES])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=[1.25, 1]
    )
    curves = LearningCurveDisplay.from_results(results)
    band = "se" if len(curves.curves) <= MAX_BANDS else None
    fisher_mask = next(
        row for row in results.summary("random") if row["strategy"] == "FisherMask"
    )
    # An arrow from flat curves would say more than the seeds do.
    saved = ("FisherMask", "random") if fisher_mask["saved_low"] > 0 else None
    curves.plot(left, band=band, labels_saved=saved)
    for drawn in (curves.lines_, curves.bands_):
        if "random" in drawn:
            drawn["random"].set_color("0.5")
    seeds = len({row["seed"] for row in results})
    left.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    balanced = results[0]["dataset"] in BALANCED_TESTS
    left.set_ylabel("accuracy on balanced test images" if balanced else "test accuracy")
    left.set_title(f"{title}: mean of {seeds} seeds", fontsize=11)
    forest(
        right,
        results,
        "margin",
        "mean accuracy beside margin sampling's,\npaired by seed, 95 % interval",
    )
    return figure


def variants_figure(rows: Rows, title: str) -> Any:
    """Each variant's mean lead over the default with its interval."""
    kept = [
        row
        for row in rows
        if row["strategy"] == "FisherMask" or row["strategy"] not in STRATEGIES
    ]
    n_variants = len({row["strategy"] for row in kept})
    figure, ax = plt.subplots(figsize=(7, 1.2 + 0.3 * n_variants), layout="constrained")
    ax.set_title(title, fontsize=11)
    forest(
        ax,
        ordered(kept),
        "FisherMask",
        "mean accuracy beside FisherMask's, paired by seed, 95 % interval",
    )
    return figure


def forest(ax: Any, results: ComparisonResults, baseline: str, label: str) -> None:
    """One point and interval per strategy, the baseline's left out; filled where Holm's
    p is below 0.05.
    """
    table = [row for row in results.summary(baseline) if row["strategy"] != baseline]
    for place, row in enumerate(table):
        mean, low, high = (
            row[key] for key in ("area_difference", "area_low", "area_high")
        )
        sure = row["p_holm"] < 0.05
        ax.plot([low, high], [place, place], color="#0072B2", linewidth=1.5)
        ax.plot(
            mean,
            place,
            "o",
            color="#0072B2",
            markerfacecolor="#0072B2" if sure else "white",
        )
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(table)), [row["strategy"] for row in table])
    ax.invert_yaxis()
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"{label}\n(filled: p < 0.05 after Holm's correction)", fontsize=9)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def figures(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every figure that the files give, with its name."""
    for path in sorted(folder.glob("*.csv")):
        rows = read(folder, path.stem)
        if "accuracy" not in rows[0]:
            continue
        for setting in dict.fromkeys(row["setting"] for row in rows):
            own = [row for row in rows if row["setting"] == setting]
            names = {row["strategy"] for row in own}
            name = re.sub(r"[^a-z0-9]+", "-", f"results-{path.stem}-{setting}".lower())
            if {"margin", "random", "FisherMask"} <= names:
                yield name, strategies_figure(own, f"{own[0]['dataset']}, {setting}")
            if "FisherMask" in names and names - set(STRATEGIES):
                title = f"{own[0]['dataset']}, {setting}: one change each"
                yield f"{name}-variants", variants_figure(own, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--docs",
        type=Path,
        default=DOCS,
        help="folder of results.md, results/ and images/",
    )
    docs = parser.parse_args().docs
    page = docs / "results.md"
    page.write_text(
        filled(page.read_text(encoding="utf-8"), docs / "results"), encoding="utf-8"
    )
    for name, figure in figures(docs / "results"):
        figure.savefig(docs / "images" / f"{name}.png", dpi=90)
        plt.close(figure)
        print(docs / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
