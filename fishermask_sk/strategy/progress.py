"""What a query shows while it runs: bars, and the seconds of each step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter

from tqdm.auto import tqdm

from fishermask_sk.distributed import Processes

Advance = Callable[[int], object]
# Handed what moves a bar on, and of how many, it gives what is told instead.
Paced = Callable[[Advance, int], Advance]

logger = logging.getLogger(__name__)


def unpaced(advance: Advance, total: int) -> Advance:
    """Nobody else is told."""
    return advance


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Its seconds at INFO."""
    start = perf_counter()
    yield
    logger.info("%s: %.3f s", what, perf_counter() - start)


class Progress:
    """Bars of a query, on the first process alone, and the seconds of its steps.

    Attributes
    ----------
    timings : dict of str to float
    """

    def __init__(self, verbose: int, processes: Processes) -> None:
        self.processes = processes
        self.silent = not verbose or processes.rank > 0
        self.timings: dict[str, float] = {}

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """One step, by its name."""
        self.processes.enter(step)
        start = perf_counter()
        with logged(step):
            yield
        self.timings[step] = perf_counter() - start

    @contextmanager
    def bar(self, step: str, total: int) -> Iterator[Callable[[int], object]]:
        """A bar, and what moves it on."""
        with tqdm(total=total, desc=step, disable=self.silent, leave=False) as bar:
            yield bar.update
            bar.update(total - bar.n)  # what turned out not to be needed is done
            bar.refresh()

    @contextmanager
    def picking(
        self, n_steps: int, paced: Callable[..., Callable[[int], object]]
    ) -> Iterator[Callable[[], object]]:
        """A bar for what comes before the first pick, which takes longer than any, and
        one for the picks. `paced` is handed what moves that on, and of how many.
        """
        with ExitStack() as bars:
            advance = bars.enter_context(self.bar("set-up", 1))
            n_picked = 0

            def on_pick() -> None:
                nonlocal advance, n_picked
                if not n_picked:
                    bars.close()
                    bar = bars.enter_context(self.bar("picks", n_steps))
                    advance = paced(bar, n_steps, "picks")
                n_picked += 1
                advance(1)

            yield on_pick
