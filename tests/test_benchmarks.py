"""The benchmarks run: at sizes where their figures mean nothing."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from fishermask_sk import FisherMask, ResNet18Classifier

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name):
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def query(monkeypatch, tmp_path):
    module = benchmark("query")
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
    [("steps", 5), ("fidelity", 10), ("large", 2)],
)
def test_a_section_writes_its_table(section, n_rows, query, tmp_path):
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


# `make bench-price`.


@pytest.fixture
def price(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it takes what it shares from query
    module = benchmark("price")
    for name, place in (("FOLDER", tmp_path), ("TABLE", tmp_path / "price.json")):
        monkeypatch.setattr(module, name, place)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "n_lines"),
    [
        ("narrow", 2),
        ("two-stages", 3),
        ("last-layer", 1),
        ("wide", 3),
        ("hundred-classes", 1),
        ("features", 1),
        ("million", 2),
    ],
)
def test_a_row_of_prices_runs_at_a_small_size(row, n_lines, price, capsys, tmp_path):
    price.run(row, 0.002, resume=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] == "|"]
    assert len(lines) == 2 + n_lines
    assert len({line.count("|") for line in lines}) == 1
    assert not list(tmp_path.iterdir())  # such a row is not written


def test_a_row_of_prices_goes_on_where_it_was(price, monkeypatch, tmp_path):
    def row(scale, done):
        for name in ("a", "b"):
            if name not in done:
                yield {
                    "name": name,
                    "machine": "a machine",
                    "pool": "a pool",
                    "setting": name,
                    "forward": 2.0,
                    "query": 3.0,
                    "forward_processor": 2.0,
                    "query_processor": 5.0,
                    "grown": 0.5,
                    "timings": {"mask": 1.0},
                }
                if len(done) < 1:
                    raise KeyboardInterrupt

    monkeypatch.setattr(price, "ROWS", {"narrow": row})
    with pytest.raises(KeyboardInterrupt):
        price.run("narrow", 1, resume=False)
    price.run("narrow", 1, resume=True)
    page = (tmp_path / "price.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| a pool")]
    assert [line.split(" | ")[1] for line in lines] == ["a", "b"]
    assert lines[0].endswith("| 2.0 | 5.0 | 2.5 |")
    assert "narrow: a machine" in page


# `make gpu`.


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    module = benchmark("gpu")
    monkeypatch.setattr(module, "OUT", tmp_path / "gpu.txt")
    return module


def test_without_a_gpu_nothing_is_run_and_nothing_written(gpu, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", None)
    with pytest.raises(
        SystemExit, match=r"needs a GPU, .* nothing was run and nothing"
    ):
        gpu.main([])
    assert not gpu.OUT.exists()


def test_a_part_that_is_none(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["everything"])
    told = "PART=everything is unknown; use one of tests, bench, distributed"
    assert told in capsys.readouterr().err


def test_parts_are_appended_to_one_file(gpu, monkeypatch, tmp_path):
    """Also what failed, and what took too long."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nprint(*sys.argv[1:], flush=True)\n"
        "time.sleep(60 * (sys.argv[1] == 'bench'))\nsys.exit(sys.argv[1] == 'tests')\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    went = [
        gpu.run(part, "cpu", 0.5, gpu.OUT, limit)
        for part, limit in (("distributed", 60), ("tests", 60), ("bench", 3))
    ]
    assert went == [True, False, False]
    lines = gpu.OUT.read_text().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("==")] == [
        "== distributed",
        "== tests",
        "== bench",
    ]
    assert "distributed --device cpu --scale 0.5 --here" in lines
    ends = [line.rsplit(" after ")[0] for line in lines if " after " in line]
    assert ends == ["done", "FAILED with 1", "STOPPED, out of time"]


def test_images_where_fashion_mnist_is_missing_are_random(gpu, monkeypatch):
    def missing(*args, **kwargs):
        assert not kwargs["download_if_missing"]
        raise FileNotFoundError

    monkeypatch.setattr(gpu, "load_images", missing)
    X, y, source = gpu.images(30)
    assert X.shape == (30, 1, 28, 28)
    assert len(y) == 30
    assert source == "random images of 28×28"


def test_nccl_takes_one_process_a_gpu_and_gloo_two_on_one(gpu, monkeypatch):
    for n_gpus, expected in ((1, 1), (2, 2), (8, 2)):
        monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda n=n_gpus: n)
        assert gpu.groups("cuda") == [("nccl", expected), ("gloo", 2)]


@pytest.mark.slow
def test_what_make_gpu_runs_runs_on_a_cpu(gpu):
    for part in ("bench", "distributed"):
        assert gpu.run(part, "cpu", 0.001, gpu.OUT)
    told = gpu.OUT.read_text()
    for name in ("the last layer", "two stages", "all layers, exact"):
        assert f"{name}: k = " in told
    assert "a pick of 60 samples" in told
    assert "gloo, 1 process: the same picks" in told
    assert "gloo, 2 processes: the same picks" in told
