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

from fishermask_sk.active_learning import PoolLearner
from fishermask_sk.comparison import load_results

FOLDER = Path(__file__).parents[1] / "examples" / "reproduction"
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
    assert "1/4  tiny, entropy, seed 0" in stopped.stdout
    assert "Stopped. The same command goes on from here." in stopped.stderr
    assert stopped.returncode == 1

    run = importlib.import_module("run")
    place = run.Place(
        tmp_path / "tiny.py", tmp_path / "rounds" / "tiny", tmp_path, None
    )
    before = load_results(place.curve(0, "entropy", 0))
    assert len(before) == 3
    for curve in run.curves(place):
        run.play(curve)
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
        (setting.name, setting.dataset, strategy)
        for setting in study.settings
        for strategy in setting.strategies
    ]
    assert len(set(parts)) == len(parts)


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
    """A docs folder with the results of two seeds, made up, and a page that asks for
    every kind of table.
    """
    report = importlib.import_module("report")
    rng = np.random.default_rng(0)
    for folder in ("results", "images"):
        (tmp_path / folder).mkdir()
    with (tmp_path / "results" / "toy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, importlib.import_module("run").COLUMNS)
        writer.writeheader()
        for lead, strategy in enumerate([*report.STRATEGIES, "variant"]):
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
    about = {"seeds": 2, "commits": ["0123456789"]}
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
    kinds = [
        "runs",
        *(
            f"{kind} | toy | small"
            for kind in ("strategies", "variants", "curves", "costs")
        ),
    ]
    kinds += ["masks | masks | toys", "sizes | sizes", "strategies | other | small"]
    blocks = (f"Before\n<!-- report: {kind} -->\nold\n<!-- end -->\n" for kind in kinds)
    (tmp_path / "results.md").write_text("\n".join(blocks))
    return tmp_path


def test_report_from_files_alone(docs, monkeypatch):
    report = importlib.import_module("report")
    monkeypatch.setattr(sys, "argv", ["report.py", "--docs", str(docs)])
    report.main()
    page = (docs / "results.md").read_text()
    assert "old" not in page
    assert page.count("Before") == 8
    assert "| `toy` | toys, small | 9 | 10, +5 to 20 | 2 of 2 | `0123456` |" in page
    assert re.search(r"\| random \| 2 \| 0\.77\d \| 0\.65\d \| – \| – \|", page)
    lead = re.search(
        r"\| variant \| 2 \| 0\.78\d \| 0\.66\d \| \**\+(0\.0\d\d) \[", page
    )
    assert float(lead[1]) == pytest.approx(
        0.06, abs=0.002
    )  # 0.08 in two of three rounds: 0.75 of the area
    assert re.search(
        r"\| FisherMask \| 0\.50\d ± 0\.000 \| 0\.60\d ± 0\.000 \| 0\.70\d ± 0\.000 \|",
        page,
    )
    assert "| FisherMask | 3.00 | 3.00 to 3.00 | 1.00 | 75% |" in page
    assert "| 10 | 20 / 75% | 80 / 25% | 50% |" in page
    assert (
        "| 1,000 | 10 | 50 | 5 | 7.5 (6.0 to 9.0) | 1.5 | 2.5 | 3.5 | 9.0 | 5 |" in page
    )
    assert (
        "| **last** | 1,000 | 10 | 40 | 5 | 3.0 | 1.0 | 1.0 | 1.0 | 8.0 | 3 |" in page
    )
    assert (
        "| all | **2,000** | 10 | 50 | 5 | 12.0 | 1.0 | 5.0 | 6.0 | 8.0 | 7 |" in page
    )
    assert page.count("*Not run yet.*") == 1
    images = sorted(path.name for path in (docs / "images").iterdir())
    assert images == ["results-toy-small-variants.png", "results-toy-small.png"]
    report.main()
    assert (docs / "results.md").read_text() == page


def test_the_page_is_what_its_files_say(common):
    """After new results: python examples/reproduction/report.py."""
    report = importlib.import_module("report")
    page = (report.DOCS / "results.md").read_text(encoding="utf-8")
    assert report.filled(page, report.DOCS / "results") == page
    for image in re.findall(r"\]\((images/results-.*?png)\)", page):
        assert (report.DOCS / image).stat().st_size < 200_000
