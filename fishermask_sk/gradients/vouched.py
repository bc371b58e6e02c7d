r"""A batch of whose parameters the graph vouches, compared for little.

With a what a layer saw, g the gradient at its output and f its operation, autograd's
gradient of a batch is then Σ f(a_n, g_n). Left to be seen is

- that the rule is f: the rows that it gives of one row of the cotangents, summed over
  all samples, are autograd's, which come with that row's own backward pass;
- that a and g of a sample are its own, and g linear in the cotangent: they are the
  same, g in proportion, in a pass of their own, over some samples that are drawn, in
  another order, from the cotangent times `SCALE`. A hook that clips, rounds or
  normalises gradients, of this batch for the first time, shows here.

What is wrong here, or only looks like it, is decided by `continuing_check` on the same
batch.

On a ResNet-18 of width 16 at 28×28, batch 128, one thread, float32, this takes 0.3 to
0.4 times as long as a forward pass while embeddings are made for the mask that the
method picks, and 0.8 to 1.2 times for one over all layers. Nets so small that what
torch is asked for takes longer than the arithmetic pay more: a forward pass of 0.4 ms,
a check of 2.5.

This file sees tensors and torch modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from time import perf_counter

import torch
from torch import Tensor, nn

from fishermask_sk.gradients.generic import dense, samples
from fishermask_sk.gradients.modules import Batch
from fishermask_sk.gradients.recording import (
    Outputs,
    Recorded,
    Recorder,
    at_least_float32,
)
from fishermask_sk.gradients.verification import ROUNDINGS, Comparison, Verification

# Of a batch's samples, those that have a pass of their own: one of so many, and at
# least so many.
SHARE_DRAWN, LEAST_DRAWN = 16, 2
# Of either sign, and large: what is clipped where gradients are larger shows on a few.
# No power of two: that would commute with rounding.
SCALE = -47.3


class Vouched:
    """One row of the cotangents, on which a batch is compared.

    Parameters
    ----------
    recorder : Recorder
    verification : Verification
    places : mapping of parameter name to Tensor of shape (m,)
        Entries of the ruled parameters that are compared.
    recorded : Recorded
        Of the batch's pass.
    cotangents : Tensor of shape (n, rows, c)

    Attributes
    ----------
    row : int
    parameters : list of Tensor
        Those whose gradients are wanted of this row's backward pass.
    seconds : float
        Time spent so far.
    """

    def __init__(
        self,
        recorder: Recorder,
        verification: Verification,
        places: Mapping[str, Tensor],
        recorded: Recorded,
        cotangents: Tensor,
    ) -> None:
        self._recorder, self._verification = recorder, verification
        self._places = places
        self.row = verification.row(cotangents.shape[1])
        self.parameters = [recorder.parameters[name] for name in places]
        self.seconds = 0.0
        n = len(cotangents)
        drawn = verification.positions(n, max(LEAST_DRAWN, n // SHARE_DRAWN))
        self._drawn = drawn.to(cotangents.device, non_blocking=True)
        self._cotangent = cotangents[self._drawn, self.row]
        layers = {recorder.routes[name].module for name in places}
        self._kept = {m: [recorded[m][0].seen[self._drawn]] for m in layers}

    def arrived(self, layer: nn.Module, g: Tensor) -> None:
        """Keep what comes at a layer's output in the row's backward pass."""
        self._kept[layer].append(g[self._drawn])

    def expect(self, gradients: Sequence[Tensor | None]) -> None:
        """Take autograd's gradients of the parameters, from the same pass."""
        self._expected = {}
        for (name, places), g, p in zip(
            self._places.items(), gradients, self.parameters, strict=True
        ):
            if g is None:
                found = torch.zeros_like(places, dtype=p.dtype)
            else:
                found = dense(g).flatten()[places]
            self._expected[name] = at_least_float32(found, found.dtype)

    def note(self, seconds: Sequence[float]) -> None:
        """Count what the row's pass took longer than the others'; with no others about
        half of it went into the gradients of the parameters.
        """
        others = sum(seconds) - seconds[self.row]
        usual = others / (len(seconds) - 1) if others else seconds[self.row] / 2
        self.seconds += max(0.0, seconds[self.row] - usual)

    def holds(
        self,
        batch: Batch,
        rows: Mapping[str, Tensor],
        squares: Mapping[str, Comparison],
    ) -> bool:
        """Whether all is autograd's.

        Parameters
        ----------
        batch : batch of n samples
        rows : mapping of parameter name to Tensor of shape (n, m)
            What the rules gave of the row at the places; nothing is zero.
        squares : mapping of parameter name to Comparison
            What else is to be compared.
        """
        start = perf_counter()
        sums = {}
        for name, expected in self._expected.items():
            of_samples = rows.get(name, expected.new_zeros(1, len(expected)))
            summed, squared = of_samples.sum(0), of_samples.square().sum(0)
            sums[name] = Comparison(summed, squared, expected)
        apart = self._apart(batch)
        wrong = apart is None or self._verification.wrong(sums, squares, {"": apart})
        self.seconds += perf_counter() - start
        return not wrong

    def _apart(self, batch: Batch) -> Comparison | None:
        """How far a and g of the drawn samples are from those of a pass of their own;
        None where they cannot be compared.
        """
        part = samples(batch, self._drawn)
        with self._recorder.recorded(part, self._places) as (logits, recorded):
            if any(len(recorded[layer]) != 1 for layer in self._kept):
                return None
            alone = {layer: [recorded[layer][0].seen] for layer in self._kept}
            Outputs(alone, recorded).pull_back(
                logits,
                SCALE * self._cotangent,
                lambda m, g: alone[m].append(g / SCALE),
            )
        kept, again = (list(chain(*each.values())) for each in (self._kept, alone))
        if [x.shape for x in kept] != [y.shape for y in again]:
            return None
        sizes = torch.stack([_lengths(y) for y in again])
        apart = [_lengths(x - y) for x, y in zip(kept, again, strict=True)]
        eps = torch.finfo(self._verification.coarsest).eps
        floor = ROUNDINGS * eps * sizes.amax(1, keepdim=True)
        # Squared, so that the root of a tolerance is allowed: where a sum is next to
        # zero, ReLU may go either way.
        shares = (torch.stack(apart) / sizes.maximum(floor)).square().flatten()
        return Comparison(shares, torch.ones_like(shares), torch.zeros_like(shares))


def _lengths(x: Tensor) -> Tensor:
    """The sum of each sample's absolute numbers (n,)."""
    lengths = x.abs().flatten(1).sum(1)
    return at_least_float32(lengths, lengths.dtype)
