r"""Greedy selection of the samples that lower the expected error, tr(M⁻¹ F̄), most.

With L labelled samples, b to pick and damping λ:

* F̄ is the mean of :math:`V_x^\top V_x` over pool and labelled samples together
  (`pool_information`);
* :math:`M_\emptyset = \lambda I + \frac{L}{L+b}` · the labelled samples' mean
  (`labeled_information`);
* picking x adds :math:`\frac{b}{L+b} V_x^\top V_x`.

The gain of a candidate needs only two c×c matrices, A = V M⁻¹ Vᵀ and B = V M⁻¹ F̄ M⁻¹
Vᵀ: `initial` makes them, in a basis where M_∅ = I and F̄ is diagonal unless there are
too many weights for so few candidates, and `candidates` keeps them. Source: Ash et al.,
"Gone Fishing" (BAIT), arXiv 2106.09675, with the scaling of its authors' code. This
file sees tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask_sk._collectives import Best, Shard
from fishermask_sk.candidates import Candidates
from fishermask_sk.gains import trace_increases
from fishermask_sk.initial import TOO_LARGE, from_matrices, from_rows

# λ below this asks for float64 in every product, not only where small matrices are
# kept.
FLOAT32_DAMPING = 0.1
# Gains closer than this, relative to the best, are equal: of these the lowest index
# wins.
TIE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
# Picks made ahead at the start; twice as many after each time that all of them were
# right.
START_AHEAD = 4


class Selection(NamedTuple):
    """Positions in the pool in the order of picking, and the trace reduction of each
    pick as it was made.
    """

    indices: Tensor
    trace_reductions: Tensor


def select(
    embeddings: Tensor,
    pool_information: Tensor | None,
    n_instances: int,
    *,
    labeled_information: Tensor | None = None,
    labeled_embeddings: Tensor | None = None,
    information_embeddings: Tensor | None = None,
    n_labeled: int = 0,
    damping: float = 1.0,
    oversample: float = 1.0,
    choose: Callable[[Tensor], Tensor] | None = None,
    on_pick: Callable[[], object] | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
) -> Selection:
    r"""Pick `n_instances` samples one by one, each with the largest trace reduction;
    then drop the surplus.

    Parameters
    ----------
    embeddings : Tensor of shape (n, c, k)
        Of the pool. Any rows with the same :math:`V_x^\top V_x` give the same picks.
        They may lie in a mapped file, or on another device than the information, where
        all arithmetic is done.
    pool_information : Tensor of shape (k, k) or None
        F̄, the mean over pool and labelled samples together, or over a target. None
        leaves it in the form of the embeddings, for many weights and few samples: no
        k×k matrix is made.
    n_instances : int
        b, at most n. It sets the weight of a pick even when more are picked first.
    labeled_information : Tensor of shape (k, k), optional
        Mean over the labelled samples.
    labeled_embeddings : Tensor of shape (L, c, k), optional
        Instead of `labeled_information`, where `pool_information` is None.
    information_embeddings : Tensor of shape (m, c, k), optional
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
    on_pick : callable, called after every pick and every removal
    overwrite : bool
        Work in `embeddings` and the information matrices instead of in copies.
    shard : Shard, optional
        Where `embeddings` are those of one process of several, which all call this: its
        place among them. Then `pool_information` and `labeled_information` are those of
        all, and so are the indices.

    Returns
    -------
    indices : Tensor of shape (n_instances,), int64, in the order in which the samples
    were picked
    trace_reductions : Tensor of shape (n_instances,), float64, the gains at which they
    were picked

    Raises
    ------
    FloatingPointError
        Where no gain is a finite number.

    Notes
    -----
    Only the candidates with the largest gains are kept up to date from pick to pick.
    Every few picks one pass over the embeddings, 4·n·c²·k flops a pick in one large
    product, replays the picks on all candidates: those that were the best of all stand,
    from the first that was not on they are made anew. Candidates that a bound keeps far
    from the largest gain are left out until it no longer does (`screening`).

    Gains fall by orders of magnitude while A and B started from the first, so A, B and
    M⁻¹ are float64, and so are the leading directions in the pass of the first picks;
    all else has the dtype of the embeddings (float64 throughout for λ < 0.1).

    Beside the embeddings it holds, in float64, five k×k matrices at the start and up to
    four later, four numbers for each of n·c², and blocks of products.

    Examples
    --------
    >>> V = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]], [[0.0, 3.0]]])
    >>> picks, gains = select(V, V.flatten(0, 1).mT @ V.flatten(0, 1) / 3, 2)
    >>> picks
    tensor([1, 0])
    """
    if not overwrite:
        embeddings = embeddings.clone()
    shard = shard or Shard(len(embeddings))
    n_picks = min(ceil(oversample * n_instances), shard.total)
    weight = n_instances / (n_labeled + n_instances)
    if pool_information is None:
        n_steps = n_picks + n_picks - n_instances
        state = from_rows(
            embeddings,
            labeled_embeddings,
            weight,
            damping,
            n_steps,
            information_embeddings,
        )
    else:
        state = from_matrices(
            embeddings,
            pool_information,
            labeled_information,
            weight,
            damping,
            shard,
            overwrite,
        )
    state.exact |= damping < FLOAT32_DAMPING
    tie_tolerance = TIE_TOLERANCE.get(embeddings.dtype, 1e-6)
    indices, gains = _pick(
        state, n_picks, n_picks > n_instances, choose, on_pick, tie_tolerance
    )
    kept = _drop_surplus(
        state, indices, n_instances, choose or torch.amin, tie_tolerance, on_pick
    )
    kept = shard.same(kept)  # where the processes' arithmetic differs in the last digit
    return Selection(indices[kept], gains[kept])


def _pick(
    state: Candidates,
    n_picks: int,
    add_last: bool,
    choose: Callable[[Tensor], Tensor] | None,
    on_pick: Callable[[], object] | None,
    tie_tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Greedy picks and their gains."""
    indices: list[Tensor] = []
    gains: list[Tensor] = []
    closed = torch.zeros(state.n, dtype=torch.bool, device=state.a.device)
    n_ahead = START_AHEAD

    def best_of(all_reductions: Tensor, bring_back: bool = True) -> tuple[Tensor, Best]:
        """The open candidates' gains, and the largest."""
        reductions = all_reductions.masked_fill(closed, -torch.inf)
        if bring_back:
            reductions = state.bring_back(reductions, tie_tolerance)
        best = state.shard.best(reductions, tie_tolerance, choose)
        if not bool(torch.isfinite(best.gain)):
            raise FloatingPointError(
                f"The largest trace reduction is {best.gain.item()}. {TOO_LARGE}"
            )
        return reductions, best

    def accept(best: Best) -> None:
        indices.append(best.position)
        gains.append(best.gain)
        closed[state.shard.own(best.position)] = True
        if on_pick is not None:
            on_pick()

    reductions, best = best_of(state.reductions())
    while True:
        if state.is_stale(best.gain):
            state.refresh()
            reductions, best = best_of(state.reductions())
        state.leave_out(reductions, best.gain)
        t = len(indices)
        n_left = state.set_precision(t, n_picks, best.gain) - t
        # What `choose` draws must not depend on picks that are taken back.
        steps = state.look_ahead(
            best, reductions, 1 if choose else min(n_ahead, n_left), tie_tolerance
        )
        accept(best)
        is_last = t + len(steps) == n_picks and not add_last
        added = steps[:-1] if is_last else steps
        after = state.add(added)
        n_right = 1
        for step, all_reductions in zip(steps[1:], after, strict=False):
            reductions, best = best_of(all_reductions, bring_back=False)
            if not torch.equal(best.position, step.sample) or state.is_stale(best.gain):
                break
            accept(best)
            n_right += 1
        if n_right < len(steps):
            kept = state.keep(steps, len(added), n_right)
            if kept is not None:
                after = kept
            n_ahead = n_right
        else:
            n_ahead = min(2 * n_ahead, state.max_ahead)
        if len(indices) == n_picks:
            return torch.stack(indices), torch.stack(gains)
        reductions, best = best_of(after[-1])


def _drop_surplus(
    state: Candidates,
    indices: Tensor,
    n_instances: int,
    choose: Callable[[Tensor], Tensor],
    tolerance: float,
    on_pick: Callable[[], object] | None,
) -> Tensor:
    """BAIT's backward pass: which of `indices` stay when the least costly are removed
    in turn.
    """
    kept = torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    if len(indices) == n_instances:
        return kept
    state = state.restrict(indices)
    for _ in range(len(indices) - n_instances):
        costs = trace_increases(state.a, state.b).masked_fill(~kept, torch.inf)
        least = costs.amin()
        if not bool(torch.isfinite(least)):
            raise FloatingPointError(
                f"The least cost of dropping a pick is {least.item()}. {TOO_LARGE}"
            )
        tied = costs <= least + tolerance * least.abs()
        # Ties are settled by place in the pool, not by order of picking.
        loser = choose(indices[tied.nonzero()[:, 0]])
        dropped = (indices == loser).nonzero()[0, 0]
        kept[dropped] = False
        state.remove(dropped)
        if on_pick is not None:
            on_pick()
    return kept
