"""What uses modAL, tested again with other versions of modAL and scikit-learn, each
really installed.

An environment is a folder that pip fills with those two and nothing else. First on the
path it hides the versions that were installed for development; torch and all else are
shared, so that it takes seconds to build. They need a network, and only the first time;
where pip fails, they fail.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-versions"
TESTS = [
    "tests/test_modal.py",
    "tests/test_modal_contract.py",
    "tests/test_modal_peers.py",
]

# The newest is what is installed for development. From Python 3.14 on the oldest with
# wheels is 1.7.
SCIKIT_LEARN = (
    ["1.5", "1.7", "newest"] if sys.version_info < (3, 14) else ["1.7", "newest"]
)
MODAL = ["0.4.1", "0.4.2.1"]


def run(*arguments, **environment):
    """Run this interpreter in the repository; fail with everything that it said."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PYTEST_")
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def environment(scikit_learn, modal):
    """Return the folder with these versions; the first time, have pip fill it."""
    folder = (
        ENVIRONMENTS
        / f"py{sys.version_info.major}.{sys.version_info.minor}-{scikit_learn}-{modal}"
    )
    if not folder.exists():
        requirements = [f"modAL-python=={modal}"]
        if scikit_learn != "newest":
            requirements.append(f"scikit-learn=={scikit_learn}.*")
        ENVIRONMENTS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=ENVIRONMENTS
        ) as scratch:  # nothing half-built is left behind
            # Without --no-deps modAL 0.4.2.1 would bring skorch 0.9.0, which cannot be
            # imported any more.
            pip = [
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            run(
                *pip,
                "--only-binary",
                ":all:",
                "--target",
                f"{scratch}/built",
                *requirements,
            )
            Path(scratch, "built").rename(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("modal", MODAL)
@pytest.mark.parametrize("scikit_learn", SCIKIT_LEARN)
def test_with(scikit_learn, modal):
    folder = environment(scikit_learn, modal)
    found = run(
        "-c",
        "import modAL, sklearn; from importlib.metadata import version as "
        "v\nprint(modAL.__file__, v('modAL-python'), v('scikit-learn'), "
        "sklearn.__version__)",
        PYTHONPATH=str(folder),
    )
    modal_file, modal_found, scikit_learn_found, scikit_learn_imported = found.split()
    assert Path(modal_file).is_relative_to(folder)
    assert modal_found == modal
    assert scikit_learn_found == scikit_learn_imported
    assert scikit_learn == "newest" or scikit_learn_found.startswith(f"{scikit_learn}.")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, PYTHONPATH=str(folder))
