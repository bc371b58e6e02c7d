r"""What the selection keeps of every candidate where there are few rows and many
weights: their kernel, and no k×k matrix.

.. math:: K = V M^{-1} W^\top, \qquad A_x = V_x M^{-1} V_x^\top, \qquad B_x = w
    \sum_{y} (V_x M^{-1} W_y^\top)(V_x M^{-1} W_y^\top)^\top,

with the rows V (n·c, k) of the candidates and the rows W of the candidates and of all
samples that F̄ is the mean of. In the words of Gaussian processes, K is the posterior
covariance of the scores, and picking i conditions on its c scores:

.. math:: K \to K - K_{\cdot i} (I + A_i)^{-1} K_{i \cdot}.

M and F̄ come divided by the weight b/(L+b) of a pick. Memory: one matrix of
n·c × (rows of W), float64. This file sees tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishermask_sk.distributed import Best
from fishermask_sk.selection.embeddings import Embeddings, blocks, first_copies
from fishermask_sk.selection.gains import plus_identity, trace_reductions


class KernelCandidates:
    """The kernel of the candidates, all of them here, under picks.

    Parameters
    ----------
    embeddings : Embeddings
    target : list of Embeddings
        F̄ is `scale` times the sum of their VᵀV.
    scale : float
    labeled : Embeddings or None
        M_∅ is λI and `known_scale` times the sum of their VᵀV.
    known_scale, damping : float

    Attributes
    ----------
    error : float
        What rounding may have left in a gain.
    """

    leader: Best | None = None

    def __init__(
        self,
        embeddings: Embeddings,
        target: list[Embeddings],
        scale: float,
        labeled: Embeddings | None,
        known_scale: float,
        damping: float,
    ) -> None:
        self.embeddings, self.target, self.scale = embeddings, target, scale
        self.labeled, self.known_scale, self.damping = labeled, known_scale, damping
        own = embeddings.n * embeddings.c
        # Where the candidates are part of F̄ their columns serve twice.
        others = [each for each in target if each is not embeddings]
        self._of_target = slice(0 if len(others) < len(target) else own, None)
        columns = [embeddings, *others]
        self.kernel = _kernel([embeddings], columns, damping)
        if labeled is not None:
            between = _kernel([labeled], columns, damping).mul_(known_scale**0.5)
            among = _kernel([labeled], [labeled], damping).mul_(known_scale)
            factor, _ = torch.linalg.cholesky_ex(plus_identity(among))
            half = torch.linalg.solve_triangular(factor, between, upper=False)
            self.kernel.addmm_(half[:, :own].mT, half, alpha=-1)
        largest = self._own_blocks().diagonal(dim1=1, dim2=2).sum(1).amax()
        self._noise = 16 * torch.finfo(torch.float64).eps * float(largest)
        self.error = 0.0
        self._first = first_copies(embeddings)
        self._picked = torch.zeros_like(self._first, dtype=torch.bool)

    def gains(self) -> Tensor:
        """The trace reduction of every candidate (n,), −∞ for those that are picked."""
        n, c = self.embeddings.n, self.embeddings.c
        rows = self.kernel[:, self._of_target].unflatten(0, (n, c))
        b = (rows @ rows.mT).mul_(self.scale)
        self.error = self._noise * float(b.diagonal(dim1=1, dim2=2).sum(1).amax())
        found = trace_reductions(self._own_blocks(), b)[self._first]
        return found.masked_fill(self._picked, -torch.inf)

    def add(self, position: Tensor, place: int | None) -> None:
        """Condition on a pick."""
        self._picked.index_fill_(0, position, True)
        c = self.embeddings.c
        one = position.reshape(1)
        row = self.kernel.unflatten(0, (-1, c)).index_select(0, one)[0]
        a = self._own_blocks().index_select(0, one)[0]
        factor, _ = torch.linalg.cholesky_ex(plus_identity(a))
        half = torch.linalg.solve_triangular(factor, row, upper=False)
        self.kernel.addmm_(half[:, : len(self.kernel)].mT, half, alpha=-1)

    def is_settled(self, gain: float) -> bool:
        """Always: conditioning is an elimination, as good as one from a fresh start."""
        return True

    def starting_point(self, picks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The picks' embeddings (m, c, r), F̄ and M_∅ in float64, for the backward
        pass: in an orthonormal basis of what picks and labelled samples span, for
        outside it M never changes.
        """
        v = self.embeddings.rows(picks)
        rows = [v.flatten(0, 1)]
        if self.labeled is not None:
            rows += [_all_rows(self.labeled)]
        basis = torch.linalg.qr(torch.cat(rows).mT).Q
        information = torch.stack([_information(each, basis) for each in self.target])
        information = information.sum(0) * self.scale
        known = None
        if self.labeled is not None:
            known = _information(self.labeled, basis) * self.known_scale
            known.diagonal().add_(self.damping)
        return v @ basis, information, known

    def _own_blocks(self) -> Tensor:
        """A of every candidate (n, c, c)."""
        n, c = self.embeddings.n, self.embeddings.c
        square = self.kernel[:, : n * c].view(n, c, n, c)
        return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _kernel(
    rows: list[Embeddings], columns: list[Embeddings], damping: float
) -> Tensor:
    """V Wᵀ / λ, a block of W at a time."""
    like = torch.empty(0, dtype=torch.float64, device=rows[0].device)
    heights, widths = ([e.n * e.c for e in each] for each in (rows, columns))
    result = like.new_empty(sum(heights), sum(widths))
    start = 0
    for each in columns:
        for part in blocks(each, each.c * each.k):
            w = _all_rows(each.part(part)).mT / damping
            place = slice(start, start + w.shape[1])
            top = 0
            for v in rows:
                height = v.n * v.c
                result[top : top + height, place] = v.times(w).flatten(0, 1)
                top += height
            start = place.stop
    return result


def _information(embeddings: Embeddings, basis: Tensor) -> Tensor:
    """The sum of VᵀV in a basis (k, r)."""
    total = basis.new_zeros(basis.shape[1], basis.shape[1])
    for part in blocks(embeddings):
        rows = embeddings.part(part).times(basis).flatten(0, 1)
        total.addmm_(rows.mT, rows)
    return total


def _all_rows(embeddings: Embeddings) -> Tensor:
    every = torch.arange(embeddings.n, device=embeddings.device)
    return embeddings.rows(every).flatten(0, 1)
