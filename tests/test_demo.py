"""`make demo` on a tiny budget: the table, the numbers and the picture come out."""

import subprocess
import sys
from pathlib import Path

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
    assert "6/6" in run.stderr, "the progress bar counts strategies x seeds"
    header, *lines = run.stdout[run.stdout.index("strategy") :].splitlines()
    assert header.split() == ["strategy", "FisherMask", "margin", "random"]
    assert [line.split()[0] for line in lines[1:3]] == ["24", "36"]


def test_table_shows_the_saved_numbers(quick):
    output, run = quick
    results = pd.read_csv(output / "demo-digits.csv")
    assert len(results) == 3 * 2 * 2  # strategies, seeds, rounds
    for (_, strategy), accuracy in results.groupby(["n_labels", "strategy"])[
        "accuracy"
    ]:
        assert f"{accuracy.mean():.3f} ± {accuracy.sem():.3f}" in run.stdout, strategy


def test_strategies_start_from_the_same_net(quick):
    output, _ = quick
    first = pd.read_csv(output / "demo-digits.csv").query("round == 0")
    assert (first.groupby("seed")["accuracy"].nunique() == 1).all()
    assert first["accuracy"].nunique() == 2, "seeds must differ"
