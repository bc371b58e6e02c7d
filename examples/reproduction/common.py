"""What the studies share: how a study is written down, the pools, the strategies and
the variants of FisherMask.
"""

from __future__ import annotations

import runpy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import torch

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.baselines import (
    badge_sampling,
    bait_sampling,
    entropy_sampling,
    facility_location_sampling,
    kcenter_sampling,
    least_confidence_sampling,
    margin_sampling,
    random_sampling,
    weighted_margin_sampling,
)
from fishermask_sk.datasets import load_images
from fishermask_sk.selection import select

Strategy: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """One pool, one learner, one budget, and the strategies that run on it.

    Parts of a study may share a name: their strategies are then compared with each
    other. Strategies named in `with_target` are handed the data's `X_target`.
    """

    name: str
    dataset: str
    load: Callable[
        ..., Any
    ]  # (seed, data_home) -> Bunch of X_train, y_train, X_test, y_test
    estimator: Any
    strategies: Mapping[str, Strategy]
    n_initial: int
    n_instances: int
    n_queries: int
    with_target: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """Settings that are run in this order, each with `n_seeds` seeds from
    `first_seed` on.
    """

    question: str
    n_seeds: int
    settings: Sequence[Setting]
    first_seed: int = 0

    @property
    def seeds(self) -> range:
        """Every setting's."""
        return range(self.first_seed, self.first_seed + self.n_seeds)


def load_pool(
    seed: int,
    data_home: Any = None,
    *,
    name: str,
    pool: Mapping[int, int],
    side: int | None = None,
    n_test: int | None = None,
) -> Any:
    """Draw the pool by the seed; shrink images to `side` pixels by means, keep `n_test`
    test images a class.

    The test images are the same for all seeds.
    """
    images = load_images(name, data_home=data_home, subset=pool, random_state=seed)
    if n_test is not None:
        kept = first_of_each(images.y_test, n_test)
        images.X_test, images.y_test = images.X_test[kept], images.y_test[kept]
    if side is not None:
        images.X_train, images.X_test = (
            shrunk(images.X_train, side),
            shrunk(images.X_test, side),
        )
    return images


def load_pool_for_purpose(
    seed: int,
    data_home: Any = None,
    *,
    wanted: Sequence[int],
    n_target: int,
    pool: Mapping[int, int],
    repeat: Callable[..., np.ndarray] | None = None,
    **options: Any,
) -> Any:
    """Draw a pool of which only some classes are wanted, and a target: `n_target` other
    images of each of these.

    Test images are of the wanted classes alone. `repeat` makes near-duplicates of the
    pool's images, and says of which.
    """
    counts = {c: n + n_target * (c in wanted) for c, n in pool.items()}
    data = load_pool(seed, data_home, pool=counts, **options)
    rng = np.random.RandomState(seed)
    of_wanted = np.isin(data.y_train, wanted)
    target = np.flatnonzero(of_wanted)
    target = target[first_of_each(data.y_train[target], n_target)]
    data.X_target = data.X_train[target]
    kept = np.setdiff1d(np.arange(len(data.y_train)), target)
    data.X_train, data.y_train = data.X_train[kept], data.y_train[kept]
    if repeat is not None:
        data.X_train, data.y_train = repeat(data.X_train, data.y_train, rng)
    tested = np.isin(data.y_test, wanted)
    data.X_test, data.y_test = data.X_test[tested], data.y_test[tested]
    return data


def load_shifted(
    seed: int,
    data_home: Any = None,
    *,
    shift: Callable[[np.ndarray], np.ndarray],
    share: float,
    n_target: int,
    pool: Mapping[int, int],
    **options: Any,
) -> Any:
    """Draw a pool of which a `share` of each class is shifted, and a target of
    `n_target` images a class that all are, as the test images are.
    """
    data = load_pool_for_purpose(
        seed, data_home, wanted=list(pool), n_target=n_target, pool=pool, **options
    )
    for label, count in pool.items():
        rows = np.flatnonzero(data.y_train == label)[: round(share * count)]
        data.X_train[rows] = shift(data.X_train[rows])
    data.X_target, data.X_test = shift(data.X_target), shift(data.X_test)
    return data


def load_with_target_of_pool(
    seed: int, data_home: Any = None, *, n_target: int, **options: Any
) -> Any:
    """Draw a pool, and from it the target: so many of its images, which stay in it."""
    data = load_pool(seed, data_home, **options)
    drawn = np.random.RandomState(seed).permutation(len(data.X_train))[:n_target]
    data.X_target = data.X_train[drawn]
    return data


def first_of_each(labels: np.ndarray, n: int) -> np.ndarray:
    """Positions of the first n of each class, sorted."""
    rows = [np.flatnonzero(labels == label)[:n] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def all_repeated(
    X: np.ndarray,
    y: np.ndarray,
    rng: np.random.RandomState,
    *,
    times: int,
    vary: Callable[..., np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Every image so many times, each time a little different, in random order."""
    order = rng.permutation(np.repeat(np.arange(len(X)), times))
    return vary(X[order], rng), y[order]


def some_repeated(
    X: np.ndarray,
    y: np.ndarray,
    rng: np.random.RandomState,
    *,
    n_repeated: int,
    times: int,
    vary: Callable[..., np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The first `n_repeated` images of each class so many times, the others once."""
    repeated = np.isin(np.arange(len(X)), first_of_each(y, n_repeated))
    order = rng.permutation(np.repeat(np.arange(len(X)), np.where(repeated, times, 1)))
    return vary(X[order], rng), y[order]


def noisy(X: np.ndarray, rng: np.random.RandomState, scale: float = 0.03) -> np.ndarray:
    """Each pixel moved by normal noise, within [0, 1]."""
    noise = rng.normal(scale=scale, size=X.shape)
    return np.clip(X + noise, 0, 1).astype(X.dtype)


def filmed(X: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Frames of one scene: moved by up to a pixel, half of them flipped, up to a tenth
    darker or brighter.
    """
    padded = np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = X.shape[2:]
    frames = np.empty_like(X)
    for i, (top, left, flipped) in enumerate(rng.randint([3, 3, 2], size=(len(X), 3))):
        frame = padded[i, :, top : top + height, left : left + width]
        frames[i] = frame[:, :, ::-1] if flipped else frame
    light = rng.uniform(0.9, 1.1, size=(len(X), 1, 1, 1))
    return np.clip(frames * light, 0, 1).astype(X.dtype)


def shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """Each pixel the mean of a square of pixels."""
    n, n_channels, height, _ = images.shape
    step = height // side
    return images.reshape(n, n_channels, side, step, side, step).mean(axis=(3, 5))


class WithoutLabeled(FisherMask):
    """FisherMask as if nothing were labelled yet: the labelled samples are in neither M
    nor F̄.
    """

    def __call__(
        self, learner: Any, X_pool: Any, n_instances: int = 1, **options: Any
    ) -> Any:
        """Pick as FisherMask does."""
        return super().__call__(
            learner, X_pool, n_instances, **(options | {"X_labeled": X_pool[:0]})
        )


class ScaledPicks(FisherMask, ABC):
    """FisherMask in which picks weigh otherwise in M: V_x of each sample of the pool is
    multiplied by a factor. F̄ and the labelled samples stay as they are.
    """

    @abstractmethod
    def factors(
        self, learner: Any, X_pool: Any, n_instances: int, X_target: Any
    ) -> np.ndarray:
        """One for each sample of the pool."""

    def __call__(
        self,
        learner: Any,
        X_pool: Any,
        n_instances: int = 1,
        *,
        X_target: Any = None,
        **options: Any,
    ) -> Any:
        """Pick as FisherMask does."""
        factors = self.factors(learner, X_pool, n_instances, X_target)
        scaled = partial(_select_scaled, torch.as_tensor(factors))
        with patch("fishermask_sk.strategy.query.select", scaled):
            return super().__call__(
                learner, X_pool, n_instances, X_target=X_target, **options
            )


class PickWeighsOne(ScaledPicks):
    """FisherMask with 1/(L+b) for the weight of a pick in M, where BAIT's code has
    b/(L+b).
    """

    def factors(
        self, learner: Any, X_pool: Any, n_instances: int, X_target: Any
    ) -> np.ndarray:
        """One for each sample of the pool."""
        return np.full(len(X_pool), n_instances**-0.5)


def _select_scaled(
    factors: Any,
    embeddings: Any,
    pool_information: Any,
    n_instances: int,
    *,
    labeled_information: Any = None,
    labeled_embeddings: Any = None,
    information_embeddings: Any = None,
    **options: Any,
) -> Any:
    # Where a query does without the matrices of F̄ and of the labelled samples, they are
    # made here.
    if pool_information is None:
        parts = [part for part in (embeddings, labeled_embeddings) if part is not None]
        n = sum(part.n for part in parts)
        pool_information = sum(part.information() for part in parts) / n
        if information_embeddings is not None:
            pool_information = information_embeddings.information()
        if labeled_embeddings is not None:
            labeled_information = labeled_embeddings.information()
            labeled_information /= labeled_embeddings.n
    return select(
        embeddings.scaled(factors),
        pool_information,
        n_instances,
        labeled_information=labeled_information,
        **options,
    )


def setting_of(study: str, number: int, **changes: Any) -> Setting:
    """A setting of another study, counted from 0, with what is given in place of its
    own.
    """
    path = Path(__file__).parent / "studies" / f"{study}.py"
    settings = runpy.run_path(str(path))["STUDY"].settings
    return replace(settings[number], **changes)


BASELINES: dict[str, Strategy] = {
    "random": random_sampling,
    "entropy": entropy_sampling,
    "least confidence": least_confidence_sampling,
    "margin": margin_sampling,
    "k-center": kcenter_sampling,
    "BADGE": badge_sampling,
    "BAIT": bait_sampling,
}
STRATEGIES: dict[str, Strategy] = {**BASELINES, "FisherMask": FisherMask()}
# Those that know what the labels are for stand beside those that do not.
WITH_TARGET: dict[str, Strategy] = {
    "FisherMask with target": FisherMask(),
    "BAIT with target": bait_sampling,
    "weighted margin": weighted_margin_sampling,
    "facility location": facility_location_sampling,
}
FOR_PURPOSE: dict[str, Strategy] = {
    **{name: BASELINES[name] for name in ("random", "margin", "BADGE", "BAIT")},
    "FisherMask": FisherMask(),
    **WITH_TARGET,
}
# Ten classes, width 8, and the short training of study 5.
SMALL_NET = ResNet18Classifier(
    width=8, head_bias=False, classes=range(10), min_steps=40, lr=2e-3
)


def fashion_imbalanced(strategies: Mapping[str, Strategy], **budget: Any) -> Setting:
    """FashionMNIST as in the paper's imbalanced pools: one class of four is twenty
    times as common as the others.
    """
    return Setting(
        name="imbalanced",
        dataset="fashion-mnist",
        load=partial(
            load_pool,
            name="fashion-mnist",
            pool={0: 250, 1: 5000, 2: 250, 3: 250},
            n_test=500,
        ),
        estimator=ResNet18Classifier(width=16, head_bias=False, classes=range(4)),
        strategies=strategies,
        **({"n_initial": 60, "n_instances": 40, "n_queries": 8} | budget),
    )


def fashion_imbalanced_small(
    strategies: Mapping[str, Strategy],
    name: str = "imbalanced 14x14",
    **budget: Any,
) -> Setting:
    """The same made small, for studies of many variants: images of 14×14 pixels, width
    8, 2,300 images.

    k is 351, of which the head takes 256. Training is shortened: 40 steps at twice the
    learning rate were as accurate as 100 (looked at for one seed, with random labels,
    before any strategy was compared).
    """
    return Setting(
        name=name,
        dataset="fashion-mnist",
        load=partial(
            load_pool,
            name="fashion-mnist",
            pool={0: 100, 1: 2000, 2: 100, 3: 100},
            side=14,
            n_test=250,
        ),
        estimator=ResNet18Classifier(
            width=8, head_bias=False, classes=range(4), min_steps=40, lr=2e-3
        ),
        strategies=strategies,
        **({"n_initial": 60, "n_instances": 60, "n_queries": 3} | budget),
    )
