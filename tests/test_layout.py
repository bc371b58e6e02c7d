"""The layout of the package: imports go down, old paths load, importing it is cheap."""

import ast
import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fishermask_sk
from fishermask_sk._moved import MOVED

PACKAGE = Path(fishermask_sk.__file__).parent
# A file may import from its own room and from those above it in this list.
FLOORS = [
    {"_version", "_warnings", "_types", "_docstrings"},
    {"_rows", "_describe", "distributed"},
    {"gradients"},
    {"selection"},
    {"memory"},
    {"nets"},
    {"scores"},
    {"strategy"},
    {"baselines"},
    {"loops", "plotting", "datasets"},
    {"modal", "activeml", "_moved"},
    {"__init__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(file):
    """Dotted names inside the package that a file imports, wherever it does; of `from a
    import b` both a and a.b, as b may be a module.
    """
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.startswith("fishermask_sk")]


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_imports_go_down(file):
    room = file.relative_to(PACKAGE).with_suffix("").parts[0]
    assert room in FLOOR_OF, f"say in FLOORS where the room {room!r} stands"
    up = [
        name
        for name in imports_of(file)
        if "." in name and FLOOR_OF[name.split(".")[1]] > FLOOR_OF[room]
    ]
    assert not up, f"{file.relative_to(PACKAGE)} imports from above it: {up}"


def test_no_two_files_import_each_other():
    """Circles inside a room show as well."""
    graph = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ["fishermask_sk", *file.relative_to(PACKAGE).with_suffix("").parts]
        if parts[-1] != "__init__":
            graph[".".join(parts)] = set(imports_of(file))

    def reaches(start, goal, seen):
        for name in graph.get(start, ()):
            if name == goal:
                return [start]
            if name not in seen:
                seen.add(name)
                if path := reaches(name, goal, seen):
                    return [start, *path]
        return []

    circles = [path for name in graph if (path := reaches(name, name, set()))]
    assert not circles


def written_names(file):
    """What a file imports of the package; of a page, every dotted name it says."""
    if file.suffix == ".py":
        return imports_of(file)
    return re.findall(r"fishermask_sk\.\w+", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "folder", ["fishermask_sk", "tests", "benchmarks", "examples", "docs"]
)
def test_nobody_imports_by_an_old_path(folder):
    """They are for what was pickled, and mypy does not know them."""
    old = {f"fishermask_sk.{name}" for name in MOVED}
    made = {"_build", "generated", "auto_examples"}
    found = [
        (file.relative_to(PACKAGE.parent), name)
        for file in (PACKAGE.parent / folder).rglob("*")
        if file.suffix in {".py", ".md", ".rst"} and made.isdisjoint(file.parts)
        for name in written_names(file)
        if ".".join(name.split(".")[:2]) in old
    ]
    assert not found


# What a test may change of the package, by the name that it has in the test.
PATCHED = {
    "datasets._SYSTEM_HOME": "which data sets this machine has is not known",
    "module.perf_counter": "seconds of a busy machine tell nothing",
    "pace.perf_counter": "a test cannot wait for ten minutes",
}
PATCHES = {"setattr", "delattr", "setitem", "delitem", "object", "multiple", "patch"}


def root_of(node):
    """The name that an expression like `a.b[c].d` begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return getattr(node, "id", None)


def patches_in(file):
    """What a file changes of what it imports from the package."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("fishermask_sk")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            changed = node.args[0]
            if name in PATCHES and root_of(changed) in own:
                names = [getattr(arg, "value", "…") for arg in node.args[1:2]]
                yield ".".join([ast.unparse(changed), *map(str, names)])
            elif name in PATCHES and "'fishermask_sk." in ast.unparse(changed):
                yield ast.unparse(changed)
        elif (
            isinstance(node, ast.Attribute | ast.Subscript)
            and isinstance(node.ctx, ast.Store | ast.Del)
            and root_of(node) in own
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parent.glob("*.py")), ids=lambda file: file.stem
)
def test_nobody_patches_the_package(file):
    """A test reaches what it is about by parameters, by samples or by a net."""
    assert set(patches_in(file)) <= PATCHED.keys()


def test_patches_are_seen(tmp_path):
    file = tmp_path / "test_patching.py"
    file.write_text(
        "from fishermask_sk.strategy import masks, pace as p\n"
        "from fishermask_sk import FisherMask\n"
        "monkeypatch.setattr(masks, 'MIN', 3)\n"
        "monkeypatch.setattr(time, 'sleep', None)\n"
        "mock.patch.object(FisherMask, 'select')\n"
        "mock.patch('fishermask_sk.memory.free_bytes')\n"
        "p.SECONDS, a = 2, 3\n"
        "p.TABLE['a'] = 3\n"
        "mine = FisherMask\n"
    )
    assert set(patches_in(file)) == {
        "masks.MIN",
        "FisherMask.select",
        "'fishermask_sk.memory.free_bytes'",
        "p.SECONDS",
        "p.TABLE['a']",
    }


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_old_paths_still_load(old, new):
    before = importlib.import_module(f"fishermask_sk.{old}")
    assert before is importlib.import_module(f"fishermask_sk.{new}")
    assert before.__spec__.name == before.__name__ == f"fishermask_sk.{new}"


def test_old_paths_load_once_the_package_is_imported():
    code = "import fishermask_sk.query_strategy as old; print(old.FisherMask())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "FisherMask()"


def test_what_was_pickled_by_an_old_path_loads():
    by_old_path = pickle.dumps(fishermask_sk.FisherMask(0.01), protocol=0).replace(
        b"fishermask_sk.strategy.fisher_mask", b"fishermask_sk.query_strategy"
    )
    assert pickle.loads(by_old_path).sparsity == 0.01


# Every path in the reference of the last release before the rooms.
PATHS = [
    "FisherMask",
    "fisher_mask_sampling",
    "as_estimator",
    "check_network",
    "network_report.NetworkReport",
    "ResNet18Classifier",
    "datasets.load_images",
    "modal.ActiveLearner",
    "ActiveLearningClassifier",
    "active_learning.PoolLearner",
    "active_learning.Round",
    "compare_strategies",
    "load_results",
    "results.ComparisonResults",
    "results.Table",
    "results.holm",
    "baselines.random_sampling",
    "baselines.least_confidence_sampling",
    "baselines.margin_sampling",
    "baselines.power_margin_sampling",
    "baselines.entropy_sampling",
    "baselines.kcenter_sampling",
    "baselines.badge_sampling",
    "baselines.bait_sampling",
    "baselines.weighted_margin_sampling",
    "baselines.facility_location_sampling",
    "plotting.LearningCurveDisplay",
    "plotting.QueryDisplay",
    "plotting.MaskDisplay",
    "fisher",
    "gradients",
    "masks",
    "selection",
    "activeml.FisherMaskQuery",
]


@pytest.mark.parametrize("path", PATHS)
def test_public_paths_import(path):
    module, _, name = path.rpartition(".")
    if not module:
        found = getattr(fishermask_sk, name, None)
        assert found is not None or importlib.import_module(f"fishermask_sk.{name}")
        return
    assert hasattr(importlib.import_module(f"fishermask_sk.{module}"), name)


def test_importing_the_package_leaves_heavy_libraries_alone():
    """Those that torch, scikit-learn and skorch bring by themselves do not count."""
    code = (
        "import sys, torch, sklearn.base, sklearn.pipeline, skorch; "
        "before = set(sys.modules); import fishermask_sk; "
        "heavy = {'torchvision', 'pandas', 'matplotlib', 'modAL', 'skactiveml'}; "
        "print(*heavy & (set(sys.modules) - before))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
