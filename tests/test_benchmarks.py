"""The benchmarks run: at sizes where their figures mean nothing."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from fishermask_sk import FisherMask, ResNet18Classifier

QUERY = Path(__file__).parents[1] / "benchmarks" / "query.py"


@pytest.fixture
def query(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("benchmarks_query", QUERY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    for name, value in (("N_LABELED", 20), ("N_POOL", 60), ("N_PICKS", 5)):
        monkeypatch.setattr(module, name, value)

    def load(n_pool, n_labeled=20, load=module.load):
        return load(min(n_pool, 60), min(n_labeled, 60))

    def small_net(width, max_epochs=1, **kwargs):
        return ResNet18Classifier(width=2, max_epochs=1, **kwargs)

    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(module, "ResNet18Classifier", small_net)
    monkeypatch.setattr(
        module, "FisherMask", partial(FisherMask, 0.1)
    )  # more weights than 700 directions
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "n_rows"),
    [("steps", 5), ("screened", 3), ("fidelity", 10), ("large", 2)],
)
def test_a_section_writes_its_table(section, n_rows, query, monkeypatch, tmp_path):
    parts = query.screening.Screen.parts
    monkeypatch.setattr(
        query.screening.Screen, "parts", parts
    )  # as it was, after the section's own
    sizes = {
        "fidelity": {"n_pool": 60, "n_picks": 5},
        "large": {"n_pool": 60, "n_picks": 5},
    }
    getattr(query, section)(**sizes.get(section, {}))
    (page,) = tmp_path.glob("*.md")
    table = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(table) == n_rows + 2
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.slow
def test_the_peak_of_the_selection_is_printed(query, capsys):
    query.peak()
    assert "MB at the most" in capsys.readouterr().out
