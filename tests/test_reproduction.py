"""The studies' scripts on tiny budgets: a run that is stopped goes on, and the report
needs the files alone.
"""

import csv
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import naive_embeddings
from skorch import NeuralNetClassifier

from fishermask_sk.loops.comparison import load_results
from fishermask_sk.loops.learner import PoolLearner

FOLDER = Path(__file__).parents[1] / "examples" / "reproduction"
STRATEGIES = ["FisherMask", "BAIT", "BADGE", "k-center", "margin", "least confidence"]
STRATEGIES += ["entropy", "random", "variant"]
PARTS = [("stem", 20, 0.75), ("head", 80, 0.25)]
STUDIES = sorted(path.stem for path in (FOLDER / "studies").glob("*.py"))

TINY = """
import os
import signal
from functools import partial
from common import BASELINES, Setting, Study, load_pool
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

def flat(X):
    return X.reshape(len(X), -1)

def random_or_stop(*args, **kwargs):
    if "STOP" in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
    return BASELINES["random"](*args, **kwargs)

STRATEGIES = BASELINES | {"random": random_or_stop}

def part(*names):
    return Setting(
        name="tiny", dataset="digits",
        load=partial(
            load_pool, name="digits", pool={0: 20, 1: 10, 2: 10}, side=4, n_test=5
        ),
        estimator=make_pipeline(FunctionTransformer(flat), LogisticRegression()),
        strategies={name: STRATEGIES[name] for name in names},
        n_initial=6, n_instances=3, n_queries=2,
    )

STUDY = Study("Does it run?", 2, [part("entropy", "random"), part("margin")])
"""


@pytest.fixture(scope="module")
def common():
    """The module that the configurations import."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("common")
    sys.path.remove(str(FOLDER))


def test_a_stopped_study_goes_on(common, tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    command = [
        sys.executable,
        FOLDER / "run.py",
        tmp_path / "tiny.py",
        "--n-jobs",
        "1",
        "--commit",
        "abc",
    ]
    command += ["--output", tmp_path, "--rounds", tmp_path / "rounds", "--parts", "1"]
    stopped = subprocess.run(
        [
            "sh",
            "-c",
            '"$@" & wait $!',
            "sh",
            *command,
        ],  # in the background, where shells ignore SIGINT
        capture_output=True,
        text=True,
        env=os.environ | {"STOP": "1"},
        timeout=120,
        check=False,
    )
    assert "4 curves on 1 processes: the first curve will tell" in stopped.stdout
    assert "1/4  tiny, entropy, seed 0; 0.0 h left, ends about " in stopped.stdout
    assert "Stopped. The same command goes on from here." in stopped.stderr
    assert stopped.returncode == 1

    run = importlib.import_module("run")
    place = run.Place(
        tmp_path / "tiny.py", tmp_path / "rounds" / "tiny", tmp_path, None
    )
    before = load_results(place.curve(0, "entropy", 0))
    assert len(before) == 3
    for curve in run.curves(place):
        assert run.is_whole(curve) == (curve[1:] == (0, 0, "entropy"))
        played, seconds = run.play(curve)
        assert played == curve
        assert seconds > 0
        assert run.is_whole(curve)
        whole = {
            (row["strategy"], row["seed"]) for row in run.rows_of_whole_seeds(place)
        }
        assert ("entropy", curve.seed) not in whole or ("random", curve.seed) in whole
    run.write(place, "def")
    with (tmp_path / "tiny.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 3
    kept = [row for row in rows if (row["strategy"], row["seed"]) == ("entropy", "0")]
    assert [float(row["fit_seconds"]) for row in kept] == [
        round(row["fit_seconds"], 3) for row in before
    ]
    for (
        seed
    ) in "01":  # all strategies of a seed start alike, also those of another part
        firsts = [row for row in rows if row["seed"] == seed and row["round"] == "0"]
        assert len(firsts) == 3
        assert (
            len(
                {
                    (row["accuracy"], row["log_loss"], row["class_counts"])
                    for row in firsts
                }
            )
            == 1
        )
    about = json.loads((tmp_path / "tiny.json").read_text())
    assert about["commits"][-1] == "def"
    assert about["settings"][0]["strategies"]["random"] == "random_or_stop"


@pytest.mark.parametrize("name", STUDIES)
def test_every_configuration_is_a_study(common, name):
    study = runpy.run_path(str(FOLDER / "studies" / f"{name}.py"))["STUDY"]
    assert isinstance(study, common.Study)
    parts = [
        (setting.name, strategy)  # names of the rounds' files
        for setting in study.settings
        for strategy in setting.strategies
    ]
    assert len(set(parts)) == len(parts)
    for setting in study.settings:
        assert set(setting.with_target) <= set(setting.strategies)


def test_unknown_study(capsys, common, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "digit"])
    with pytest.raises(SystemExit):
        importlib.import_module("run").main()
    assert (
        "there is no study 'digit'; choose one of ablations, "
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def net():
    """A linear net, its pool and its labelled samples."""
    torch.manual_seed(0)
    X = np.random.default_rng(0).normal(size=(30, 3)).astype("float32")
    y = (X[:, 0] > 0) + (X[:, 1] > 1).astype("int64")
    net = NeuralNetClassifier(
        torch.nn.Linear(3, 3),
        criterion=torch.nn.CrossEntropyLoss,
        train_split=None,
        verbose=0,
        lr=1.0,
    )
    return net.fit(X[:9], y[:9]), X[9:], X[:9]


def test_a_pick_that_weighs_one(common, net):
    fitted, X_pool, X_labeled = net
    pool, labeled = (
        naive_embeddings(fitted.module_, torch.tensor(X)).double().numpy()
        for X in (X_pool, X_labeled)
    )
    n_labeled, b = len(labeled), 8
    everything = np.concatenate([pool, labeled])
    target = np.einsum("nck,ncl->kl", everything, everything) / len(everything)
    m = np.eye(pool.shape[2]) + np.einsum("nck,ncl->kl", labeled, labeled) / (
        n_labeled + b
    )
    picks = []
    for _ in range(b):
        grown = m + np.einsum("nck,ncl->nkl", pool, pool) / (n_labeled + b)
        traces = np.trace(np.linalg.solve(grown, target), axis1=1, axis2=2)
        traces[picks] = np.inf
        picks.append(int(traces.argmin()))
        m = grown[picks[-1]]
    found, _ = common.PickWeighsOne(1.0)(
        PoolLearner(fitted, None, X_labeled, None), X_pool, b
    )
    assert found.tolist() == picks
    plain = (
        common.FisherMask(1.0).select(fitted, X_pool, b, X_labeled=X_labeled).tolist()
    )
    assert plain != picks


def test_without_labeled(common, net):
    fitted, X_pool, X_labeled = net
    learner = PoolLearner(fitted, None, X_labeled, None)
    picks, _ = common.WithoutLabeled(1.0)(learner, X_pool, 5)
    np.testing.assert_array_equal(
        picks, common.FisherMask(1.0).select(fitted, X_pool, 5, X_labeled=X_pool[:0])
    )
    assert (
        picks.tolist()
        != common.FisherMask(1.0)
        .select(fitted, X_pool, 5, X_labeled=X_labeled)
        .tolist()
    )


@pytest.fixture
def docs(common, tmp_path):
    """A folder with results of two seeds, made up."""
    rng = np.random.default_rng(0)
    (tmp_path / "results").mkdir()
    with (tmp_path / "results" / "toy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, importlib.import_module("run").COLUMNS)
        writer.writeheader()
        for lead, strategy in enumerate(STRATEGIES):
            for seed in (0, 1):
                for i in range(3):
                    accuracy = round(
                        0.5 + 0.1 * i + 0.01 * lead * (i > 0) + 0.001 * rng.random(), 5
                    )
                    row = {
                        "dataset": "toys",
                        "setting": "small",
                        "strategy": strategy,
                        "seed": seed,
                        "round": i,
                    }
                    row |= {
                        "n_labels": 10 + 5 * i,
                        "accuracy": accuracy,
                        "balanced_accuracy": accuracy,
                    }
                    row |= {
                        "log_loss": 1.0,
                        "query_seconds": 3.0 * (i > 0),
                        "fit_seconds": 1.0,
                    }
                    writer.writerow(row | {"class_counts": f"0:{8 + 5 * i} 1:2"})
    setting = {"name": "small", "n_initial": 3, "n_queries": 2, "n_instances": 5}
    setting |= {"load": {"keywords": {"name": "toys"}}, "estimator": "Net()"}
    about = {"question": "Why?", "seeds": 2, "commits": ["0123456789"]}
    about["settings"] = [setting]
    (tmp_path / "results" / "toy.json").write_text(json.dumps(about))
    lines = ["setting,seed,query,n_labels,part,weights,share_of_mask,share_of_net"]
    lines += [
        f"toys,0,1,10,{part},{weights},{share},{share / 2}"
        for part, weights, share in PARTS
    ]
    (tmp_path / "results" / "masks.csv").write_text("\n".join(lines) + "\n")
    steps = ("fit", "query", "mask", "embeddings", "selection")
    seconds = ",".join(f"{step}_seconds" for step in steps)
    header = f"varied,layers,N,C,k,b,seed,{seconds},bytes"
    lines = [
        header,
        "nothing,all,1000,10,50,5,0,8,6,1,2,3,4000000",
        "nothing,all,1000,10,50,5,1,10,9,2,3,4,6000000",
    ]
    lines += [
        "N,all,2000,10,50,5,0,8,12,1,5,6,7000000",
        "layers,last,1000,10,40,5,0,8,3,1,1,1,3000000",
    ]
    (tmp_path / "results" / "sizes.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_report_from_files_alone(docs, tmp_path, monkeypatch):
    report = importlib.import_module("report")
    output = tmp_path / "report"
    command = ["report.py", "--results", str(docs / "results"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    report.main()
    page = (output / "studies" / "toy.md").read_text()
    assert "So far" not in page  # both seeds are in
    assert "`0123456`" in page
    assert "3 labels at first, then 2 queries of 5. Pool: name = toys." in page
    assert "- FisherMask minus random sampling: **−" in page
    assert re.search(r"\| random \| 77\.\d \| 65\.\d \| – \| ", page)
    lead = re.search(r"\| variant \| 78\.\d \| 66\.\d \| \**\+(\d\.\d)\** \[", page)
    # 8 points in two of three rounds: 0.75 of the area.
    assert float(lead[1]) == pytest.approx(6, abs=0.2)
    curve = r"\| FisherMask \| 50\.\d ± 0\.0 \| 60\.\d ± 0\.0 \| 70\.\d ± 0\.0 \|"
    assert re.search(curve, page)
    verdict = (output / "results.md").read_text()
    assert (
        "| [toy](studies/toy.md) | toys, small | 9 | 10 to 20 | 2 of 2 | < 0.1 |"
        in (verdict)
    )
    assert "| small | **random** will do | – | **−" in verdict
    assert (output / "studies" / "masks.md").read_text().count(report.MISSING) == 2
    images = sorted(path.name for path in (output / "images").iterdir())
    assert images == [
        "results-overview.svg",
        "results-toy-small-variants.svg",
        "results-toy-small.svg",
    ]
    first = (output / "images" / images[2]).read_bytes()
    report.main()
    assert (output / "studies" / "toy.md").read_text() == page
    assert (output / "images" / images[2]).read_bytes() == first

    made = json.loads((docs / "results" / "toy.json").read_text())
    (docs / "results" / "toy.json").write_text(json.dumps(made | {"seeds": 3}))
    report.main()
    assert "| small | " not in (output / "results.md").read_text()
    assert "So far 2 of 3 seeds" in (output / "studies" / "toy.md").read_text()


def test_tables_of_costs_and_masks(docs):
    tables = importlib.import_module("report_tables")
    toy, masks, sizes = (
        tables.read(docs / "results", name) for name in ("toy", "masks", "sizes")
    )
    assert "| FisherMask | 3.00 (3.00 to 3.00) | 1.00 | 75% |" in tables.costs_table(
        toy
    )
    assert "| 10 | 20 / 75% | 80 / 25% | 50% |" in tables.masks_table(masks)
    page = tables.sizes_table(sizes)
    for line in (
        "| 1,000 | 10 | 50 | 5 | 7.5 (6.0 to 9.0) | 1.5 | 2.5 | 3.5 | 9.0 | 5 |",
        "| **last** | 1,000 | 10 | 40 | 5 | 3.0 | 1.0 | 1.0 | 1.0 | 8.0 | 3 |",
        "| all | **2,000** | 10 | 50 | 5 | 12.0 | 1.0 | 5.0 | 6.0 | 8.0 | 7 |",
    ):
        assert line in page


def test_a_part_of_a_study_has_no_reading(common, tmp_path):
    report = importlib.import_module("report")
    folder = report.DOCS / "results"
    assert "### Reading" not in report.study_page(folder, "digits")
    assert "Every strategy beats" in report.study_page(folder, "digits")
    lines = (folder / "digits.csv").read_text().splitlines()
    kept = [lines[0], *(line for line in lines if line.split(",")[3] in set("01234"))]
    (tmp_path / "digits.csv").write_text("\n".join(kept) + "\n")
    (tmp_path / "digits.json").write_text((folder / "digits.json").read_text())
    page = report.study_page(tmp_path, "digits")
    assert "So far 5 of 20 seeds are in." in page
    assert "Every strategy beats" not in page


def rounds(setting, strategies, seeds):
    """Rows of a table, made up."""
    rng = np.random.default_rng(0)
    return [
        {
            **{"dataset": "toys", "setting": setting, "strategy": strategy},
            **{"seed": seed, "round": i, "n_labels": 10 + 5 * i},
            **{"accuracy": 0.5 + 0.1 * i + 0.01 * rng.random(), "log_loss": 1.0},
            **{"query_seconds": 1.0, "fit_seconds": 1.0, "balanced_accuracy": 0.5},
        }
        for strategy in strategies
        for seed in range(seeds)
        for i in range(3)
    ]


def write_study(folder, name, rows, planned, n_seeds=2):
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    about = {"question": "Why?", "seeds": n_seeds, "commits": ["0123456789"]}
    about["settings"] = [
        {
            **{"name": setting, "strategies": dict.fromkeys(strategies, "")},
            **{"n_initial": 10, "n_queries": 2, "n_instances": 5},
            **{"load": None, "estimator": "Net()"},
        }
        for setting, strategies in planned.items()
    ]
    (folder / f"{name}.json").write_text(json.dumps(about))


def test_without_random_all_stand_next_to_the_default(common, tmp_path):
    """Margin sampling among them, and no strategy is called a variant."""
    report = importlib.import_module("report")
    names = ["margin", "FisherMask", "two stages"]
    write_study(tmp_path, "cheap", rounds("small", names, 2), {"small": names})
    page = report.study_page(tmp_path, "cheap")
    assert "variant |" not in page
    assert "Each next to FisherMask's default. 2 seeds." in page
    table = page[page.index("| strategy |") :]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line[:2] == "| "]
    default = "| FisherMask (default)"
    assert rows[2:5] == [default, "| margin", "| two stages"]
    assert rows[-3:] == ["| FisherMask", "| margin", "| two stages"]
    drawn = dict(report.figures(tmp_path))
    assert list(drawn) == ["results-cheap-small-variants.svg"]
    labels = drawn["results-cheap-small-variants.svg"].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["margin", "two stages"]


def test_a_table_of_one_seed_has_no_intervals(common, tmp_path):
    report = importlib.import_module("report")
    names = ["random", "margin", "FisherMask", "bare"]
    rows = rounds("small", names, 1)
    write_study(tmp_path, "begun", rows, {"small": names}, n_seeds=20)
    page = report.study_page(tmp_path, "begun")
    assert "So far 1 of 20 seeds are in." in page
    assert "One seed, and so no interval." in page
    assert "nan" not in page
    assert re.search(r"\| random \| 70\.\d \| 60\.\d \| – \| [+−]0\.\d \| – \|", page)
    assert len(list(report.figures(tmp_path))) == 3


def test_a_study_is_whole_when_all_of_its_settings_are(common, tmp_path):
    report = importlib.import_module("report")
    names = ["random", "margin", "FisherMask"]
    planned = {"small": names, "large": names}
    rows = rounds("small", names, 3)
    write_study(tmp_path, "half", rows, planned, n_seeds=3)
    told = "So far, of 3 seeds are in: small: 3; large: none."
    assert told in report.study_page(tmp_path, "half")
    assert "| half" not in report.WHOLE["verdict"](tmp_path)
    assert "[half](studies/half.md), 3 seeds" in report.WHOLE["verdict"](tmp_path)
    more = rows + rounds("large", names, 2)
    write_study(tmp_path, "half", more, planned, n_seeds=3)
    told = "So far, of 3 seeds are in: small: 3; large: 2."
    assert told in report.study_page(tmp_path, "half")
    more = rows + rounds("large", names, 3)
    write_study(tmp_path, "half", more, planned, n_seeds=3)
    assert "So far" not in report.study_page(tmp_path, "half")


def test_a_study_without_results_has_a_page_that_says_so(docs):
    report = importlib.import_module("report")
    made = dict(report.pages(docs / "results"))
    assert (
        "Fixed and not run yet: [ablations](studies/ablations.md), "
        in (made["results.md"])
    )
    page = made["studies/irrelevant.md"]
    assert page.startswith("# Study 11")
    assert "No results yet" in page
    assert "run.py irrelevant --output" in page
    assert "No results yet" not in made["studies/toy.md"]


def test_the_choice_is_the_cheapest_that_nothing_beats(common):
    tables = importlib.import_module("report_tables")
    rng = np.random.default_rng(0)

    def rows(**leads):
        return [
            {
                "strategy": name,
                "seed": seed,
                "round": i,
                "n_labels": 10 + i,
                "accuracy": 0.5 + lead + 0.01 * rng.normal(),
            }
            for name, lead in leads.items()
            for seed in range(10)
            for i in range(2)
        ]

    assert tables.choice(rows(random=0.0, margin=0.0, FisherMask=0.0)) == "random"
    assert tables.choice(rows(random=0.0, margin=0.1, FisherMask=0.1)) == "margin"
    assert tables.choice(rows(random=0.0, margin=0.1, FisherMask=0.2)) == "FisherMask"
    assert tables.choice(rows(random=0.1, margin=0.0, FisherMask=0.2)) == "FisherMask"


def test_report_of_an_empty_folder(common, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        importlib.import_module("report").main()
    assert "holds no results of run.py; name its --output" in capsys.readouterr().err


def test_the_pages_are_what_the_files_say(common):
    """After new results: python examples/reproduction/report.py."""
    report = importlib.import_module("report")
    for path, place in report.FRONT.items():
        text = path.read_text(encoding="utf-8")
        assert report.with_verdict(text, report.DOCS / "results", place) == text
    for path, text in report.pages(report.DOCS / "results"):
        assert (report.DOCS / path).read_text(encoding="utf-8") == text, path
        for image in re.findall(r"images/(results-.*?svg)\)", text):
            assert (report.DOCS / "images" / image).stat().st_size < 200_000


def test_words_belong_to_settings(common):
    report = importlib.import_module("report")
    for study in report.studies(report.DOCS / "results"):
        _, sections = report.words_of(study)
        known = report.settings(report.read(report.DOCS / "results", study))
        assert set(sections) <= set(known), study


def test_a_run_says_when_it_ends(common, tmp_path):
    run = importlib.import_module("run")
    (tmp_path / "tiny.py").write_text(TINY)
    place = run.Place(tmp_path / "tiny.py", tmp_path / "rounds", tmp_path, None)
    todo = run.curves(place)  # two seeds of entropy and random, then two of margin
    clock = run.Clock(todo, n_jobs=2)
    assert clock.seconds_left() is None
    clock.done(todo[0], 60.0)
    assert clock.seconds_left() == 5 * 60 / 2
    table = "setting,strategy,seed,query_seconds,fit_seconds\n"
    table += "tiny,entropy,0,2,8\ntiny,entropy,1,4,16\ntiny,random,0,0,30\n"
    (tmp_path / "tiny.csv").write_text(table)
    clock = run.Clock(todo[:4], n_jobs=1, results=tmp_path)
    assert clock.seconds_left() == 15 + 30 + 15 + 30
    clock.done(todo[0], 30.0)  # twice as slow as in the table
    assert clock.seconds_left() == 2 * (30 + 15 + 30)
    assert "0.0 h left, ends about " in str(clock)


def test_a_run_goes_on_from_whole_seeds_of_the_table(common, tmp_path):
    run = importlib.import_module("run")
    (tmp_path / "tiny.py").write_text(TINY)
    place = run.Place(tmp_path / "tiny.py", tmp_path / "rounds", tmp_path, None, True)
    setting = place.study.settings[0]
    values = dict.fromkeys(run.COLUMNS, "0.5") | {"setting": setting.name}
    rows = [
        values | {"strategy": strategy, "seed": str(seed), "round": str(number)}
        for seed in (0, 1)
        for strategy in setting.strategies
        for number in range(setting.n_queries + 1)
    ][:-1]  # the second seed lacks a round
    with (tmp_path / "tiny.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, run.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    run.table_to_go_on_from.cache_clear()
    whole = [run.is_whole(curve) for curve in run.curves(place) if curve.part == 0]
    n_strategies = len(setting.strategies)
    assert whole == [True] * n_strategies + [False] * n_strategies
    assert [row["seed"] for row in run.rows_of_whole_seeds(place)] == ["0"] * (
        n_strategies * (setting.n_queries + 1)
    )


def test_a_pool_for_a_purpose(common):
    wanted, pool = (1, 7), dict.fromkeys(range(10), 12) | {1: 5, 7: 5}
    options = {"name": "digits", "wanted": wanted, "n_target": 20, "pool": pool}
    plain = common.load_pool_for_purpose(3, **options)
    assert np.bincount(plain.y_train).tolist() == [pool[c] for c in range(10)]
    assert set(plain.y_test.tolist()) == {1, 7}
    rows = {image.tobytes() for image in plain.X_train}
    assert len(plain.X_target) == 40
    assert not rows & {image.tobytes() for image in plain.X_target}

    repeat = common.partial(common.all_repeated, times=3, vary=common.noisy)
    repeated = common.load_pool_for_purpose(3, repeat=repeat, **options)
    counts = np.bincount(repeated.y_train)
    assert counts.tolist() == [3 * pool[c] for c in range(10)]
    distance = np.abs(repeated.X_train[:, None] - plain.X_train[None]).mean((2, 3, 4))
    nearest = distance.argmin(1)
    assert np.bincount(nearest).tolist() == [3] * len(plain.X_train)
    np.testing.assert_array_equal(plain.y_train[nearest], repeated.y_train)
    assert 0 < distance.min(1).max() < 0.03
    np.testing.assert_array_equal(repeated.X_target, plain.X_target)


def test_some_images_are_there_many_times(common):
    X = np.arange(8.0)[:, None, None, None]
    y = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    rng = np.random.RandomState(0)
    X_new, y_new = common.some_repeated(
        X, y, rng, n_repeated=1, times=4, vary=lambda X, rng: X
    )
    found = X_new.ravel().astype(int)
    assert np.bincount(found).tolist() == [4, 4, 1, 1, 1, 1, 1, 1]
    assert (y_new == found % 2).all()


def test_frames_differ_by_a_pixel_a_flip_and_light(common):
    rng = np.random.RandomState(0)
    X = np.repeat(rng.uniform(0.2, 0.6, size=(1, 3, 5, 5)), 60, axis=0)
    frames = common.filmed(X, rng)
    assert len(np.unique(frames.reshape(60, -1), axis=0)) == 60
    padded = np.pad(X[0], ((0, 0), (1, 1), (1, 1)), mode="edge")
    crops = [padded[:, i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    crops += [crop[:, :, ::-1] for crop in crops]
    for frame in frames:
        light = [(frame / crop).ravel() for crop in crops]
        best = min(light, key=np.ptp)
        assert np.ptp(best) < 1e-9
        assert 0.9 <= best[0] <= 1.1


def test_a_shifted_target(common):
    options = {"name": "digits", "pool": dict.fromkeys(range(10), 20), "n_target": 5}
    shifted = common.load_shifted(0, shift=lambda X: X + 10, share=0.1, **options)
    plain = common.load_pool(0, name="digits", pool=dict.fromkeys(range(10), 25))
    assert (shifted.X_target.min(), shifted.X_test.min()) == (10, 10)
    is_shifted = shifted.X_train.min((1, 2, 3)) >= 10
    assert np.bincount(shifted.y_train[is_shifted]).tolist() == [2] * 10
    assert shifted.X_train[~is_shifted].max() <= 1
    np.testing.assert_allclose(shifted.X_test, plain.X_test + 10)


def test_a_target_of_the_pool(common):
    options = {"name": "digits", "pool": dict.fromkeys(range(10), 20)}
    data = common.load_with_target_of_pool(0, n_target=30, **options)
    assert len(data.X_train) == 200
    rows = [image.tobytes() for image in data.X_train]
    target = [image.tobytes() for image in data.X_target]
    assert len(set(target)) == 30
    assert set(target) <= set(rows)


def test_claims_are_those_of_the_studies(common):
    """Every comparison that was to be made is of settings and strategies there are."""
    tables = importlib.import_module("report_tables")
    for study, claims in tables.CLAIMS.items():
        path = FOLDER / "studies" / f"{study}.py"
        settings = {s.name: s for s in runpy.run_path(str(path))["STUDY"].settings}
        for setting, *pair in claims:
            assert set(pair) <= set(settings[setting].strategies)


def test_claims_are_corrected_together(common):
    tables = importlib.import_module("report_tables")
    rng = np.random.default_rng(0)
    rows = [
        {
            "dataset": "toys",
            "setting": setting,
            "strategy": strategy,
            "seed": seed,
            "round": 0,
            "n_labels": 10,
            "accuracy": lead + 0.01 * rng.normal(),
        }
        for setting in "ab"
        for strategy, lead in (("margin", 0.5), ("FisherMask", 0.55), ("other", 0.1))
        for seed in range(5)
    ]
    claims = [(setting, "FisherMask", "margin") for setting in "abc"]
    _, _, *lines = tables.claims_table(rows, claims).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| toys, a", "| toys, b"]
    for line in lines:
        assert "FisherMask minus margin | **+" in line
    summary = tables.ComparisonResults(
        row for row in rows if row["setting"] == "a" and row["strategy"] != "other"
    ).summary("margin")
    p = [tables.p_value(factor * summary[1]["p"]) for factor in (1, 2)]
    assert f"| {p[0]} | " in lines[0]
    assert lines[0].split(" | ")[4] in (p[0], p[1])
