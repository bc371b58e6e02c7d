r"""Greedy selection of the samples that lower the expected error, tr(M⁻¹ F̄), most.

With L labelled samples, b to pick and damping λ, on embeddings V of shape (n, c, k):

* F̄ is the mean of :math:`V_x^\top V_x` over pool and labelled samples together, or
  over what the model is for (`pool_information`);
* :math:`M_\emptyset = \lambda I + \frac{L}{L+b}` · the labelled samples' mean
  (`labeled_information`);
* picking x adds :math:`\frac{b}{L+b} V_x^\top V_x`.

Woodbury's identity and a rotation under the trace make the gain of a candidate
:math:`\mathrm{tr}\, B (I + A)^{-1}`, with A = V M⁻¹ Vᵀ and B = V M⁻¹ F̄ M⁻¹ Vᵀ of shape
(c, c). `candidates` keeps them where M and F̄ are matrices, `kernels` where there are
few rows and many weights, and `surplus` takes picks back. Source: Ash et al., "Gone
Fishing" (BAIT), arXiv 2106.09675, with the scaling of its authors' code. This file sees
tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask_sk._warnings import warn_user
from fishermask_sk.distributed import Shard
from fishermask_sk.selection.candidates import Candidates
from fishermask_sk.selection.embeddings import Embeddings, as_embeddings
from fishermask_sk.selection.gains import TIE_TOLERANCE, equal_from
from fishermask_sk.selection.kernels import KernelCandidates
from fishermask_sk.selection.surplus import kept_picks

# λ below this asks for float64 in every product and every sum.
FLOAT32_DAMPING = 0.1
# Where λ is this close to the rounding of the information, gains may be rounding too.
ROUNDING_SHARE = 1e-3

TOO_LARGE = (
    "The information is too large for this damping, in float64 or in the dtype of the "
    "embeddings: raise damping, scale the samples, or look for one whose gradient "
    "is far larger than the others'."
)


class Selection(NamedTuple):
    """Positions in the pool in the order of picking, and the trace reduction of each
    pick as it was made.
    """

    indices: Tensor
    trace_reductions: Tensor


def select(
    embeddings: Tensor | Embeddings,
    pool_information: Tensor | None,
    n_instances: int,
    *,
    labeled_information: Tensor | None = None,
    labeled_embeddings: Tensor | Embeddings | None = None,
    information_embeddings: Tensor | Embeddings | None = None,
    n_labeled: int = 0,
    damping: float = 1.0,
    oversample: float = 1.0,
    choose: Callable[[Tensor], Tensor] | None = None,
    draw: Callable[[Tensor], Tensor] | None = None,
    on_pick: Callable[[], object] | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
) -> Selection:
    r"""Pick `n_instances` samples one by one, each with the largest trace reduction;
    then drop the surplus.

    Parameters
    ----------
    embeddings : Tensor or Embeddings of shape (n, c, k)
        Of the pool. Any rows with the same :math:`V_x^\top V_x` give the same picks.
        They may lie in a mapped file, or on another device than the information, where
        all arithmetic is done.
    pool_information : Tensor of shape (k, k) or None
        F̄, the mean over pool and labelled samples together, or over other samples.
        None leaves it in the form of the embeddings, for few rows and many weights: no
        k×k matrix is made.
    n_instances : int
        b, at most n. It sets the weight of a pick even when more are picked first.
    labeled_information : Tensor of shape (k, k), optional
        Mean over the labelled samples.
    labeled_embeddings : Tensor or Embeddings of shape (L, c, k), optional
        Instead of `labeled_information`, where `pool_information` is None.
    information_embeddings : Tensor or Embeddings of shape (m, c, k), optional
        Where `pool_information` is None: F̄ is the sum of their VᵀV, instead of the
        mean over pool and labelled samples.
    n_labeled : int
        L; 0 means that M starts from λI.
    damping : float
        λ > 0.
    oversample : float
        Pick min(⌈oversample·b⌉, n) first and remove the least costly afterwards (BAIT
        uses 2).
    choose : callable, Tensor of tied positions -> one of them, optional
        Default: the lowest.
    draw : callable, Tensor of positions -> one of them, optional
        Who is picked where nothing tells the candidates apart: the largest gain is
        zero, or all are equal. Default: as of other ties.
    on_pick : callable, called after every pick and every removal
    overwrite : bool
        Work in the information matrices, where they are float64, instead of in copies.
    shard : Shard, optional
        Where `embeddings` are those of one process of several, which all call this: its
        place among them. Then `pool_information` and `labeled_information` are those of
        all, and so are the indices.

    Returns
    -------
    indices : Tensor of shape (n_instances,), int64
        In the order in which the samples were picked.
    trace_reductions : Tensor of shape (n_instances,), float64
        The gains at which they were picked.

    Raises
    ------
    FloatingPointError
        Where no gain is a finite number, or where the backward pass cannot tell which
        pick is least missed.

    Notes
    -----
    A pick costs one product of all embeddings with a (k, 2c) matrix, and what is beside
    it: A and B (n, c, c), float64, and four k×k matrices; or, without
    `pool_information`, one matrix of all rows by all rows. The dtype of that product is
    that of the embeddings, or float64 where rounding could show in a gain, and
    throughout for λ < 0.1.

    Gains are good to 1e-4 while the information is below 1e11 times λ; beyond, to about
    their ratio times 2e-16. The backward pass makes N = I − A of the picks from an
    orthonormal factor every 16 removals, about (m·c + d)·d² multiplications for m picks
    and d = min(k, m·c) directions, and the cost of a single pick likewise wherever N
    has lost its digits and the pick may still be the cheapest. With b = 250 and
    `oversample` = 2, of c = 9 rows and k = 1402 weights, it takes about two and a half
    minutes on one thread.

    Examples
    --------
    >>> V = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]], [[0.0, 3.0]]])
    >>> picks, gains = select(V, V.flatten(0, 1).mT @ V.flatten(0, 1) / 3, 2)
    >>> picks
    tensor([1, 0])
    """
    device = None if pool_information is None else pool_information.device
    pool = as_embeddings(embeddings, device)
    shard = shard or Shard(pool.n)
    n_picks = min(ceil(oversample * n_instances), shard.total)
    weight = n_instances / (n_labeled + n_instances)
    state: Candidates | KernelCandidates
    if pool_information is None:
        labeled, target = (
            None if each is None else as_embeddings(each, pool.device)
            for each in (
                labeled_embeddings if n_labeled else None,
                information_embeddings,
            )
        )
        state = _from_rows(pool, labeled, target, weight, damping)
    else:
        exact = pool.dtype == torch.float64 or damping < FLOAT32_DAMPING
        information, known = (
            matrix
            if matrix is None or (overwrite and matrix.dtype == torch.float64)
            else matrix.double().clone()
            for matrix in (
                pool_information,
                labeled_information if weight < 1 else None,
            )
        )
        assert information is not None  # for the type checker
        largest = float(information.trace())
        information /= weight
        if known is not None:
            largest += float(known.trace()) * (1 - weight)
            known *= (1 - weight) / weight
            known.diagonal().add_(damping / weight)
        _check_rounding(largest, damping)
        state = Candidates(pool, information, known, damping / weight, shard, exact)
    indices, gains = _pick(state, shard, n_picks, choose, draw, on_pick)
    if n_picks == n_instances:
        return Selection(indices, gains)
    kept = kept_picks(
        state.starting_point(indices),
        indices,
        n_instances,
        damping / weight,
        choose or torch.amin,
        TIE_TOLERANCE[pool.dtype],
        on_pick,
    )
    kept = shard.same(kept)  # where the processes' arithmetic differs in the last digit
    return Selection(indices[kept], gains[kept])


def _pick(
    state: Candidates | KernelCandidates,
    shard: Shard,
    n_picks: int,
    choose: Callable[[Tensor], Tensor] | None,
    draw: Callable[[Tensor], Tensor] | None,
    on_pick: Callable[[], object] | None,
) -> tuple[Tensor, Tensor]:
    """Greedy picks and their gains."""
    dtype = state.embeddings.dtype

    def level(largest: float) -> float:
        return equal_from(largest, state.error, dtype)

    indices: list[Tensor] = []
    gains: list[Tensor] = []
    has_warned = False
    while True:
        reductions = state.gains()
        best = state.leader or shard.best(reductions, level, choose)
        if choose is not None and state.leader is not None:
            choose(best.position.reshape(1))  # who chooses is asked at every pick
        gain, all_tied = best.value, best.all_tied
        if not abs(gain) < torch.inf:
            raise FloatingPointError(
                f"The largest trace reduction is {gain}. {TOO_LARGE}"
            )
        if not state.is_settled(gain):
            continue
        position, t = best.position, len(indices)
        # Where all that are left are picked, nobody need be drawn.
        told_apart = choose or not (all_tied or gain <= 0)
        if draw and not told_apart and shard.total > n_picks:
            if not has_warned:
                has_warned = True
                warn_user(
                    f"After {t} of {n_picks} picks no sample would teach the net more "
                    f"than another (each lowers the objective by {gain:.3g}): "
                    "from here on samples are drawn at random, as random_state says. "
                    "Nets that have diverged, are certain of everything or give one "
                    "output for all samples come to this."
                )
            position = draw(shard.positions(~reductions.isneginf()))
            best = best._replace(gain=shard.value(reductions, position), place=None)
        indices.append(position)
        gains.append(best.gain)
        if on_pick is not None:
            on_pick()
        if len(indices) == n_picks:
            return torch.stack(indices), torch.stack(gains)
        state.add(position, best.place)


def _from_rows(
    pool: Embeddings,
    labeled: Embeddings | None,
    target: Embeddings | None,
    weight: float,
    damping: float,
) -> KernelCandidates:
    """Without any k×k matrix."""
    parts = [pool] + ([labeled] if labeled is not None else [])
    scale = 1 / sum(part.n for part in parts)
    if target is not None:
        parts, scale = [target], 1.0
    known_scale = 0.0
    largest = scale * sum(_trace(part) for part in parts)
    if labeled is not None:
        known_scale = (1 - weight) / labeled.n
        largest += known_scale * _trace(labeled)
    _check_rounding(largest, damping)
    return KernelCandidates(
        pool, parts, scale / weight, labeled, known_scale / weight, damping / weight
    )


def _trace(embeddings: Embeddings) -> float:
    """Of the sum of VᵀV."""
    return float(embeddings.quadratic().diagonal(dim1=1, dim2=2).sum())


def _check_rounding(largest: float, damping: float) -> None:
    """`largest` is the trace of all information: it must be finite, and should not
    drown λ.
    """
    if not abs(largest) < torch.inf:
        raise FloatingPointError(
            f"The information has the trace {largest}. {TOO_LARGE}"
        )
    if largest * torch.finfo(torch.float64).eps > ROUNDING_SHARE * damping:
        warn_user(
            f"damping={damping:g} is {damping / largest:.0e} of the trace of "
            "the information: late gains are lost in the rounding of float64, and "
            "what is picked then is arbitrary. Raise damping."
        )
