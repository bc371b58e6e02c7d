"""Query strategies compared: the same splits, first batches and training noise for all;
safe against being killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.utils import column_or_1d
from tqdm.auto import tqdm

from fishermask_sk._describe import describe, digest
from fishermask_sk._rows import as_rows, n_rows
from fishermask_sk._types import Estimator, Labels, Positions, QueryStrategy, Samples
from fishermask_sk.loops.classifier import ActiveLearningClassifier
from fishermask_sk.loops.learner import PoolLearner, column_labels, name_of
from fishermask_sk.loops.results import ComparisonResults, load_results
from fishermask_sk.loops.results_file import Record, ResultsFile, Rounds, hold
from fishermask_sk.loops.rounds import Round
from fishermask_sk.nets.skorch_adapter import preserved_rng
from fishermask_sk.scores.targets import checked_target, taken_by, warn_of_untargeted

__all__ = ["ComparisonResults", "compare_strategies", "load_results"]


def compare_strategies(
    estimator: Estimator,
    strategies: Mapping[str, QueryStrategy] | Sequence[QueryStrategy],
    X: Samples,
    y: Labels,
    X_test: Samples,
    y_test: Labels,
    n_initial: int = 100,
    n_instances: int = 100,
    n_queries: int = 10,
    seeds: int | Iterable[int] = 5,
    *,
    n_jobs: int | None = 1,
    results: str | Path | None = None,
    initial: str | Positions = "random",
    X_target: Samples | None = None,
    target_weight: Labels | None = None,
    verbose: int = 0,
) -> ComparisonResults:
    """Run every query strategy with every seed, and score each round on a test set.

    Every curve is one :class:`~fishermask_sk.ActiveLearningClassifier` with the seed
    for its `random_state`: with the same seed, all strategies start from the same first
    batch, and train with the same noise.

    Parameters
    ----------
    estimator : estimator
        A classifier; a clone of it is fitted in every round.
    strategies : dict from str to callable, or iterable of callables
        Query strategies with their names. Without names they are called by function or
        class.
    X, y : samples of shape (n_samples, ...) and their labels of shape (n_samples,)
        The pool, with y for the oracle.
    X_test, y_test : samples of shape (n_test, ...) and their labels of shape (n_test,)
        What every round is scored on.
    n_initial, n_instances, n_queries, initial
        As for `ActiveLearningClassifier`: first batch, labels per query, queries, and
        how the first batch is drawn.
    seeds : int or iterable of int, default=5
        The seeds, or how many of them, from 0 on.
    n_jobs : int or None, default=1
        Processes, one curve at a time in each (joblib's; -1 for all cores).
    results : str or Path, default=None
        A file to which each round is appended as it ends. Where it exists, the
        comparison goes on from it: curves that are complete are not run again, of
        others only the last round is fitted again. More seeds or strategies than the
        file has are run in addition; anything else that differs is refused. Without
        a file an interrupted comparison is lost.
    X_target, target_weight
        As for `ActiveLearningClassifier.fit`: unlabelled samples of what the model will
        be used on, and their weights, for the strategies that have such parameters.
        ``partial(FisherMask(), X_target=None)`` is FisherMask without.
    verbose : int, default=0
        Whether to show progress: curves and, with ``n_jobs=1``, the rounds of each.

    Returns
    -------
    ComparisonResults
        A list of tidy rows, in the order of `strategies`, seeds and rounds, with a
        `summary`. A run that was killed and goes on ends with the rows of one that was
        not, but for the seconds.

    Raises
    ------
    TypeError, ValueError
        For parameters out of range, names given twice, samples and labels that do not
        match; for a `results` file that is none or belongs to other settings, which is
        left as it is.
    RuntimeError
        Where another run holds the file.
    OSError
        Where the file cannot be written, for instance on a full disk; call again when
        there is room.

    Warns
    -----
    UserWarning
        Where lines in the middle of the file cannot be read; their rounds are run
        again. Where strategies have no parameter for what is given of a target; they
        are named once.

    See Also
    --------
    fishermask_sk.loops.comparison.load_results : The rows so far, while it is running.
    fishermask_sk.plotting.LearningCurveDisplay.from_results : The picture.

    Notes
    -----
    The file is text, one JSON record per line, flushed to the disk (fsync) before the
    next round begins; killing the run at any moment loses at most the running rounds. A
    lock file ``<results>.lock`` stays next to it, and keeps two runs from one file.
    Settings are compared by the estimator's and strategies' parameters, the names of
    functions and the values that they enclose (not their code), and digests of the data
    (of a Dataset: of its attributes, not of what it reads from files). Going on is
    exact where fits are (on a CPU with one number of threads), and where strategies
    have no memory of earlier rounds.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.naive_bayes import GaussianNB
    >>> from fishermask_sk import compare_strategies
    >>> from fishermask_sk.baselines import margin_sampling, random_sampling
    >>> X, y = load_iris(return_X_y=True)
    >>> results = compare_strategies(
    ...     GaussianNB(), {"random": random_sampling, "margin": margin_sampling},
    ...     X[::2], y[::2], X[1::2], y[1::2],
    ...     n_initial=10, n_instances=5, n_queries=2, seeds=2,
    ... )
    >>> len(results), results[0]["strategy"], results[0]["n_labels"]
    (12, 'random', 10)
    >>> [row["strategy"] for row in results.summary(baseline="random")]
    ['random', 'margin']
    """
    named, seeds = _named(strategies), _checked_seeds(seeds)
    loop = ActiveLearningClassifier(
        estimator,
        next(iter(named.values())),
        n_initial=n_initial,
        n_instances=n_instances,
        n_queries=n_queries,
        initial=initial,
    )
    for strategy in named.values():  # bad parameters are refused before anything is run
        loop.set_params(query_strategy=strategy).iter_rounds(X, y)
    target = checked_target(
        as_rows(X, "X"), n_rows(as_rows(X, "X"), "X"), X_target, target_weight
    )
    warn_of_untargeted(named, target)
    n_samples, n_test = (
        n_rows(as_rows(X_test, "X_test"), "X_test"),
        n_rows(as_rows(y_test, "y_test"), "y_test"),
    )
    if n_samples != n_test:
        raise ValueError(
            f"X_test has {n_samples} samples and y_test has {n_test} labels; pass one "
            "label per sample."
        )
    settings = {
        "estimator": describe(estimator),
        "n_initial": int(n_initial),
        "n_instances": int(n_instances),
        "n_queries": int(n_queries),
        "initial": describe(initial),
        "data": {
            "X": digest(X),
            "y": digest(y),
            "X_test": digest(X_test),
            "y_test": digest(y_test),
            **{name: digest(value) for name, value in target.items()},
        },
    }
    definitions = {name: describe(strategy) for name, strategy in named.items()}
    held: AbstractContextManager[tuple[ResultsFile | None, Rounds]] = (
        nullcontext((None, {}))
        if results is None
        else hold(Path(results), settings, definitions)
    )
    with held as (file, known):
        tasks = {
            (name, seed): partial(
                _play,
                loop.set_params(
                    query_strategy=named[name], random_state=seed
                ).get_params(deep=False),
                (X, y, X_test, column_or_1d(np.asarray(y_test))),
                taken_by(named[name], target),
                {"strategy": name, "seed": seed},
                known.get((name, seed), []),
                file,
            )
            for name in named
            for seed in seeds
        }
        curves = _run_all(tasks, n_jobs, verbose)
    return ComparisonResults(row for key in tasks for row in curves[key])


def _run_all(
    tasks: Mapping[tuple[str, int], Callable[..., list[Record]]],
    n_jobs: int | None,
    verbose: int,
) -> dict[tuple[str, int], list[Record]]:
    """Run every curve, here or in worker processes."""
    bar = partial(tqdm, total=len(tasks), desc="curves", disable=not verbose)
    if n_jobs == 1:
        return {key: play(verbose=verbose) for key, play in bar(tasks.items())}
    # Copy on write: memory-mapped arrays that are read-only make torch warn.
    parallel = Parallel(n_jobs=n_jobs, return_as="generator_unordered", mmap_mode="c")
    return dict(
        bar(parallel(delayed(_with_key)(key, play) for key, play in tasks.items()))
    )


def _with_key(
    key: tuple[str, int], play: Callable[[], list[Record]]
) -> tuple[tuple[str, int], list[Record]]:
    return key, play()


def _play(
    params: dict[str, Any],
    data: tuple[Any, Any, Any, np.ndarray],
    target: dict[str, Any],
    curve: Record,
    known: list[Record],
    file: ResultsFile | None,
    verbose: int = 0,
) -> list[Record]:
    """Play the rounds of one curve that are not known yet, and return all of its
    rows.
    """
    X, y, X_test, y_test = data
    rows, n_rounds = list(known), params["n_queries"] + 1
    if rows and (
        len(rows) == n_rounds or rows[-1]["n_labels"] == n_rows(as_rows(X, "X"), "X")
    ):
        return rows
    rounds = ActiveLearningClassifier(**params).iter_rounds(
        X, y, labeled_iter=[row["indices"] for row in rows], **target
    )
    description = f"{curve['strategy']}, seed {curve['seed']}"
    with tqdm(
        total=n_rounds,
        initial=len(rows),
        desc=description,
        disable=not verbose,
        leave=False,
    ) as bar:
        for round_ in rounds:
            if round_.number < len(
                rows
            ):  # the last known round, fitted again to go on from
                continue
            with preserved_rng():  # a net's data loader draws, also to predict
                row = {**curve, **_row(round_, X_test, y_test)}
            if file is not None:
                file.append(row)
            rows.append(row)
            bar.update()
    return rows


def _row(round_: Round, X_test: Any, y_test: np.ndarray) -> Record:
    """What a round adds to the table; only types that JSON gives back as they were."""
    correct = np.asarray(round_.learner.predict(X_test)) == y_test
    classes, counts = np.unique(round_.learner.y_training, return_counts=True)
    return {
        "round": round_.number,
        "n_labels": len(round_.labeled_indices),
        "accuracy": float(correct.mean()),
        "balanced_accuracy": float(
            np.mean([correct[y_test == label].mean() for label in np.unique(y_test)])
        ),
        "log_loss": _log_loss(round_.learner, X_test, y_test),
        "class_counts": {
            str(label): int(count) for label, count in zip(classes, counts, strict=True)
        },
        "query_seconds": round_.query_seconds,
        "fit_seconds": round_.fit_seconds,
        "indices": round_.query_idx.tolist(),
    }


def _log_loss(learner: PoolLearner, X_test: Any, y_test: np.ndarray) -> float:
    """−mean log p of the true class, p at least the machine precision, also for a class
    that has no column yet.

    scikit-learn's refuses classes that the estimator has not seen.
    """
    if not hasattr(learner.estimator, "predict_proba"):
        return float("nan")
    proba = np.asarray(learner.predict_proba(X_test))
    of_true = np.zeros(len(y_test))
    for column, label in enumerate(column_labels(learner.estimator, proba.shape[1])):
        of_true[y_test == label] = proba[y_test == label, column]
    return float(-np.log(np.maximum(of_true, np.finfo(proba.dtype).eps)).mean())


def _named(strategies: Any) -> dict[str, Callable[..., Any]]:
    if isinstance(strategies, Mapping):
        named = list(strategies.items())
    else:
        named = [(name_of(strategy), strategy) for strategy in strategies]
    if not named:
        raise ValueError(
            "strategies is empty; pass at least one, as {'margin': margin_sampling}."
        )
    for name, _ in named:
        if not isinstance(name, str):
            raise TypeError(f"strategies has the name {name!r}; names must be strings.")
        if [other for other, _ in named].count(name) > 1:
            raise ValueError(
                f"Two strategies are called {name!r}; pass a dict with a name for each."
            )
    return dict(named)


def _checked_seeds(seeds: Any) -> list[int]:
    listed = (
        list(range(seeds))
        if isinstance(seeds, Integral) and not isinstance(seeds, bool)
        else seeds
    )
    if (
        isinstance(listed, bool)
        or not np.iterable(listed)
        or not all(isinstance(seed, Integral) for seed in listed)
    ):
        raise TypeError(f"seeds must be a number of seeds or integers, got {seeds!r}.")
    listed = [int(seed) for seed in listed]
    if not listed or len(set(listed)) < len(listed) or min(listed) < 0:
        raise ValueError(
            f"seeds must be at least one, each once and none negative, got {seeds!r}."
        )
    return listed
