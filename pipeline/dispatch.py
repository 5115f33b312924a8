"""Which Executor gets a batch: the one that will hold most of the experts that its table names, unless it has too much to do.

Knows tables, counts and seconds; nothing of Ray. What an Executor will hold when a batch's turn has come is what the tables sent to
it before name: nobody asks it. How quick it is, is measured by its answers, so that a slow one gets less.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.data import Batch
from pipeline.window import MAX_LOOKAHEAD, Window
from store.schedule import WORTH_COPYING

IMBALANCE = 2
"""An Executor may be ahead of the least busy one by the work of so many batches, for the sake of the experts that it holds."""
PRICE = 0.05
"""Each batch's work that it is ahead must be made up for by so large a share of the table's experts: at the end of a run all wait
for the one that ends last. `python -m pipeline.plan.several` weighs both."""
MAX_WAITING = MAX_LOOKAHEAD + 1 + IMBALANCE
"""The most batches that an Executor is ever sent before it has answered."""
LATEST = 0.3
"""Weight of the latest batch in an Executor's pace."""

Uses = Sequence[Sequence[tuple[int, float]]]
"""Per MoE layer (expert, probability that the batch needs it): `HashTable.uses_under`."""


@dataclass
class Job:
    """A batch on its way.

    Attributes:
        prediction: its table, or a reference to it; None: the Executor makes it.
        uses: what its table names, once that is known to whoever chooses.
        answer: a reference to what the Executor will say, once it has been sent.
        sent: when that was, time.time_ns().
    """

    batch: Batch
    prediction: Any
    uses: Uses = ()
    answer: Any = None
    sent: int = 0
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = max(1, int(sum(lengths.sum() for lengths in self.batch.tokens.lengths)))


class Lane:
    """One Executor as the driver sees it.

    Attributes:
        under_way: what it has been sent and has not answered, in that order.
        number: of the Executor, once it has answered.
        pids: of its processes, as far as they have been seen.
    """

    def __init__(
        self,
        executor: Any,
        slots: int,
        lookahead: int | Literal["auto"],
        clock: Callable[[], float] = time.perf_counter,
        pids: set[int] | None = None,
    ):
        """
        Args:
            pids: kept by whoever keeps the Executor, as far as they are known.
        """
        self.executor = executor
        self.number: int | None = None
        self.pids: set[int] = set() if pids is None else pids
        self.under_way: deque[Job] = deque()
        self._window = Window(slots, lookahead)
        self._slots, self._clock = slots, clock
        self._holds: dict[tuple[int, int], None] = {}
        """(MoE layer, expert), the least recently named first; at most as many as there are slots."""
        self._pace: float | None = None
        """Seconds per token."""
        self._since = 0.0
        """When it began with the first that is under way."""

    @property
    def room(self) -> int:
        """Batches that its look-ahead still asks for; may be negative."""
        return self._window.lookahead + 1 - len(self.under_way)

    @property
    def tokens(self) -> int:
        """Under way."""
        return sum(job.tokens for job in self.under_way)

    def pace(self) -> float | None:
        """Seconds per token; None: it has not answered yet. One whose answer is overdue is at least as slow as that."""
        if self._pace is None or not self.under_way:
            return self._pace
        return max(self._pace, (self._clock() - self._since) / self.under_way[0].tokens)

    def overlap(self, uses: Uses) -> float:
        """How many of the experts that a table names it will hold when that batch's turn has come."""
        return sum(p for layer, experts in enumerate(uses) for expert, p in experts if (layer, expert) in self._holds)

    def sent(self, job: Job) -> None:
        if not self.under_way:
            self._since = self._clock()
        self.under_way.append(job)
        for layer, experts in enumerate(job.uses):
            for expert, p in experts:
                if p >= WORTH_COPYING:  # the others are read in place, if at all
                    self._holds.pop((layer, expert), None)
                    self._holds[layer, expert] = None
        for key in list(self._holds)[: max(0, len(self._holds) - self._slots)]:
            del self._holds[key]

    def answered(self, predicted_uses: float) -> None:
        """The first that was under way is done."""
        job, now = self.under_way.popleft(), self._clock()
        pace = (now - self._since) / job.tokens
        self._pace = pace if self._pace is None else LATEST * pace + (1 - LATEST) * self._pace
        self._since = now
        self._window.saw(predicted_uses)


def choose(lanes: Sequence[Lane], job: Job) -> Lane | None:
    """Who gets a batch; None: those that may have it have enough."""
    paces = [lane.pace() for lane in lanes]
    known = [pace for pace in paces if pace is not None]
    usual = sum(known) / len(known) if known else 1.0  # who has not answered yet counts as one like the others
    done_in = [(lane.tokens + job.tokens) * (usual if pace is None else pace) for lane, pace in zip(lanes, paces, strict=True)]
    ahead = [(seconds - min(done_in)) / (job.tokens * usual) for seconds in done_in]  # in batches like this one
    named = sum(p for experts in job.uses for _, p in experts) or 1.0

    def worth(i: int) -> tuple[float, float]:
        return lanes[i].overlap(job.uses) / named - PRICE * ahead[i], -ahead[i]

    fit = [i for i, lane in enumerate(lanes) if ahead[i] <= IMBALANCE and lane.room + IMBALANCE > 0]
    return lanes[max(fit, key=worth)] if fit else None
