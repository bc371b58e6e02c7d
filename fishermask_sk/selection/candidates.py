r"""What the selection keeps of every candidate, and how a pick changes it, where M and
F̄ are k×k matrices.

.. math:: A = V M^{-1} V^\top, \qquad B = V Z V^\top \qquad (n, c, c), \qquad
    Z = M^{-1} \bar F M^{-1}.

Plainly, both are made anew for every pick, N·c·k² multiplications each. The fast form:
picking i, with :math:`U = M^{-1} V_i^\top \mathrm{chol}(I + A_i)^{-\top}` (k, c),
:math:`H = 2 Z V_i^\top \mathrm{chol}(I + A_i)^{-\top} - U G`, :math:`G = U^\top \bar F
U` and :math:`Y = V U`, changes

.. math:: A \to A - Y Y^\top, \qquad B \to B - Y (VH)^\top, \qquad
    M^{-1} \to M^{-1} - U U^\top, \qquad Z \to Z - \tfrac12 (U H^\top + H U^\top),

so that a pick costs one product of all embeddings with [U, H]; of B the symmetric part
counts, and is left as it comes. M⁻¹ and Z are float64; the product need not be: what
rounding may have left in each gain is estimated, and the few candidates whose gain may
be the largest are looked at again, by M⁻¹ and Z themselves. The weights' own basis is
kept: no embedding is ever rewritten. M and F̄ come divided by the weight b/(L+b) of a
pick, which leaves V as it is. This file sees tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishermask_sk.distributed import Best, Shard
from fishermask_sk.selection.embeddings import Embeddings, blocks, first_copies
from fishermask_sk.selection.gains import (
    cholesky_plus_identity,
    equal_from,
    quotient_traces,
    traces,
)

# So many of those with the largest gains are looked at together, as long as others may
# have a larger one. More than the last of these cannot be told apart. On a processor
# most picks need one look, and an accelerator had better look once.
LOOKS = {"cpu": (1, 3, 8, 64)}
ACCELERATOR_LOOKS = (8, 64)
# Where A and B are made afresh, because looks have cost as much as that does, after
# fewer picks than this, they are float64 from then on.
FEW_PICKS = 16
# Where rounding may take more than this from the I of I + A, all products are float64:
# a float32 gain would tell nothing.
MOST_OF_IDENTITY = 0.1
# Beyond this share of a gain M⁻¹ and Z are made afresh, which costs as much as hundreds
# of picks. Their error is estimated, at 1 to 100 times of what was measured.
ERROR_LIMIT = 1e-4
# Picks whose columns wait beside M⁻¹ and Z before they are folded into them.
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
        What rounding may have left in a gain that was looked at.
    leader : Best or None
        Whose gain is ahead of all others, where that was seen as they were looked at.
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
        self.damping, self.shard = damping, shard
        self.dtype = torch.float64 if exact else embeddings.dtype
        self.picked: list[Tensor] = []
        self.error = 0.0
        n, c = embeddings.n, embeddings.c
        self._worth_filling = n * embeddings.width / (2 * c * embeddings.k)
        self._both = information.new_empty(n, c, c, 2)  # I + A, and B
        self._both[..., 0] = embeddings.quadratic()
        self._lengths = traces(self._both)[:, 0].sqrt()
        self._per_term = self._lengths / embeddings.k**0.5
        self.leader: Best | None = None
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._places = torch.arange(n, device=embeddings.device)
        self._first = first_copies(embeddings)
        self._has_copies = bool((self._first != self._places).any())
        self._of_weights = _OfWeights(embeddings.k, c, like=information)
        self.refresh()

    def refresh(self) -> None:
        """M⁻¹, Z, A and B from their definitions; at most four k×k matrices are held.

        With M = LLᵀ, Z is :math:`L^{-\\top} (L^{-1} \\bar F L^{-\\top}) L^{-1}`:
        rounding then has the shape of M⁻¹ on both sides, and stays below the condition
        of M times that of float64.
        """
        multiple = 1 / self.damping if self._is_identity else None
        inverse, z = self._of_weights.cleared(multiple)
        if self._is_identity:
            torch.div(self.information, self.damping**2, out=z)
            a = self._both[..., 0]
            a.div_(self.damping).diagonal(dim1=1, dim2=2).add_(1)
        else:
            # Symmetric, and transposed as LAPACK wants it: nothing is copied below.
            factor, middle = inverse.mT, z.mT
            self._factor(z, out=factor)
            z.copy_(self.information)
            for triangle, upper, left in (
                (factor, False, True),
                (factor.mT, True, False),
                (factor.mT, True, True),
                (factor, False, False),
            ):
                torch.linalg.solve_triangular(
                    triangle, middle, upper=upper, left=left, out=middle
                )
            torch.cholesky_inverse(factor, out=factor)
        squares = self.shard.largest(self._lengths[:, None].square())[0]
        self._noise = float(z.diagonal().amax() * squares)
        self._n_fresh = len(self.picked)
        self._fill()

    @property
    def _is_identity(self) -> bool:
        """Whether M is λI."""
        return self.known is None and not self.picked

    def _fill(self) -> None:
        """A and B by M⁻¹ and Z, and what rounding may leave of them in a gain, which
        may be so many times too small and so much.
        """
        inverse, z = self._of_weights.folded()
        a, b = self._both.unbind(3)
        b.copy_(self.embeddings.quadratic(z, self.dtype))
        if not self._is_identity:
            a.copy_(self.embeddings.quadratic(inverse, self.dtype))
            a.diagonal(dim1=1, dim2=2).add_(1)
        # What X = M⁻¹ or Z leaves in V X Vᵀ is the rounding of |V| |X Vᵀ|, where X Vᵀ
        # is no longer than the root of |X| tr V X Vᵀ, and of its own terms.
        norm_z = torch.linalg.matrix_norm(z)
        norms = torch.stack([norm_z.new_tensor(1 / self.damping), norm_z])
        sizes = traces(self._both)
        sizes[:, 0] -= self.embeddings.c
        roots = (sizes.clamp_min(0) * norms).sqrt()
        lost = self._lengths[:, None] * (roots + norms * self._per_term[:, None])
        lost *= torch.finfo(self.dtype).eps
        of_a, self._rounding = lost.mT.contiguous()
        self._factors = 1 + of_a
        of_identity = float(self.shard.largest(of_a[:, None]))
        if self.dtype != torch.float64 and of_identity > MOST_OF_IDENTITY:
            self.dtype = torch.float64
            self._fill()
            return
        self._lead = self._first
        if self.picked:
            self._close(torch.stack(self.picked))
        self._worst = self.shard.largest(self._rounding[:, None])
        self._n_filled, self._n_looks = len(self.picked), 0

    def _close(self, positions: Tensor) -> None:
        """These are not to be picked."""
        self._rounding.index_fill_(0, self.shard.own(positions), -torch.inf)
        if self._has_copies:
            # The lowest that is not picked stands for all copies of it.
            is_open, n = ~self._rounding.isneginf(), self.embeddings.n
            places = torch.where(is_open, self._places, n)
            lowest = places.scatter_reduce(0, self._first, places, "amin")
            self._lead = torch.where(is_open, lowest[self._first], self._places)

    def gains(self) -> Tensor:
        """The trace reduction of every candidate here (n,), −∞ for those that are
        picked; of those that are not among the largest an upper bound.
        """
        found = self._gains()
        return found[self._lead] if self._has_copies else found

    def _gains(self) -> Tensor:
        """Of copies that of the lowest alone."""
        n = self.embeddings.n
        while n:
            if self.dtype != torch.float64 and self._n_looks > self._worth_filling:
                self._sharpen()
            found = quotient_traces(self._both, self.dtype)
            upper = torch.addcmul(self._rounding, found, self._factors)
            # No number: of one that is picked, or that rounding leaves no gain.
            upper.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
            if self._has_copies:
                upper.masked_fill_(self._lead != self._places, -torch.inf)
            if self._look(upper):
                return upper
            if self.dtype == torch.float64:
                return found.masked_fill(upper.isneginf(), -torch.inf)
            self._sharpen()
        return self._lengths

    def _sharpen(self) -> None:
        """A and B afresh; where they were a few picks ago, in float64 from now on."""
        if len(self.picked) - self._n_filled < FEW_PICKS:
            self.dtype = torch.float64
        self._fill()

    def _look(self, upper: Tensor) -> bool:
        """Gains by M⁻¹ and Z of the largest of these upper bounds, until no other can
        be as large; or False, if they are many. One that is ahead of all is the leader;
        else these gains are put in the place of their bounds.
        """
        looks = LOOKS.get(upper.device.type, ACCELERATOR_LOOKS)
        bounds, places = upper.topk(min(len(upper), looks[-1] + 1))
        self._seen, self.leader = {}, None
        gains: list[float] = []
        exact: list[Tensor] = []
        for start, end in zip((0, *looks), looks, strict=False):
            few = places[start:end]
            both, factor, g = self._seen_at(self.embeddings.rows(few))
            exact.append(traces(g))
            numbers = torch.cat([self._worst, few, exact[-1], bounds[start : end + 1]])
            (worst, *numbers_of_few), n = numbers.tolist(), len(few)
            for i, place in enumerate(numbers_of_few[:n]):
                self._seen[int(place)] = both[i], factor[i], g[i]
            # Bounds descend: those that are picked come last.
            n_open = n - numbers_of_few[2 * n : 3 * n].count(-torch.inf)
            gains += numbers_of_few[n : n + n_open]
            ratio = torch.finfo(torch.float64).eps / torch.finfo(self.dtype).eps
            self.error = torch.finfo(torch.float64).eps * self._noise + ratio * worst
            largest = max([-torch.inf, *gains])
            level = equal_from(largest, self.error, self.embeddings.dtype)
            self._n_looks += n if start else 0
            best_other = numbers_of_few[3 * n :]
            if not best_other or not best_other[0] >= level:
                break
        else:
            return False
        found = exact[0] if len(exact) == 1 else torch.cat(exact)
        is_ahead = 0 < largest < torch.inf and sum(not g < level for g in gains) == 1
        if is_ahead and not self._has_copies and not self.shard.is_shared:
            i, seen = gains.index(largest), list(self._seen)
            self.leader = Best(places[i], found[i], largest, False, seen[i])
        else:
            upper.index_copy_(0, places[: len(gains)], found[: len(gains)])
        return True

    def _seen_at(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some V (m, c, k): V [M⁻¹, Z], L with LLᵀ = I + A, and G = L⁻¹ B L⁻ᵀ, whose
        trace is the gain.
        """
        both = self._of_weights.times(v.flatten(0, 1)).unflatten(0, v.shape[:2])
        a, b = (both.flatten(1, 2) @ v.mT).unflatten(1, (-1, 2)).unbind(2)
        factor = cholesky_plus_identity(a)
        half = torch.linalg.solve_triangular(factor, b, upper=False)
        g = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        return both, factor, g

    def add(self, position: Tensor, place: int | None) -> None:
        """Bring every candidate up to date with a pick."""
        if place in self._seen:
            both, factor, g = self._seen[place]
        else:
            v = self.shard.take(position.reshape(1), self.embeddings.rows)
            both, factor, g = (each[0] for each in self._seen_at(v))
        half = torch.linalg.solve_triangular(factor, both.flatten(1), upper=False)
        u, h = half.tensor_split(2, dim=1)
        columns = self._of_weights.subtract(u, h, g).to(self.dtype)  # U, H and U again
        u_h = columns[:2].flatten(0, 1).mT
        self.picked.append(position)
        # An entry of Y = VU is off by |V||U| over the root of k, as a sum of k terms
        # whose errors are independent; a change of B by that times |VH|, and so on.
        norms = torch.linalg.vector_norm(columns[1:], dim=(1, 2))[:, None]
        eps = 8**0.5 * torch.finfo(self.dtype).eps
        for part in blocks(self.embeddings):
            y_h = self.embeddings.part(part).times(u_h).unflatten(2, (2, -1))
            factors = y_h[:, :, 0], y_h.flatten(1, 2).mT
            both = self._both[part].flatten(2)
            if y_h.dtype == both.dtype:
                both.baddbmm_(*factors, alpha=-1)
            else:
                both.sub_(torch.bmm(*factors))
            size = torch.linalg.vector_norm(y_h.mul_(norms), dim=(1, 2, 3))
            self._rounding[part].addcmul_(size, self._per_term[part], value=eps)
        self._close(position.reshape(1))
        self._worst = self.shard.largest(self._rounding[:, None])

    def is_settled(self, gain: float) -> bool:
        """Whether a largest gain like this is no rounding; else all was made afresh,
        and gains are to be asked for again.
        """
        is_fresh = len(self.picked) == self._n_fresh
        if is_fresh or self.error <= ERROR_LIMIT * gain:
            return True
        self.refresh()
        return False

    def starting_point(self, picks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The picks' embeddings (m, c, k), F̄ and M_∅ in float64, for the backward
        pass.
        """
        v = self.shard.take(picks, self.embeddings.rows)
        return v, self.information, self.known

    def _factor(self, m: Tensor, out: Tensor) -> None:
        """L with LLᵀ = M, from M_∅ and the picks, into `out`; M is made in `m`."""
        k = self.embeddings.k
        if self.known is None:
            m.zero_().diagonal().fill_(self.damping)
        else:
            m.copy_(self.known)
        step = max(1, k // self.embeddings.c)
        for some in torch.stack(self.picked).split(step) if self.picked else ():
            v = self.shard.take(some, self.embeddings.rows).flatten(0, 1)
            m.addmm_(v.mT, v)
        cholesky(m, self.damping, out)


class _OfWeights:
    """M⁻¹ and Z, minus what picks have added: columns, which are folded into them when
    there are many.

    Parameters
    ----------
    k, c : int
    like : Tensor
        Of their dtype, where they shall lie.
    """

    def __init__(self, k: int, c: int, like: Tensor) -> None:
        self._c = c
        self._both = like.new_empty(2, k, k)
        # U, H and U again: either neighbours are what Z changes by.
        self._columns = like.new_zeros(3, FOLDED_PICKS * c, k)
        self._n = 0
        self._multiple: float | None = None

    def cleared(self, multiple: float | None = None) -> tuple[Tensor, Tensor]:
        """Room for M⁻¹, unless that is a multiple of I, and for Z; what picks have
        added is forgotten.
        """
        self._columns.zero_()
        self._n, self._multiple = 0, multiple
        inverse, z = self._both
        return inverse, z

    def times(self, rows: Tensor) -> Tensor:
        """Rows (m, k) times each of them (m, 2, k)."""
        result = rows.new_empty(len(rows), 2, rows.shape[1])
        p, q = result.unbind(1)
        u = self._columns[0]
        spent = rows @ self._columns[1:].flatten(0, 1).mT
        by_u = spent[:, len(u) :]
        # Transposed, which they equal, matrices are read at twice the pace by MKL.
        if self._multiple is None:
            torch.matmul(rows, self._both.flatten(0, 1).mT, out=result.flatten(1))
            p.addmm_(by_u, u, alpha=-1)
        else:
            torch.matmul(rows, self._both[1].mT, out=q)
            torch.addmm(rows, by_u, u, beta=self._multiple, alpha=-1, out=p)
        q.addmm_(spent, self._columns[:2].flatten(0, 1), alpha=-0.5)
        return result

    def subtract(self, u: Tensor, half: Tensor, g: Tensor) -> Tensor:
        """Take a pick away, with H = 2·half − G U, all of them transposed; U, H and U
        (3, c, k).
        """
        if self._n == self._columns.shape[1]:
            self.folded()
        place = slice(self._n, self._n + self._c)
        self._n = place.stop
        self._columns[::2, place] = u
        torch.addmm(half, g, u, beta=2, alpha=-1, out=self._columns[1, place])
        return self._columns[:, place]

    def folded(self) -> tuple[Tensor, Tensor]:
        """All of M⁻¹ and Z."""
        inverse, z = self._both
        if self._n:
            u, u_h, h_u = (
                self._columns[i:j].flatten(0, 1) for i, j in ((0, 1), (0, 2), (1, 3))
            )
            if self._multiple is not None:
                inverse.zero_().diagonal().fill_(self._multiple)
            inverse.addmm_(u.mT, u, alpha=-1)
            z.addmm_(u_h.mT, h_u, alpha=-0.5)
            self.cleared()
        return inverse, z


def cholesky(m: Tensor, damping: float, out: Tensor | None = None) -> Tensor:
    """L with LLᵀ = M (k, k), which may be overwritten; eigenvalues below `damping` are
    rounding, and are raised to it.
    """
    out = torch.empty_like(m.mT) if out is None else out
    failed = torch.empty((), dtype=torch.int32, device=m.device)
    torch.linalg.cholesky_ex(m, out=(out, failed))
    if bool(failed):
        values, vectors = torch.linalg.eigh(m)
        m.copy_((vectors * values.clamp_min(damping).sqrt()).mT)
        out.copy_(torch.linalg.qr(m, mode="r").R.mT)
        # No entry is smaller than the root of the least eigenvalue, but by rounding.
        diagonal = out.diagonal()
        diagonal.copy_(diagonal.abs().clamp_min(damping**0.5).copysign(diagonal))
    return out
