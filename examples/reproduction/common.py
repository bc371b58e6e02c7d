"""What the studies share: how a study is written down, the pools, the strategies and
the variants of FisherMask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.baselines import (
    badge_sampling,
    bait_sampling,
    entropy_sampling,
    kcenter_sampling,
    least_confidence_sampling,
    margin_sampling,
    random_sampling,
)
from fishermask_sk.datasets import load_images
from fishermask_sk.selection import select


@dataclass(frozen=True)
class Setting:
    """One pool, one learner, one budget, and the strategies that play on it.

    Parts of a study may share a name: their strategies are then compared with each
    other.
    """

    name: str
    dataset: str
    load: Callable[
        ..., Any
    ]  # (seed, data_home) -> Bunch of X_train, y_train, X_test, y_test
    estimator: Any
    strategies: Mapping[str, Callable[..., Any]]
    n_initial: int
    n_instances: int
    n_queries: int


@dataclass(frozen=True)
class Study:
    """Settings that are played in this order, each with `n_seeds` seeds from
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
        kept = [
            np.flatnonzero(images.y_test == label)[:n_test]
            for label in np.unique(images.y_test)
        ]
        kept = np.sort(np.concatenate(kept))
        images.X_test, images.y_test = images.X_test[kept], images.y_test[kept]
    if side is not None:
        images.X_train, images.X_test = (
            shrunk(images.X_train, side),
            shrunk(images.X_test, side),
        )
    return images


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


class PickWeighsOne(FisherMask):
    """FisherMask with 1/(L+b) for the weight of a pick in M, where BAIT's code has
    b/(L+b).
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pick as FisherMask does."""
        with patch("fishermask_sk._query.select", _select_with_weight_one):
            return super().__call__(*args, **kwargs)


def _select_with_weight_one(
    embeddings: Any, pool_information: Any, n_instances: int, **options: Any
) -> Any:
    # F̄ and the labelled samples' information come apart from the embeddings, and stay
    # as they are.
    return select(
        embeddings / n_instances**0.5, pool_information, n_instances, **options
    )


BASELINES = {
    "random": random_sampling,
    "entropy": entropy_sampling,
    "least confidence": least_confidence_sampling,
    "margin": margin_sampling,
    "k-center": kcenter_sampling,
    "BADGE": badge_sampling,
    "BAIT": bait_sampling,
}
STRATEGIES = {**BASELINES, "FisherMask": FisherMask()}


def fashion_imbalanced(
    strategies: Mapping[str, Callable[..., Any]], **budget: int
) -> Setting:
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
    strategies: Mapping[str, Callable[..., Any]],
    name: str = "imbalanced 14x14",
    **budget: int,
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
