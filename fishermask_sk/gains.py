r"""Gains of candidates from their A and B: exact, bounded from above, and the costs of
taking picks back.

This file sees small matrices only: batches of c×c Tensors, one for each candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The inverse of I + A is as good as elimination while tr(A), and with it the condition
# of I + A, is below this.
MAX_TRACE = 1e4
# Between these, many small eliminations go step by step through all candidates at once.
MAX_UNROLLED_CLASSES, MIN_UNROLLED = 32, 2_000
# So many entries of small matrices are eliminated at a time, in up to five copies: 16
# MB each.
ENTRIES_AT_A_TIME = 2**21


def trace_reductions(a: Tensor, b: Tensor) -> Tensor:
    r"""How much each candidate would lower tr(M⁻¹ F̄): :math:`\mathrm{tr}\, B (I +
    A)^{-1}`.

    From Woodbury's identity for :math:`(M + V^\top V)^{-1}` and a rotation under the
    trace.

    Parameters
    ----------
    a, b : Tensors of shape (n, c, c)

    Returns
    -------
    Tensor of shape (n,)
    """
    return _trace_of_quotient(b, a, sign=1)


def reductions_and_bounds(
    a: Tensor, b: Tensor, y: Tensor, vh: Tensor, a_before: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Trace reductions after the last of several picks, and what they cannot exceed
    after each before it.

    A only shrinks from pick to pick, so that :math:`K = (I + A)^{-1}` with the A after
    the last pick m is the largest: after pick j the gain is at most

    .. math:: \mathrm{tr}\, K B_j = \mathrm{tr}\, K B_m + 2 \sum_{i > j} \langle K Y_i,
    V H_i \rangle.

    Parameters
    ----------
    a, b : Tensors of shape (n, c, c)
        After the last pick.
    y, vh : Tensors of shape (n, c, m·c)
        Y and VH of each pick, side by side.
    a_before : Tensor of shape (n, c, c)
        Before the first.

    Returns
    -------
    gains : Tensor of shape (n,)
        tr K B, after the last pick.
    bounds : Tensor of shape (n, m − 1)
        Infinity where A is, or was before these picks, so large that rounding could
        spoil K.
    """
    c, columns = y.shape[1:]
    factor, failed = torch.linalg.cholesky_ex(plus_identity(a))
    safe = (failed == 0) & (a_before.diagonal(dim1=1, dim2=2).sum(1) < MAX_TRACE)
    unsafe = (~safe).nonzero()[:, 0]
    if len(unsafe):
        factor[unsafe] = torch.eye(c, dtype=a.dtype, device=a.device)
    k = torch.cholesky_inverse(factor)
    gains = (k * b).sum((1, 2))
    lowered = 2 * (k.to(y.dtype) @ y).mul_(vh).sum(1).unflatten(
        1, (columns // c, c)
    ).sum(2).to(gains.dtype)
    bounds = gains[:, None] + lowered[:, 1:].flip(1).cumsum(1).flip(1)
    if len(unsafe):
        gains[unsafe] = trace_reductions(a[unsafe], b[unsafe])
        bounds[unsafe] = torch.inf
    return gains, bounds


def trace_increases(a: Tensor, b: Tensor) -> Tensor:
    r"""How much removing each picked sample would raise tr(M⁻¹ F̄):
    :math:`\mathrm{tr}\, B (I - A)^{-1}`.

    Parameters
    ----------
    a, b : Tensors of shape (n, c, c)

    Returns
    -------
    Tensor of shape (n,)
    """
    return _trace_of_quotient(b, a, sign=-1)


def effective_dimensions(a: Tensor) -> Tensor:
    r"""How many dimensions of M each candidate informs, of at most c:
    :math:`\mathrm{tr}\, (I + A)^{-1} A`.

    The effective dimension, or degrees of freedom, of ridge regression on its c rows
    alone.

    Parameters
    ----------
    a : Tensor of shape (n, c, c)

    Returns
    -------
    Tensor of shape (n,)
        Infinity where A is so large that rounding could spoil it.
    """
    too_large = a.diagonal(dim1=1, dim2=2).sum(1) >= MAX_TRACE
    return _trace_of_quotient(a, a, sign=1).masked_fill(too_large, torch.inf)


def plus_identity(matrices: Tensor) -> Tensor:
    """I + X for each of the matrices X (..., c, c)."""
    return matrices + torch.eye(
        matrices.shape[-1], dtype=matrices.dtype, device=matrices.device
    )


def _trace_of_quotient(b: Tensor, a: Tensor, sign: int) -> Tensor:
    """For each pair of symmetric matrices (n, c, c) tr B (I ± A)⁻¹, some of them at a
    time.
    """
    n_matrices = max(1, ENTRIES_AT_A_TIME // a.shape[-1] ** 2)
    parts = zip(b.split(n_matrices), a.split(n_matrices), strict=True)
    return torch.cat(
        [_eliminated(b_part, plus_identity(sign * a_part)) for b_part, a_part in parts]
    )


def _eliminated(numerator: Tensor, denominator: Tensor) -> Tensor:
    """tr(B D⁻¹) for each pair of symmetric matrices (n, c, c), D positive definite.

    LAPACK would take the small matrices one by one. Instead row j is eliminated from
    all of them at once: with d = D[j, j], l = D[j+1:, j] / d and q = B[j, j], what is
    left of D is D − d l lᵀ, what is left of B is B − l bᵀ − b lᵀ for b = B[j+1:, j] − q
    l / 2, and q / d is row j's part of the trace.
    """
    n, c = numerator.shape[:2]
    if c > MAX_UNROLLED_CLASSES or n < MIN_UNROLLED:
        factor, _ = torch.linalg.cholesky_ex(denominator)
        half = torch.linalg.solve_triangular(factor, numerator, upper=False)
        return (
            torch.linalg.solve_triangular(factor, half.mT, upper=False)
            .diagonal(dim1=-2, dim2=-1)
            .sum(-1)
        )
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
