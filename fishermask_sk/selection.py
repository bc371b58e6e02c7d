r"""Greedy selection of the samples that lower the expected error, tr(M⁻¹ F̄), most.

With L labelled samples, b to pick and damping λ:

* F̄ is the mean of :math:`V_x^\top V_x` over pool and labelled samples together (`pool_information`);
* :math:`M_\emptyset = \lambda I + \frac{L}{L+b}` · the labelled samples' mean (`labeled_information`);
* picking x adds :math:`\frac{b}{L+b} V_x^\top V_x`.

The gain of a candidate needs only two c×c matrices, :math:`A = V M^{-1} V^\top` and
:math:`B = V M^{-1} \bar F M^{-1} V^\top`. They are kept for every candidate and updated after each pick in one
pass over the embeddings; M, F̄ and V first move to a basis where M_∅ = I and F̄ is diagonal. Source: Ash et al.,
"Gone Fishing" (BAIT), arXiv 2106.09675, with the scaling of its authors' code. This file sees tensors only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

# λ below this asks for float64 in every product, not only where small matrices are kept.
FLOAT32_DAMPING = 0.1
# The updates of the first picks are the largest, and cancel most later. In these picks, or this share of all, the
# leading directions, which hold all but this share of the trace of F̄, are multiplied in float64.
EXACT_PICKS, EXACT_SHARE, TAIL_SHARE = 10, 1 / 8, 1e-4
# A pick of gain g in float32 leaves about this times (g/g')² in the relative error of a later gain g', less where
# only the tail was float32 (both measured on the embeddings of a trained net) ...
FLOAT32_ERROR = 5e-9
# ... in float64 this ...
FLOAT64_ERROR = 1e-17
# ... and where the sum of them passes this, M⁻¹, A and B are computed afresh before the next pick.
ERROR_LIMIT = 1e-4
# Where λ is this close to the rounding of the information, gains may be rounding too.
ROUNDING_SHARE = 1e-3
# Gains closer than this, relative to the best, are equal: of these the lowest index wins.
TIE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
# The eigenvectors of F̄ cost k³; beyond this many weights M and F̄ are used as they are.
MAX_ROTATED = 6_000
# Rows of embeddings handled at a time where they change dtype or basis: what fits into a processor's cache.
BLOCK_ROWS = 2**9
# Up to this many classes, many small eliminations go step by step through all candidates at once.
MAX_UNROLLED_CLASSES = 32


TOO_LARGE = (
    "The information is too large beside the damping, for float64 or for the dtype of the embeddings: raise damping, "
    "scale the samples, or look for one whose gradient is far larger than the others'."
)


class Selection(NamedTuple):
    """Positions in the pool in the order of picking, and the trace reduction of each pick as it was made."""

    indices: Tensor
    trace_reductions: Tensor


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
    overwrite: bool = False,
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
        λ > 0.
    oversample : float
        Pick min(⌈oversample·b⌉, n) first and remove the least costly afterwards (BAIT uses 2).
    choose : callable, Tensor of tied positions -> one of them, optional
        Default: the lowest.
    on_pick : callable, called after every pick and every removal
    overwrite : bool
        Rotate `embeddings` in place instead of in a copy.

    Returns
    -------
    indices : Tensor of shape (n_instances,), int64, in the order in which the samples were picked
    trace_reductions : Tensor of shape (n_instances,), float64, the gains at which they were picked

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

    One pass over the embeddings costs 4·n·c²·k flops a pick. Gains fall by orders of magnitude while A and B
    started from the first, so A, B and M⁻¹ are float64, and so are the leading directions in the pass of the
    first picks; all else has the dtype of the embeddings (float64 throughout for λ < 0.1).

    Beside the embeddings it holds, in float64, k×k matrices (six at the start, one later) and 6·n·c² numbers.

    Examples
    --------
    >>> V = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]], [[0.0, 3.0]]])
    >>> picks, gains = select(V, V.flatten(0, 1).mT @ V.flatten(0, 1) / 3, 2)
    >>> picks
    tensor([1, 0])
    """
    state = _State.initial(
        embeddings if overwrite else embeddings.clone(),
        *_scaled(pool_information, labeled_information, n_labeled, n_instances, damping),
    )
    state.exact |= damping < FLOAT32_DAMPING
    choose = choose or torch.amin
    n_picks = min(ceil(oversample * n_instances), len(embeddings))
    n_exact = max(EXACT_PICKS, ceil(EXACT_SHARE * n_picks))
    tie_tolerance = TIE_TOLERANCE.get(embeddings.dtype, 1e-6)
    picked: list[Tensor] = []
    gains: list[Tensor] = []
    available = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
    for t in range(n_picks):
        reductions = trace_reductions(state.a, state.b).masked_fill(~available, -torch.inf)
        best = _best(reductions, choose, tie_tolerance)
        if state.is_stale(reductions[best]):
            state.refresh()
            reductions = trace_reductions(state.a, state.b).masked_fill(~available, -torch.inf)
            best = _best(reductions, choose, tie_tolerance)
        picked.append(best)
        gains.append(reductions[best])
        available[best] = False
        if t + 1 < n_picks or n_picks > n_instances:  # nobody asks after the last
            state.add(best, reductions[best], early=t < n_exact)
        if on_pick is not None:
            on_pick()
    indices = torch.stack(picked)
    kept = _drop_surplus(state, indices, n_instances, choose, tie_tolerance, on_pick)
    return Selection(indices[kept], torch.stack(gains)[kept])


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


def _scaled(
    pool_information: Tensor,
    labeled_information: Tensor | None,
    n_labeled: int,
    n_instances: int,
    damping: float,
) -> tuple[Tensor, Tensor | None, float]:
    """F̄, the labelled part of M_∅ and λ, all divided by the weight b/(L+b) of a pick.

    The one place that weighs a pick: M and F̄ divided by it give the same gains, and V stays as it is.
    """
    weight = n_instances / (n_labeled + n_instances)
    information, known, largest = pool_information.double() / weight, None, pool_information.trace()
    if labeled_information is not None and n_labeled:
        known = labeled_information.double() * ((1 - weight) / weight)
        largest = largest + known.trace()
    if not bool(torch.isfinite(largest)):
        raise FloatingPointError(f"The information has the trace {largest.item()}. {TOO_LARGE}")
    if float(largest) * torch.finfo(information.dtype).eps > ROUNDING_SHARE * damping:
        warnings.warn(
            f"damping={damping:g} is {damping / float(largest):.0e} of the trace of the information: late gains are "
            "lost in the rounding of float64, and what is picked then is arbitrary. Raise damping.",
            UserWarning,
            stacklevel=2,
        )
    return information, known, damping / weight


def _trace_of_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """tr(B D⁻¹) for each pair of symmetric matrices (n, c, c), D positive definite.

    LAPACK would take the small matrices one by one. Instead row j is eliminated from all of them at once:
    with d = D[j, j], l = D[j+1:, j] / d and q = B[j, j], what is left of D is D − d l lᵀ, what is left of B is
    B − l bᵀ − b lᵀ for b = B[j+1:, j] − q l / 2, and q / d is row j's part of the trace.
    """
    c = numerator.shape[-1]
    if c > MAX_UNROLLED_CLASSES:
        factor, _ = torch.linalg.cholesky_ex(denominator)
        half = torch.linalg.solve_triangular(factor, numerator, upper=False)
        return torch.linalg.solve_triangular(factor, half.mT, upper=False).diagonal(dim1=-2, dim2=-1).sum(-1)
    left_d, left_b = (
        matrices.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        for matrices in (denominator, numerator)
    )
    trace = torch.zeros_like(left_d[0, 0])
    for j in range(c):
        d, q = left_d[j, j], left_b[j, j]
        trace += q / d
        r = left_d[j + 1 :, j]
        factors = r / d
        b = left_b[j + 1 :, j] - 0.5 * q * factors
        for row in range(c - j - 1):  # the lower triangles alone
            below = slice(j + 1, j + 2 + row)
            left_d[j + 1 + row, below].addcmul_(r[: row + 1], factors[row], value=-1)
            left_b[j + 1 + row, below].addcmul_(b[: row + 1], factors[row], value=-1)
            left_b[j + 1 + row, below].addcmul_(factors[: row + 1], b[row], value=-1)
    return trace


def _plus_identity(matrices: Tensor) -> Tensor:
    return matrices + torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _inverse_root(known: Tensor, damping: float) -> Tensor:
    """R with Rᵀ (λI + known) R = I. Eigenvalues below λ are rounding: `known` has none below zero."""
    m = known.clone()
    m.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(m)
    if not bool(failed):
        identity = torch.eye(len(m), dtype=m.dtype, device=m.device)
        return torch.linalg.solve_triangular(factor, identity, upper=False).mT
    values, vectors = torch.linalg.eigh(m)
    return vectors / values.clamp_min(damping).sqrt()


class _State:
    """M⁻¹, and A and B of every candidate, under picks and removals; F̄ as a matrix or its diagonal."""

    def __init__(self, embeddings: Tensor, information: Tensor, inv_information: Tensor) -> None:
        self.embeddings, self.information, self.inv_information = embeddings, information, inv_information
        self.exact = embeddings.dtype == information.dtype
        n, c, self.n_leading = embeddings.shape
        self.a, self.b = (information.new_empty(n, c, c) for _ in range(2))
        self.error = information.new_zeros(())
        self.whitened = False
        self.picked: list[Tensor] = []

    @classmethod
    def initial(cls, embeddings: Tensor, information: Tensor, known: Tensor | None, damping: float) -> _State:
        """In a basis where M_∅ = I and F̄ is diagonal, to which `embeddings` are rotated in place."""
        identity = torch.eye(len(information), dtype=information.dtype, device=information.device)
        root = identity / damping**0.5 if known is None else _inverse_root(known, damping)
        if len(information) > MAX_ROTATED:
            state = cls(embeddings, information, root @ root.mT)
            state.refresh()
            return state
        eigenvalues, eigenvectors = torch.linalg.eigh(root.mT @ information @ root)
        eigenvalues, eigenvectors = eigenvalues.flip(0).clamp_min(0), eigenvectors.flip(1)  # leading first
        basis = (root @ eigenvectors).to(embeddings.dtype)
        for part in _blocks(embeddings):
            embeddings[part] = embeddings[part] @ basis
        state = cls(embeddings, eigenvalues, identity)
        tail = eigenvalues.sum() - eigenvalues.cumsum(0)
        state.n_leading = int((tail > TAIL_SHARE * eigenvalues.sum()).sum()) + 1
        state.whitened = True
        state.refresh()
        return state

    def rebuild_inverse(self) -> None:
        """M⁻¹ from M_∅ = I and the picks, without the rounding of all the steps between."""
        if self.whitened and self.picked:
            v = self.embeddings[torch.stack(self.picked)].to(self.information.dtype).flatten(0, 1)
            factor, failed = torch.linalg.cholesky_ex(_plus_identity(v.mT @ v))
            if not bool(failed):
                self.inv_information = torch.cholesky_inverse(factor)

    def refresh(self) -> None:
        """M⁻¹, A and B from their definitions."""
        self.rebuild_inverse()
        for part in _blocks(self.embeddings):
            v = self.embeddings[part].to(self.information.dtype)
            p = v if self.whitened and not self.picked else v @ self.inv_information
            self.a[part] = p @ v.mT
            self.b[part] = self._times_information(p) @ p.mT
        self.error.zero_()

    def add(self, i: Tensor, gain: Tensor, early: bool) -> None:
        """Pick sample i: M grows by its information."""
        n_exact = self._n_columns if self.exact else early * self.n_leading
        self._apply(i, 1, n_exact)
        self.picked.append(i)
        rounding = (
            FLOAT32_ERROR * (TAIL_SHARE if early else 1) if n_exact < self._n_columns else FLOAT64_ERROR
        )
        self.error += rounding * gain.square()

    def is_stale(self, gain: Tensor) -> bool:
        """Whether a gain this small may be rounding of the larger ones before it."""
        return bool(self.error > ERROR_LIMIT * gain.square())

    def remove(self, i: Tensor) -> None:
        """Take sample i back: M shrinks by its information."""
        self._apply(i, -1, self._n_columns)

    def restrict(self, samples: Tensor) -> _State:
        """The same M, with these samples alone as candidates; A and B are computed afresh."""
        self.rebuild_inverse()
        restricted = _State(self.embeddings[samples], self.information, self.inv_information)
        restricted.refresh()
        return restricted

    def _times_information(self, p: Tensor) -> Tensor:
        """P F̄, for rows P."""
        return p * self.information if self.information.ndim == 1 else p @ self.information

    @property
    def _n_columns(self) -> int:
        return self.embeddings.shape[2]

    def _apply(self, i: Tensor, sign: int, n_exact: int) -> None:
        index = i.reshape(1)
        v = self.embeddings[index][0].to(self.information.dtype)
        factor, _ = torch.linalg.cholesky_ex(_plus_identity(sign * self.a[index])[0])
        u = torch.linalg.solve_triangular(factor, v @ self.inv_information, upper=False).mT
        f_u = self._times_information(u.mT).mT
        h = self.inv_information @ f_u - 0.5 * sign * (u @ (u.mT @ f_u))
        self.inv_information.addmm_(u, u.mT, alpha=-sign)
        y, vh = self._times(torch.cat([u, h], dim=1), n_exact).tensor_split(2, dim=-1)
        cross = y @ vh.mT
        self.a -= sign * (y @ y.mT)
        self.b -= sign * (cross + cross.mT)

    def _times(self, right: Tensor, n_exact: int) -> Tensor:
        """V times a float64 matrix, the first `n_exact` directions in float64, the others as V is stored."""
        stored = right.to(self.embeddings.dtype)
        if n_exact == 0 or stored.dtype == right.dtype:
            return (self.embeddings @ stored).to(right.dtype)
        product = right.new_empty(*self.embeddings.shape[:2], right.shape[1])
        for part in _blocks(self.embeddings):
            v = self.embeddings[part]
            leading = v[..., :n_exact].to(right.dtype) @ right[:n_exact]
            product[part] = leading + v[..., n_exact:] @ stored[n_exact:]
        return product


def _blocks(embeddings: Tensor) -> Iterator[slice]:
    n, c, _ = embeddings.shape
    step = max(1, BLOCK_ROWS // c)
    return (slice(start, start + step) for start in range(0, n, step))


def _best(reductions: Tensor, choose: Callable[[Tensor], Tensor], tolerance: float) -> Tensor:
    """Position of the largest entry; `choose` settles ties."""
    best = reductions.amax()
    if not bool(torch.isfinite(best)):
        raise FloatingPointError(f"The largest trace reduction is {best.item()}. {TOO_LARGE}")
    tied = reductions >= best - tolerance * best.abs()
    return choose(tied.nonzero()[:, 0])


def _drop_surplus(
    state: _State,
    indices: Tensor,
    n_instances: int,
    choose: Callable[[Tensor], Tensor],
    tolerance: float,
    on_pick: Callable[[], object] | None,
) -> Tensor:
    """BAIT's backward pass: which of `indices` stay when the least costly are removed in turn."""
    kept = torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    if len(indices) == n_instances:
        return kept
    state = state.restrict(indices)
    for _ in range(len(indices) - n_instances):
        costs = trace_increases(state.a, state.b).masked_fill(~kept, torch.inf)
        least = costs.amin()
        if not bool(torch.isfinite(least)):
            raise FloatingPointError(f"The least cost of dropping a pick is {least.item()}. {TOO_LARGE}")
        tied = costs <= least + tolerance * least.abs()
        # Ties are settled by place in the pool, not by order of picking.
        loser = choose(indices[tied.nonzero()[:, 0]])
        dropped = (indices == loser).nonzero()[0, 0]
        kept[dropped] = False
        state.remove(dropped)
        if on_pick is not None:
            on_pick()
    return kept
