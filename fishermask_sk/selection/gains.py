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
# So many entries of small matrices are eliminated at a time, in up to five copies of 16
# MB each; an accelerator has the room, and wants few launches.
ENTRIES_AT_A_TIME = 2**21
ENTRIES_ON_DEVICE = 2**27
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
    return quotient_traces(torch.stack([plus_identity(a), b], dim=3))


def quotient_traces(pairs: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """tr(B D⁻¹) for each pair of matrices D, symmetric, positive definite, and B (n, c,
    c, 2), float64; a dtype may do where time counts.
    """
    n, c = pairs.shape[:2]
    on_cpu = pairs.device.type == "cpu"
    is_unrolled = on_cpu and c <= MAX_UNROLLED_ROWS and n >= MIN_UNROLLED
    entries = ENTRIES_AT_A_TIME if on_cpu else ENTRIES_ON_DEVICE
    found = [
        _eliminated(part.to(dtype)).double()
        if is_unrolled
        else factored_traces(part[..., 1], torch.linalg.cholesky_ex(part[..., 0]).L)
        for part in pairs.split(max(1, entries // c**2))
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def factored_traces(numerator: Tensor, factor: Tensor) -> Tensor:
    """tr(B D⁻¹) for each pair, of D its Cholesky factor."""
    return traces(torch.cholesky_solve(numerator, factor))


def traces(matrices: Tensor) -> Tensor:
    """Of each matrix (n, c, c, ...)."""
    return matrices.diagonal(dim1=1, dim2=2).sum(-1)


def cholesky_plus_identity(a: Tensor) -> Tensor:
    """L with LLᵀ = I + A for each A (..., c, c), which are overwritten."""
    a.diagonal(dim1=-2, dim2=-1).add_(1)
    return torch.linalg.cholesky_ex(a).L


def plus_identity(matrices: Tensor) -> Tensor:
    """I + X for each of the matrices X (..., c, c)."""
    return matrices + torch.eye(
        matrices.shape[-1], dtype=matrices.dtype, device=matrices.device
    )


def _eliminated(pairs: Tensor) -> Tensor:
    """tr(B D⁻¹), row by row of all pairs at once.

    With d = D[j, j], l = D[j+1:, j] / d, and q, r and s the entries of B at [j, j],
    [j+1:, j] and [j, j+1:], what is left of D is D − d l lᵀ, what is left of B is B −
    (r − q l / 2) lᵀ − l (s − q l / 2)ᵀ, and q / d is row j's part of the trace.
    """
    last = pairs.flatten(1).mT.clone(memory_format=torch.contiguous_format)
    left_d, left_b = last.unflatten(0, pairs.shape[1:]).unbind(2)
    trace = torch.zeros_like(left_d[0, 0])
    for j in range(len(left_d)):
        d, q, below = left_d[j, j], left_b[j, j], slice(j + 1, None)
        trace.addcdiv_(q, d)
        column = left_d[below, j]
        factors = column / d
        half = 0.5 * q * factors
        r, s = left_b[below, j] - half, left_b[j, below] - half
        left_d[below, below].addcmul_(column[:, None], factors[None], value=-1)
        left_b[below, below].addcmul_(r[:, None], factors[None], value=-1)
        left_b[below, below].addcmul_(factors[:, None], s[None], value=-1)
    return trace
