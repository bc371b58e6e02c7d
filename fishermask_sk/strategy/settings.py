"""What a query is set to: `FisherMask`'s parameters, frozen, and checked before any
work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from fishermask_sk.gradients.fisher import Weighting
from fishermask_sk.memory import parse_memory
from fishermask_sk.scores.proposals import check_candidates_parameter
from fishermask_sk.strategy.directions import Auto
from fishermask_sk.strategy.masks import MaskRule

MASKS = ("fisher", "per_layer", "random")
WEIGHTINGS = ("fisher", "uniform")


@dataclass(frozen=True)
class Settings:
    """Parameters of `FisherMask`, as it documents them."""

    sparsity: float
    layers: str | Sequence[str]
    mask: str | MaskRule
    keep_head: bool
    head: str | None
    weighting: Weighting
    n_mask_samples: int
    n_information_samples: int | None
    candidates: int | Callable[..., Any] | None
    damping: float
    oversample: float
    batch_size: int
    max_memory: int | str | None
    n_top_classes: int | None
    n_components: int | str | Auto | None
    random_state: Any
    verbose: int

    @property
    def components(self) -> int | Auto | None:
        """`n_components` with what "auto" stands for."""
        n = self.n_components
        return Auto() if isinstance(n, str) else n


def check_settings(settings: Settings) -> None:
    """Check each parameter against its range.

    Raises
    ------
    TypeError, ValueError
        That name the parameter, its value and what it must be.
    """
    sparsity = settings.sparsity
    largest = np.inf if isinstance(sparsity, Integral) else 1
    if not _is_number(sparsity) or not 0 < sparsity <= largest:
        raise ValueError(
            f"sparsity={sparsity!r} must be a fraction in (0, 1] of the trainable "
            "weights, or an int >= 1, the number of weights to keep."
        )
    if not callable(settings.mask) and not (
        isinstance(settings.mask, str) and settings.mask in MASKS
    ):
        raise ValueError(
            f"mask={settings.mask!r} is unknown; use one of {', '.join(MASKS)}, or a "
            "callable."
        )
    if not isinstance(settings.weighting, str) or settings.weighting not in WEIGHTINGS:
        raise ValueError(
            f"weighting={settings.weighting!r} is unknown; use 'fisher' or 'uniform'."
        )
    if not isinstance(settings.layers, str) and not (
        isinstance(settings.layers, (list, tuple))
        and settings.layers
        and all(isinstance(p, str) for p in settings.layers)
    ):
        raise ValueError(
            f"layers={settings.layers!r} must be 'all', 'last', 'middle', a pattern or "
            "a list of patterns."
        )
    if not _is_number(settings.damping) or not 0 < settings.damping < np.inf:
        raise ValueError(
            f"damping={settings.damping!r} must be a finite number > 0; the paper's is "
            "1."
        )
    if not _is_number(settings.oversample) or not 1 <= settings.oversample < np.inf:
        raise ValueError(
            f"oversample={settings.oversample!r} must be a finite number >= 1; 1 drops "
            "nothing, BAIT uses 2."
        )
    check_candidates_parameter(settings.candidates)
    optional = {"n_top_classes": 2, "n_components": 1, "n_information_samples": 1}
    for name, least in {"n_mask_samples": 1, "batch_size": 1, **optional}.items():
        value = getattr(settings, name)
        if value is None and name in optional:
            continue
        is_auto = isinstance(value, Auto) or (
            isinstance(value, str) and value == "auto"
        )
        if name == "n_components" and is_auto:
            continue
        if (
            not isinstance(value, Integral)
            or isinstance(value, bool)
            or int(value) < least
        ):
            raise ValueError(f"{name}={value!r} must be an int >= {least}.")
    if settings.max_memory is not None:
        parse_memory(settings.max_memory)
    check_flag(settings.keep_head, "keep_head")
    if settings.head is not None and not isinstance(settings.head, str):
        raise ValueError(
            f"head={settings.head!r:.60} must be the name of a module, as in "
            "module.named_modules(), or None to find the head."
        )
    if not isinstance(settings.verbose, Integral) or settings.verbose < 0:
        raise ValueError(
            f"verbose={settings.verbose!r} must be an int >= 0; 1 shows progress bars."
        )
    try:
        check_random_state(settings.random_state)
    except ValueError as error:
        raise ValueError(
            f"random_state={settings.random_state!r} must be an int, a RandomState or "
            "None."
        ) from error


def check_flag(value: Any, name: str) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r} must be True or False.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
