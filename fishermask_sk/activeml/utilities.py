"""What scikit-activeml asks of a strategy beside picks: a utility of every candidate
before each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishermask_sk.gradients.fisher import information
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.gradients.per_sample import PerSampleGradients
from fishermask_sk.nets.skorch_adapter import fitted_net, preserved_rng
from fishermask_sk.selection.gains import trace_reductions
from fishermask_sk.strategy.fisher_mask import FisherMask


@dataclass(frozen=True)
class Asked:
    """What a strategy is asked: how many of which samples."""

    clf: Any
    pool: np.ndarray
    known: np.ndarray  # the labelled samples
    target: np.ndarray | None
    candidates: np.ndarray  # positions in the pool
    n_instances: int
    return_utilities: bool


def gains_at_each_pick(
    net: Any, strategy: FisherMask, asked: Asked, picks: np.ndarray
) -> np.ndarray:
    """Trace reductions (b, n_candidates) of all candidates before each pick, by the
    formulas of the docstring of `selection`, in float64.
    """
    fitted = fitted_net(net)
    with preserved_rng(), undisturbed(fitted.module):
        pool, _ = fitted.dataset(asked.pool, "X")
        example = next(fitted.batches(pool, min(8, len(asked.pool))))
        gradients = PerSampleGradients(fitted.module, fitted.logits, example)
        kept = torch.as_tensor(strategy.mask_indices_).to(
            next(fitted.module.parameters()).device
        )

        def embedded(X: np.ndarray) -> Tensor:
            dataset, _ = fitted.dataset(X, "X")
            return torch.cat(
                [
                    gradients.embeddings(
                        batch,
                        kept,
                        strategy.weighting,
                        reduced=True,
                        n_top_classes=strategy.n_top_classes,
                    ).double()
                    for batch in fitted.batches(dataset, strategy.batch_size)
                ]
            )

        v = embedded(asked.pool)
        n_labeled = len(asked.known)
        total = information(embedded(asked.known) if n_labeled else v[:0])
        target = (information(v) + total) / (len(v) + n_labeled)
        if asked.target is not None:
            target = information(embedded(asked.target)) / len(asked.target)
    weight = len(picks) / (n_labeled + len(picks))
    m = strategy.damping * torch.eye(len(kept), dtype=v.dtype, device=v.device)
    inv_m = torch.linalg.inv(m + total / (n_labeled + len(picks)))
    gains = []
    for pick in picks:
        w = v[asked.candidates] @ inv_m
        a = weight * w @ v[asked.candidates].mT
        b = weight * w @ target @ w.mT
        gains.append(trace_reductions(a, b).cpu().numpy())
        u = weight**0.5 * v[pick]
        inv_m -= (
            inv_m
            @ u.mT
            @ torch.linalg.solve(torch.eye(len(u)).to(u) + u @ inv_m @ u.mT, u @ inv_m)
        )
    return np.stack(gains)
