r"""Candidates that cannot be picked soon, because a bound says so, are left out of the
updates until it no longer does.

With :math:`X = V M^{-1/2}`, so that :math:`A = X X^\top`, and :math:`S = M^{-1/2} \bar
F M^{-1/2}`, a gain is

.. math:: \mathrm{tr}\,(I + A)^{-1} B = \mathrm{tr}\,(I + X X^\top)^{-1} X S X^\top
    \le \lambda_1(S)\; \mathrm{tr}\,(I + A)^{-1} A.

Picks add to M, so that both factors only fall, and an old λ₁ with an old A bounds all
later gains. (The gains need not fall: the expected error is not supermodular.) In
convex optimisation such rules are called safe screening. This file sees tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishermask_sk.gains import effective_dimensions
from fishermask_sk.operators import DiagonalInformation, InverseInformation

# Those whose bound is below this share of the largest gain are left out. Bounds fall
# more slowly than gains, and to bring one back costs as much as its updates of a
# hundred picks ...
SCREENED_SHARE = 0.2
# ... which happens at this share, before the next picks are made ahead, not when their
# gains have come down to it.
READMITTED_SHARE = 0.75
# Not before so many picks, while gains fall steeply, and again when the largest gain
# has fallen to this share.
FIRST_SCREENING, NEXT_SCREENING = 16, 0.5
# To gather the rows of the others costs a tenth of their updates: not for less than
# this share.
MIN_SCREENED = 1 / 4
# How exact λ₁ need be.
EIGENVALUE_ERROR = 0.05


class Screen:
    """Which candidates are left out, and bounds of their gains.

    Parameters
    ----------
    like : Tensor of shape (n, c, c)
        With the dtype and the device of gains.
    """

    def __init__(self, like: Tensor) -> None:
        self.out = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        self.kept: Tensor | None = (
            None  # positions of the others, once some are left out
        )
        self.has_begun = False
        self._last_gain = torch.inf
        self._dimensions = like.new_zeros(len(like))
        self._eigenvalue = like.new_zeros(())

    @property
    def n_kept(self) -> int:
        """How many are not left out."""
        return len(self.out) if self.kept is None else len(self.kept)

    def parts(self, n_samples: int) -> list[slice] | list[Tensor]:
        """Those that are not left out, so many at a time."""
        if self.kept is None:
            return [
                slice(start, start + n_samples)
                for start in range(0, len(self.out), n_samples)
            ]
        return list(self.kept.split(n_samples)) if len(self.kept) else []

    def bounds(self) -> Tensor:
        """What no gain of those that are left out can exceed, from now on; of no
        meaning for the others (n,).
        """
        return self._eigenvalue * self._dimensions

    def is_due(self, n_picked: int, gain: Tensor) -> bool:
        """Whether the largest gain has come far enough down to look for more."""
        return (
            n_picked >= FIRST_SCREENING
            and float(gain) <= NEXT_SCREENING * self._last_gain
        )

    def leave_out(
        self,
        a: Tensor,
        reductions: Tensor,
        gain: Tensor,
        inverse: InverseInformation,
        information: DiagonalInformation,
    ) -> None:
        """Leave out those whose bound is far below the largest gain.

        Parameters
        ----------
        a : Tensor of shape (n, c, c)
        reductions : Tensor of shape (n,)
            −∞ for those that are not to be picked.
        gain : Tensor of shape ()
            The largest.
        inverse : InverseInformation
            M⁻¹ ≤ I.
        information : DiagonalInformation
            F̄, falling.
        """
        self._last_gain, self.has_begun = float(gain), True
        # The A of those left out is that of when they left, and bounds their gains
        # still.
        dimensions = effective_dimensions(a).clamp_min(0)
        dimensions[torch.isneginf(reductions)] = 0
        limit = SCREENED_SHARE * gain
        # λ₁ is larger than any entry of the diagonal: where that leaves few out, so
        # does λ₁.
        least = (information.values * inverse.diagonal()).amax()
        if (dimensions * least < limit).sum() < MIN_SCREENED * len(a):
            return
        self._dimensions = dimensions
        self._eigenvalue = largest_eigenvalue(
            inverse, information, float(EIGENVALUE_ERROR * least)
        )
        out = self.out | (self.bounds() < limit)
        if out.sum() >= MIN_SCREENED * len(a):
            self._set(out)

    def readmit(self, reductions: Tensor, largest: Tensor) -> Tensor:
        """Leave those out no longer whose bounds among `reductions` come near the
        largest gain; their positions.
        """
        samples = (
            self.out
            & (reductions >= READMITTED_SHARE * largest)
            & ~torch.isneginf(reductions)
        ).nonzero()[:, 0]
        if len(samples):
            self._set(self.out.index_fill(0, samples, False))
        return samples

    def _set(self, out: Tensor) -> None:
        self.out = out
        self.kept = (~out).nonzero()[:, 0] if bool(out.any()) else None


def largest_eigenvalue(
    inverse: InverseInformation, information: DiagonalInformation, tolerance: float
) -> Tensor:
    """No less than λ₁(F̄^½ M⁻¹ F̄^½), and at most `tolerance` more, for M⁻¹ ≤ I and F̄
    diagonal, falling.

    It is at most λ₁ of a leading block plus λ₁ of the block of all other directions,
    which M⁻¹ ≤ I keeps below F̄'s.
    """
    n = int((information.values > tolerance).sum())
    others = (
        information.values[n:].sum()
        if n == len(information.values)
        else information.values[n]
    )
    if n == 0:
        return others
    root = information.values[:n].sqrt()
    return others + torch.linalg.eigvalsh(inverse.leading(n) * root * root[:, None])[-1]
