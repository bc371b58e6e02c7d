r"""Greedy selection of the samples that lower the expected error, tr(M⁻¹ F̄), most.

With L labelled samples, b to pick and damping λ:

* F̄ is the mean of :math:`V_x^\top V_x` over pool and labelled samples together (`pool_information`);
* :math:`M_\emptyset = \lambda I + \frac{L}{L+b}` · the labelled samples' mean (`labeled_information`);
* picking x adds :math:`\frac{b}{L+b} V_x^\top V_x`.

The gain of a candidate needs only two c×c matrices, :math:`A = V M^{-1} V^\top` and
:math:`B = V M^{-1} \bar F M^{-1} V^\top` with V scaled by √(b/(L+b)). They are kept for every candidate and
updated after each pick in one pass over the embeddings. Source: Ash et al., "Gone Fishing" (BAIT),
arXiv 2106.09675, with the scaling of its authors' code. This file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

# λ below this asks for float64 wherever a k×k matrix is inverted: float32 then leaves float64's picks.
FLOAT32_DAMPING = 0.1
# Gains closer than this, relative to the best, are equal: of these the lowest index wins.
TIE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
# Rows of embeddings handled at a time.
BLOCK_ROWS = 2**13


class Selection(NamedTuple):
    """Positions in the pool in the order of picking, and the trace reduction of each pick as it was made."""

    indices: Tensor
    trace_reductions: Tensor


class _Update(NamedTuple):
    """What one pick changes: M⁻¹ by UUᵀ, and (A, B) of every V by the columns of V·[U, H]."""

    u: Tensor
    h: Tensor


def select(
    embeddings: Tensor,
    pool_information: Tensor,
    n_instances: int,
    *,
    labeled_information: Tensor | None = None,
    n_labeled: int = 0,
    damping: float = 1.0,
    oversample: float = 1.0,
    choose: Callable[[Tensor], Tensor] | None = None,
    on_pick: Callable[[], object] | None = None,
) -> Selection:
    r"""Pick `n_instances` samples one by one, each with the largest trace reduction; then drop the surplus.

    Parameters
    ----------
    embeddings : Tensor of shape (n, c, k)
        Of the pool. Any rows with the same :math:`V_x^\top V_x` give the same picks.
    pool_information : Tensor of shape (k, k)
        F̄, the mean over pool and labelled samples together.
    n_instances : int
        b, at most n. It sets the weight of a pick even when more are picked first.
    labeled_information : Tensor of shape (k, k), optional
        Mean over the labelled samples.
    n_labeled : int
        L; 0 means that M starts from λI.
    damping : float
        λ > 0. Below 0.1 the state is kept in float64.
    oversample : float
        Pick min(⌈oversample·b⌉, n) first and remove the least costly afterwards (BAIT uses 2).
    choose : callable, Tensor of tied positions -> one of them, optional
        Default: the lowest.
    on_pick : callable, called after every pick and every removal

    Returns
    -------
    indices : Tensor of shape (n_instances,), int64, in the order in which the samples were picked
    trace_reductions : Tensor of shape (n_instances,), the gains at which they were picked

    Raises
    ------
    FloatingPointError
        Where no gain is a finite number.

    Notes
    -----
    After picking i, with the old M⁻¹ and :math:`U = M^{-1} V_i^\top \mathrm{chol}(I + A_i)^{-\top}`,
    :math:`Z = M^{-1} \bar F U`, :math:`G = U^\top \bar F U`, :math:`H = Z - \frac12 U G` and
    :math:`Y = V U`, the state of every candidate becomes

    .. math:: A - Y Y^\top, \qquad B - Y (VH)^\top - (VH) Y^\top, \qquad M^{-1} - U U^\top.

    One pass over the embeddings costs 4·n·c²·k flops a pick; beside the embeddings it holds two k×k matrices,
    2·n·c² numbers and one block of 8,192 rows.

    Examples
    --------
    >>> V = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]], [[0.0, 3.0]]])
    >>> picks, gains = select(V, V.flatten(0, 1).mT @ V.flatten(0, 1) / 3, 2)
    >>> picks
    tensor([1, 0])
    """
    dtype = torch.float64 if damping < FLOAT32_DAMPING else embeddings.dtype
    weight = n_instances / (n_labeled + n_instances)
    state = _State(
        embeddings,
        pool_information.to(dtype),
        _initial_inverse(labeled_information, n_labeled, weight, damping, pool_information.to(dtype)),
        weight,
    )
    choose = choose or torch.amin
    n_picks = min(ceil(oversample * n_instances), len(embeddings))
    picked: list[Tensor] = []
    gains: list[Tensor] = []
    available = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
    for _ in range(n_picks):
        reductions = trace_reductions(state.a, state.b)
        best = _best(reductions.masked_fill(~available, -torch.inf), choose)
        picked.append(best)
        gains.append(reductions[best])
        available[best] = False
        state.add(best)
        if on_pick is not None:
            on_pick()
    indices, reductions = torch.stack(picked), torch.stack(gains)
    kept = _drop_surplus(state, indices, n_instances, choose, on_pick)
    return Selection(indices[kept], reductions[kept])


def trace_reductions(a: Tensor, b: Tensor) -> Tensor:
    r"""How much each candidate would lower tr(M⁻¹ F̄): :math:`\mathrm{tr}\, B (I + A)^{-1}`.

    From Woodbury's identity for :math:`(M + V^\top V)^{-1}` and a rotation under the trace.

    Parameters
    ----------
    a, b : Tensors of shape (n, c, c)

    Returns
    -------
    Tensor of shape (n,)
    """
    return _trace_of_quotient(b, _plus_identity(a))


def trace_increases(a: Tensor, b: Tensor) -> Tensor:
    r"""How much removing each picked sample would raise tr(M⁻¹ F̄): :math:`\mathrm{tr}\, B (I - A)^{-1}`.

    Parameters
    ----------
    a, b : Tensors of shape (n, c, c)

    Returns
    -------
    Tensor of shape (n,)
    """
    return _trace_of_quotient(b, _plus_identity(-a))


def _trace_of_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """tr(B D⁻¹) of each pair of symmetric matrices, D positive definite: tr of L⁻¹ B L⁻ᵀ for D = LLᵀ."""
    factor, _ = torch.linalg.cholesky_ex(denominator)
    half = torch.linalg.solve_triangular(factor, numerator, upper=False)
    return torch.linalg.solve_triangular(factor, half.mT, upper=False).diagonal(dim1=-2, dim2=-1).sum(-1)


def _plus_identity(matrices: Tensor) -> Tensor:
    return matrices + torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _initial_inverse(
    labeled_information: Tensor | None, n_labeled: int, weight: float, damping: float, like: Tensor
) -> Tensor:
    """M_∅⁻¹. Eigenvalues below λ are rounding: the labelled samples' information has none below zero."""
    if labeled_information is None or n_labeled == 0:
        return torch.eye(len(like), dtype=like.dtype, device=like.device) / damping
    m = (1 - weight) * labeled_information.to(like.dtype)
    m.diagonal().add_(damping)
    values, vectors = torch.linalg.eigh(m)
    return (vectors / values.clamp_min(damping)) @ vectors.mT


class _State:
    """M⁻¹, and A and B of every candidate, under picks and removals."""

    def __init__(
        self, embeddings: Tensor, information: Tensor, inv_information: Tensor, weight: float
    ) -> None:
        self.embeddings, self.information, self.inv_information = embeddings, information, inv_information
        self.root_weight = weight**0.5
        n, c, _ = embeddings.shape
        self.a = information.new_empty(n, c, c)
        self.b = information.new_empty(n, c, c)
        for part in self._blocks():
            v = self.scaled(part)
            p = v @ inv_information
            self.a[part] = p @ v.mT
            self.b[part] = p @ information @ p.mT

    def scaled(self, part: slice | Tensor) -> Tensor:
        """V of some samples, times √(b/(L+b)): the one place that weighs a pick."""
        return self.embeddings[part].to(self.information.dtype) * self.root_weight

    def add(self, i: Tensor) -> None:
        """Pick sample i: M grows by its information."""
        self._apply(self._update(i, sign=1), sign=1)

    def remove(self, i: Tensor) -> None:
        """Take sample i back: M shrinks by its information."""
        self._apply(self._update(i, sign=-1), sign=-1)

    def restrict(self, samples: Tensor) -> _State:
        """The same M, with these samples alone as candidates; A and B are computed afresh."""
        return _State(self.embeddings[samples], self.information, self.inv_information, self.root_weight**2)

    def _blocks(self) -> list[slice]:
        n, c, _ = self.embeddings.shape
        step = max(1, BLOCK_ROWS // c)
        return [slice(start, start + step) for start in range(0, n, step)]

    def _update(self, i: Tensor, sign: int) -> _Update:
        index = i.reshape(1)
        v = self.scaled(index)[0]
        factor, _ = torch.linalg.cholesky_ex(_plus_identity(sign * self.a[index])[0])
        u = torch.linalg.solve_triangular(factor, v @ self.inv_information, upper=False).mT
        z = self.inv_information @ (self.information @ u)
        g = u.mT @ self.information @ u
        return _Update(u, z - 0.5 * sign * (u @ g))

    def _apply(self, update: _Update, sign: int) -> None:
        u, h = update
        self.inv_information.addmm_(u, u.mT, alpha=-sign)
        both = torch.cat([u, h], dim=1) * self.root_weight
        for part in self._blocks():
            y, vh = (self.embeddings[part].to(both.dtype) @ both).split([u.shape[1], h.shape[1]], dim=-1)
            cross = y @ vh.mT
            self.a[part] -= sign * (y @ y.mT)
            self.b[part] -= sign * (cross + cross.mT)


def _best(reductions: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Position of the largest entry; `choose` settles ties. Nothing here waits for the device."""
    best = reductions.amax()
    tied = reductions >= best - TIE_TOLERANCE.get(reductions.dtype, 1e-6) * best.abs()
    if not bool(torch.isfinite(best)):
        raise FloatingPointError(
            f"The largest trace reduction is {best.item()}: the embeddings are too large for "
            f"{reductions.dtype}. Scale the inputs, train the network with less confidence, or raise damping."
        )
    return choose(tied.nonzero()[:, 0])


def _drop_surplus(
    state: _State,
    indices: Tensor,
    n_instances: int,
    choose: Callable[[Tensor], Tensor],
    on_pick: Callable[[], object] | None,
) -> Tensor:
    """BAIT's backward pass: positions among `indices` that stay when the least costly are removed in turn."""
    kept = torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    if len(indices) == n_instances:
        return kept
    state = state.restrict(indices)
    for _ in range(len(indices) - n_instances):
        costs = trace_increases(state.a, state.b).masked_fill(~kept, torch.inf)
        least = costs.amin()
        tied = costs <= least + TIE_TOLERANCE.get(costs.dtype, 1e-6) * least.abs()
        # Ties are settled by place in the pool, not by order of picking.
        loser = choose(indices[tied.nonzero()[:, 0]])
        dropped = (indices == loser).nonzero()[0, 0]
        kept[dropped] = False
        state.remove(dropped)
        if on_pick is not None:
            on_pick()
    return kept
