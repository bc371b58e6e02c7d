"""Comparisons: tidy rows, the same start for all, going on after every kind of end, and
what the summary says.
"""

import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from scipy import sparse, stats
from sklearn.base import BaseEstimator
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch.utils.data import TensorDataset

from fishermask_sk._describe import describe, digest
from fishermask_sk.baselines import entropy_sampling, margin_sampling, random_sampling
from fishermask_sk.loops.comparison import (
    ComparisonResults,
    compare_strategies,
    load_results,
)
from fishermask_sk.loops.results import Table, holm
from fishermask_sk.loops.results_file import differences
from fishermask_sk.plotting import LearningCurveDisplay
from fishermask_sk.strategy.fisher_mask import FisherMask

X, Y = load_iris(return_X_y=True)
SPLIT = (X[::2], Y[::2], X[1::2], Y[1::2])
STRATEGIES = {"random": random_sampling, "margin": margin_sampling}


def compare(strategies=STRATEGIES, estimator=None, split=SPLIT, **params):
    settings = {"n_initial": 8, "n_instances": 4, "n_queries": 3, "seeds": 2, **params}
    return compare_strategies(
        GaussianNB() if estimator is None else estimator, strategies, *split, **settings
    )


def without_seconds(rows):
    return [
        {name: value for name, value in row.items() if not name.endswith("_seconds")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def whole():
    """The rows of an undisturbed run."""
    return without_seconds(compare())


# --- rows
# --------------------------------------------------------------------------------


def test_one_tidy_row_per_strategy_seed_and_round():
    results = compare()
    keys = [
        (row["strategy"], row["seed"], row["round"], row["n_labels"]) for row in results
    ]
    assert keys == [
        (s, seed, r, 8 + 4 * r) for s in STRATEGIES for seed in (0, 1) for r in range(4)
    ]
    for row in results:
        assert sum(row["class_counts"].values()) == row["n_labels"]
        assert row["fit_seconds"] > 0
        assert (row["query_seconds"] > 0) == (row["round"] > 0)
        assert len(row["indices"]) == (4 if row["round"] else 8)


def test_all_strategies_start_from_the_same_batch_and_the_same_fit():
    results = compare(
        estimator=RandomForestClassifier(5),
        strategies={**STRATEGIES, "entropy": entropy_sampling},
    )
    for seed in (0, 1):
        first = [row for row in results if row["seed"] == seed and row["round"] == 0]
        assert len({str(row["indices"]) for row in first}) == 1
        assert len({row["log_loss"] for row in first}) == 1
    assert results[0]["indices"] != results[4]["indices"]


def test_metrics_are_scikit_learns():
    row = compare(n_queries=0, seeds=[5], n_initial=40)[0]
    labeled = np.array(row["indices"])
    estimator = GaussianNB().fit(SPLIT[0][labeled], SPLIT[1][labeled])
    y_pred, proba = estimator.predict(SPLIT[2]), estimator.predict_proba(SPLIT[2])
    assert row["accuracy"] == pytest.approx(estimator.score(*SPLIT[2:]))
    assert row["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(SPLIT[3], y_pred)
    )
    assert row["log_loss"] == pytest.approx(log_loss(SPLIT[3], proba))
    assert row["class_counts"] == {
        str(c): int((SPLIT[1][labeled] == c).sum()) for c in range(3)
    }


def test_a_class_without_a_column_costs_what_scikit_learn_charges_for_zero():
    row = compare(n_queries=0, seeds=1, initial=[0, 1, 30, 31])[
        0
    ]  # never the third class
    estimator = GaussianNB().fit(SPLIT[0][[0, 1, 30, 31]], SPLIT[1][[0, 1, 30, 31]])
    proba = np.c_[estimator.predict_proba(SPLIT[2]), np.zeros(75)]
    assert row["log_loss"] == pytest.approx(log_loss(SPLIT[3], proba, labels=[0, 1, 2]))


def test_an_estimator_without_probabilities_has_no_log_loss():
    rows = compare({"random": random_sampling}, LinearSVC(), initial="stratified")
    assert all(np.isnan(row["log_loss"]) for row in rows)
    assert rows[-1]["accuracy"] > 0.7


def test_string_labels():
    names = np.array(["a", "b", "c"])
    rows = compare(split=(SPLIT[0], names[SPLIT[1]], SPLIT[2], names[SPLIT[3]]))
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in compare()]
    assert set(rows[-1]["class_counts"]) == {"a", "b", "c"}


def test_a_budget_beyond_the_data_ends_with_all_rows(tmp_path):
    path = tmp_path / "results.jsonl"
    results = compare(n_initial=60, n_instances=10, n_queries=9, results=path)
    assert [row["n_labels"] for row in results[:3]] == [60, 70, 75]
    again = compare(n_initial=60, n_instances=10, n_queries=9, results=path)
    assert again == results


def test_strategies_without_names_are_called_by_function_or_class():
    results = compare(
        [random_sampling, partial(margin_sampling, random_state=0)],
        n_queries=0,
        seeds=1,
    )
    assert [row["strategy"] for row in results] == [
        "random_sampling",
        "margin_sampling",
    ]


def test_inputs_are_left_as_they_are():
    strategy, estimator = FisherMask(), GaussianNB()
    compare({"random": random_sampling}, estimator)
    assert vars(estimator) == vars(GaussianNB())
    assert vars(strategy) == vars(FisherMask())


@pytest.mark.slow
def test_processes_give_the_same_rows(tmp_path, whole):
    path = tmp_path / "results.jsonl"
    assert without_seconds(compare(n_jobs=2, results=path)) == whole
    assert without_seconds(compare(n_jobs=2)) == whole
    assert without_seconds(compare(results=path)) == whole


def test_nested_progress_bars_and_nothing_else(capsys):
    compare()
    assert capsys.readouterr() == ("", "")
    compare(verbose=1)
    printed, shown = capsys.readouterr()
    assert printed == ""
    assert "curves: 100%" in shown
    assert "margin, seed 1" in shown


def test_display_from_results():
    display = LearningCurveDisplay.from_results(compare())
    assert list(display.curves) == ["random", "margin"]


# --- going on
# --------------------------------------------------------------------------------


class Counting(GaussianNB):
    """Remembers how often it was fitted, over all clones."""

    fits = 0

    def fit(self, X, y):
        type(self).fits += 1
        return super().fit(X, y)


def test_a_complete_file_is_read_and_nothing_is_played(tmp_path, whole):
    first = compare(estimator=Counting(), results=tmp_path / "results.jsonl")
    before = Counting.fits
    assert compare(estimator=Counting(), results=tmp_path / "results.jsonl") == first
    assert without_seconds(first) == whole
    assert Counting.fits == before


@pytest.mark.parametrize("n_rows", [0, 1, 3, 4, 9])
def test_only_the_last_known_round_is_fitted_again(tmp_path, whole, n_rows):
    path = tmp_path / "results.jsonl"
    compare(estimator=Counting(), results=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: 4 + n_rows]))  # run, settings, two strategies
    before = Counting.fits
    assert without_seconds(compare(estimator=Counting(), results=path)) == whole
    assert Counting.fits - before == 16 - n_rows + bool(n_rows % 4)


def test_every_cut_of_the_last_line_is_survived(tmp_path, whole):
    path = tmp_path / "results.jsonl"
    compare(results=path)
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (1, len(lines[9]) // 2, len(lines[9]) - 1):
        path.write_bytes(b"".join(lines[:9]) + lines[9][:cut])
        assert without_seconds(compare(results=path)) == whole
        assert len(load_results(path)) == 16


def test_a_broken_line_in_the_middle_is_named_and_played_again(tmp_path, whole):
    path = tmp_path / "results.jsonl"
    compare(results=path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = b"x" + lines[5]
    path.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match=r"lines \[6\] cannot be read and are dropped"):
        assert without_seconds(compare(results=path)) == whole
    assert len(load_results(path)) == 16


def test_more_seeds_and_strategies_are_added(tmp_path):
    path = tmp_path / "results.jsonl"
    compare({"random": random_sampling}, results=path, seeds=1)
    more = compare(
        {"margin": margin_sampling, "random": random_sampling},
        results=path,
        seeds=[1, 0],
    )
    assert [(row["strategy"], row["seed"]) for row in more[::4]] == [
        ("margin", 1),
        ("margin", 0),
        ("random", 1),
        ("random", 0),
    ]
    assert len(compare({"random": random_sampling}, results=path, seeds=1)) == 4
    assert len(load_results(path)) == 16


def test_an_empty_file_is_a_new_one(tmp_path, whole):
    path = tmp_path / "results.jsonl"
    path.touch()
    assert without_seconds(compare(results=path)) == whole


class Failing(BaseEstimator):
    """Margin sampling that raises when the pool has shrunk so far."""

    def __init__(self, at=0):
        self.at = at

    def __call__(self, learner, X_pool, n_instances=1):
        if len(X_pool) == self.at:
            raise KeyboardInterrupt
        return margin_sampling(learner, X_pool, n_instances)


def test_an_error_keeps_the_rounds_before_and_frees_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare({"margin": Failing(at=63)}, results=path, seeds=1)
    assert [row["round"] for row in load_results(path)] == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        compare({"margin": Failing(at=63)}, results=path, seeds=1)


def run_in_child(path, n_jobs=1, limit=None):
    """Play a comparison in a forked process: it has imported everything already, so
    that kills hit the work.
    """
    # The child would take an earlier test's pool of workers for its own, and wait for
    # threads that it does not have.
    get_reusable_executor().shutdown(wait=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if limit is not None:
            signal.signal(
                signal.SIGXFSZ, signal.SIG_IGN
            )  # writing then fails as on a full disk, halfway in a line
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        compare(
            estimator=RandomForestClassifier(20),
            n_queries=6,
            seeds=3,
            results=path,
            n_jobs=n_jobs,
        )
        code = 0
    except OSError as error:
        (path.parent / "error.txt").write_text(str(error))
    finally:
        os._exit(code)


def n_lines(path):
    """Lines of rounds in the file, whole or not."""
    return (
        path.read_bytes().count(b'{"strategy"') - 2 if path.exists() else 0
    )  # two lines define the strategies


@pytest.mark.slow
@pytest.mark.parametrize(("n_jobs", "n_kills"), [(1, 20), (2, 4)])
def test_kills_at_random_times_leave_the_table_of_an_undisturbed_run(
    tmp_path, n_jobs, n_kills
):
    path, rng = tmp_path / "results.jsonl", random.Random(n_jobs)
    expected = without_seconds(
        compare(estimator=RandomForestClassifier(20), n_queries=6, seeds=3)
    )
    kills = hits = 0
    while kills < n_kills:
        known = n_lines(path)
        child = run_in_child(path, n_jobs)
        watch = os.pidfd_open(child)
        # Kills come by progress first, so that slow machines are hit in the middle as
        # well, and then at random.
        wanted = known + rng.randint(0, 2)
        while n_lines(path) < wanted and not select.select([watch], [], [], 0.005)[0]:
            pass
        ended, _, _ = select.select([watch], [], [], rng.uniform(0.0, 0.1))
        os.close(watch)
        if ended:  # all was done: from the start again
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            path.unlink()
            continue
        # The run alone: its workers, where it has some, live on and try to append.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        if path.exists():
            n_rows = len(load_results(path))
            assert n_rows >= known - 1  # what was on the disk stays, but for a cut line
            hits += known < n_rows < len(expected)
    assert hits > 0
    results = compare(
        estimator=RandomForestClassifier(20),
        n_queries=6,
        seeds=3,
        results=path,
        n_jobs=n_jobs,
    )
    assert without_seconds(results) == expected
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [
        (line["strategy"], line["seed"], line["round"])
        for line in lines
        if "round" in line
    ]
    assert len(keys) == len(set(keys)) == len(expected)


def test_a_worker_of_a_killed_run_cannot_append(tmp_path):
    from fishermask_sk.loops.results_file import hold

    path = tmp_path / "results.jsonl"
    with hold(path, {}, {}) as (left_over, _):
        left_over.append({"strategy": "a", "seed": 0, "round": 0})
    with hold(path, {}, {}) as (file, known):
        assert len(known["a", 0]) == 1
        with pytest.raises(
            RuntimeError, match="was taken over by a later run of compare_strategies"
        ):
            left_over.append({"strategy": "a", "seed": 0, "round": 1})
        file.append({"strategy": "a", "seed": 0, "round": 1})
    assert [row["round"] for row in load_results(path)] == [0, 1]


@pytest.mark.slow
def test_a_full_disk_is_said_and_survived(tmp_path):
    path = tmp_path / "results.jsonl"
    child = run_in_child(path, limit=6000)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    said = (tmp_path / "error.txt").read_text()
    assert (
        "Could not write to the results (File too large). All rounds before are safe: "
        "make room, and call" in said
    )
    assert path.stat().st_size == 6000  # cut in the middle of a line
    assert 0 < len(load_results(path)) < 42
    estimator = RandomForestClassifier(20)
    expected = compare(estimator=estimator, n_queries=6, seeds=3)
    results = compare(estimator=estimator, n_queries=6, seeds=3, results=path)
    assert without_seconds(results) == without_seconds(expected)


def test_a_full_disk_at_the_start_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "results.jsonl"
    compare(results=path)
    before = path.read_bytes()
    (tmp_path / "results.jsonl.new").symlink_to("/dev/full")
    with pytest.raises(
        OSError,
        match=r"No space left on device.*make room, and call compare_strategies again",
    ):
        compare(results=path)
    assert path.read_bytes() == before


# --- refusals
# --------------------------------------------------------------------------------


def test_a_second_run_on_one_file(tmp_path):
    path = tmp_path / "results.jsonl"

    def strategy(learner, X_pool, n_instances=1):
        with pytest.raises(
            RuntimeError,
            match=r"results.jsonl' is in use by another run of compare_strategies",
        ):
            compare(results=path)
        return np.arange(n_instances)

    assert len(compare({"nested": strategy}, results=path, seeds=1)) == 4


def test_a_file_with_old_paths_of_our_functions_goes_on(tmp_path):
    path = tmp_path / "results.jsonl"
    expected = without_seconds(compare(results=path))
    today, before = b"fishermask_sk.baselines.uncertainty.", b"fishermask_sk.baselines."
    assert today in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(today, before))
    assert without_seconds(compare(results=path)) == expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n_instances": 5}, "n_instances is 4 in the file and 5 now"),
        ({"n_initial": 9}, "n_initial is 8 in the file and 9 now"),
        ({"n_queries": 4}, "n_queries is 3 in the file and 4 now"),
        (
            {"initial": "stratified"},
            "initial is 'random' in the file and 'stratified' now",
        ),
        (
            {"estimator": GaussianNB(var_smoothing=0.5)},
            "estimator.params.var_smoothing is 1e-09 in the file and 0.5 now",
        ),
        (
            {"estimator": LogisticRegression()},
            "estimator.class is 'sklearn.naive_bayes.GaussianNB' in the file",
        ),
        ({"split": (*SPLIT[:3], SPLIT[3][::-1])}, "data.y_test is '.*' in the file"),
        ({"split": (SPLIT[0] + 1, *SPLIT[1:])}, "data.X is '.*' in the file"),
        (
            {"estimator": GaussianNB(var_smoothing=0)},
            "var_smoothing is 1e-09 in the file and 0 now",
        ),
        (
            {"strategies": {"margin": entropy_sampling}},
            r"strategies\['margin'\] is 'fishermask_sk.baselines.uncertainty.ma",
        ),
    ],
)
def test_results_of_other_settings_are_refused_and_kept(tmp_path, other, message):
    path = tmp_path / "results.jsonl"
    compare(results=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"belongs to other settings: .*{message}"):
        compare(**{"results": path, **other})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["strategy,seed\nrandom,0\n", "{}\n", "[1]\n", "no newline"]
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "notes.csv"
    path.write_text(content)
    with pytest.raises(
        ValueError,
        match=r"notes\.csv' is not a file of compare_strategies; give another path",
    ):
        compare(results=path)
    assert path.read_text() == content


def test_another_version_of_the_format(tmp_path):
    path = tmp_path / "results.jsonl"
    compare(results=path, n_queries=0)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(
        ValueError,
        match="has version 2 of the format, and this package reads version 1",
    ):
        compare(results=path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*; make it first"
    ):
        compare(results=tmp_path / "no" / "results.jsonl")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"strategies": {}}, ValueError, "strategies is empty"),
        (
            {"strategies": {1: margin_sampling}},
            TypeError,
            "strategies has the name 1; names must be strings",
        ),
        (
            {"strategies": [margin_sampling] * 2},
            ValueError,
            "Two strategies are called 'margin_sampling'",
        ),
        (
            {"strategies": {"margin": "margin"}},
            TypeError,
            "query_strategy must be a function or a callable object",
        ),
        (
            {"seeds": 0},
            ValueError,
            "seeds must be at least one, each once and none negative, got 0",
        ),
        ({"seeds": [1, 1]}, ValueError, "seeds must be at least one, each once"),
        (
            {"seeds": [-1]},
            ValueError,
            "seeds must be at least one, each once and none negative",
        ),
        (
            {"seeds": 1.5},
            TypeError,
            "seeds must be a number of seeds or integers, got 1.5",
        ),
        (
            {"seeds": True},
            TypeError,
            "seeds must be a number of seeds or integers, got True",
        ),
        ({"n_initial": 0}, ValueError, "n_initial must be an integer of at least 1"),
        (
            {"split": (*SPLIT[:3], SPLIT[3][1:])},
            ValueError,
            "X_test has 75 samples and y_test has 74 labels",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path, params, error, message
):
    with pytest.raises(error, match=message):
        compare(**{"results": tmp_path / "results.jsonl", **params})
    assert not list(tmp_path.iterdir())


# --- settings
# --------------------------------------------------------------------------------


def lambdas():
    return [
        lambda x: x + 1,
        lambda x: x + 2,
        lambda x: min(x),
        lambda x: max(x),
        lambda x: [i in {1, 2} for i in x],
    ]


def made_with(value):
    def strategy(learner, X_pool, n_instances=1):
        return np.arange(n_instances) + value

    def with_default(learner, X_pool, n_instances=1, value=value):
        return np.arange(n_instances) + value

    return [
        strategy,
        with_default,
        lambda learner, X_pool, n_instances: np.arange(n_instances) + value,
    ]


DIFFERENT = [
    *lambdas(),
    *made_with(0),
    *made_with(1),
    Path("a"),
    Path("b"),
    b"a",
    b"b",
    1j,
    range(3),
    range(4),
    torch.float32,
    torch.device("cpu"),
    np.random.default_rng(0),
    np.random.default_rng(1),
    np.random.RandomState(0),
    np.random.RandomState(1),
    threading.Lock(),
    GaussianNB(),
    GaussianNB(var_smoothing=1),
    partial(margin_sampling, random_state=0),
    partial(margin_sampling, random_state=1),
    margin_sampling,
    FisherMask(),
    FisherMask(mask=lambdas()[0]),
    np.arange(3),
    np.arange(3.0),
    torch.arange(4),
    TensorDataset(torch.arange(3)),
    TensorDataset(torch.arange(1, 4)),
    torch.nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False),
    {"a": {1, 2}},
    {"a": {1, 3}},
    GaussianNB().fit,
    sparse.csr_matrix(np.eye(3)),
    sparse.csr_matrix(2 * np.eye(3)),
]


def test_an_int_is_no_float_and_nan_is_nan(tmp_path):
    """FisherMask(1) keeps one weight and FisherMask(1.0) all; SimpleImputer's
    missing_values is NaN.
    """
    assert differences(describe(FisherMask(1.0)), describe(FisherMask(1))) == [
        "params.sparsity is 1.0 in the file and 1 now"
    ]
    imputing = make_pipeline(SimpleImputer(), GaussianNB())
    whole = compare(
        estimator=imputing, results=tmp_path / "results.jsonl", n_initial=np.int64(8)
    )
    again = compare(estimator=imputing, results=tmp_path / "results.jsonl", n_initial=8)
    assert list(again) == list(whole)


def test_the_layout_in_memory_is_no_content():
    values = np.arange(12.0).reshape(4, 3)
    others = [
        np.asfortranarray(values),
        np.repeat(values, 2, axis=0)[::2],
        torch.tensor(values.T.copy()).T,
    ]
    assert {digest(each) for each in (values, *others)} == {digest(values)}
    assert digest(values) != digest(values.T)


def test_descriptions_tell_things_apart_and_survive_json():
    described = [json.dumps(describe(thing)) for thing in DIFFERENT]
    assert len(set(described)) == len(described)
    assert not [
        text for text in described if " at 0x" in text
    ]  # an address is another one in every run


@pytest.mark.slow
def test_descriptions_are_the_same_in_every_process():
    program = (
        "import json, sys; sys.path[:0] = sys.argv[1:]; import numpy as np, pandas as "
        "pd, torch\nfrom pathlib import Path\nfrom torch.utils.data import "
        "TensorDataset\nfrom fishermask_sk._describe import digest\nfrom "
        "fishermask_sk.strategy.fisher_mask import FisherMask\n"
        "torch.manual_seed(0)\nthings "
        "= [TensorDataset(torch.ones(3)), torch.nn.Linear(2, 2), FisherMask(), {'a', "
        "'b', 'c'},\npd.DataFrame({'a': [1.5], 'b': ['x']}), pd.Series([1]),\nlambda "
        "x: [i in {'a', 'b', 'c'} for i in x], Path('a')]\nprint(json.dumps([digest(t) "
        "for t in things]))"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parents[1])],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert answers[0] == answers[1]
    assert len(set(json.loads(answers[0]))) == 8


def test_an_object_that_holds_itself_is_described():
    class Knot:
        pass

    knot = Knot()
    knot.self = knot
    assert digest(knot) == digest(knot)


# --- the summary
# --------------------------------------------------------------------------------


def rows_of(curves, metric="accuracy", n_labels=(10, 20, 40)):
    return ComparisonResults(
        {
            "strategy": name,
            "seed": seed,
            "round": i,
            "n_labels": n_labels[i],
            metric: score,
        }
        for name, seeds in curves.items()
        for seed, scores in enumerate(seeds)
        for i, score in enumerate(scores)
    )


CURVES = {
    "random": [(0.2, 0.4, 0.6), (0.3, 0.4, 0.5), (0.1, 0.5, 0.6)],
    "good": [(0.4, 0.6, 0.8), (0.3, 0.5, 0.9), (0.2, 0.6, 0.6)],
    "bad": [(0.2, 0.3, 0.4), (0.2, 0.4, 0.5), (0.1, 0.3, 0.5)],
}


def test_areas_differences_and_tests_by_hand():
    summary = rows_of(CURVES).summary("random")
    areas = {
        name: np.array(
            [((a + b) / 2 * 10 + (b + c) / 2 * 20) / 30 for a, b, c in seeds]
        )
        for name, seeds in CURVES.items()
    }
    p = {}
    for row in summary:
        own, base = areas[row["strategy"]], areas["random"]
        assert row["n_seeds"] == 3
        assert row["area"] == pytest.approx(own.mean())
        assert row["final"] == pytest.approx(
            np.mean([seed[-1] for seed in CURVES[row["strategy"]]])
        )
        assert row["area_difference"] == pytest.approx((own - base).mean())
        assert row["area_low"] <= row["area_difference"] <= row["area_high"]
        if row["strategy"] != "random":
            p[row["strategy"]] = row["p"]
            assert row["p"] == pytest.approx(stats.ttest_rel(own, base).pvalue)
    assert np.isnan(summary[0]["p"])
    small, large = sorted(p.values())
    corrected = {row["p"]: row["p_holm"] for row in summary[1:]}
    assert corrected[small] == pytest.approx(2 * small)
    assert corrected[large] == pytest.approx(max(large, 2 * small))


def test_wilcoxon():
    rng = np.random.default_rng(0)
    curves = {name: rng.random((8, 3)).tolist() for name in ("a", "b")}
    row = rows_of(curves).summary("a", test="wilcoxon")[1]
    areas = {
        name: [np.trapezoid(seed, (10, 20, 40)) / 30 for seed in seeds]
        for name, seeds in curves.items()
    }
    assert row["p"] == pytest.approx(stats.wilcoxon(areas["b"], areas["a"]).pvalue)


def test_labels_saved_at_equal_accuracy_by_hand():
    saved = [row["labels_saved"] for row in rows_of(CURVES).summary("random")]
    # The best that both reach: .6, .5, .6. Random needs 40, 40, 40 labels for it; good
    # 20, 20, 20. With bad it is .4, .5, .5, at 20, 40, 20 labels for random; bad needs
    # 40, 40, 40.
    assert saved == pytest.approx([0, 20, -40 / 3])
    interpolated = rows_of({"a": [(0.0, 0.5, 1.0)], "b": [(0.0, 0.75, 0.7)]}).summary(
        "a"
    )[1]
    assert interpolated["labels_saved"] == pytest.approx(30 - 20)


def test_for_a_loss_lower_is_better():
    losses = {
        name: [[1 - score for score in seed] for seed in seeds]
        for name, seeds in CURVES.items()
    }
    summary = rows_of(losses, "log_loss").summary("random", metric="log_loss")
    assert [row["labels_saved"] for row in summary] == pytest.approx([0, 20, -40 / 3])
    assert summary[1]["area_difference"] < 0


def test_intervals_are_seeded_and_grow_with_confidence():
    results = rows_of(CURVES)
    first, again = (results.summary("random", random_state=1)[1] for _ in range(2))
    assert first == again
    wide = results.summary("random", confidence=0.999)[1]
    assert wide["area_low"] <= first["area_low"]
    assert wide["area_high"] >= first["area_high"]


def test_intervals_are_bca():
    differences = [
        0.1,
        0.2,
        0.9,
        0.15,
        0.05,
        0.3,
    ]  # skewed, where BCa is not percentile
    curves = {"a": [(0.0,)] * 6, "b": [(value,) for value in differences]}
    row = rows_of(curves, n_labels=(10,)).summary("a", n_bootstrap=40_000)[1]

    d, rng = np.array(differences), np.random.default_rng(7)
    means = np.sort(d[rng.integers(6, size=(40_000, 6))].mean(1))
    left_out = np.array([np.delete(d, i).mean() for i in range(6)])
    pull = left_out.mean() - left_out
    a = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    below = (means < d.mean()).mean() / 2 + (means <= d.mean()).mean() / 2
    z0, z = stats.norm.ppf(below), stats.norm.ppf([0.025, 0.975])
    levels = stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
    expected = np.quantile(means, levels)
    found = [row["area_low"], row["area_high"]]
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert abs(np.quantile(means, 0.025) - expected[0]) > 0.02


def test_bootstrap_intervals_cover_as_they_should():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        curves = {
            "a": [(0.5,)] * 40,
            "b": [(0.5 + noise,) for noise in rng.normal(0.1, 0.1, 40)],
        }
        row = rows_of(curves, n_labels=(10,)).summary("a", n_bootstrap=500)[1]
        covered += row["area_low"] <= 0.1 <= row["area_high"]
    assert 176 <= covered <= 199


def test_one_seed_has_no_interval_and_no_test():
    row = rows_of({name: seeds[:1] for name, seeds in CURVES.items()}).summary(
        "random"
    )[1]
    assert row["n_seeds"] == 1
    assert all(
        np.isnan(row[name])
        for name in ("area_low", "area_high", "p", "p_holm", "saved_low")
    )


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_equal_strategies_do_not_differ(test):
    row = rows_of({"a": CURVES["random"], "b": CURVES["random"]}).summary(
        "a", test=test
    )[1]
    assert (row["p"], row["p_holm"], row["area_difference"], row["labels_saved"]) == (
        1,
        1,
        0,
        0,
    )


def test_the_same_difference_on_all_seeds_has_no_t():
    better = [[score + 0.1 for score in curve] for curve in CURVES["random"]]
    results = rows_of({"a": CURVES["random"], "b": better})
    row = results.summary("a")[1]
    assert row["area_difference"] == pytest.approx(0.1)
    assert row["area_low"] == row["area_high"] == pytest.approx(0.1)
    assert np.isnan(row["p"])
    assert np.isnan(row["p_holm"])
    assert results.summary("a", test="wilcoxon")[1]["p"] == pytest.approx(0.25)


def test_seeds_that_are_not_finished_are_left_out():
    results = rows_of(CURVES)
    unfinished = ComparisonResults(
        row
        for row in results
        if (row["strategy"], row["seed"], row["round"]) != ("good", 2, 2)
    )
    assert [row["n_seeds"] for row in unfinished.summary("random")] == [3, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"baseline": "BAIT"},
            r"baseline='BAIT' is not among the strategies; "
            r"choose one of \['random', 'good', 'bad'\]",
        ),
        ({"metric": "f1"}, "metric='f1' is not among the columns"),
        ({"test": "z"}, "test='z' is unknown; choose 't' or 'wilcoxon'"),
    ],
)
def test_summaries_of_what_is_not_there(options, message):
    with pytest.raises(ValueError, match=message):
        rows_of(CURVES).summary(**{"baseline": "random", **options})


def test_no_shared_seed():
    results = rows_of({"a": [(0.5, 0.6, 0.7)], "b": [(0.5, 0.6, 0.7)]})
    for row in results[3:]:
        row["seed"] = 9
    with pytest.raises(
        ValueError, match="There is no seed with all rounds of both 'b' and 'a'"
    ):
        results.summary("a")


def test_holms_method_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_tables_print_and_become_frames(monkeypatch):
    summary = compare().summary("random")
    text = str(summary)
    assert text.splitlines()[0].split()[:2] == ["strategy", "n_seeds"]
    assert "margin" in text
    assert str(Table()) == "(no rows)"
    frame = compare().to_frame()
    assert frame.shape[0] == 16
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ImportError, match="to_frame needs pandas, which is not installed"
    ):
        summary.to_frame()
