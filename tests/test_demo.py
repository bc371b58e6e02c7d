"""`make demo` on a tiny budget: the table, the numbers and the picture come out."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder that a quick run filled, and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "results"
    command = [sys.executable, DEMO, "--quick", "--seeds", "2", "--output", output]
    return output, subprocess.run(command, capture_output=True, text=True, check=True)


def test_table_and_picture_come_out(quick):
    output, run = quick
    picture = output / "demo-digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run.stdout.rstrip().endswith(str(picture)), (
        "the last line must name the picture"
    )
    assert "8/8" in run.stderr, "the progress bar counts strategies x seeds"
    header, *lines = run.stdout[run.stdout.index("strategy") :].splitlines()
    names = ["FisherMask", "with", "target", "FisherMask", "margin", "random"]
    assert header.split() == ["strategy", *names]
    assert [line.split()[0] for line in lines[1:3]] == ["20", "35"]


def test_table_shows_the_saved_numbers(quick):
    output, run = quick
    results = pd.read_csv(output / "demo-digits.csv")
    assert len(results) == 4 * 2 * 2  # strategies, seeds, rounds
    for (_, strategy), accuracy in results.groupby(["n_labels", "strategy"])[
        "accuracy"
    ]:
        assert f"{accuracy.mean():.3f} ± {accuracy.sem():.3f}" in run.stdout, strategy


def test_strategies_start_from_the_same_net(quick):
    output, _ = quick
    first = pd.read_csv(output / "demo-digits.csv").query("round == 0")
    assert (first.groupby("seed")["accuracy"].nunique() == 1).all()
    assert first["accuracy"].nunique() == 2, "seeds must differ"


def test_what_was_bought_is_counted(quick):
    output, run = quick
    results = pd.read_csv(output / "demo-digits.csv")
    assert (results["different"] <= results["wanted"]).all()
    assert (results["wanted"] <= results["n_labels"]).all()
    assert "Of 35 labels" in run.stdout


def test_the_pool_is_what_the_demo_says():
    demo = runpy.run_path(str(DEMO))
    X, y, image, X_target, X_test, y_test = demo["load"](0)
    assert np.bincount(y).tolist() == [32 * 4] * 5 + [8 * 4] * 5
    assert (np.bincount(np.unique(image, return_inverse=True)[1]) == 4).all()
    assert X.shape == (800, 1, 8, 8)
    assert X_target.shape == (100, 1, 8, 8)
    assert set(y_test) == {5, 6, 7, 8, 9}
    assert len(X_test) == len(y_test)
    close = np.abs(X[:, None] - X_target[None]).mean((2, 3, 4)).min()
    assert close > 0.03  # no frame of a target's image
