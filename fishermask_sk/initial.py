r"""Where the selection starts: the candidates with M_∅⁻¹ and F̄ in the form that suits
their size.

Everything moves to a basis where M_∅ = I and F̄ is diagonal, unless there are many
weights and few candidates, for whom that would cost more than it saves: then M⁻¹ is a
matrix and F̄ a Cholesky factor, or both stay in the form of the embeddings. M and F̄
are divided by the weight b/(L+b) of a pick, which gives the same gains and leaves V as
it is. This file sees tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishermask_sk._collectives import Shard
from fishermask_sk._warnings import warn_user
from fishermask_sk.candidates import MAX_AHEAD, Candidates
from fishermask_sk.gains import plus_identity
from fishermask_sk.operators import (
    DiagonalInformation,
    EmbeddedInformation,
    FactoredInformation,
    InverseInformation,
    blocks,
)

# The eigenvectors of F̄ cost about 20 k³ flops. Up to this many weights that takes less
# than a minute ...
FEW_WEIGHTS = 6_000
# ... and beyond them less than products of all embeddings with two matrices, if there
# are so many rows a weight ...
MIN_ROWS_PER_WEIGHT = 6
# ... but LAPACK counts what they need beside with 32 bits.
MAX_ROTATED = 32_000
# Where λ is this close to the rounding of the information, gains may be rounding too.
ROUNDING_SHARE = 1e-3

TOO_LARGE = (
    "The information is too large beside the damping, for float64 or for the dtype of "
    "the embeddings: raise damping, scale the samples, or look for one whose gradient "
    "is far larger than the others'."
)


def from_matrices(
    embeddings: Tensor,
    pool_information: Tensor,
    labeled_information: Tensor | None,
    weight: float,
    damping: float,
    shard: Shard,
    overwrite: bool = False,
) -> Candidates:
    """From F̄ and the labelled samples' information.

    Parameters
    ----------
    embeddings : Tensor of shape (n, c, k)
        Overwritten, where they are rotated.
    pool_information : Tensor of shape (k, k)
        F̄.
    labeled_information : Tensor of shape (k, k) or None
        Mean over the labelled samples.
    weight : float
        b/(L+b).
    damping : float
        λ.
    shard : Shard
    overwrite : bool
        Work in the information matrices, where they are float64, instead of in copies.

    Returns
    -------
    Candidates
    """
    target, known = (
        matrix
        if matrix is None or (overwrite and matrix.dtype == torch.float64)
        else matrix.double().clone()
        for matrix in (pool_information, labeled_information if weight < 1 else None)
    )
    assert target is not None  # for the type checker
    largest = (
        target.trace()
        if known is None
        else target.trace() + known.trace() * (1 - weight)
    )
    _check_rounding(largest, damping)
    target /= weight
    if known is not None:
        known *= (1 - weight) / weight
    n_weights, n_rows = len(target), embeddings.shape[1]
    if not _is_rotated(shard.total * n_rows, n_weights):
        base = _inverse(
            torch.zeros_like(target) if known is None else known, damping / weight
        )
        inverse = InverseInformation(base, n_weights, MAX_AHEAD * n_rows)
        return Candidates(embeddings, FactoredInformation(target), inverse, shard)
    basis, eigenvalues = shard.from_first(
        lambda: _basis(target, known, damping / weight), target, target[0]
    )
    basis = basis.to(embeddings.dtype)
    for part in blocks(embeddings):
        embeddings[part] = (embeddings[part].to(basis) @ basis).to(embeddings.device)
    del basis
    identity = target.zero_()  # its memory, which nothing else needs any more
    identity.diagonal().fill_(1)
    inverse = InverseInformation(identity, n_weights, MAX_AHEAD * n_rows)
    return Candidates(
        embeddings, DiagonalInformation(eigenvalues), inverse, shard, whitened=True
    )


def from_rows(
    embeddings: Tensor,
    labeled: Tensor | None,
    weight: float,
    damping: float,
    n_steps: int,
    information: Tensor | None = None,
) -> Candidates:
    """From the embeddings alone, without any k×k matrix, for many weights and few
    samples.

    Parameters
    ----------
    embeddings : Tensor of shape (n, c, k)
    labeled : Tensor of shape (L, c, k) or None
    weight : float
        b/(L+b).
    damping : float
        λ.
    n_steps : int
        How many picks and removals will add columns to M⁻¹.
    information : Tensor of shape (m, c, k), optional
        F̄ is the sum of its VᵀV; by default the mean over pool and labelled samples.

    Returns
    -------
    Candidates
    """
    n_samples, n_rows, n_weights = embeddings.shape
    n_labeled = 0 if labeled is None else len(labeled)
    labeled = labeled if n_labeled else None
    parts, n_averaged = [embeddings], n_samples + n_labeled
    if information is not None:
        parts, n_averaged = [information], 1
    elif labeled is not None:
        parts.append(labeled)
    like = torch.empty(0, dtype=torch.float64, device=parts[-1].device)
    pool = EmbeddedInformation(parts, 1 / n_averaged / weight)
    largest = pool.trace(like)
    base = like.new_tensor(weight / damping)
    inverse = InverseInformation(base, n_weights, (n_labeled + n_steps) * n_rows)
    if labeled is not None:
        known = EmbeddedInformation([labeled], (1 - weight) / weight / n_labeled)
        largest = largest + known.trace(like)
        inverse.subtract(
            _columns(inverse, labeled.double().flatten(0, 1) * known.scale**0.5), 1
        )
    _check_rounding(largest * weight, damping)
    return Candidates(embeddings, pool, inverse, Shard(n_samples))


def _is_rotated(n_rows: int, n_weights: int) -> bool:
    """Whether all embeddings, so many rows, move to another basis."""
    is_cheaper = n_weights <= FEW_WEIGHTS or n_rows >= MIN_ROWS_PER_WEIGHT * n_weights
    return is_cheaper and n_weights <= MAX_ROTATED


def _check_rounding(largest: Tensor, damping: float) -> None:
    """`largest` is the trace of all information: it must be finite, and should not
    drown λ.
    """
    if not bool(torch.isfinite(largest)):
        raise FloatingPointError(
            f"The information has the trace {largest.item()}. {TOO_LARGE}"
        )
    if float(largest) * torch.finfo(torch.float64).eps > ROUNDING_SHARE * damping:
        warn_user(
            f"damping={damping:g} is {damping / float(largest):.0e} of the trace of "
            "the information: late gains are lost in the rounding of float64, and "
            "what is picked then is arbitrary. Raise damping."
        )


def _basis(
    pool_information: Tensor, known: Tensor | None, damping: float
) -> tuple[Tensor, Tensor]:
    """R with Rᵀ(λI + known)R = I and RᵀF̄R diagonal, and that diagonal, falling. Both
    matrices are overwritten.
    """
    if known is None:
        values, vectors = torch.linalg.eigh(pool_information)
        return vectors.flip(1) / damping**0.5, values.flip(0).clamp_min(0) / damping
    known.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(known)
    if bool(failed):  # eigenvalues below λ are rounding: `known` has none below zero
        values, vectors = torch.linalg.eigh(known)
        root = vectors / values.clamp_min(damping).sqrt()
        values, vectors = torch.linalg.eigh(root.mT @ pool_information @ root)
        return root @ vectors.flip(1), values.flip(0).clamp_min(0)
    known.copy_(factor)
    del factor
    half = torch.linalg.solve_triangular(known, pool_information, upper=False)
    pool_information.copy_(torch.linalg.solve_triangular(known, half.mT, upper=False))
    del half
    values, vectors = torch.linalg.eigh(pool_information)
    return torch.linalg.solve_triangular(
        known.mT, vectors.flip(1), upper=True
    ), values.flip(0).clamp_min(0)


def _inverse(known: Tensor, damping: float) -> Tensor:
    """(λI + known)⁻¹, in the memory of `known`."""
    known.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(known)
    if not bool(failed):
        return known.copy_(torch.cholesky_inverse(factor))
    del factor  # its memory goes first
    values, vectors = torch.linalg.eigh(known)
    return known.copy_((vectors / values.clamp_min(damping)) @ vectors.mT)


def _columns(inverse: InverseInformation, rows: Tensor) -> Tensor:
    """U (k, m) with (M + RᵀR)⁻¹ = M⁻¹ − U Uᵀ, for rows R (m, k): Woodbury's
    identity.
    """
    p = inverse.times(rows)
    factor, _ = torch.linalg.cholesky_ex(plus_identity(p @ rows.mT))
    return torch.linalg.solve_triangular(factor, p, upper=False).mT
