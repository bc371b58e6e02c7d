"""Wheel and sdist are built, install into empty environments, and work there; the
version stands in one place.
"""

import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from filelock import FileLock

import fishermask_sk

ROOT = Path(__file__).parents[1]

SMOKE = """
from importlib.metadata import version
from pathlib import Path
import numpy as np, torch
from skorch import NeuralNetClassifier
import fishermask_sk
from fishermask_sk import FisherMask
from fishermask_sk.baselines import margin_sampling
from fishermask_sk.datasets import load_images
from fishermask_sk.modal import ActiveLearner
from fishermask_sk.plotting import MaskDisplay

assert version("fishermask-sk") == fishermask_sk.__version__, version("fishermask-sk")
assert Path(fishermask_sk.__file__).with_name("py.typed").exists()
X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
y = np.int64(X[:, 0] > 0)
net = NeuralNetClassifier(
    torch.nn.Linear(4, 2),
    criterion=torch.nn.CrossEntropyLoss,
    train_split=None,
    verbose=0,
)
learner = ActiveLearner(net, FisherMask(1.0, random_state=0), X[:10], y[:10])
query_idx, X_query = learner.query(X[10:], n_instances=3)
learner.teach(X_query, y[10:][query_idx])
assert len(learner.X_training) == 13
print(fishermask_sk.__file__)
"""


def run(*arguments, cwd):
    """Run a command outside the repository's folder; fail with everything that it
    said.
    """
    process = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "PYTHONPATH"))
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist; the wheel is made from the sdist, as `build`
    does it.
    """
    folder = tmp_path_factory.mktemp("dist")
    # Two builds at once, in two of pytest's processes, would write the same egg-info.
    with FileLock(tmp_path_factory.getbasetemp().parent / "build.lock"):
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.mark.slow
def test_an_index_takes_both(built):
    names = sorted(path.name for path in built.iterdir())
    version = fishermask_sk.__version__
    assert names == [
        f"fishermask_sk-{version}-py3-none-any.whl",
        f"fishermask_sk-{version}.tar.gz",
    ]
    assert "PASSED" in run(
        sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built
    )
    with tarfile.open(built / names[1]) as sdist:
        held = {path.partition("/")[2] for path in sdist.getnames()}
        text = sdist.extractfile(f"fishermask_sk-{version}/PKG-INFO").read().decode()
    assert {
        "docs/modal.md",
        "docs/images/demo-digits.png",
        "examples/demo.py",
        "tests/reference.py",
        "benchmarks/query.py",
    } <= held
    assert not any(
        path.startswith(("docs/_build", "docs/auto_examples", "docs/generated"))
        for path in held
    )
    assert "(`docs/modal.md`)" in text


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
def test_installs_and_works(built, tmp_path, suffix):
    (package,) = built.glob(f"*{suffix}")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        package,
        cwd=tmp_path,
    )
    # torch and the rest, gigabytes, are those of this environment: named last, and
    # without its own .pth files, by which it would find the repository.
    site = Path(
        run(
            python,
            "-c",
            "import sysconfig; print(sysconfig.get_path('purelib'))",
            cwd=tmp_path,
        ).strip()
    )
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    (tmp_path / "smoke.py").write_text(SMOKE, encoding="utf-8")
    found = (
        run(python, "-W", "ignore", "smoke.py", cwd=tmp_path).strip().splitlines()[-1]
    )
    assert Path(found).is_relative_to(site)


def test_readme_on_an_index():
    """Nothing there leads to a file, for there are none around it; the links to other
    sites stay.
    """
    written = runpy.run_path(str(ROOT / "setup.py"))
    readme, shown = written["README"], written["without_files"](written["README"])
    relative, absolute = r"\]\((?!https?:)", r"\]\(https?:[^)]*\)"
    assert re.search(relative, readme)
    assert not re.search(relative, shown)
    assert re.findall(absolute, shown) == re.findall(absolute, readme)
    for name in re.findall(r"\(`([\w./]+)`\)", shown):
        assert (ROOT / name).exists()
    assert "(`docs/modal.md`)" in shown
    assert "source archive" in shown


def test_version_of_the_citation():
    (version,) = re.findall(
        r"^version: (.+)$",
        (ROOT / "CITATION.cff").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert version == fishermask_sk.__version__
