r"""What the selection keeps of every candidate, and how a pick changes it, where M and
F̄ are k×k matrices.

.. math:: A = V M^{-1} V^\top, \qquad B = V M^{-1} \bar F M^{-1} V^\top
    \qquad (n, c, c), \text{ float64}.

Plainly, both are made anew for every pick, N·c·k² multiplications each. The fast form:
picking i, with the old M⁻¹ and :math:`U = M^{-1} V_i^\top \mathrm{chol}(I +
A_i)^{-\top}` (k, c), :math:`G = U^\top \bar F U`, :math:`H = M^{-1} \bar F U -
\frac12 U G` and :math:`Y = V U`, changes

.. math:: A \to A - Y Y^\top, \qquad B \to B - Y (VH)^\top - (VH) Y^\top, \qquad
    M^{-1} \to M^{-1} - U U^\top,

so that a pick costs one product of all embeddings with [U, H]. The weights' own basis
is kept: no embedding is ever rewritten. M and F̄ come divided by the weight b/(L+b) of
a pick, which leaves V as it is. This file sees tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishermask_sk.distributed import Shard
from fishermask_sk.selection.embeddings import Embeddings, blocks
from fishermask_sk.selection.gains import trace_reductions

# The product of a pick leaves errors in all gains; their sum is estimated, at 1 to 100
# times of what was measured. While it is below this share of a gain, products are
# float32 ...
PASS_LIMIT = 1e-4
# ... and beyond this one M⁻¹, A and B are made afresh, which costs as much as hundreds
# of products in float64.
ERROR_LIMIT = 1e-3
# Picks whose columns wait beside M⁻¹ before they are folded into it.
FOLDED_PICKS = 16


class Candidates:
    """A and B of every candidate, with the M⁻¹ and F̄ that they come from.

    Parameters
    ----------
    embeddings : Embeddings
    information : Tensor of shape (k, k), float64
        F̄.
    known : Tensor of shape (k, k), float64, or None
        M_∅, where samples are labelled.
    damping : float
        λ: M_∅ = λI where `known` is None, and no eigenvalue of it is smaller.
    shard : Shard
        Where the candidates of several processes are. Positions count through all of
        them; M⁻¹ and F̄ are the same everywhere, A and B are those of the candidates
        here.
    exact : bool
        Every product is float64.

    Attributes
    ----------
    error : float
        What rounding may have left in a gain.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        information: Tensor,
        known: Tensor | None,
        damping: float,
        shard: Shard,
        exact: bool,
    ) -> None:
        self.embeddings, self.information, self.known = embeddings, information, known
        self.damping, self.shard, self.exact = damping, shard, exact
        self.picked: list[Tensor] = []
        n, c = embeddings.n, embeddings.c
        self._both = information.new_empty(2, n, c, c)
        self.a, self.b = self._both
        for part in blocks(embeddings):
            self.a[part] = embeddings.part(part).quadratic()
        self._longest = float(self._largest_traces()[0])
        self.refresh()

    def gains(self) -> Tensor:
        """The trace reduction of every candidate here (n,)."""
        return trace_reductions(self.a, self.b)

    def refresh(self) -> None:
        """M⁻¹, A and B from their definitions; at most four k×k matrices are held.

        With M = LLᵀ, B is made from :math:`L^{-\\top} (L^{-1} \\bar F L^{-\\top})
        L^{-1}`: rounding then has the shape of M⁻¹ on both sides, and stays below the
        condition of M times that of float64.
        """
        k, c = self.embeddings.k, self.embeddings.c
        inverse = self.information.new_tensor(1 / self.damping)
        self.inverse = _Inverse(inverse, k, c)  # the old one's memory goes first
        factor: Tensor | None = None
        if self.known is None and not self.picked:
            middle = self.information / self.damping**2
            self.a /= self.damping
        else:
            factor = self._factor()
            # Symmetric, and transposed as LAPACK wants it: nothing is copied below.
            middle = self.information.clone(memory_format=torch.contiguous_format).mT
            for triangle, upper, left in (
                (factor, False, True),
                (factor.mT, True, False),
                (factor.mT, True, True),
                (factor, False, False),
            ):
                torch.linalg.solve_triangular(
                    triangle, middle, upper=upper, left=left, out=middle
                )
        noise = torch.finfo(torch.float64).eps * float(middle.diagonal().amax())
        self.error, self._n_fresh = noise * self._longest, len(self.picked)
        self._fill(self.b, middle)
        del middle
        if factor is not None:
            inverse = torch.cholesky_inverse(factor)
            del factor
            self._fill(self.a, inverse)
            self.inverse = _Inverse(inverse, k, c)

    def add(self, position: Tensor, gain: float) -> None:
        """Bring every candidate up to date with a pick."""
        v = self.shard.take(position.reshape(1), self.embeddings.rows)[0].double()
        p = self.inverse.times(v)
        gram = p @ v.mT
        gram.diagonal().add_(1)
        factor, _ = torch.linalg.cholesky_ex(gram)
        u = torch.linalg.solve_triangular(factor, p, upper=False).mT
        f_u = self.information @ u
        g = f_u.mT @ u
        h = torch.addmm(self.inverse.times(f_u.mT).mT, u, g, alpha=-0.5)
        self.inverse.subtract(u)
        self.picked.append(position)
        right = torch.cat([u, h], dim=1)
        rounding = self._rounding_of_pass(right, g.diagonal())
        in_float32 = self.error + torch.finfo(torch.float32).eps * rounding
        if self.exact or in_float32 > PASS_LIMIT * gain:
            self.error += torch.finfo(torch.float64).eps * rounding
        else:
            self.error = in_float32
            right = right.to(self.embeddings.dtype)
        for part in blocks(self.embeddings):
            products = self.embeddings.part(part).times(right).unflatten(2, (2, -1))
            y, both = products[:, :, 0], products.flatten(1, 2)
            y_y, y_vh = (y @ both.mT).unflatten(2, (-1, 2)).unbind(3)
            self.a[part] -= y_y
            self.b[part] -= y_vh + y_vh.mT

    def _rounding_of_pass(self, right: Tensor, g: Tensor) -> float:
        """What the products of a pick may leave in a gain, in units of the last digit.

        An entry of Y = VU is off by |V||U| over the root of k, as a sum of k terms
        whose errors are independent, and changes B by twice as much times VH, whose
        square is at most tr B tr G; and the other way round.
        """
        norms = torch.linalg.vector_norm(right.unflatten(1, (2, -1)), dim=(0, 2))
        numbers = torch.cat([self._largest_traces(), norms, g])
        # One look, as in `Shard.best`.
        a, b, of_u, of_h, *of_g = numbers.tolist()
        length = 2 * (self._longest / self.embeddings.k) ** 0.5
        # Rounding may leave less than nothing of a trace.
        roots = [max(x, 0.0) ** 0.5 for x in (b * sum(of_g), a)]
        return length * (of_u * roots[0] + of_h * roots[1])

    def is_stale(self, gain: float) -> bool:
        """Whether too much of a gain this small may be rounding, and a pick was made
        since the last fresh start.
        """
        return self.error > ERROR_LIMIT * gain and len(self.picked) > self._n_fresh

    def starting_point(self, picks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The picks' embeddings (m, c, k), F̄ and M_∅ in float64, for the backward
        pass.
        """
        v = self.shard.take(picks, self.embeddings.rows).double()
        return v, self.information, self.known

    def _fill(self, target: Tensor, middle: Tensor) -> None:
        for part in blocks(self.embeddings):
            target[part] = self.embeddings.part(part).quadratic(middle)

    def _factor(self) -> Tensor:
        """L with LLᵀ = M, from M_∅ and the picks."""
        k = self.embeddings.k
        if self.known is None:
            m = torch.eye(k, dtype=self.a.dtype, device=self.a.device) * self.damping
        else:
            m = self.known.clone()
        step = max(1, k // self.embeddings.c)
        for some in torch.stack(self.picked).split(step) if self.picked else ():
            v = self.shard.take(some, self.embeddings.rows).to(m).flatten(0, 1)
            m.addmm_(v.mT, v)
        return cholesky(m, self.damping)

    def _largest_traces(self) -> Tensor:
        """The largest trace of an A, and of a B (2,)."""
        traces = self._both.diagonal(dim1=2, dim2=3).sum(2)
        return self.shard.largest(traces.mT)


class _Inverse:
    """M⁻¹ = base − Q Qᵀ: every pick adds columns to Q, and they are folded into the
    base when there are many.

    Parameters
    ----------
    base : Tensor of shape (k, k), or () for that multiple of the identity
    k, c : int
    """

    def __init__(self, base: Tensor, k: int, c: int) -> None:
        self.base, self.k = base, k
        self._columns = base.new_empty(k, 0)
        self._room = FOLDED_PICKS * c

    def times(self, rows: Tensor) -> Tensor:
        """P M⁻¹, for rows P (m, k)."""
        product = rows @ self.base if self.base.ndim else rows * self.base
        spent = rows @ self._columns
        return torch.addmm(product, spent, self._columns.mT, alpha=-1)

    def subtract(self, u: Tensor) -> None:
        """M⁻¹ ← M⁻¹ − U Uᵀ, for U (k, c)."""
        self._columns = torch.cat([self._columns, u], dim=1)
        if self._columns.shape[1] >= self._room:
            if not self.base.ndim:
                eye = torch.eye(self.k, dtype=u.dtype, device=u.device)
                self.base = eye * self.base
            self.base.addmm_(self._columns, self._columns.mT, alpha=-1)
            self._columns = self._columns[:, :0]


def cholesky(m: Tensor, damping: float) -> Tensor:
    """L with LLᵀ = M (k, k), which is overwritten; eigenvalues below `damping` are
    rounding, and are raised to it.
    """
    factor, failed = torch.linalg.cholesky_ex(m)
    if not bool(failed):
        return factor
    del factor  # its memory goes first
    values, vectors = torch.linalg.eigh(m)
    m.copy_((vectors * values.clamp_min(damping).sqrt()).mT)
    return torch.linalg.qr(m, mode="r").R.mT
