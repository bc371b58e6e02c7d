"""A warning where a query will take long, from its first batches."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from fishermask_sk.memory import duration
from fishermask_sk.selection.embeddings import Embeddings
from fishermask_sk.strategy.question import Question
from fishermask_sk.strategy.selection_costs import SelectionCosts
from fishermask_sk.strategy.sizes import Sizes

# Weights that are tried to learn the selection's pace, which takes a second or less.
TIMED_WEIGHTS = 512
# After so many seconds of a step its pace is known, and so many in all are long.
PACE_SECONDS, LONG_SECONDS = 10.0, 600.0
# A sample whose weights are ranked takes about as long as so many that are embedded: of
# ResNet-18 twice as long at widths 16 and 64.
RANKED = 2.0


class Pace:
    """How long a query will take, by what its steps have taken so far.

    Parameters
    ----------
    question : Question
    cheapest : callable () -> (setting, seconds), or None
        Asked once, where the query will take long, for a setting that would not.
    """

    def __init__(
        self,
        question: Question,
        cheapest: Callable[[], tuple[str, float] | None] | None = None,
    ) -> None:
        self.question, self._cheapest = question, cheapest
        self._has_said = False

    def counted(
        self,
        advance: Callable[[int], object],
        total: int,
        what: str = "samples",
        later: float = 0.0,
        selection: Callable[[], float] | None = None,
    ) -> Callable[[int], object]:
        """`advance`, and one warning where it and what is left will take long.

        Parameters
        ----------
        advance : callable, told how many are done
        total : int
            How many there are.
        what : str
        later : float
            What comes afterwards, as so many more.
        selection : callable () -> seconds, optional
            What the selection will take.
        """
        start, done, of_selection = perf_counter(), 0, 0.0

        def counted(n: int) -> None:
            nonlocal done, selection, of_selection
            advance(n)
            done += n
            spent = perf_counter() - start
            if self._has_said or not 0 < done < total or spent < PACE_SECONDS:
                return
            if self.question.processes.rank:
                return
            if selection is not None:
                of_selection, selection = selection(), None
            left = spent / done * (total - done + later) + of_selection
            if spent + left >= LONG_SECONDS:
                known = f", {duration(of_selection)} of them for the selection"
                by = f"{done} of {total} {what}"
                self._say(left, known * bool(of_selection), by)

        return counted

    def _say(self, left: float, known: str, by: str) -> None:
        self._has_said = True
        found = self._cheapest() if self._cheapest else None
        cure = "check_network prices cheaper settings"
        if found is not None and found[1] < left:
            cure = f"{found[0]} would take about {duration(found[1])}"
        self.question.warn(
            f"This query needs about {duration(left)} more{known}, by the first {by}; "
            f"{cure}. See the page on choosing settings.",
            "pace",
        )


def selection_seconds(example: Embeddings, sizes: Sizes) -> float:
    """Of a selection, tried on few weights."""
    damping = float(sizes.params.damping)
    return SelectionCosts(example, damping, TIMED_WEIGHTS).seconds(sizes)
