r"""BAIT's backward pass: picks are taken back, one by one, that are least missed.

Removing i raises the objective by its cost, with N_i = I − A_i:

.. math:: \mathrm{tr}\, B_i N_i^{-1} = \mathrm{tr}\, B^-_i (I + A^-_i)^{-1},

the gain of i beside the others, A⁻ and B⁻ with M without i. Where i alone informs a
direction, N_i is as small there as λ beside the information, and 1 − A_i would be
rounding. So the picks move to a basis where M_∅ = I (n picks, X of shape (n, c, d)
with d at most their rows), and A comes from an orthonormal factor,

.. math:: \begin{pmatrix} X \\ I \end{pmatrix} = \begin{pmatrix} Q_1 \\ Q_2
    \end{pmatrix} T, \qquad A_i = Q_{1,i} Q_{1,i}^\top, \qquad P = T^{-1} Q_1^\top,
    \qquad B_i = P_i^\top \bar F P_i;

or, where there are few rows and much information, N itself comes from one,

.. math:: \begin{pmatrix} I \\ -X^\top \end{pmatrix} = \begin{pmatrix} Q_3 \\ Q_4
    \end{pmatrix} R, \qquad N = Q_3 Q_3^\top, \qquad P = -Q_4 Q_3^\top.

Removing i changes N by a Schur complement, N − N_{·i} N_i^{-1} N_{i·}, and P and B
alike. Where that leaves too few digits of a sample's N, its cost is bounded from
below, and made afresh where the bound says that it may be the least. This file sees
tensors only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fishermask_sk.selection.candidates import cholesky
from fishermask_sk.selection.gains import plus_identity, trace_reductions

# Everything is made anew after so many removals.
REMOVALS = 16
# With information of this much of λ, and at most so many rows a direction, N comes from
# a factor of its own.
LARGE_INFORMATION, ROWS_PER_DIRECTION = 1e6, 2
# What of the smallest eigenvalue of N may be rounding, for a cost to count as exact.
COST_ERROR = 1e-6
# ... and of what a removal changes, for N to be kept up to date with it.
UPDATE_ERROR = 1e-10
# The rounding of N in units of the last digit.
ROUNDING = 64 * torch.finfo(torch.float64).eps

CANNOT_DECIDE = (
    "The backward pass cannot tell which pick is least missed: the information of a "
    "pick is {:.0e} times the damping, beyond what float64 resolves. Raise damping, "
    "scale the samples, or set oversample=1, which needs no backward pass."
)


def kept_picks(
    start: tuple[Tensor, Tensor, Tensor | None],
    indices: Tensor,
    n_kept: int,
    damping: float,
    choose: Callable[[Tensor], Tensor],
    tolerance: float,
    on_removal: Callable[[], object] | None,
) -> Tensor:
    """Which picks stay.

    Parameters
    ----------
    start : tuple of Tensors of shape (m, c, k), (k, k) and (k, k) or None
        The picks' embeddings, F̄ and M_∅; None for λI.
    indices : Tensor of shape (m,)
        The picks' positions, by which ties are settled.
    n_kept : int
    damping : float
        λ.
    choose : callable, Tensor of tied positions -> one of them
    tolerance : float
        Costs closer than this, relative to the least, are equal.
    on_removal : callable or None

    Returns
    -------
    Tensor of shape (m,), bool

    Raises
    ------
    FloatingPointError
        Where rounding decides which cost is the least.
    """
    x, information = _whitened(*start, damping)
    picks = _Picks(x, information)
    if not picks.largest * torch.finfo(x.dtype).eps < 1:
        raise FloatingPointError(CANNOT_DECIDE.format(picks.largest))
    positions = indices.cpu()  # an accelerator is asked once a removal
    while len(picks.left) > n_kept:
        costs, shares = torch.stack([picks.costs(), picks.shares]).cpu()
        least = costs.amin()
        if not bool(torch.isfinite(least)):
            raise FloatingPointError(CANNOT_DECIDE.format(picks.largest))
        tied = (costs <= least + tolerance * least.abs()).nonzero()[:, 0]
        loser = choose(positions[picks.left[tied]])
        i = int((positions[picks.left] == loser).nonzero()[0, 0])
        picks.remove(i, float(shares[i]))
        if on_removal is not None:
            on_removal()
    kept = torch.zeros(len(indices), dtype=torch.bool, device="cpu")
    kept[picks.left] = True
    return kept.to(indices.device)


def _whitened(
    v: Tensor, information: Tensor, known: Tensor | None, damping: float
) -> tuple[Tensor, Tensor]:
    """The picks (m, c, d) and F̄ (d, d) where M_∅ = I, and with no direction that no
    pick informs.
    """
    n, c, k = v.shape
    rows = v.flatten(0, 1)
    if known is None:
        rows, information = rows / damping**0.5, information / damping
    else:
        factor = cholesky(known.clone(), damping)
        rows = torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT
        half = torch.linalg.solve_triangular(factor, information, upper=False)
        information = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    if len(rows) < k:
        basis, triangle = torch.linalg.qr(rows.mT)
        rows, information = triangle.mT, basis.mT @ information @ basis
    return rows.unflatten(0, (n, c)), information


class _Picks:
    """The picks that are left, with N, B and P.

    Parameters
    ----------
    x : Tensor of shape (m, c, d)
    information : Tensor of shape (d, d)
    """

    n: Tensor  # (m, c, c)
    b: Tensor  # (m, c, c)
    p: Tensor  # (d, m·c)
    every_n: Tensor | None  # N between all (m·c, m·c), where it has its own factor
    error: Tensor  # what of an entry of N may be rounding (m,)
    shares: Tensor  # that of the smallest eigenvalue of N (m,)

    def __init__(self, x: Tensor, information: Tensor) -> None:
        self.x, self.information = x, information
        self.c, self.d = x.shape[1:]
        self.left = torch.arange(len(x), device="cpu")
        self.largest = float(x.square().sum((1, 2)).amax())
        self._n_removed, self._is_due = 0, True

    def costs(self) -> Tensor:
        """What removing each would cost (m,); of those that cannot be the cheapest a
        lower bound.
        """
        if self._is_due:
            self._start()
        factor, failed = torch.linalg.cholesky_ex(self.n)
        inverse = torch.cholesky_inverse(factor)
        # One over the norm of the inverse is at most the smallest eigenvalue.
        smallest = 1 / torch.linalg.matrix_norm(inverse)
        smallest.masked_fill_(failed != 0, 0)
        costs = (inverse * self.b).sum((1, 2))
        self.shares = self.error / smallest
        doubtful = ~(self.error <= COST_ERROR * smallest)
        if not bool(doubtful.any()):
            return costs
        # No N is larger than this, and so no cost is smaller.
        values, vectors = torch.linalg.eigh(self.n[doubtful])
        at_most = values.clamp_min(0) + self.error[doubtful, None]
        rotated = vectors.mT @ self.b[doubtful] @ vectors
        costs[doubtful] = (rotated.diagonal(dim1=1, dim2=2) / at_most).sum(1)
        while bool(doubtful[i := costs.argmin()]):
            costs[i], doubtful[i] = self._afresh(int(i)), False
        return costs

    def remove(self, i: int, share: float) -> None:
        """Take the i-th of those that are left back, of whose N so much may be
        rounding.
        """
        pick, self.left = int(self.left[i]), self._but(i)
        self._n_removed += 1
        if self._n_removed == REMOVALS or not share <= UPDATE_ERROR:
            self._is_due = True
            return
        own = slice(i * self.c, (i + 1) * self.c)
        every = self.every_n
        across = -(self.x[pick] @ self.p) if every is None else every[own]
        factor, _ = torch.linalg.cholesky_ex(self.n[i])
        z = torch.linalg.solve_triangular(factor, across, upper=False)
        u = torch.linalg.solve_triangular(factor, self.p[:, own].mT, upper=False).mT
        f_u = self.information @ u
        # P F̄ P without i, from (P − U Z)ᵀ F̄ (P − U Z).
        across_f = self._blocks(z.mT, (f_u.mT @ self.p - 0.5 * (u.mT @ f_u) @ z).mT)
        shrunk = self._blocks(z.mT, z.mT)
        lost = share * shrunk.diagonal(dim1=1, dim2=2).sum(1)
        stay = torch.arange(len(self.left), device=lost.device)
        stay += stay >= i
        self.b = (self.b - across_f - across_f.mT)[stay]
        self.n = (self.n - shrunk)[stay]
        self.error = (self.error + 4 * lost + 2 * (self.error * lost).sqrt())[stay]
        columns = stay[:, None] * self.c + torch.arange(self.c, device=stay.device)
        columns = columns.flatten()
        self.p = (self.p - u @ z)[:, columns]
        if self.every_n is not None:
            self.every_n = (self.every_n - z.mT @ z)[columns][:, columns]

    def _start(self) -> None:
        """N, B and P of those that are left, from an orthonormal factor."""
        rows = self.x[self.left].flatten(0, 1)
        eye = torch.eye(self.d, dtype=rows.dtype, device=rows.device)
        few = len(rows) <= ROWS_PER_DIRECTION * self.d
        if few and self.largest >= LARGE_INFORMATION:
            upper = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            q = torch.linalg.qr(torch.cat([upper, -rows.mT])).Q
            upper, lower = q.tensor_split([len(rows)])
            self.every_n, self.p = upper @ upper.mT, -(lower @ upper.mT)
            self.n = self._blocks(upper, upper)
            self.error = ROUNDING * self.n.diagonal(dim1=1, dim2=2).sum(1)
        else:
            q, triangle = torch.linalg.qr(torch.cat([rows, eye]))
            upper = q[: len(rows)]
            self.every_n = None
            self.p = torch.linalg.solve_triangular(triangle, upper.mT, upper=True)
            self.n = plus_identity(-self._blocks(upper, upper))
            self.error = torch.full_like(self.n[:, 0, 0], ROUNDING)
        self.b = self._blocks((self.information @ self.p).mT, self.p.mT)
        self._n_removed, self._is_due = 0, False

    def _but(self, i: int) -> Tensor:
        """Those that are left but for the i-th."""
        return torch.cat([self.left[:i], self.left[i + 1 :]])

    def _afresh(self, i: int) -> Tensor:
        """The cost of one, as its gain beside the others."""
        rows = self.x[self._but(i)].flatten(0, 1)
        eye = torch.eye(self.d, dtype=rows.dtype, device=rows.device)
        triangle = torch.linalg.qr(torch.cat([rows, eye]), mode="r").R
        v = self.x[int(self.left[i])].mT
        half = torch.linalg.solve_triangular(triangle.mT, v, upper=False)
        p = torch.linalg.solve_triangular(triangle, half, upper=True)
        b = p.mT @ self.information @ p
        return trace_reductions((half.mT @ half)[None], b[None])[0]

    def _blocks(self, left: Tensor, right: Tensor) -> Tensor:
        """Of left · rightᵀ (m·c, m·c) each pick's own block (m, c, c)."""
        left, right = (each.unflatten(0, (-1, self.c)) for each in (left, right))
        return left @ right.mT
