"""Make the results pages from the files of a folder alone.

    python examples/reproduction/report.py
    python examples/reproduction/report.py --results my-results --output my-report

One page a study, one of the verdict, one of costs and one of masks, and their figures.
The words come from pages/, the numbers from the files: pages/<study>.md says what was
run and, under "Reading", what a whole run shows; a run with fewer seeds is shown
without it. A study without words gets those of its configuration. No net is trained.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import report_figures
from report_tables import (
    CLAIMS,
    TABLES,
    WHOLE,
    Rows,
    about,
    claims_table,
    has_strategies,
    has_variants,
    is_whole,
    n_seeds,
    not_run,
    read,
    seeds_in,
    settings,
    studies,
)

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
BLOCK = re.compile(r"<!-- report: (.+?) -->")
VERDICT = re.compile(r"(<!-- verdict -->)\n.*?(<!-- end -->)", re.DOTALL)
# Pages that show the verdict as well, and where studies are from there.
FRONT = {DOCS.parent / "README.md": "docs/", DOCS / "index.md": ""}
MISSING = "*Not run yet.*"
OVERVIEW = "results-overview.svg"


def words_of(study: str) -> tuple[str, dict[str, str]]:
    """What stands in front of a study's page, and the words by section."""
    path = HERE / "pages" / f"{study}.md"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {study}\n"
    front, *sections = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return front.strip(), dict(zip(sections[::2], sections[1::2], strict=True))


def study_page(folder: Path, study: str) -> str:
    """The page of a study."""
    rows, made = read(folder, study), about(folder, study)
    front, sections = words_of(study)
    parts = [front, f"*{made['question']}*"]
    whole = is_whole(rows, made)
    if not whole:
        parts.append(f"{so_far(rows, made)} What a whole run shows is left out.")
    if study in CLAIMS:
        parts += ["## What was to be shown", claims_table(rows, CLAIMS[study])]
    configurations = {each["name"]: each for each in made.get("settings", [])}
    for setting in settings(rows):
        own = [row for row in rows if row["setting"] == setting]
        parts.append(f"## {own[0]['dataset']}, {setting}")
        text = sections.get(setting) or in_words(configurations[setting])
        described, _, reading = text.partition("### Reading\n")
        parts.append(described.strip())
        parts += setting_parts(study, setting, own)
        if whole and reading:
            parts.append(reading.strip())
    commits = ", ".join(f"`{commit[:7]}`" for commit in made["commits"])
    parts += ["## Run it yourself", run_it(study, commits)]
    return "\n\n".join(parts) + "\n"


def so_far(rows: Rows, made: dict[str, Any]) -> str:
    """How much of a study is in."""
    counts = seeds_in(rows, made)
    if len(set(counts.values())) == 1:
        return f"So far {next(iter(counts.values()))} of {made['seeds']} seeds are in."
    parts = [f"{name}: {n or 'none'}" for name, n in counts.items()]
    return f"So far, of {made['seeds']} seeds are in: {'; '.join(parts)}."


def setting_parts(study: str, setting: str, rows: Rows) -> Iterator[str]:
    """Figures and tables of one setting."""
    n = n_seeds(rows)
    seeds = f"{n} seeds." if n > 1 else "One seed, and so no interval."
    if has_strategies(rows):
        yield TABLES["findings"](rows)
        yield (
            "![Left: mean accuracy against labels. Right: mean accuracy minus margin "
            f"sampling's, with intervals.](../images/{_name(study, setting)})"
        )
        yield f"{seeds} {HOW_TO_READ}"
        yield TABLES["strategies"](rows)
        yield TABLES["curves"](rows)
    if has_variants(rows):
        if has_strategies(rows):
            yield f"One change to FisherMask at a time, {seeds}"
        else:
            yield f"Each next to FisherMask's default. {seeds} {HOW_TO_READ}"
        yield (
            "![Mean accuracy of each minus the default's, with intervals.]"
            f"(../images/{_name(study, setting, '-variants')})"
        )
        yield TABLES["variants"](rows)
        if not has_strategies(rows):
            yield TABLES["curves"](rows)


HOW_TO_READ = "Bold: p < 0.05 ([how to read the tables](../results.md#how-to-read))."
_name = report_figures.name_of


def in_words(setting: dict[str, Any]) -> str:
    """What a configuration says of a setting, for want of better words."""
    pool = setting["load"]["keywords"] if isinstance(setting["load"], dict) else {}
    drawn = _said(pool, "; ")
    return (
        f"{setting['n_initial']} labels at first, then {setting['n_queries']} queries "
        f"of {setting['n_instances']}. Pool: {drawn or 'see the configuration'}. "
        f"Learner: `{setting['estimator']}`."
    )


def _said(value: Any, between: str = ", ") -> str:
    """A value of a configuration, without Python's brackets."""
    if isinstance(value, dict) and "partial" in value:
        name = value["partial"].rpartition(".")[2].replace("_", " ")
        return f"{name} ({_said(value['keywords'])})" if value["keywords"] else name
    if isinstance(value, dict):
        sign = ": " if all(key.isdecimal() for key in value) else " = "
        return between.join(f"{key}{sign}{_said(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    if isinstance(value, str) and value.startswith("common."):
        return value.rpartition(".")[2].replace("_", " ")
    return str(value)


def page_without_results(study: str) -> str:
    """The page of a study that is fixed and was not run."""
    front, _ = words_of(study)
    told = "No results yet: what is written here was fixed before the first run."
    return "\n\n".join([front, told, "## Run it yourself", run_it(study)]) + "\n"


def run_it(study: str, commits: str = "") -> str:
    made = f"Made with {commits}. " if commits else ""
    if not (HERE / "studies" / f"{study}.py").exists():
        return made.strip()
    return (
        f"```sh\npython examples/reproduction/run.py {study} --output my-results\n"
        "python examples/reproduction/report.py --results my-results --output my-report"
        f"\n```\n\n{made}The configuration is "
        f"[`{study}.py`](../../examples/reproduction/studies/{study}.py)."
    )


def filled(page: str, folder: Path) -> str:
    """A page with a table in the place of each of its `report` comments."""

    def table(block: re.Match[str]) -> str:
        kind, *place = (word.strip() for word in block[1].split("|"))
        if kind in WHOLE:
            return WHOLE[kind](folder)
        rows = read(folder, *place)
        return TABLES[kind](rows) if rows else MISSING

    return BLOCK.sub(table, page)


def with_verdict(text: str, folder: Path, place: str) -> str:
    """A page with the verdict between its marks; studies are in `place`."""
    table = WHOLE["verdict"](folder).replace("](studies/", f"]({place}studies/")
    return VERDICT.sub(lambda marks: f"{marks[1]}\n{table}\n{marks[2]}", text)


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    """Every page that the files give: its path, its text."""
    made = studies(folder)
    for name, path in (
        ("results", "results.md"),
        ("costs", "studies/costs.md"),
        ("masks", "studies/masks.md"),
    ):
        text = (HERE / "pages" / f"{name}.md").read_text(encoding="utf-8")
        yield path, filled(text, folder)
    for study in made:
        yield f"studies/{study}.md", study_page(folder, study)
    for study in not_run(folder):
        yield f"studies/{study}.md", page_without_results(study)


def figures(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every figure that the files give, with its name."""
    compared = {}
    for study in studies(folder):
        rows = read(folder, study)
        for setting in settings(rows):
            own = [row for row in rows if row["setting"] == setting]
            if has_strategies(own):
                if any(row["strategy"] == "FisherMask" for row in own):
                    compared[f"{own[0]['dataset']}, {setting} ({study})"] = own
                yield _name(study, setting), report_figures.strategies_figure(own)
            if has_variants(own):
                figure = report_figures.variants_figure(own)
                yield _name(study, setting, "-variants"), figure
    if compared:
        yield OVERVIEW, report_figures.overview_figure(compared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=DOCS / "results", help="folder of the files"
    )
    parser.add_argument(
        "--output", type=Path, default=DOCS, help="folder of pages and figures"
    )
    args = parser.parse_args()
    if not studies(args.results):
        parser.error(f"{args.results} holds no results of run.py; name its --output.")
    for folder in ("studies", "images"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    for path, text in pages(args.results):
        (args.output / path).write_text(text, encoding="utf-8")
        print(args.output / path)
    for name, figure in figures(args.results):
        path = args.output / "images" / name
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        print(path)
    if args.output == DOCS:
        for page, place in FRONT.items():
            text = page.read_text(encoding="utf-8")
            page.write_text(with_verdict(text, args.results, place), encoding="utf-8")


if __name__ == "__main__":
    main()
