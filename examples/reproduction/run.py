"""Run a study of the results page.

    python examples/reproduction/run.py digits
    nohup python examples/reproduction/run.py ablations > results/ablations.log &

A study is a file in `studies/`. The run says when it will end: at first by the seconds
in docs/results, then by those of its own curves. Every round is on the disk when it
ends: stop the run with Ctrl-C or SIGTERM whenever you like, and start it again.

Seeds that are whole are in docs/results/<study>.csv, one row per dataset, setting,
strategy, seed and round; <study>.json says with what they were made. The same seed
gives every strategy the same pool, first batch and training noise. `report.py` makes
pages of them. `--go-on` keeps the seeds that are whole there, without their rounds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch starts, here and in the workers
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch

from fishermask_sk import compare_strategies
from fishermask_sk._describe import describe
from fishermask_sk.loops.comparison import load_results

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "docs" / "results"
sys.path.insert(0, str(HERE))
COLUMNS = (
    "dataset",
    "setting",
    "strategy",
    "seed",
    "round",
    "n_labels",
    "accuracy",
    "balanced_accuracy",
    "log_loss",
    "query_seconds",
    "fit_seconds",
    "class_counts",
)


class Place(NamedTuple):
    """Where a study comes from and where its results go."""

    config: Path
    rounds: Path  # a file for every curve, to go on from
    output: Path
    data_home: Path | None
    goes_on: bool = False  # from the table in `output`, which has whole seeds

    @property
    def study(self) -> Any:
        return runpy.run_path(str(self.config))["STUDY"]

    def curve(self, part: int, strategy: str, seed: int) -> Path:
        name = self.study.settings[part].name
        return self.rounds / f"{name}, {strategy}, {seed}.jsonl".replace(
            " ", "_"
        ).replace("/", "_")


class Curve(NamedTuple):
    """One strategy with one seed, in one part of the study."""

    place: Place
    part: int
    seed: int
    strategy: str


def curves(place: Place) -> list[Curve]:
    """All of a study in the order of playing: part by part, and in each seed by
    seed.
    """
    study = place.study
    return [
        Curve(place, part, seed, strategy)
        for part, setting in enumerate(study.settings)
        for seed in study.seeds
        for strategy in setting.strategies
    ]


def use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(
        True
    )  # training on few labels drifts into denormal numbers, which are slow


def start_worker() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the first one ends the others
    use_one_thread()


@lru_cache(maxsize=1)
def pool_of(place: Place, part: int, seed: int) -> Any:
    return place.study.settings[part].load(seed, place.data_home)


def play(curve: Curve) -> tuple[Curve, float]:
    """Run all rounds of one curve, or those that are not in its file yet, and say how
    many seconds it took.
    """
    started = time.monotonic()
    place, part, seed, strategy = curve
    setting, data = place.study.settings[part], pool_of(place, part, seed)
    aim = {"X_target": data.X_target} if strategy in setting.with_target else {}
    compare_strategies(
        setting.estimator,
        {strategy: setting.strategies[strategy]},
        data.X_train,
        data.y_train,
        data.X_test,
        data.y_test,
        n_initial=setting.n_initial,
        n_instances=setting.n_instances,
        n_queries=setting.n_queries,
        seeds=[seed],
        results=place.curve(part, strategy, seed),
        **aim,
    )
    return curve, time.monotonic() - started


def is_whole(curve: Curve) -> bool:
    """Whether all rounds are in the curve's file."""
    place, part, seed, strategy = curve
    if kept_rows(place, part, seed):
        return True
    file = place.curve(part, strategy, seed)
    rows = load_results(file) if file.exists() else []
    return bool(rows) and rows[-1]["round"] == place.study.settings[part].n_queries


def kept_rows(place: Place, part: int, seed: int) -> list[dict[str, str]]:
    """Rows of a seed that the table to go on from has whole; else none."""
    setting, rows = place.study.settings[part], []
    if place.goes_on:
        rows = table_to_go_on_from(place.output / f"{place.config.stem}.csv")
    rows = [
        row
        for row in rows
        if (row["setting"], row["seed"]) == (setting.name, str(seed))
        and row["strategy"] in setting.strategies
    ]
    n_whole = len(setting.strategies) * (setting.n_queries + 1)
    return rows if len(rows) == n_whole else []


@lru_cache(maxsize=1)
def table_to_go_on_from(path: Path) -> list[dict[str, str]]:
    """The table as it was when the run began."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def seconds_before(path: Path) -> dict[tuple[str, str], float]:
    """What a curve of each setting and strategy took in a table of results."""
    spent: dict[tuple[str, str], dict[str, float]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if "fit_seconds" in row:
                    seeds = spent.setdefault((row["setting"], row["strategy"]), {})
                    seconds = float(row["query_seconds"]) + float(row["fit_seconds"])
                    seeds[row["seed"]] = seeds.get(row["seed"], 0.0) + seconds
    return {key: sum(seeds.values()) / len(seeds) for key, seeds in spent.items()}


class Clock:
    """How long the rest of a run takes: what its curves took before, times how slow
    this machine has been so far.
    """

    def __init__(self, todo: list[Curve], n_jobs: int, results: Path = RESULTS) -> None:
        self.n_jobs = n_jobs
        self.rest = {curve: self._key(curve) for curve in todo}
        self.before = {}
        if todo:
            self.before = seconds_before(results / f"{todo[0].place.config.stem}.csv")
        self.took = self.planned = 0.0
        self.n_done = 0

    @staticmethod
    def _key(curve: Curve) -> tuple[str, str]:
        return curve.place.study.settings[curve.part].name, curve.strategy

    def done(self, curve: Curve, seconds: float) -> None:
        self.planned += self.before.get(self.rest.pop(curve), seconds)
        self.took += seconds
        self.n_done += 1

    def seconds_left(self) -> float | None:
        """None where nothing is known yet."""
        known = [self.before[key] for key in self.rest.values() if key in self.before]
        n_unknown = len(self.rest) - len(known)
        if n_unknown and not self.n_done:
            return None
        mean = self.took / self.n_done if self.n_done else 0.0
        slowness = self.took / self.planned if self.planned else 1.0
        return (sum(known) * slowness + n_unknown * mean) / self.n_jobs

    def __str__(self) -> str:
        left = self.seconds_left()
        if left is None:
            return "the first curve will tell how long it takes"
        end = datetime.now() + timedelta(seconds=left)
        return f"{left / 3600:.1f} h left, ends about {end:%a %H:%M}"


def rows_of_whole_seeds(place: Place) -> Iterator[dict[str, Any]]:
    """Rows of the parts and seeds that all strategies of the part have finished."""
    study = place.study
    for part, setting in enumerate(study.settings):
        for seed in study.seeds:
            if kept := kept_rows(place, part, seed):
                yield from kept
                continue
            files = [
                place.curve(part, strategy, seed) for strategy in setting.strategies
            ]
            played = [load_results(file) if file.exists() else [] for file in files]
            if not all(
                rows and rows[-1]["round"] == setting.n_queries for rows in played
            ):
                continue
            for row in chain.from_iterable(played):
                counts = " ".join(
                    f"{label}:{count}" for label, count in row["class_counts"].items()
                )
                seconds = {
                    key: round(row[key], 3) for key in ("query_seconds", "fit_seconds")
                }
                named = {
                    "dataset": setting.dataset,
                    "setting": setting.name,
                    "class_counts": counts,
                }
                full = {
                    **row,
                    **named,
                    **seconds,
                    "log_loss": round(row["log_loss"], 5),
                }
                for key in ("accuracy", "balanced_accuracy"):
                    full[key] = round(full[key], 5)
                yield {column: full[column] for column in COLUMNS}


def write(place: Place, commit: str) -> None:
    """Put the table, and what it was made with, in the place of the old ones."""
    rows = list(rows_of_whole_seeds(place))
    if not rows:
        return
    table, about = (
        place.output / f"{place.config.stem}{suffix}" for suffix in (".csv", ".json")
    )
    commits = json.loads(about.read_text())["commits"] if about.exists() else []
    with Replacing(table) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    study = place.study
    with Replacing(about) as file:
        description = {
            "question": study.question,
            "seeds": study.n_seeds,
            "commits": commits if commit in commits else [*commits, commit],
            "versions": {
                name: version(name)
                for name in ("torch", "numpy", "scikit-learn", "skorch")
            },
            "machine": f"{platform.machine()}, one thread a process",
            "settings": [in_words(setting) for setting in study.settings],
        }
        json.dump(description, file, indent=1)
        file.write("\n")


def in_words(setting: Any) -> dict[str, Any]:
    """What a part of a study was made with."""
    words = setting.__dict__ | {
        "load": describe(setting.load),
        "estimator": repr(setting.estimator),
    }
    words["strategies"] = {
        name: getattr(strategy, "__name__", repr(strategy))
        for name, strategy in setting.strategies.items()
    }
    return words


class Replacing:
    """A text file that takes the place of the old one only when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.new = path, path.with_name(f"{path.name}.new")

    def __enter__(self) -> Any:
        self.file = self.new.open("w", newline="", encoding="utf-8")
        return self.file

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.file.close()
        if kind is None:
            self.new.replace(self.path)


def run(place: Place, commit: str, n_jobs: int, parts: list[int] | None = None) -> None:
    """Run what has not run yet; whole seeds are written as they end."""
    place.rounds.mkdir(parents=True, exist_ok=True)
    place.output.mkdir(parents=True, exist_ok=True)
    todo = [
        curve
        for curve in curves(place)
        if (parts is None or curve.part + 1 in parts) and not is_whole(curve)
    ]
    started, clock = time.monotonic(), Clock(todo, n_jobs)
    print(f"{len(todo)} curves on {n_jobs} processes: {clock}", flush=True)
    try:
        with get_context("spawn").Pool(
            n_jobs, start_worker
        ) as pool:  # leaving it ends the workers
            played = pool.imap_unordered(play, todo)
            for number, (curve, seconds) in enumerate(played, start=1):
                clock.done(curve, seconds)
                name = place.study.settings[curve.part].name
                minutes = (time.monotonic() - started) / 60
                print(
                    f"{minutes:6.1f} min  {number}/{len(todo)}  {name}, "
                    f"{curve.strategy}, seed {curve.seed}; {clock}",
                    flush=True,
                )
                if (
                    curve.strategy
                    == list(place.study.settings[curve.part].strategies)[-1]
                ):
                    write(place, commit)
    finally:
        write(place, commit)


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def current_commit() -> str:
    """The commit that is checked out, and whether the sources differ from it."""

    def git(*arguments: str | Path) -> str:
        return subprocess.run(
            ["git", "-C", str(HERE), *arguments],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()

    changed = git(
        "status", "--porcelain", "--", HERE.parents[1] / "fishermask_sk", HERE
    )
    return (git("rev-parse", "HEAD") or "unknown") + (
        " with changes" if changed else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="name of a file in studies/, or the path of one")
    parser.add_argument(
        "--parts", type=int, nargs="+", help="run only these, counted from 1"
    )
    parser.add_argument(
        "--n-jobs", type=int, default=2, help="processes, of one thread each"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--rounds",
        type=Path,
        default=HERE.parents[1] / "results",
        help="files to go on from",
    )
    parser.add_argument("--data-home", type=Path, help="where load_images looks first")
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="do not run again seeds that are whole in the table in --output",
    )
    parser.add_argument(
        "--commit", help="of the sources, where they are no git checkout"
    )
    args = parser.parse_args()
    named = HERE / "studies" / f"{args.study}.py"
    config = (named if named.exists() else Path(args.study)).resolve()
    if not config.exists():
        known = ", ".join(sorted(path.stem for path in named.parent.glob("*.py")))
        parser.error(f"there is no study {args.study!r}; choose one of {known}.")
    place = Place(
        config,
        args.rounds.resolve() / config.stem,
        args.output.resolve(),
        args.data_home,
        args.go_on,
    )
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # shells start background jobs with SIGINT ignored
        signal.signal(number, stop)
    try:
        run(place, args.commit or current_commit(), args.n_jobs, args.parts)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")


if __name__ == "__main__":
    main()
