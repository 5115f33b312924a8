"""The Executor actor: the backbone on its device, as many experts as the budget allows in slots, the rest a read away.

Calls may wait in it, as many as the window is wide: each hands its table to the copy engine when it comes, and is computed when its
turn has come. A call carries all that it needs and may be repeated, in any order, by a restarted Executor.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.device import Answer, Device, ExecutorSpec
from pipeline.inputs import Hear, Result
from pipeline.on_cpu import OnCPU
from predictor.accuracy import Accuracy, compare
from predictor.actor import Prediction
from predictor.hash_table import HashTable
from predictor.traces import Trace
from store.arena import Arena
from store.movement import Movement


@dataclass
class BatchStats:
    """What one batch did; plain data, so that it can be written to the journal. Times are time.time_ns()."""

    start: int
    end: int
    pid: int
    tokens: int
    predict_span: list[int] | None
    copy_spans: list[list[int]]
    hits: list[int]
    misses: list[int]
    prefetch_bytes: int
    demand_bytes: int
    read_in_place_bytes: int
    stall_ms: float
    resident: list[int]
    """Experts in slots per MoE layer, after the batch."""
    resident_peak_bytes: int
    predicted_uses: float
    """Distinct (MoE layer, expert) pairs that the batch's table expects."""
    device_memory_peak_bytes: int | None = None
    """On a GPU, the most that torch has held there so far."""
    first_token_ms: float | None = None
    """Of a task that generates, from the batch's start to the first new token of each row."""
    token_ms: list[float] = field(default_factory=list)
    """The same for each further step."""
    new_tokens: int = 0
    """Of all rows."""
    accuracy: Accuracy = field(default_factory=Accuracy)
    load: list[list[int]] = field(default_factory=list)
    """Per MoE layer, tokens that the router gave each expert; empty under hash routing."""
    predicted_load: list[list[int]] = field(default_factory=list)
    """The same by the table's first choice."""

    @property
    def moves(self) -> int:
        """Experts that crossed the link since the batch before: copied or read in place."""
        return sum(experts for _, _, experts in self.copy_spans) + sum(self.misses)


@dataclass(frozen=True)
class BatchResult:
    """One line of the journal."""

    batch: int
    results: list[Result]
    stats: BatchStats

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Computed:
    """What the compute thread hands back. Times are time.time_ns()."""

    answer: Answer
    moved: Movement
    start: int
    end: int
    steps: list[int]
    """When each new token of the rows came, for a task that generates."""


class Executor:
    """Run as a Ray actor; plain calls work too, from any number of threads."""

    def __init__(self, spec: ExecutorSpec):
        self._spec = spec
        arena = Arena.attach(spec.arena)
        if arena is None:
            raise RuntimeError(f"{spec.arena}: the arena is gone; was it removed by hand?")
        self._arena = arena
        # One thread computes, whoever calls: torch's operators keep helper threads for every thread that ever called them.
        self._compute = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (spec.threads,))
        self._starting = self._compute.submit(_make_device, spec, arena)
        wait([self._starting])  # a model is made under settings of the whole process: nobody else may make tensors meanwhile
        self._closed = False
        self._spoken: dict[int, list[list[int]]] = {}

    def ready(self) -> int:
        """The process id: answers once the model stands.

        Raises:
            SpaceError: it cannot stand there. From here and not from the constructor, whose errors Ray would wrap in its own.
        """
        self._device  # noqa: B018 (waited for)
        return os.getpid()

    def plan(self, batch: int, prediction: Prediction, routing: str = "exact") -> None:
        """Hears which experts a later batch will need; their copies begin as soon as there is room for them."""
        self._device.plan(batch, prediction.table.uses_under(routing))

    def execute(self, batch: Batch, prediction: Prediction | None, routing: str = "exact", hear: Hear | None = None) -> BatchResult:
        """Runs one batch, when those that came before it are done; its experts are on their way meanwhile.

        Args:
            prediction: the batch's table. Under "hash" routing it is the routing; under "exact" it is a hint and may be None.
            hear: called with every new token of a task that generates, in the thread that computes. Another process asks `spoken`.
        """
        assert routing == "exact" or prediction is not None
        if prediction is not None:
            self.plan(batch.index, prediction, routing)
        table = prediction.table if prediction is not None and routing == "hash" else None
        done = self._compute.submit(self._run, batch, table, None, hear).result()
        moved = done.moved
        steps = np.diff([done.start, *done.steps]) / 1e6
        stats = BatchStats(
            start=done.start,
            end=done.end,
            pid=os.getpid(),
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
            first_token_ms=float(steps[0]) if len(steps) else None,
            token_ms=steps[1:].tolist(),
            predicted_uses=prediction.table.expected_uses(routing) if prediction else 0.0,
        )
        truth = [chosen[:, 0] for chosen in done.answer.chosen]
        if prediction is not None and _is_about(prediction.table, truth):
            stats.accuracy = compare(prediction.table, truth)
            sizes = self._spec.model.shape.experts
            stats.load = _loads(truth, sizes)
            stats.predicted_load = _loads([experts[:, 0] for experts in prediction.table.experts], sizes)
        results = self._spec.task.results(batch, done.answer.outputs)
        stats.new_tokens = sum(len(result.get("token_ids", ())) for result in results)
        return BatchResult(batch.index, results, stats)

    def spoken(self, batch: int) -> list[list[int]]:
        """What a batch under way has generated so far: per step the new token of each row, -1 in rows that were done."""
        return list(self._spoken.get(batch, ()))

    def trace(self, batch: Batch, top_t: int) -> Trace:
        """Runs one batch exactly and returns what its routers decided: tokens and labels of the same forward, in one order."""
        done = self._compute.submit(self._run, batch, None, top_t).result()
        return Trace(batch.tokens, tuple(done.answer.decisions))

    def close(self) -> None:
        """Stops copying and gives up the arena. May be repeated."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._starting.exception() is None:
                self._compute.submit(self._device.close).result()
        finally:
            self._compute.shutdown()
            self._arena.close()

    @property
    def _device(self) -> Device:
        return self._starting.result()

    @torch.inference_mode()
    def _run(self, batch: Batch, table: HashTable | None, top_t: int | None = None, hear: Hear | None = None) -> Computed:
        """In the compute thread: the forward, and nothing that could be done beside the next one."""
        steps: list[int] = []
        spoken: list[list[int]] = []
        self._spoken[batch.index] = spoken

        def heard(tokens: np.ndarray, awake: np.ndarray) -> None:
            steps.append(time.time_ns())
            spoken.append(tokens.tolist())
            if hear is not None:
                hear(tokens, awake)

        start = time.time_ns()
        try:
            answer = self._device.run(batch, table, top_t, heard)
        finally:
            del self._spoken[batch.index]
        return Computed(answer, self._device.take(), start, time.time_ns(), steps)


def _make_device(spec: ExecutorSpec, arena: Arena) -> Device:
    if spec.device == "cpu":
        return OnCPU(spec, arena)
    from pipeline.on_gpu import OnGPU  # not on a machine without one: it needs Triton

    return OnGPU(spec, arena)


def _is_about(table: HashTable, truth: list[np.ndarray]) -> bool:
    """Whether a table names experts for what the routers decided: not under hash routing, nor where a layer was not reached."""
    return [len(layer) for layer in truth] == [len(layer) for layer in table.experts] and table.experts[0].shape[1] > 0


def _loads(choices: list[np.ndarray], sizes: tuple[int, ...]) -> list[list[int]]:
    """Tokens per expert, per MoE layer."""
    return [np.bincount(c, minlength=n).tolist() for c, n in zip(choices, sizes, strict=True)]
