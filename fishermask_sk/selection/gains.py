r"""Gains of candidates from their A and B, :math:`\mathrm{tr}\, B (I + A)^{-1}`.

Batches of small symmetric matrices (n, c, c), one for each candidate. This file sees
tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Up to so many rows, many small eliminations go step by step through all candidates at
# once: on a processor LAPACK would take them one by one.
MAX_UNROLLED_ROWS, MIN_UNROLLED = 32, 2_000
# So many entries of small matrices are eliminated at a time, in up to five copies: 16
# MB each.
ENTRIES_AT_A_TIME = 2**21
# Gains closer than this, relative to the best, are equal: of these the lowest index
# wins. Copies of a sample differ by the rounding of their embeddings ...
TIE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-9}
# ... and by that of A and B, so that gains are equal, too, that differ by no more than
# is estimated to be rounding, up to this share.
ROUNDING_TOLERANCE = 1e-6


def equal_from(largest: float, error: float, dtype: torch.dtype) -> float:
    """From where on gains are equal to the largest, where rounding may have left an
    error in them.
    """
    size = abs(largest)
    rounding = min(ROUNDING_TOLERANCE * size, error)
    return largest - max(rounding, TIE_TOLERANCE[dtype] * size)


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
    return quotient_traces(b, plus_identity(a))


def quotient_traces(numerator: Tensor, denominator: Tensor) -> Tensor:
    """tr(B D⁻¹) for each pair of matrices (n, c, c), D symmetric, positive definite."""
    n, c = numerator.shape[:2]
    if numerator.device.type != "cpu" or c > MAX_UNROLLED_ROWS or n < MIN_UNROLLED:
        return factored_traces(numerator, torch.linalg.cholesky_ex(denominator).L)
    n_matrices = max(1, ENTRIES_AT_A_TIME // c**2)
    parts = zip(numerator.split(n_matrices), denominator.split(n_matrices), strict=True)
    return torch.cat([_eliminated(*part) for part in parts])


def factored_traces(numerator: Tensor, factor: Tensor) -> Tensor:
    """tr(B D⁻¹) for each pair, of D its Cholesky factor."""
    quotient = torch.cholesky_solve(numerator, factor)
    return quotient.diagonal(dim1=1, dim2=2).sum(1)


def cholesky_plus_identity(a: Tensor) -> Tensor:
    """L with LLᵀ = I + A for each A (..., c, c), which are overwritten."""
    a.diagonal(dim1=-2, dim2=-1).add_(1)
    return torch.linalg.cholesky_ex(a).L


def plus_identity(matrices: Tensor) -> Tensor:
    """I + X for each of the matrices X (..., c, c)."""
    return matrices + torch.eye(
        matrices.shape[-1], dtype=matrices.dtype, device=matrices.device
    )


def _eliminated(numerator: Tensor, denominator: Tensor) -> Tensor:
    """tr(B D⁻¹), of whose B the symmetric part counts.

    Row j is eliminated from all of them at once: with d = D[j, j], l = D[j+1:, j] / d
    and q = B[j, j], what is left of D is D − d l lᵀ, what is left of B is B − l bᵀ − b
    lᵀ for b = B[j+1:, j] − q l / 2, and q / d is row j's part of the trace.
    """
    c = numerator.shape[1]
    left_d, left_b = (
        matrices.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        for matrices in (denominator, numerator)
    )
    left_b += numerator.permute(2, 1, 0)
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
    return trace / 2
