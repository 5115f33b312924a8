"""The Executor called directly, as a system of the bench: the driver's loop without actors."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace

from pipeline.batch_result import BatchResult
from pipeline.bench.whole import Pass, numbers
from pipeline.bench.workload import Combination, Workload
from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.window import Window
from predictor.actor import Prediction


class InProcess:
    """This project's Executor called directly, tables as far ahead as the window says: the driver's loop without actors."""

    def __init__(self, workload: Workload, given: Combination, spec: ExecutorSpec, routing: str = "exact", goes_on: bool = True):
        """
        Args:
            goes_on: the tables of the next round's first batches are known when a round ends, as those of the next inputs are
                under steady load; otherwise, as at the end of a run, there is nothing to look ahead to.
        """
        self._workload, self._predictor, self._routing, self._goes_on = workload, given.predictor, routing, goes_on
        self._asks = spec.predictor is not None
        """The Executor has a predictor of its own, which works while it serves: no table comes from memory."""
        self._executor = Executor(spec)
        self._executor.ready()
        self._window = Window(spec.slots, workload.prepared.config.predictor.lookahead)
        self._next = self._planned = 0  # batches are numbered on from round to round

    def run(self, batches: list[Batch]) -> Pass:
        waiting, under_way = deque(batches), deque[Future[BatchResult]]()
        outputs, times, stats = [], [], []
        start = last = time.perf_counter()
        while waiting or under_way:
            while waiting and len(under_way) <= self._window.lookahead:
                under_way.append(self._submit(waiting.popleft()))
            if self._goes_on:
                self._plan_on(batches, self._window.lookahead + 1 - len(under_way))
            result = under_way.popleft().result()
            now = time.perf_counter()
            self._window.saw(result.stats.predicted_uses)
            times.append((now - last) * 1e3)
            last = now
            outputs.append(numbers(result.results))
            stats.append(result.stats)
        return Pass(time.perf_counter() - start, outputs, times, stats)

    def close(self) -> None:
        self._executor.close()

    def _submit(self, batch: Batch) -> Future[BatchResult]:
        number, self._next = self._next, self._next + 1
        return self._executor.submit(replace(batch, index=number), self._table(batch), self._routing)

    def _plan_on(self, batches: list[Batch], count: int) -> None:
        """Tells the Executor of the next round's first batches."""
        for number in range(max(self._next, self._planned), self._next + count):
            batch = batches[number % len(batches)]
            table = self._table(batch)
            if self._asks:
                self._executor.expect(replace(batch, index=number), self._routing)
            elif table is not None:
                self._executor.plan(number, table, self._routing)
            self._planned = number + 1

    def _table(self, batch: Batch) -> Prediction | None:
        return None if self._predictor is None or self._asks else _handed_over(self._workload.table(self._predictor, batch))


def _handed_over(prediction: Prediction) -> Prediction:
    """A recorded table, as if it had been made just now."""
    now = time.time_ns()
    return replace(prediction, start=now - (prediction.end - prediction.start), end=now)
