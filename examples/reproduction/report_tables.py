"""The tables and sentences of the results pages, each made from rows of a results file.

Accuracies are in percent and differences in points. A difference has its 95 % bootstrap
interval behind it and is bold where Holm's p is below 0.05.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fishermask_sk.loops.results import ComparisonResults, holm

# In the order of the pages; what else is in a file are variants of FisherMask.
STRATEGIES = (
    "FisherMask",
    "FisherMask with target",
    "BAIT",
    "BAIT with target",
    "BADGE",
    "k-center",
    "facility location",
    "margin",
    "weighted margin",
    "power margin",
    "least confidence",
    "entropy",
    "random",
)
# With these and some form of FisherMask, a table of strategies can be made.
COMPARED = {"margin", "random"}
# How a reader asks for what has a short name in the files.
ASKED_FOR = {"last layer": '`FisherMask(layers="last")`'}
# What a query costs, from low to high; unknown names come last.
BY_COST = (
    "random",
    "margin",
    "least confidence",
    "entropy",
    "power margin",
    "weighted margin",
    "facility location",
    "BADGE",
    "k-center",
    "BAIT",
    "BAIT with target",
    "last layer",
    "FisherMask",
    "FisherMask with target",
)
# Kinds of pool, and the settings behind each. A setting that is named nowhere has a
# line of its own.
POOLS = {
    "images, most of them irrelevant": (
        ("irrelevant", "FashionMNIST, few wanted"),
        ("irrelevant", "digits, few wanted"),
        ("irrelevant", "CIFAR-10, few wanted"),
    ),
    "images, each many times": (
        ("near_duplicates", "some many times"),
        ("near_duplicates", "some many times, 20 a query"),
        ("near_duplicates", "some many times, 180 a query"),
        ("near_duplicates", "each five times"),
        ("near_duplicates", "each eight times"),
    ),
    "images, most irrelevant, each many times": (
        ("both", "FashionMNIST, a fifth wanted, each eight times"),
        ("both", "CIFAR-10, a fifth wanted, each eight times"),
    ),
    "other images in use than in the pool": (
        ("shift", "a tenth dark"),
        ("shift", "a tenth blurred"),
        ("shift", "a tenth turned"),
    ),
    "images, some classes rare": (
        ("digits", "imbalanced"),
        ("fashion_imbalanced", "imbalanced"),
        ("ablations", "imbalanced 14x14"),
        ("ablations", "imbalanced 14x14, 20 a query"),
        ("ablations", "imbalanced 14x14, 180 a query"),
        ("cifar10_imbalanced", "imbalanced"),
        ("demo", "imbalanced"),
        ("last_layer", "classes 7 to 9 common"),
        ("last_layer", "classes 4 to 7, 14x14"),
    ),
    "images, all classes equally common": (
        ("digits", "balanced"),
        ("fashion_balanced", "balanced 14x14"),
        ("no_harm", "balanced"),
        ("no_harm", "balanced 14x14"),
        ("networks", "images, Vision Transformer"),
    ),
    "rows of a table": (("networks", "table, MLP"),),
    "short texts": (
        ("networks", "text, transformer"),
        ("text_again", "text, transformer, new seeds"),
    ),
}
# What was to be shown, as the configurations say: setting, strategy, baseline. Holm's
# correction is for all comparisons of a study together.
CLAIMS = {
    "both": [
        (setting, "FisherMask with target", baseline)
        for _, setting in POOLS["images, most irrelevant, each many times"]
        for baseline in ("margin", "weighted margin", "facility location")
    ],
    "irrelevant": [
        (setting, "FisherMask with target", baseline)
        for _, setting in POOLS["images, most of them irrelevant"]
        for baseline in ("FisherMask", "margin")
    ],
    "near_duplicates": [
        (setting, "FisherMask", "margin")
        for setting in ("some many times", "each five times", "each eight times")
    ],
    "shift": [
        (setting, "FisherMask with target", "FisherMask")
        for _, setting in POOLS["other images in use than in the pool"]
    ],
    "cheaper": [
        (f"cheaper, {pool}", form, "FisherMask")
        for pool in ("near-duplicates", "irrelevant", "imbalanced", "balanced")
        for form in (
            "two stages",
            "two stages, drawn",
            "last layer",
            "part of the last layer",
        )
    ],
    "variants": [("digits, the head alone", "last layer", "FisherMask with target")],
    "no_harm": [
        (setting, "FisherMask with target", "margin")
        for setting in ("balanced", "balanced 14x14")
    ],
}
NUMBERS = {"seed": int, "round": int, "n_labels": int}

NUMBER = re.compile(r"[*<+−\s]*\d|–$")

Rows = list[dict[str, Any]]


# ----------------------------------------------------------------------- files


def studies(folder: Path) -> list[str]:
    """Names of the studies that have results here."""
    return [
        path.stem
        for path in sorted(folder.glob("*.csv"))
        if path.with_suffix(".json").exists()
    ]


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


def about(folder: Path, study: str) -> dict[str, Any]:
    """What a study's rows were made with."""
    path = folder / f"{study}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def settings(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["setting"] for row in rows))


def hours(rows: Rows) -> float:
    """Time of all queries and trainings in a row; NaN where none was kept."""
    if "fit_seconds" not in rows[0]:
        return math.nan
    return sum(row["query_seconds"] + row["fit_seconds"] for row in rows) / 3600


def in_hours(spent: float) -> str:
    if math.isnan(spent):
        return "–"
    return "< 0.1" if spent < 0.05 else f"{spent:.1f}"


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


def part_of(made: dict[str, Any], setting: str) -> dict[str, Any]:
    """What one setting's rows were made with."""
    parts = [each for each in made.get("settings", []) if each["name"] == setting]
    return made | {"settings": parts}


def ordered(rows: Rows) -> ComparisonResults:
    """The strategies in the order of the pages, then others in that of the file."""
    names = [*STRATEGIES, *dict.fromkeys(row["strategy"] for row in rows)]
    return ComparisonResults(sorted(rows, key=lambda row: names.index(row["strategy"])))


def strategies_in(rows: Rows) -> Rows:
    """What has a place in the table of strategies: all, where no default is there whose
    variants the others could be.
    """
    if not any(row["strategy"] == "FisherMask" for row in rows):
        return rows
    return [row for row in rows if row["strategy"] in STRATEGIES]


def variants_in(rows: Rows) -> Rows:
    """FisherMask, and what has no place in the table of strategies: its variants, or
    all where there is no such table.
    """
    if not has_strategies(rows):
        return rows
    return [
        row
        for row in rows
        if row["strategy"] == "FisherMask" or row["strategy"] not in STRATEGIES
    ]


def has_strategies(rows: Rows) -> bool:
    """Whether strategies are to be compared, and not FisherMask's default with others
    alone.
    """
    names = {row["strategy"] for row in rows}
    return names >= COMPARED and any(name.startswith("FisherMask") for name in names)


def has_variants(rows: Rows) -> bool:
    names = {row["strategy"] for row in variants_in(rows)}
    return "FisherMask" in names and len(names) > 1


# ----------------------------------------------------------------------- words


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; columns of numbers are aligned to the right."""
    header, rows = list(header), [list(row) for row in rows]
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    rules = ["---:" if all(map(NUMBER.match, cells)) else "---" for cells in columns]
    lines = [header, rules, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def points(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:+.1f}".replace("-", "−")


def difference(row: dict[str, Any]) -> str:
    """A mean difference in points and its interval."""
    low, high = points(row["area_low"]), points(row["area_high"])
    mean = points(row["area_difference"])
    if math.isnan(row["area_low"]):
        return mean  # of one seed
    return f"{f'**{mean}**' if row['p_holm'] < 0.05 else mean} [{low}, {high}]"


def labels_saved(row: dict[str, Any]) -> str:
    keys = ["labels_saved", "saved_low", "saved_high"]
    if math.isnan(row["saved_low"]):
        del keys[1:]  # of one seed
    mean, *ends = (f"{round(row[key])}".replace("-", "−") for key in keys)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def p_value(p: float, equals: str = "") -> str:
    return "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def rare_labels(rows: Rows, strategy: str) -> float:
    """Labels outside the classes that random sampling bought most of, at the end, mean
    over seeds.
    """
    if "class_counts" not in rows[0]:
        return math.nan
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


def n_seeds(rows: Rows) -> int:
    """How many seeds each strategy of each setting has at least."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        place = row.get("setting", ""), row["strategy"]
        seeds.setdefault(place, set()).add(row["seed"])
    return min(map(len, seeds.values()))


def seeds_in(rows: Rows, made: dict[str, Any]) -> dict[str, int]:
    """How many seeds of each setting are in, by its name."""
    counts = {}
    for setting in settings(rows) + [part["name"] for part in made.get("settings", [])]:
        own = [row for row in rows if row["setting"] == setting]
        parts = part_of(made, setting)["settings"]
        planned = {name for part in parts for name in part.get("strategies", ())}
        missing = planned - {row["strategy"] for row in own}
        counts[setting] = n_seeds(own) if own and not missing else 0
    return counts


def is_whole(rows: Rows, made: dict[str, Any]) -> bool:
    return min(seeds_in(rows, made).values()) >= made["seeds"]


def findings(rows: Rows) -> str:
    """What a setting says, in sentences made of its numbers alone."""
    results = ordered(strategies_in(rows))
    lines = []
    over = {name: results.summary(name) for name in ("random", "margin")}
    for baseline, table in over.items():
        for own in table:
            if own["strategy"].startswith("FisherMask"):
                lines.append(
                    f"- {own['strategy']} minus {baseline} sampling: {difference(own)} "
                    f"points of mean accuracy, p {p_value(own['p_holm'], '= ')}."
                )
        for word, sign in (("above", 1), ("below", -1)):
            names = [
                f"{row['strategy']} ({points(row['area_difference'])})"
                for row in table
                if row["p_holm"] < 0.05 and sign * row["area_difference"] > 0
            ]
            if names:
                lines.append(
                    f"- Significantly {word} {baseline} sampling: {', '.join(names)}."
                )
    return "\n".join(lines)


# ---------------------------------------------------------------------- tables


def strategies_table(rows: Rows) -> str:
    """Every strategy next to random sampling and next to margin sampling."""
    results = ordered(strategies_in(rows))
    over_random, over_margin = map(results.summary, ("random", "margin"))
    rare = {row["strategy"]: rare_labels(rows, row["strategy"]) for row in over_random}
    with_rare = any(n > 0 for n in rare.values())
    lines = []
    for random, margin in zip(over_random, over_margin, strict=True):
        name = random["strategy"]
        lines.append(
            [
                name,
                f"{100 * random['final']:.1f}",
                f"{100 * random['area']:.1f}",
                "–" if name == "random" else difference(random),
                "–" if name == "margin" else difference(margin),
                "–" if name == "random" else labels_saved(random),
                *([f"{rare[name]:.0f}"] if with_rare else []),
            ]
        )
    labels = max(row["n_labels"] for row in rows)
    header = [
        "strategy",
        f"% at {labels} labels",
        "mean %",
        "over random",
        "over margin",
        "labels saved",
        *(["rare labels"] if with_rare else []),
    ]
    return markdown(header, lines)


def variants_table(rows: Rows) -> str:
    """Every variant next to the default, on the seeds that both have."""
    lines = [
        [
            row["strategy"] + " (default)" * (row["strategy"] == "FisherMask"),
            f"{100 * row['final']:.1f}",
            f"{100 * row['area']:.1f}",
            "–" if row["strategy"] == "FisherMask" else difference(row),
            p_value(row["p_holm"]),
        ]
        for row in ordered(variants_in(rows)).summary("FisherMask")
    ]
    first = "variant" if has_strategies(rows) else "strategy"
    return markdown(
        [first, "% at the end", "mean %", "over the default", "p (Holm)"], lines
    )


def curves_table(rows: Rows) -> str:
    """Mean accuracy and its standard error, round by round."""
    rows = list(ordered(strategies_in(rows) if has_strategies(rows) else rows))
    names, labels = (
        list(dict.fromkeys(row[key] for row in rows))
        for key in ("strategy", "n_labels")
    )
    lines = []
    for name in names:
        cells = []
        for n in labels:
            scores = 100 * np.array(
                [
                    row["accuracy"]
                    for row in rows
                    if (row["strategy"], row["n_labels"]) == (name, n)
                ]
            )
            cell = f"{scores.mean():.1f}"
            if len(scores) > 1:
                cell += f" ± {scores.std(ddof=1) / len(scores) ** 0.5:.1f}"
            cells.append(cell)
        lines.append([name, *cells])
    return markdown(["labels bought", *map(str, labels)], lines)


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
                f"{np.median(query):.2f} ({low:.2f} to {high:.2f})",
                f"{np.median(fit):.2f}",
                f"{share:.0%}",
            ]
        )
    header = ["strategy", "seconds a query", "seconds a training", "query's share"]
    return markdown(header, lines)


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
    header = ["layers", *sizes, "query", "mask", "embed", "select", "training", "MB"]
    return markdown(header, lines)


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
    return markdown(["labels", *parts, "of the net"], lines)


def runs_table(folder: Path) -> str:
    """What the files hold, and how long it took."""
    lines = []
    for study in studies(folder):
        rows = read(folder, study)
        for setting in settings(rows):
            own = [row for row in rows if row["setting"] == setting]
            labels = sorted({row["n_labels"] for row in own})
            spent = hours(own)
            lines.append(
                [
                    f"[{study}](studies/{study}.md)",
                    f"{own[0]['dataset']}, {setting}",
                    str(len({row["strategy"] for row in own})),
                    f"{labels[0]} to {labels[-1]}",
                    f"{n_seeds(own)} of {about(folder, study)['seeds']}",
                    in_hours(spent),
                ]
            )
    header = ["study", "data and setting", "strategies", "labels", "seeds", "hours"]
    return markdown(header, lines)


def waiting(folder: Path) -> str:
    """Which studies have words, and no results yet."""
    links = [f"[{name}](studies/{name}.md)" for name in not_run(folder)]
    return f"Fixed and not run yet: {', '.join(links)}." if links else ""


def not_run(folder: Path) -> list[str]:
    """Names of the studies that are fixed and have no results here."""
    here = Path(__file__).parent
    known = {path.stem for path in (here / "studies").glob("*.py")}
    with_words = {path.stem for path in (here / "pages").glob("*.md")}
    return sorted(known & with_words - set(studies(folder)))


def claims_table(rows: Rows, claims: list[tuple[str, str, str]]) -> str:
    """The comparisons that a study was made for, as far as they have been run."""
    compared = []
    for setting, strategy, baseline in claims:
        pair = [
            row
            for row in rows
            if row["setting"] == setting and row["strategy"] in (strategy, baseline)
        ]
        if pair:
            summary = ComparisonResults(pair).summary(baseline)
            own = next(row for row in summary if row["strategy"] == strategy)
            compared.append((f"{pair[0]['dataset']}, {setting}", own, baseline))
    corrected = holm(own["p"] for _, own, _ in compared)
    lines = [
        [
            setting,
            f"{own['strategy']} minus {baseline}",
            difference(own | {"p_holm": p_holm}),
            p_value(own["p"]),
            p_value(p_holm),
            str(own["n_seeds"]),
        ]
        for (setting, own, baseline), p_holm in zip(compared, corrected, strict=True)
    ]
    header = ["data and setting", "difference of", "points", "p", "p (Holm)", "seeds"]
    return markdown(header, lines)


# --------------------------------------------------------------------- verdict


def choice(rows: Rows) -> str:
    """The cheapest strategy that no more expensive one beats significantly.

    Goes from low to high costs and changes where the next is significantly better,
    paired by seed and corrected by Holm's method.
    """
    known = [row for row in rows if row["strategy"] in BY_COST]
    results = ordered(known)
    names = {row["strategy"] for row in known}
    best = "random"
    for name in BY_COST[1:]:
        if name in names:
            summary = results.summary(best, n_bootstrap=200)  # only p is needed
            table = {row["strategy"]: row for row in summary}
            if table[name]["p_holm"] < 0.05 and table[name]["area_difference"] > 0:
                best = name
    return best


def verdict_table(folder: Path) -> str:
    """Your pool is … use …, with the numbers behind each line."""
    named = {place for places in POOLS.values() for place in places}
    pools = dict(POOLS)
    for study in studies(folder):
        for setting in settings(read(folder, study)):
            if (study, setting) not in named:
                pools[setting] = ((study, setting),)
    lines = []
    for words, places in pools.items():
        found = []
        for study, setting in places:
            rows = read(folder, study, setting)
            if not {"random", "FisherMask"} <= {row["strategy"] for row in rows}:
                continue
            if is_whole(rows, part_of(about(folder, study), setting)):
                # a part decides nothing
                found.append((study, rows, choice(rows)))
        if not found:
            continue
        counts = [best for _, _, best in found]
        use = max(dict.fromkeys(counts), key=counts.count)
        # The example is the setting with most seeds among those that say the same.
        study, rows, _ = max(
            (each for each in found if each[2] == use),
            key=lambda each: n_seeds(each[1]),
        )
        known = ordered([row for row in rows if row["strategy"] in BY_COST])
        over_random = {row["strategy"]: row for row in known.summary("random")}
        next_to = {row["strategy"]: row for row in known.summary(use)}
        own = next(name for name in reversed(BY_COST) if name in next_to)
        lines.append(
            [
                words,
                f"**{ASKED_FOR.get(use, use)}**{' will do' if use == 'random' else ''}",
                "–" if use == "random" else difference(over_random[use]),
                "–" if use == own else difference(next_to[own]),
                f"[{study}](studies/{study}.md), {n_seeds(rows)} seeds; "
                f"the same in {counts.count(use)} of {len(counts)}",
            ]
        )
    header = [
        "your pool is",
        "use",
        "over random, points",
        "FisherMask minus that",
        "from",
    ]
    return markdown(header, lines)


TABLES = {
    "findings": findings,
    "strategies": strategies_table,
    "variants": variants_table,
    "curves": curves_table,
    "costs": costs_table,
    "sizes": sizes_table,
    "masks": masks_table,
}
WHOLE = {"runs": runs_table, "verdict": verdict_table, "waiting": waiting}
