"""Leading directions of an information matrix F (k, k) that is never formed.

F = Σ RᵀR over blocks of rows R (m, k), so that F Q = Σ Rᵀ(R Q) for a thin Q (k, r), one
block after the other. Subspace iteration (Halko, Martinsson and Tropp, "Finding
structure with randomness", SIAM Review 2011, algorithms 4.4 and 5.3) takes a few such
products: Q ← qr(F Q), and at last the eigenvectors of QᵀFQ. Sums over blocks are sums
over processes as well, so that the directions do not depend on who holds which rows.
Peak memory is three matrices (k, r), r a little more than the directions wanted.

This file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Products with F, and directions more than are wanted, which make the last ones right.
PRODUCTS, SPARE = 3, 10


@dataclass(frozen=True)
class Auto:
    """What `n_components="auto"` keeps; other numbers are for tests and studies.

    Of a ResNet-18 of width 64 on FashionMNIST (k = 22,345, 256 drawn samples) the
    17,225 weights beside the head had 209 directions above 1.2e-4 of the largest; these
    held 97.4 % of the trace of samples that had not found them.

    Attributes
    ----------
    exact : int
        Masks of up to so many weights keep all. Five k×k matrices of these take 1.3
        GiB.
    held : int
        A head of up to so many weights, held as a product, is kept whole, and so are
        `exact` others where all are no more than that: five k×k matrices take 5.4 GiB.
    most : int
        Of the others at most so many leading directions are kept.
    share : float
        And no more than hold this share of the information's trace.
    """

    exact: int = 6000
    held: int = 12_000
    most: int = 1000
    share: float = 0.999


def n_kept_directions(
    k: int, n_head: int, n_components: int | Auto | None, n_rows_in_all: int
) -> tuple[int, int]:
    """In which directions the selection works: so many weights of the head, held as a
    product, and at most so many directions of all other weights.

    Parameters
    ----------
    k : int
    n_head : int
        How many of the k weights a product with the head stands for; 0 for none.
    n_components : int, Auto or None
        So many of all k weights, whatever could be a product; few for large k; all.
    n_rows_in_all : int
        Of all samples' embeddings: they span no more directions than that.

    Examples
    --------
    >>> n_kept_directions(20_000, 5_130, Auto(), 10**6)
    (5130, 1000)
    >>> n_kept_directions(20_000, 5_130, 500, 10**6)
    (0, 500)
    """
    rest, auto = k - n_head, n_components
    if auto is None:
        return n_head, rest
    if not isinstance(auto, Auto):
        return (n_head, rest) if auto >= k else (0, int(auto))
    if k <= auto.exact or n_rows_in_all <= auto.most:
        return n_head, rest
    if not 0 < n_head <= auto.held:
        return 0, auto.most
    few = rest <= auto.exact and k <= auto.held
    return n_head, rest if few else min(rest, auto.most)


def leading(times: Callable[[Tensor], Tensor], start: Tensor, n: int) -> Tensor:
    """The n leading eigenvectors of a matrix F ≥ 0, largest first; fewer where its rank
    is lower.

    Parameters
    ----------
    times : callable (Tensor of shape (k, r)) -> Tensor of shape (k, r)
        The product with F.
    start : Tensor of shape (k, r)
        Random, with n or more columns.
    n : int

    Returns
    -------
    Tensor of shape (k, n)

    Examples
    --------
    >>> import torch
    >>> F = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    >>> leading(lambda Q: F @ Q, torch.eye(3), 2).abs().argmax(0)
    tensor([1, 2])
    """
    basis = image = start
    for _ in range(PRODUCTS):
        basis = torch.linalg.qr(image).Q
        image = times(basis)
    values, vectors = torch.linalg.eigh((basis.T @ image).double())
    values, vectors = values.flip(0)[:n], vectors.flip(1)[:, :n]
    # Rounding mixes into a direction of λ no more than a square root of λ₁ λ, for the
    # leading ones are orthogonal to it: what it leaves where F is zero is far less.
    rounding = torch.finfo(basis.dtype).eps * values[:1]
    return basis @ vectors[:, values > rounding].to(basis)


def share_held(parts: Tensor, total: float, share: float) -> tuple[int, float]:
    """How many leading directions hold a share of the trace, or all, and what they
    hold.

    Parameters
    ----------
    parts : Tensor of shape (r,)
        The trace along each direction, of rows that did not find them.
    total : float
        Their whole trace.
    share : float

    Examples
    --------
    >>> import torch
    >>> share_held(torch.tensor([6.0, 3.0, 0.5]), 10.0, 0.9)
    (2, 0.9)
    """
    held = (parts.double().cumsum(0) / total if total else parts.double() * 0).tolist()
    enough = [i for i, value in enumerate(held) if value >= share - 1e-12]
    n = enough[0] + 1 if enough else len(held)
    return n, held[n - 1] if held else 0.0
