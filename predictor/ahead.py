"""Tables for batches that wait, several at once: what a predictor costs per call is shared by those that it is asked of together.

A predictor that sees whole texts, as a rehearsal, takes nearly as long for one row as for dozens. So it is asked when enough
batches wait beside those that have their tables and are not computed yet: the fewer of these are left, the sooner. The first is
never kept waiting, and neither is the last once all others are done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from predictor.actor import Prediction, timed
from predictor.registry import HashPredictor
from predictor.tokens import TokenBatch

ROWS, POSITIONS = 64, 8192
"""No more rows, and tokens with padding, in one go, unless a batch alone has more: beyond, a rehearsal takes longer with each, and
its memory grows."""
RESERVE = 3
"""Batches with tables that are left for each one that waits, when the predictor is asked: while it works there is enough to do."""


class Ahead:
    """Of one predictor. `ask`, `begun`, `finished` from any thread; `take` from one."""

    def __init__(self, predictor: Callable[[], HashPredictor]):
        self._predictor = predictor
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, TokenBatch, bool]] = deque()
        self._made: dict[int, Prediction | BaseException] = {}
        self._unfinished: set[int] = set()
        self._closed = False

    def ask(self, batch: int, tokens: TokenBatch, alone: bool = False) -> None:
        """Its table will be taken, after those that were asked for before.

        Args:
            alone: it is made of this batch alone, so that it is the same whoever waits beside it.
        """
        with self._changed:
            if all(batch != waiting for waiting, _, _ in self._waiting):
                self._waiting.append((batch, tokens, alone))
            self._changed.notify_all()

    def begun(self, batch: int) -> None:
        """It has its table and is on its way; whoever is only expected may not come before others have ended."""
        with self._changed:
            self._unfinished.add(batch)

    def finished(self, batch: int) -> None:
        """It has been computed, or has failed."""
        with self._changed:
            self._unfinished.discard(batch)
            self._changed.notify_all()

    def take(self, batch: int) -> Prediction:
        """The table of a batch that has asked.

        Raises:
            Whatever its prediction raised.
            RuntimeError: it has not asked, or nobody is to wait any more.
        """
        while batch not in self._made:  # calls from several threads may have asked in another order
            self._made |= self._make(self._next(batch))
        made = self._made.pop(batch)
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """Nobody waits for tables any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next(self, batch: int) -> list[tuple[int, TokenBatch]]:
        with self._changed:
            self._changed.wait_for(self._is_time)
            if not self._waiting:
                raise RuntimeError(f"batch {batch}: its table was not asked for, or the Executor is closing")
            first, tokens, alone = self._waiting.popleft()
            some, rows, longest = [(first, tokens)], tokens.size, _longest(tokens)
            while self._waiting and not alone:
                following, tokens, apart = self._waiting[0]
                rows, longest = rows + tokens.size, max(longest, _longest(tokens))
                if apart or rows > ROWS or rows * longest > POSITIONS:
                    break
                some.append((following, tokens))
                self._waiting.popleft()
        return some

    def _is_time(self) -> bool:
        """Asked when all tables that were made have been taken. Who has begun will end, and then it is time at last."""
        if self._closed or (self._waiting and self._waiting[0][2]):
            return True
        rows = sum(tokens.size for _, tokens, _ in self._waiting)
        return rows >= ROWS or RESERVE * len(self._waiting) >= len(self._unfinished)

    def _make(self, some: list[tuple[int, TokenBatch]]) -> dict[int, Prediction | BaseException]:
        try:
            predictor = self._predictor()
        except BaseException as error:
            return {batch: error for batch, _ in some}
        together = getattr(predictor, "predict_all", None)
        if together is None or len(some) == 1:
            return {batch: _tried(predictor, tokens) for batch, tokens in some}
        start = time.time_ns()
        try:
            tables = together([tokens for _, tokens in some])
        except Exception:  # whose fault it is, each says by itself
            return {batch: _tried(predictor, tokens) for batch, tokens in some}
        share = (time.time_ns() - start) // len(some)  # of the time that all took
        made: dict[int, Prediction | BaseException] = {}
        for number, ((batch, _), table) in enumerate(zip(some, tables, strict=True)):
            made[batch] = Prediction(table, start + number * share, start + (number + 1) * share)
        return made


def _longest(tokens: TokenBatch) -> int:
    return max(int(lengths.max(initial=0)) for lengths in tokens.lengths)


def _tried(predictor: HashPredictor, tokens: TokenBatch) -> Prediction | BaseException:
    try:
        return timed(predictor, tokens)
    except BaseException as error:
        return error
