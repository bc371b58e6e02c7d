r"""What the selection keeps of every candidate, :math:`A = V M^{-1} V^\top` and
:math:`B = V M^{-1} \bar F M^{-1} V^\top`, and how a pick changes it. This file sees
tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask_sk._collectives import Best, Shard
from fishermask_sk.gains import plus_identity, reductions_and_bounds, trace_reductions
from fishermask_sk.operators import (
    BLOCK_ROWS,
    DiagonalInformation,
    InverseInformation,
    PoolInformation,
    blocks,
)
from fishermask_sk.screening import Screen

# The updates of the first picks are the largest, and cancel most later. These first
# picks are multiplied in float64 ...
EXACT_PICKS = 8
# ... and after them, up to these shares of all picks, the leading directions: those
# that hold all of tr(F̄) but this.
TAIL_SHARES = ((1 / 16, 1e-4), (1 / 8, 1e-3), (3 / 8, 1e-2))
# An update leaves in any gain an error of up to the rounding of the largest B: of all
# of it in float64, and of the share of tr(F̄) that was float32. Where the sum of them
# passes this share of a gain, M⁻¹, A and B are computed afresh before the next pick.
ERROR_LIMIT = 1e-4
# An update that would add more than this share of the next gain has more directions in
# float64.
PASS_LIMIT = 1e-5
# Picks made ahead among the leading candidates, at most, before all candidates are
# brought up to date; and as long as directions are float64, when gains fall fast and a
# pick that is taken back is dear.
MAX_AHEAD, MAX_EXACT_AHEAD = 16, 8
# The leading candidates: this share of all, or this many.
ACTIVE_SHARE, MIN_ACTIVE = 1 / 16, 64
# Rows of embeddings brought up to date at a time.
UPDATE_ROWS = 2**12
# Entries of embeddings that are float64 at a time, where the leading directions are.
EXACT_ENTRIES = 2**21
# How far below a claimed gain a bound must be to spare a candidate: more than what is
# called equal, or rounding.
CLAIM_MARGIN = 1e-3
# As soon as candidates with more rows than these wait that no bound spares, they are
# followed from step to step.
MAX_WAITING = 2**10


class Step(NamedTuple):
    """One pick or removal, and how it changes M⁻¹ and every A and B."""

    sample: Tensor
    gain: Tensor
    u: Tensor
    h: Tensor
    sign: int


class Candidates:
    r"""A and B of every candidate under picks and removals, with the M⁻¹ and F̄ that
    they come from.

    Parameters
    ----------
    embeddings : Tensor of shape (n, c, k)
        In memory, in a mapped file, or on another device than the rest: it is read in
        blocks, and once for several picks.
    information : PoolInformation
    inverse : InverseInformation
    shard : Shard
        Where the candidates of several processes are. Positions count through all of
        them; M⁻¹ and F̄ are the same everywhere, A and B are those of the candidates
        here.
    whitened : bool
        Whether this is a basis where M_∅ = I and F̄ is diagonal, falling.

    Notes
    -----
    Picking i, with the old M⁻¹ and :math:`U = M^{-1} V_i^\top \mathrm{chol}(I +
    A_i)^{-\top}`,
    :math:`G = U^\top \bar F U`, :math:`H = M^{-1} \bar F U - \frac12 U G` and :math:`Y
    = V U`, changes

    .. math:: A \to A - Y Y^\top, \qquad B \to B - Y (VH)^\top - (VH) Y^\top, \qquad
    M^{-1} \to M^{-1} - U U^\top;

    removing i adds where picking subtracts, with chol(I − A_i) and H = M⁻¹F̄U + ½UG.
    """

    def __init__(
        self,
        embeddings: Tensor,
        information: PoolInformation,
        inverse: InverseInformation,
        shard: Shard,
        whitened: bool = False,
    ) -> None:
        self.embeddings, self.information, self.inverse = (
            embeddings,
            information,
            inverse,
        )
        self.shard = shard
        self.n, self.c, self.k = embeddings.shape
        self.exact = embeddings.dtype == torch.float64
        self.n_exact, self.tail = self.k, 0.0
        self.whitened = whitened
        self.leading = [self.k] * len(TAIL_SHARES)
        if whitened:
            assert isinstance(information, DiagonalInformation)  # for the type checker
            total = information.values.sum()
            tail = total - information.values.cumsum(0)
            self.leading = [
                int((tail > share * total).sum()) + 1 for _, share in TAIL_SHARES
            ]
        base = inverse.base
        self.a, self.b = (base.new_empty(self.n, self.c, self.c) for _ in range(2))
        self._samples = torch.arange(self.n, device=base.device)
        self.error = base.new_zeros(())
        self.screen = Screen(self.a)
        self.picked: list[Tensor] = []
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self.refresh()

    def set_precision(self, t: int, n_picks: int, gain: Tensor) -> int:
        """Choose the directions that go in float64 at pick t of `n_picks`; the first
        pick that may choose others.

        `gain` is that of the pick: where float32 would soon ask for a refresh, more
        directions are float64.
        """
        rungs = [(EXACT_PICKS, self.k, 0.0)]
        for (share, tail), n_leading in zip(TAIL_SHARES, self.leading, strict=True):
            rungs.append((ceil(share * n_picks), n_leading, tail))
        rungs.append((n_picks, 0, 1.0))
        place = (
            0
            if self.exact
            else next(i for i, (end, _, _) in enumerate(rungs) if t < end)
        )
        limit, largest = PASS_LIMIT * float(gain), float(self._largest_trace())
        while place and self._rounding(*rungs[place][1:]) * largest > limit:
            place -= 1
        _, self.n_exact, self.tail = rungs[place]
        return min(n_picks, next(end for end, _, _ in rungs if t < end))

    @property
    def max_ahead(self) -> int:
        """How many picks may be made ahead at this precision."""
        return MAX_AHEAD if self.n_exact == 0 else MAX_EXACT_AHEAD

    def reductions(self) -> Tensor:
        """The gain of every candidate (n,), and of those that are left out a bound of
        it.
        """
        return torch.where(
            self.screen.out, self.screen.bounds(), trace_reductions(self.a, self.b)
        )

    def refresh(self) -> None:
        """M⁻¹, A and B from their definitions."""
        self._rebuild_inverse()
        for part in self._parts(BLOCK_ROWS):
            self._compute(part)
        self.error = torch.zeros_like(self.error)

    def leave_out(self, reductions: Tensor, gain: Tensor) -> None:
        """Where it is time to, leave those out of all updates whose gains stay far from
        the largest for a while.
        """
        if self.whitened and self.screen.is_due(len(self.picked), gain):
            assert isinstance(
                self.information, DiagonalInformation
            )  # for the type checker
            self.screen.leave_out(
                self.a, reductions, gain, self.inverse, self.information
            )

    def bring_back(self, reductions: Tensor, tie_tolerance: float) -> Tensor:
        """The gains (n,), after those that were left out for long enough are brought up
        to date.

        `reductions` has bounds for those that are left out, and −∞ for those that are
        not to be picked.
        """
        if not self.screen.has_begun:
            return reductions
        largest = self.shard.best(
            reductions.masked_fill(self.screen.out, -torch.inf), tie_tolerance
        ).gain
        samples = self.screen.readmit(reductions, largest)
        if not len(samples):
            return reductions
        self._before = None  # nothing is taken back from here on
        reductions = reductions.clone()
        for part in samples.split(max(1, BLOCK_ROWS // self.c)):
            self._compute(part)
            reductions[part] = trace_reductions(self.a[part], self.b[part])
        return reductions

    def look_ahead(
        self, best: Best, reductions: Tensor, n_steps: int, tie_tolerance: float
    ) -> list[Step]:
        """Pick `best`, and then as if only those with the largest gains now were there.

        Parameters
        ----------
        best : Best
        reductions : Tensor of shape (n,)
            Gains, −∞ for those that are not to be picked.
        n_steps : int
        tie_tolerance : float
            Gains closer than this, relative to the best, are equal.

        Returns
        -------
        list of Step
            The first is right; the others are to be confirmed by what `add` finds.
        """
        self.inverse.reserve(self.c * n_steps)
        steps = [self._step(best, 1)]
        if n_steps == 1:
            return steps
        reductions = reductions.masked_fill(self.screen.out, -torch.inf)
        active = self._leading(reductions, 1.0)
        v, a, b = self._here(active), self.a[active], self.b[active]
        closed = torch.isneginf(reductions[active])
        while True:
            closed |= active + self.shard.start == steps[-1].sample
            _update(a, b, self._products(v, steps[-1:], n_exact=0), sign=1)
            gains = trace_reductions(a, b).masked_fill(closed, -torch.inf)
            best = self.shard.best(gains, tie_tolerance, places=active)
            if not bool(
                torch.isfinite(best.gain)
            ):  # the caller looks at all candidates and says so
                return steps
            steps.append(self._step(best, 1))
            if len(steps) == n_steps:
                return steps
            some = self._leading(gains, 1 - len(steps) / n_steps)
            if 2 * len(some) <= len(active):
                active, v, a, b, closed = (
                    each[some] for each in (active, v, a, b, closed)
                )

    def _leading(self, gains: Tensor, share_left: float) -> Tensor:
        """Those with the largest gains: as many as the picks that are left of those
        ahead are likely to be among.
        """
        n_leading = max(
            MIN_ACTIVE, ceil(ACTIVE_SHARE * share_left * self.screen.n_kept)
        )
        return gains.topk(min(n_leading, len(gains))).indices.sort().values

    def add(self, steps: Sequence[Step]) -> Tensor:
        """Bring every candidate up to date with these picks, in one pass over the
        embeddings.

        Parameters
        ----------
        steps : sequence of Step

        Returns
        -------
        Tensor of shape (n_steps, n)
            The gains after each of the steps. After all but the last of them a
            candidate that cannot be as good as the next step's may have an upper bound
            of its gain instead; one that is left out always has.
        """
        if not steps:
            return self.a.new_empty(0, self.n)
        self._before = None  # its memory goes before new copies are made
        if len(steps) > 1:
            self._before = self.a.clone(), self.b.clone(), self.error
        self.error = (
            self.error + self._rounding(self.n_exact, self.tail) * self._largest_trace()
        )
        after = self.screen.bounds().repeat(len(steps), 1)
        waiting: list[tuple[Tensor, Tensor]] = []
        for part in self._parts(UPDATE_ROWS):
            products = self._products(self._here(part), steps, self.n_exact)
            a, b = self.a[part], self.b[part]
            _update(a, b, products, sign=1)
            self.a[part], self.b[part] = a, b
            if self._before is None:
                after[0, part] = trace_reductions(a, b)
                continue
            y, vh = products.unbind(2)
            last, bounds = reductions_and_bounds(
                a, b, y, vh, a_before=self._before[0][part]
            )
            after[-1, part], after[:-1, part] = last, bounds.mT
            samples = self._samples[part]
            rows = self._contenders(samples, bounds, steps[1:])
            waiting.append((samples[rows], products[rows]))
            if sum(len(each) for each, _ in waiting) * self.c > MAX_WAITING:
                self._follow(waiting, after[:-1])
        if waiting:
            self._follow(waiting, after[:-1])
        self.picked += [step.sample for step in steps]
        return after

    def _contenders(
        self, samples: Tensor, bounds: Tensor, following: Sequence[Step]
    ) -> Tensor:
        """Which of these may be the best after some step, and which are claimed to be,
        by their place among them.
        """
        claimed = torch.stack([step.sample for step in following])
        gains = torch.stack([step.gain for step in following])
        contends = ~(bounds < gains * (1 - CLAIM_MARGIN)).all(1)
        contends |= torch.isin(samples + self.shard.start, claimed)
        return contends.nonzero()[:, 0]

    def _follow(self, waiting: list[tuple[Tensor, Tensor]], after: Tensor) -> None:
        """Put the gains of those who wait after each of the steps in the place of
        bounds; nobody waits any more.
        """
        assert self._before is not None  # for the type checker: there are several steps
        contenders, products = (
            torch.cat(parts) for parts in zip(*waiting, strict=True)
        )
        waiting.clear()
        a, b = self._before[0][contenders], self._before[1][contenders]
        for gains, of_step in zip(after, products.split(self.c, dim=3), strict=False):
            _update(a, b, of_step, sign=1)
            gains[contenders] = trace_reductions(a, b)

    def keep(self, steps: Sequence[Step], n_added: int, n_kept: int) -> Tensor | None:
        """Take back all but the first `n_kept` of the last steps, of which `n_added`
        were added.

        Returns the gains after each that is kept, or None where none that was added was
        taken back.
        """
        self.inverse.drop_last(self.c * (len(steps) - n_kept))
        if n_added == n_kept:
            return None
        assert (
            self._before is not None
        )  # for the type checker: there were several steps
        self.a, self.b, self.error = self._before
        del self.picked[len(self.picked) - n_added :]
        return self.add(steps[:n_kept])

    def remove(self, i: Tensor) -> None:
        """Take sample i back: M shrinks by its information."""
        step = self._step(Best(i, torch.zeros_like(self.error)), -1)
        _update(
            self.a,
            self.b,
            self._products(self._here(slice(None)), [step], self.n_exact),
            sign=-1,
        )

    def is_stale(self, gain: Tensor) -> bool:
        """Whether too much of a gain this small may be rounding of what was larger
        before the last updates.
        """
        return bool(self.error > ERROR_LIMIT * gain)

    def _rounding(self, n_exact: int, tail: float) -> float:
        """What share of the largest tr B one more update may leave as an error in any
        gain.
        """
        in_float32 = tail if n_exact < self.k else 0.0
        return (
            torch.finfo(torch.float64).eps + torch.finfo(torch.float32).eps * in_float32
        )

    def _largest_trace(self) -> Tensor:
        """The largest tr B of those that take part."""
        traces = self.b.diagonal(dim1=1, dim2=2).sum(1).masked_fill(self.screen.out, 0)
        return self.shard.best(traces, tolerance=0.0).gain

    def restrict(self, samples: Tensor) -> Candidates:
        """The same M, with these samples alone as candidates, all of them here; A and B
        are computed afresh.
        """
        self._rebuild_inverse()
        # In float64: few samples, and what is small is subtracted from what is large.
        v = self._anywhere(samples)
        return Candidates(v, self.information, self.inverse, Shard(len(v)))

    def _step(self, best: Best, sign: int) -> Step:
        """U and H of a pick (sign 1) or a removal (−1) of one sample; M⁻¹ changes."""
        v = self._anywhere(best.position.reshape(1))[0].to(self.a.dtype)
        p = self.inverse.times(v)
        factor, _ = torch.linalg.cholesky_ex(plus_identity(sign * (p @ v.mT)))
        u = torch.linalg.solve_triangular(factor, p, upper=False).mT
        f_u = self.information.times(u.mT)
        h = self.inverse.times(f_u).mT - 0.5 * sign * (u @ (f_u @ u))
        self.inverse.subtract(u, sign)
        return Step(best.position, best.gain, u, h, sign)

    def _products(self, v: Tensor, steps: Sequence[Step], n_exact: int) -> Tensor:
        """V [U₁, U₂, …] and V [H₁, H₂, …] side by side (n, c, 2, m·c).

        The first `n_exact` directions are float64, the others as V is stored.
        """
        right = torch.cat(
            [step.u for step in steps] + [step.h for step in steps], dim=1
        )
        stored = right.to(v.dtype)
        if n_exact == 0 or stored.dtype == right.dtype:
            product = v @ stored
        else:
            product = right.new_empty(*v.shape[:2], right.shape[1])
            for part in blocks(v, max(1, EXACT_ENTRIES // n_exact)):
                torch.matmul(
                    v[part, :, :n_exact].to(right.dtype),
                    right[:n_exact],
                    out=product[part],
                )
                product[part] += v[part, :, n_exact:] @ stored[n_exact:]
        return product.unflatten(2, (2, -1))

    def _compute(self, part: slice | Tensor) -> None:
        """A and B of these from their definitions."""
        v = self._here(part).to(self.a.dtype)
        p = v if self.whitened and not self.picked else self.inverse.times(v)
        self.a[part] = p @ v.mT
        self.b[part] = self.information.quadratic(p)

    def _parts(self, n_rows: int) -> list[slice] | list[Tensor]:
        """Those that are not left out, of about so many rows of embeddings each."""
        return self.screen.parts(max(1, n_rows // self.c))

    def _here(self, samples: Tensor | slice) -> Tensor:
        """Embeddings of samples that this process holds."""
        where = (
            samples
            if isinstance(samples, slice)
            else samples.to(self.embeddings.device)
        )
        return self.embeddings[where].to(self.a.device)

    def _anywhere(self, positions: Tensor) -> Tensor:
        """Embeddings of samples of any process."""
        return self.shard.take(positions, self._here)

    def _rebuild_inverse(self) -> None:
        """M⁻¹ from M_∅ = I and the picks, without the rounding of all the steps
        between.
        """
        if self.whitened and self.picked:
            m = torch.eye(self.k, dtype=self.a.dtype, device=self.a.device)
            for some in torch.stack(self.picked).split(max(1, BLOCK_ROWS // self.c)):
                v = self._anywhere(some).to(m.dtype).flatten(0, 1)
                m.addmm_(v.mT, v)
            factor, failed = torch.linalg.cholesky_ex(m)
            del m
            if not bool(failed):
                self.inverse.base.copy_(torch.cholesky_inverse(factor))
                self.inverse.drop_last(self.inverse.n_columns)


def _update(a: Tensor, b: Tensor, products: Tensor, sign: int) -> None:
    """Change A and B (n, c, c) in place by picks (sign 1) or a removal (−1), given
    their Y and VH (n, c, 2, m·c).
    """
    y = products[:, :, 0]
    both = (
        y @ products.flatten(1, 2).mT
    )  # one product of small matrices is faster than two
    y_y, y_vh = both.unflatten(2, (-1, 2)).unbind(3)
    a.sub_(y_y, alpha=sign)
    b.sub_(y_vh + y_vh.mT, alpha=sign)
