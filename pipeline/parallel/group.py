"""A group of ranks as one: batches in, as many at once as there are ranks, results out in their order.

A rank that dies takes the step under way with it: the others cannot go on without it. Then all are ended, started anew, and given
again what has no answer yet. Experts are not loaded again: the arena outlives the ranks.

Where ranks run, `Ranks` hides: in processes of this machine (processes.py) or as Ray actors (actors.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from pipeline.batch_result import BatchResult
from pipeline.data import Batch
from pipeline.parallel.placement import Assignment
from pipeline.parallel.rank import no_rows

AHEAD = 3
"""Steps that ranks are given beside the one that runs: enough to be made ready meanwhile, and to bring what they need."""

RETRIES = 5
"""A step during which ranks are lost more often than this is taken for the cause."""


class GroupLost(RuntimeError):
    """A rank has died, or does not answer: the group is no more."""


@dataclass(frozen=True)
class Step:
    """What the ranks do at the same time.

    Attributes:
        batches: at most one for each rank.
        predictions: theirs; None, or what becomes one on its way (a reference of Ray's).
    """

    batches: tuple[Batch, ...]
    predictions: tuple[Any, ...]
    routing: str

    def calls(self, ranks: int) -> list[tuple[Any, ...]]:
        """For each rank the arguments of `Rank.step`."""
        missing = ranks - len(self.batches)
        nobodys = no_rows(max(batch.index for batch in self.batches))
        predictions = (*self.predictions, *[None] * missing)
        return [(batch, self.routing, *predictions) for batch in (*self.batches, *[nobodys] * missing)]


class Ranks(Protocol):
    """The ranks of one group."""

    def submit(self, step: Step) -> None:
        """Hands each rank its part; does not wait.

        Raises:
            GroupLost: a rank has died.
        """

    def answer(self) -> list[BatchResult]:
        """Waits for the oldest step that has not been answered: what each rank has to say, by rank.

        Raises:
            GroupLost: a rank has died, or does not answer.
        """

    def close(self) -> None:
        """Lets all ranks give up what they have, and ends them."""

    def stop(self) -> None:
        """Ends all ranks, whatever they are doing."""


class Group:
    """Starts the ranks, and starts them again.

    Attributes:
        plan: who has which expert.
        restarts: how often it had to.
    """

    def __init__(self, start: Callable[[], Ranks], plan: Assignment, lost: Callable[[int], None] = lambda batches: None):
        """
        Args:
            start: makes new ones, and waits until they can work.
            lost: told how many batches are done again, whenever that is so.
        """
        self._start, self.plan, self._lost = start, plan, lost
        self._ranks: Ranks | None = start()
        self.restarts = 0

    def run(self, batches: Iterable[tuple[Batch, Any]], routing: str, ahead: int = AHEAD) -> Iterator[BatchResult]:
        """Runs batches, each with its prediction or None, and yields their results in the order given.

        Args:
            ahead: steps that are handed over before the one that runs has ended.
        """
        waiting, under_way = self._steps(batches, routing), deque[Step]()
        losses = given = 0  # given: of those under way, to the ranks that now are
        while True:
            under_way.extend(islice(waiting, max(0, ahead + 1 - len(under_way))))
            if not under_way:
                return
            try:
                if self._ranks is None:
                    self._ranks = self._start()
                for step in islice(under_way, given, None):
                    self._ranks.submit(step)
                given = len(under_way)
                results = self._ranks.answer()
            except GroupLost as error:
                losses += 1
                self.restarts += 1
                self._lost(sum(len(step.batches) for step in islice(under_way, given)))
                given = 0
                self.stop()
                if losses > RETRIES:
                    raise RuntimeError(f"the group was lost {losses} times during one step; the last time: {error}") from error
                continue
            losses, given = 0, given - 1
            yield from results[: len(under_way.popleft().batches)]

    def close(self) -> None:
        """Lets the ranks give up what they have, and ends them."""
        if self._ranks is not None:
            self._ranks.close()

    def stop(self) -> None:
        """Ends the ranks, whatever they are doing; another `run` would start new ones."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.stop()

    def _steps(self, batches: Iterable[tuple[Batch, Any]], routing: str) -> Iterator[Step]:
        left = iter(batches)
        while some := tuple(islice(left, self.plan.devices)):
            yield Step(tuple(batch for batch, _ in some), tuple(prediction for _, prediction in some), routing)
