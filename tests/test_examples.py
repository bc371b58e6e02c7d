"""Every example runs from top to bottom on a tiny budget, as a script and as the
notebook that the site offers, and is short enough to be read.
"""

import json
import re
import runpy
from pathlib import Path

import pytest

from fishermask_sk.loops.comparison import load_results

EXAMPLES = Path(__file__).parents[1] / "examples"
# What a tiny budget sets at the top of each tutorial.
TINY = {"WIDTH": 4, "MAX_EPOCHS": 1}
TUTORIALS = {
    "compare_strategies": TINY | {"SPARSITY": 0.05, "N_QUERIES": 1, "N_SEEDS": 1},
    "custom_mask": TINY | {"SPARSITY": 0.02},
    "folder_of_images": {},
    "frames_for_a_purpose": {},
    "modal_loop": TINY | {"SPARSITY": 0.01, "N_ROUNDS": 1},
    "pictures": TINY | {"SPARSITY": 0.02},
    "tabular_pipeline": {"MAX_EPOCHS": 2, "N_ROUNDS": 1},
    "text_transformer": {"MAX_EPOCHS": 2, "N_TEXTS": 90, "N_ROUNDS": 1},
    "tune_sparsity": TINY | {"N_RARE": 12, "N_INSTANCES": 24, "KEEP_HEAD": False},
    "vision_transformer": {"MAX_EPOCHS": 2, "N_EACH": 10, "N_ROUNDS": 1, "N_POOL": 99},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:The mask keeps k="
)  # a tiny net's head is most of it


def tiny(name):
    """The source of a tutorial, with small numbers where it sets its budget."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    for constant, value in TUTORIALS[name].items():
        source = with_constant(source, constant, value)
    return source


def with_constant(source, name, value):
    """The source with another value in the line that sets a constant, perhaps among
    others: `WIDTH, MAX_EPOCHS = 16, 200`.
    """
    for line in re.findall(r"^[A-Z_, ]+ = .+$", source, re.MULTILINE):
        names, values = (side.split(", ") for side in line.split(" = "))
        if name in names:
            values[names.index(name)] = repr(value)
            new = f"{', '.join(names)} = {', '.join(values)}"
            return source.replace(line, new)
    raise AssertionError(f"no line sets {name}")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a tutorial on its tiny budget in an empty folder; return what it prints and
    its names.
    """

    def run(name):
        (tmp_path / f"{name}.py").write_text(tiny(name), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        names = runpy.run_path(str(tmp_path / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, names

    return run


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_are_short_and_told_in_cells(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    assert source.count("\n# %%\n") >= 3
    assert "argparse" not in source  # a notebook has no command line


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_notebooks_run(name, tmp_path, monkeypatch):
    """The notebook that the site offers, in a kernel of its own."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebooks = pytest.importorskip("sphinx_gallery.notebook")
    parser = pytest.importorskip("sphinx_gallery.py_source_parser")
    conf = pytest.importorskip("sphinx_gallery.gen_gallery").DEFAULT_GALLERY_CONF
    path = tmp_path / f"{name}.py"
    path.write_text(tiny(name), encoding="utf-8")
    _, cells = parser.split_code_and_text_blocks(str(path))
    made = notebooks.jupyter_notebook(cells, conf, str(tmp_path))
    notebook = nbformat.reads(json.dumps(made), as_version=4)
    assert sum(cell.cell_type == "code" for cell in notebook.cells) >= 3
    monkeypatch.setenv("MPLBACKEND", "Agg")
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # a cell that fails raises


def test_modal_loop(run):
    out, _ = run("modal_loop")
    first, second, gains = out.splitlines()
    assert first.startswith("30 labels: accuracy 0.")
    assert second.startswith("45 labels: accuracy 0.")
    assert gains.endswith(" 1.0")


def test_tune_sparsity(run):
    out, _ = run("tune_sparsity")
    assert [line.split()[0] for line in out.splitlines()[1:5]] == [
        "0.01",
        "0.005",
        "0.002",
        "0.001",
    ]
    assert "best sparsity: 0.0" in out
    assert "labels spent per candidate: 48 of 264" in out


# One seed has no spread to test.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_compare_strategies(run, tmp_path):
    out, names = run("compare_strategies")
    compared = [name for name in names["strategies"] if name != "random"]
    assert [line.split()[0] for line in out.splitlines()] == compared
    assert len(names["strategies"]) == 7
    results = tmp_path
    assert (results / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert len(load_results(results / "compare.jsonl")) == 7 * 2


def test_custom_mask(run):
    out, _ = run("custom_mask")
    assert "fisher: " in out
    assert out.count("asks for") == 2
    stages = out.splitlines()[2]
    assert all(
        stage in stages
        for stage in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
    )


@pytest.mark.slow
def test_pictures(run, tmp_path):
    _, names = run("pictures")
    for name in ("rounds", "mask", "gains", "embeddings"):
        names[name].savefig(tmp_path / "drawn.svg")
        assert (tmp_path / "drawn.svg").stat().st_size > 5_000
    assert all(ax.get_xlabel() for ax in names["panels"])
    assert names["panels"][0].get_ylabel()


def test_vision_transformer(run):
    out, _ = run("vision_transformer")
    assert "stem    rule of Conv2d" in out
    assert "query    20 of 99 samples, 40 labelled, 10 classes" in out
    rounds = [line for line in out.splitlines() if "labels: accuracy" in line]
    assert [line.split()[0] for line in rounds] == ["60", "80"]


def test_text_transformer(run):
    out, _ = run("text_transformer")
    first, *sentences = out.splitlines()
    assert first.startswith("36 labels: accuracy 0.")
    assert len(sentences) >= 3


def test_tabular_pipeline(run):
    out, _ = run("tabular_pipeline")
    first, header, *rows = out.splitlines()
    assert first.startswith("18 labels: accuracy 0.")
    assert header.split() == ["mean", "radius", "mean", "texture", "clinic", "gain"]
    assert len(rows) == 6


def test_folder_of_images(run):
    first, second, third = run("folder_of_images")[0].splitlines()
    assert first == "batch-001.csv batch-001.png batch-001.tasks.json"
    assert second.startswith("16 labels of ")
    assert second.endswith("now batch-002.csv")
    assert third.startswith("24 labels of ")
    assert third.endswith("now batch-003.csv")


def test_frames_for_a_purpose(run):
    lines = run("frames_for_a_purpose")[0].splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "margin",
        "FisherMask",
        "with target",
    ]
    assert all(" of 20 wanted, " in line for line in lines)
