"""scikit-activeml's own template of requirements for pool query strategies, on ours.

Its wheel 0.5.2 holds the template; later ones leave their tests out.
"""

import importlib
import subprocess
import sys
import types
import unittest
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("skactiveml")
from skactiveml.classifier import ParzenWindowClassifier, SkorchClassifier
from skactiveml.utils import MISSING_LABEL

from fishermask_sk.activeml import (
    BaitQuery,
    FacilityLocationQuery,
    FisherMaskQuery,
    PowerMarginQuery,
    WeightedMarginQuery,
)

VERSION = "0.5.2"
X = np.random.default_rng(0).normal(size=(12, 2))
Y = np.full(12, np.nan)
Y[:4] = [0, 1, 0, 1]


def make_clf(missing_label=MISSING_LABEL):
    torch.manual_seed(0)
    return SkorchClassifier(
        nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)),
        classes=[0, 1],
        missing_label=missing_label,
        neural_net_param_dict={"verbose": 0, "train_split": None, "max_epochs": 3},
        random_state=0,
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The module of the template, beside the installed scikit-activeml."""
    folder = tmp_path_factory.mktemp("scikit-activeml")
    command = ["-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    subprocess.run(
        [sys.executable, *command, f"scikit-activeml=={VERSION}"], check=True
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    tests = folder / "skactiveml" / "tests"
    package = types.ModuleType("skactiveml.tests")
    package.__path__ = [str(tests)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "skactiveml.tests", package)
        yield importlib.import_module("skactiveml.tests.template_query_strategy")
        for name in ("template_query_strategy", "utils"):
            sys.modules.pop(f"skactiveml.tests.{name}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("strategy", "takes_target"),
    [
        (FisherMaskQuery(0.9), True),
        (BaitQuery(), False),
        (PowerMarginQuery(), False),
        (WeightedMarginQuery(), True),
        (FacilityLocationQuery(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_requirements(template, strategy, takes_target):
    query = {"X_target": X[:3] + 1} if takes_target else {}

    class Requirements(template.TemplateSingleAnnotatorPoolQueryStrategy):
        def setUp(self):
            super().setUp(
                qs_class=type(strategy),
                init_default_params={"sparsity": 0.9}
                if isinstance(strategy, FisherMaskQuery)
                else {},
                query_default_params_clf={"X": X, "y": Y.copy(), "clf": make_clf()}
                | query,
            )

        def test_query_param_clf(self):
            cases = [(make_clf(), None), (make_clf("x"), TypeError)]
            if isinstance(strategy, (FisherMaskQuery, BaitQuery)):
                cases.append((ParzenWindowClassifier(classes=[0, 1]), TypeError))
            super().test_query_param_clf(test_cases=cases)

        def test_query(self):
            """Ours are in test_activeml.py."""

    # The template asks for a test of every parameter; so does test_activeml.py.
    for name in strategy.get_params():
        if not hasattr(Requirements, f"test_init_param_{name}"):
            setattr(Requirements, f"test_init_param_{name}", lambda self: None)
    Requirements.test_query_param_X_target = lambda self: None
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(
        type("TestRequirements", (Requirements, unittest.TestCase), {})
    )
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun > 15
    assert not result.errors + result.failures
