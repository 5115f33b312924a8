"""The Executor actor: the backbone on its device, as many experts as the budget allows in slots, the rest a read away.

Calls may wait in it, as many as the window is wide: each hands its table to the copy engine when it comes, and is computed when its
turn has come. A GPU is given the next batch before it has ended the one before. A call carries all that it needs and may be
repeated, in any order, by a restarted Executor.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from pipeline.batch_result import BatchResult, BatchStats, Spoken
from pipeline.data import Batch
from pipeline.device import Answer, Device, ExecutorSpec, Work
from pipeline.garbage import spare_imports, spare_what_stands
from pipeline.inputs import Hear
from pipeline.on_cpu import OnCPU
from pipeline.predicting.rehearsal import ArenaModel
from predictor.accuracy import compare
from predictor.actor import Prediction, timed
from predictor.ahead import Ahead
from predictor.hash_table import HashTable
from predictor.registry import BY_TOKEN, HashPredictor, make
from predictor.stepping import Foresight, source_of
from predictor.tokens import TokenBatch
from predictor.traces import Trace
from store.arena import Arena

T = TypeVar("T")
LOG = logging.getLogger(__name__)
"""Ray writes it to the actor's own file, with the actor's name."""


class Executor:
    """Run as a Ray actor; plain calls work too, from any number of threads."""

    def __init__(self, spec: ExecutorSpec):
        self._spec, self._born = spec, time.time_ns()
        if spec.alone:
            spare_imports()
        arena = Arena.attach(spec.arena)
        if arena is None:
            raise RuntimeError(f"{spec.arena}: the arena is gone; was it removed by hand?")
        self._arena = arena
        # One thread computes, whoever calls: torch's operators keep helper threads for every thread that ever called them.
        self._compute = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (spec.threads,))
        self._answers = ThreadPoolExecutor(1, "answer")  # another one, so that the next batch has not to wait for them
        self._starting = self._compute.submit(_make_device, spec, arena)
        # So has what is done ahead of a batch: none overtakes another. A predictor that is here has a stream of its own on a GPU.
        own = spec.predictor is not None
        self._ahead = ThreadPoolExecutor(1, "ahead", *((torch.set_num_threads, (1,)) if own else ()))
        self._predicting = self._ahead.submit(self._make_predictor) if own else None
        self._tables = Ahead(lambda: self._predictor)
        self._expected: dict[int, Prediction | BaseException | None] = {}
        self._stepping = self._ahead.submit(self._make_stepping) if spec.stepping is not None else None
        # A model is made under settings of the whole process: nobody else may make tensors meanwhile.
        for made in (self._starting, self._predicting, self._stepping):
            if made is not None:
                made.exception()
        if spec.alone:
            spare_what_stands()
        self._closed = False
        self._spoken: dict[int, Spoken] = {}

    def ready(self) -> int:
        """The process id: answers once the model stands.

        Raises:
            SpaceError: it cannot stand there. From here and not from the constructor, whose errors Ray would wrap in its own.
            PredictorError: the predictor that is to be here has no file that can be used.
        """
        self._device  # noqa: B018 (waited for)
        for made in (self._predicting, self._stepping):
            if made is not None:
                made.result()
        return os.getpid()

    def plan(self, batch: int, prediction: Prediction, routing: str = "exact") -> None:
        """Hears which experts a later batch will need; they are copied as soon as there is room, for which this does not wait."""
        self._ahead.submit(self._plan, batch, prediction, routing)

    def plan_uses(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        """`plan`, of a table that is not at hand: per MoE layer (expert, probability that the batch needs it), likeliest first."""
        self._device.plan(batch, uses)

    def execute(self, batch: Batch, prediction: Prediction | None, routing: str = "exact", hear: Hear | None = None) -> BatchResult:
        """Runs one batch, when those that came before it are done; its experts are on their way meanwhile.

        Args:
            prediction: the batch's table. Under "hash" routing it is the routing; under "exact" it is a hint and may be None.
                Where the predictor is in this process, it is made here.
            hear: called with every new token of a task that generates, in the thread that computes. Another process asks `spoken`.
        """
        return self.submit(batch, prediction, routing, hear).result()

    def submit(
        self, batch: Batch, prediction: Prediction | None, routing: str = "exact", hear: Hear | None = None
    ) -> Future[BatchResult]:
        """`execute`, without waiting for it. Batches run in the order in which they are submitted."""
        assert routing == "exact" or prediction is not None or self._predicting is not None
        spoken = self._spoken[batch.index] = Spoken(hear)
        done: Future[BatchResult] = Future()
        done.add_done_callback(lambda _: self._spoken.pop(batch.index, None))
        done.add_done_callback(lambda _: self._tables.finished(batch.index))
        if prediction is None and self._predicting is not None and batch.index not in self._expected:
            self._tables.ask(batch.index, batch.tokens, alone=routing == "hash")
        self._ahead.submit(self._begin, batch, prediction, routing, spoken, done)
        return done

    def expect(self, batch: Batch, routing: str = "exact") -> None:
        """Hears of a batch that will be submitted without a table: the predictor that is here makes one, and it is planned."""
        self._expected[batch.index] = None
        self._tables.ask(batch.index, batch.tokens, alone=routing == "hash")
        self._ahead.submit(self._expect, batch.index, routing)

    def predict(self, tokens: TokenBatch) -> Prediction:
        """What the predictor says that is in this process, for whoever wants tables before there are batches."""
        assert self._predicting is not None, "no predictor is here"
        return self._ahead.submit(lambda: timed(self._predictor, tokens)).result()

    def spoken(self, batch: int) -> list[list[int]]:
        """What a batch under way has generated so far: per step the new token of each row, -1 in rows that were done."""
        spoken = self._spoken.get(batch)
        return list(spoken.tokens) if spoken is not None else []

    def trace(self, batch: Batch, top_t: int) -> Trace:
        """Runs one batch exactly and returns what its routers decided: tokens and labels of the same forward, in one order."""
        done: Future[Trace] = Future()
        self._run(self._device.prepare(batch, None, top_t), lambda answer: Trace(batch.tokens, tuple(answer.decisions)), done)
        return done.result()

    def close(self) -> None:
        """Stops copying and gives up the arena. May be repeated."""
        if self._closed:
            return
        self._closed = True
        self._tables.close()
        self._ahead.shutdown()
        self._compute.shutdown()
        self._answers.shutdown()
        try:
            if self._starting.exception() is None:
                self._device.close()
        finally:
            self._arena.close()

    @property
    def _device(self) -> Device:
        return self._starting.result()

    @property
    def _predictor(self) -> HashPredictor:
        assert self._predicting is not None
        return self._predicting.result()

    def _make_predictor(self) -> HashPredictor:
        """In the predictor's thread. On a GPU it reads the weights that the device has there."""
        assert self._spec.predictor is not None
        self._device  # noqa: B018 (waited for, so that the backbone is brought there once)
        return make(self._spec.predictor, ArenaModel(self._spec.model, self._spec.arena, self._arena))

    def _make_stepping(self) -> HashPredictor | None:
        """Whom a batch that is written asks of its tokens; None: nobody, there is only what they have been routed to."""
        assert self._spec.stepping is not None
        if self._spec.stepping.kind not in BY_TOKEN:
            return None
        return make(self._spec.stepping, ArenaModel(self._spec.model, self._spec.arena, self._arena))

    def _foresight(self) -> Foresight | None:
        """Of one batch."""
        if self._stepping is None or self._spec.model.is_encoder_decoder:
            return None
        return Foresight(self._spec.model.shape, source_of(self._stepping.result()))

    def _expect(self, batch: int, routing: str) -> None:
        try:
            prediction = self._expected[batch] = self._tables.take(batch)
            self._plan(batch, prediction, routing)
        except BaseException as error:
            self._expected[batch] = error

    def _begin(self, batch: Batch, prediction: Prediction | None, routing: str, spoken: Spoken, done: Future[BatchResult]) -> None:
        """Predicts a batch, if that is done here, plans it, and hands it to the compute thread."""
        try:
            if prediction is None and self._predicting is not None:
                known = self._expected.pop(batch.index, None) or self._tables.take(batch.index)
                if isinstance(known, BaseException):
                    raise known
                prediction = known
                self._tables.begun(batch.index)
            if prediction is not None:
                self._plan(batch.index, prediction, routing)
            table = prediction.table.deciding if prediction is not None and routing == "hash" else None
            work = self._device.prepare(batch, table, self._spec.top_t if table is None else None, spoken, self._foresight())
            self._run(work, partial(self._result, batch, prediction, routing, spoken), done)
        except BaseException as error:
            done.set_exception(error)

    def _plan(self, batch: int, prediction: Prediction, routing: str) -> None:
        self._device.plan(batch, prediction.table.uses_under(routing))

    def _run(self, work: Work, finished: Callable[[Answer], T], done: Future[T]) -> None:
        """One batch through both threads; the future gets what `finished` makes of its answer."""
        self._compute.submit(self._start, work, finished, done)

    def _start(self, work: Work, finished: Callable[[Answer], T], done: Future[T]) -> None:
        try:
            with torch.inference_mode():
                work.start()
        except BaseException as error:
            done.set_exception(error)
        else:
            self._answers.submit(self._answer, work, finished, done)

    def _answer(self, work: Work, finished: Callable[[Answer], T], done: Future[T]) -> None:
        try:
            with torch.inference_mode():
                done.set_result(finished(work.answer()))
        except BaseException as error:
            done.set_exception(error)

    def _result(self, batch: Batch, prediction: Prediction | None, routing: str, spoken: Spoken, answer: Answer) -> BatchResult:
        moved = answer.moved
        steps = np.diff([answer.span[0], *spoken.times]) / 1e6
        stats = BatchStats(
            start=answer.span[0],
            end=answer.span[1],
            pid=os.getpid(),
            executor=self._spec.number,
            born=self._born,
            predictor_pid=prediction.pid if prediction else None,
            tokens=int(sum(lengths.sum() for lengths in batch.tokens.lengths)),
            predict_span=[prediction.start, prediction.end] if prediction else None,
            copy_spans=moved.copy_spans,
            hits=moved.hits,
            misses=moved.misses,
            prefetch_bytes=moved.prefetch_bytes,
            demand_bytes=moved.demand_bytes,
            read_in_place_bytes=moved.read_in_place_bytes,
            stall_ms=moved.stall_ns / 1e6,
            resident=moved.resident,
            resident_peak_bytes=moved.resident_peak_bytes,
            device_memory_peak_bytes=self._device.memory_peak_bytes,
            how=answer.how,
            miss_path=self._device.miss_path,
            first_token_ms=float(steps[0]) if len(steps) else None,
            token_ms=steps[1:].tolist(),
            predicted_uses=prediction.table.expected_uses(routing) if prediction else 0.0,
        )
        truth = [chosen[:, 0] for chosen in answer.chosen]
        if prediction is not None and _is_about(prediction.table, truth):
            stats.accuracy = compare(prediction.table, truth)
            sizes = self._spec.model.shape.experts
            stats.load = _loads(truth, sizes)
            stats.predicted_load = _loads([experts[:, 0] for experts in prediction.table.experts], sizes)
        trace = Trace(batch.tokens, tuple(answer.decisions)) if self._spec.top_t is not None and routing == "exact" else None
        results = self._spec.task.results(batch, answer.outputs)
        used, found = sum(stats.hits) + sum(stats.misses), sum(stats.hits)
        words = "Executor %d: batch %d of %d rows, %d tokens: %.1f ms, %d of %d uses found in a slot"
        LOG.info(words, self._spec.number, batch.index, len(batch.rows), stats.tokens, (stats.end - stats.start) / 1e6, found, used)
        stats.new_tokens = sum(len(result.get("token_ids", ())) for result in results)
        return BatchResult(batch.index, results, stats, trace)


def _make_device(spec: ExecutorSpec, arena: Arena) -> Device:
    if spec.device == "cpu":
        return OnCPU(spec, arena)
    from pipeline.gpu.on_gpu import OnGPU  # not on a machine without one: it needs Triton

    return OnGPU(spec, arena)


def _is_about(table: HashTable, truth: list[np.ndarray]) -> bool:
    """Whether a table names experts for what the routers decided: not under hash routing, nor where a layer was not reached."""
    return [len(layer) for layer in truth] == [len(layer) for layer in table.experts] and table.experts[0].shape[1] > 0


def _loads(choices: list[np.ndarray], sizes: tuple[int, ...]) -> list[list[int]]:
    """Tokens per expert, per MoE layer."""
    return [np.bincount(c, minlength=n).tolist() for c, n in zip(choices, sizes, strict=True)]
