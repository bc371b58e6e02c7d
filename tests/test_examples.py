"""Every example runs from top to bottom on a tiny budget, and is short enough to be
read.
"""

import runpy
import sys
from pathlib import Path

import pytest

from fishermask_sk import _calibration
from fishermask_sk.comparison import load_results

EXAMPLES = Path(__file__).parents[1] / "examples"
TUTORIALS = [
    "compare_strategies",
    "custom_mask",
    "folder_of_images",
    "frames_for_a_purpose",
    "modal_loop",
    "pictures",
    "tabular_pipeline",
    "text_transformer",
    "tune_sparsity",
    "vision_transformer",
]

pytestmark = pytest.mark.filterwarnings(
    "ignore:The mask keeps k="
)  # a tiny net's head is most of it


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as from the command line, and return what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--quick"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_are_under_80_lines(name):
    _, _, code = (EXAMPLES / f"{name}.py").read_text().split('"""', 2)
    assert len(code.splitlines()) < 80


def test_modal_loop(run):
    first, second, gains = run("modal_loop").splitlines()
    assert first.startswith("30 labels: accuracy 0.")
    assert second.startswith("45 labels: accuracy 0.")
    assert gains.endswith(" 1.0")


def test_tune_sparsity(run):
    out = run("tune_sparsity")
    assert [line.split()[0] for line in out.splitlines()[1:5]] == [
        "0.01",
        "0.005",
        "0.002",
        "0.001",
    ]
    assert "best sparsity: 0.0" in out
    assert "labels spent per candidate: 48 of 264" in out


def test_compare_strategies(run, tmp_path):
    out = run("compare_strategies", "--output", tmp_path)
    table = out.splitlines()
    assert [line.split()[0] for line in table[1:8]] == [
        "FisherMask",
        "BAIT",
        "BADGE",
        "core-set",
        "margin",
        "entropy",
        "random",
    ]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert len(load_results(tmp_path / "compare-quick.jsonl")) == 7 * 2


def test_custom_mask(run):
    out = run("custom_mask")
    assert "fisher: " in out
    assert out.count("asks for") == 2
    stages = out.splitlines()[2]
    assert all(
        stage in stages
        for stage in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
    )


def test_pictures(run, tmp_path):
    run("pictures", "--output", tmp_path)
    for name in ("rounds", "mask", "gains", "embeddings"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_vision_transformer(run, monkeypatch):
    monkeypatch.setattr(_calibration, "STEP_SECONDS", 0.05)
    monkeypatch.setattr(_calibration, "SELECTION_BYTES", 2**20)
    out = run("vision_transformer")
    assert "stem    rule of Conv2d" in out
    assert "query    20 of 60,000 samples, 40 labelled, 10 classes" in out
    rounds = [line for line in out.splitlines() if "labels: accuracy" in line]
    assert [line.split()[0] for line in rounds] == ["60", "80"]


def test_text_transformer(run):
    first, asked, *sentences = run("text_transformer").splitlines()
    assert first.startswith("36 labels: accuracy 0.")
    assert asked == "asked for last:"
    assert len(sentences) >= 3


def test_tabular_pipeline(run):
    first, header, *rows = run("tabular_pipeline").splitlines()
    assert first.startswith("18 labels: accuracy 0.")
    assert header.split() == ["mean", "radius", "mean", "texture", "clinic", "gain"]
    assert len(rows) == 6


def test_folder_of_images(run):
    first, second, third = run("folder_of_images").splitlines()
    assert first == "batch-001.csv batch-001.png batch-001.tasks.json"
    assert second.startswith("16 labels of ")
    assert second.endswith("now batch-002.csv")
    assert third.startswith("24 labels of ")
    assert third.endswith("now batch-003.csv")


def test_frames_for_a_purpose(run):
    lines = run("frames_for_a_purpose").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "margin",
        "FisherMask",
        "with target",
    ]
    assert all(" of 20 wanted, " in line for line in lines)
