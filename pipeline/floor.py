"""Where the batches of a run are: with the Predictor, with an Executor, done. The driver's loop says when, this keeps count."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import ray
from ray.exceptions import RayError

from pipeline.actors import ActorLost, Actors, result
from pipeline.batch_result import BatchResult, BatchStats
from pipeline.data import Batch
from pipeline.dispatch import Job, Lane, choose
from pipeline.losses import Loss, Told
from predictor.actor import Prediction

LISTEN_S = 0.1
"""How often the Executor is asked what it has generated."""
TABLES_AHEAD = 2
"""With several Executors: tables for each that are made before it is known who gets them."""

Listen = Callable[[Batch, list[list[int]]], None]


class Floor:
    """One run's. A lane is an Executor as seen from here."""

    def __init__(self, actors: Actors, routing: str, slots: int, lookahead: int | Literal["auto"], lost: Told = lambda loss: None):
        """
        Args:
            lost: told of actors that died; their batches are sent again.
        """
        self._actors, self._routing, self._slots, self._lookahead, self._lost = actors, routing, slots, lookahead, lost
        self._lanes: list[Lane] = []
        self._asked: deque[Job] = deque()
        """Their tables are made or being made, and no Executor has them yet."""
        self._predictors = actors.pids.setdefault(actors.predictor, set())
        """Process ids seen, in the passes before this one, too."""
        self._welcome()

    @property
    def room(self) -> int:
        """How many more batches should be on their way."""
        self._welcome()
        ahead = 0 if self._alone else TABLES_AHEAD
        return max(0, sum(lane.room + ahead for lane in self._lanes) - len(self._asked))

    @property
    def is_empty(self) -> bool:
        return not self._asked and not any(lane.under_way for lane in self._lanes)

    def predict(self, batch: Batch, prediction: Prediction | None) -> None:
        """Has a batch's table made, unless it is there, or Executors make their own."""
        asks = prediction is None and self._actors.predictor is not None
        self._asked.append(Job(batch, self._actors.predict(batch.tokens) if asks else prediction))

    def dispatch(self) -> None:
        """Sends what is predicted to those who are to have it, as long as they have room."""
        while self._asked and (lane := self._lane_for(self._asked[0])) is not None:
            job = self._asked.popleft()
            job.answer = lane.executor.execute.remote(job.batch, job.prediction, self._routing)
            job.sent = time.time_ns()
            lane.sent(job)

    def done(self, listen: Listen | None = None) -> list[BatchResult]:
        """Waits until something has come, and returns the batches that are done: none, if what came is a table."""
        heads = {lane.under_way[0].answer: lane for lane in self._lanes if lane.under_way}
        tables = [job.prediction for job in list(self._asked)[:1] if not self._is_known(job)]
        if len(heads) == 1 and not tables:  # most runs: not asked first whether it is there
            answers = [self._take(lane, listen if self._alone else None) for lane in heads.values()]
        else:
            ready, _ = ray.wait([*heads, *tables], num_returns=1)
            answers = [self._take(heads[ref]) for ref in ready if ref in heads]
        return [answer for answer in answers if answer is not None]

    @property
    def _alone(self) -> bool:
        return len(self._lanes) == 1

    def _lane_for(self, job: Job) -> Lane | None:
        """None: not known yet, or there is no room. An Executor that is alone is sent a batch before its table is there."""
        if self._alone:
            return self._lanes[0] if self._lanes[0].room > 0 else None
        if not self._is_known(job):
            return None
        if job.prediction is not None and not job.uses:
            prediction: Prediction = result(job.prediction) if isinstance(job.prediction, ray.ObjectRef) else job.prediction
            job.uses = prediction.table.uses_under(self._routing)
        return choose(self._lanes, job)

    def _is_known(self, job: Job) -> bool:
        return not isinstance(job.prediction, ray.ObjectRef) or bool(ray.wait([job.prediction], timeout=0)[0])

    def _welcome(self) -> None:
        """Executors of machines that have joined."""
        if len(self._actors.executors) > len(self._lanes):
            known = [lane.executor for lane in self._lanes]
            new = [executor for executor in self._actors.executors if executor not in known]
            for executor in new:
                pids = self._actors.pids.setdefault(executor, set())
                self._lanes.append(Lane(executor, self._slots, self._lookahead, pids=pids))

    def _take(self, lane: Lane, listen: Listen | None = None) -> BatchResult | None:
        """What a lane's first batch has come to; None: its Executor is lost, and others will do what it had to do."""
        job = lane.under_way[0]
        try:
            while listen is not None and not ray.wait([job.answer], timeout=LISTEN_S)[0]:
                listen(job.batch, result(lane.executor.spoken.remote(job.batch.index)))
            done: BatchResult = result(job.answer)
        except ActorLost:
            self._lose(lane)
            if not self._lanes:
                raise
            return None
        self._see(lane, done.stats)
        lane.answered(done.stats.predicted_uses)
        done.stats.queued = len(lane.under_way)
        return done

    def _lose(self, lane: Lane) -> None:
        name = f"Executor {lane.number}" if lane.number is not None else "an Executor that had not answered yet"
        self._lost(Loss("executor", name, redone=len(lane.under_way)))
        self._lanes.remove(lane)
        self._actors.executors.remove(lane.executor)
        self._asked.extendleft(reversed(lane.under_way))
        with contextlib.suppress(RayError):
            ray.kill(lane.executor)  # it may go on dying

    def _see(self, lane: Lane, stats: BatchStats) -> None:
        """Whether the processes that did a batch are those that did the ones before."""
        lane.number = stats.executor
        if stats.pid not in lane.pids:  # an answer of the last process may still come after one of this
            if lane.pids:  # Ray has sent it again what its last process had been sent
                again = sum(job.sent < stats.born for job in lane.under_way)
                self._lost(Loss("executor", f"Executor {stats.executor}", redone=again))
            lane.pids.add(stats.pid)
        pid = stats.predictor_pid
        if pid is not None and pid not in self._predictors and self._actors.predictor is not None:
            if self._predictors:
                self._lost(Loss("predictor", "Predictor"))
            self._predictors.add(pid)
