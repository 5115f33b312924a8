"""The Executor actor: the backbone on its device, as many experts as the budget allows in slots, the rest a read away.

`plan` hears of a batch several batches ahead, so that its experts are on their way; `execute` runs it. The first is a hint and may
be lost; the second carries all that it needs and may be repeated, in any order, by a restarted Executor.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.device import ExecutorSpec, make_device
from pipeline.tasks import Result
from predictor.accuracy import Accuracy, compare
from predictor.actor import Prediction
from predictor.traces import Trace
from store.arena import Arena


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


class Executor:
    """Run as a Ray actor; plain calls work too."""

    def __init__(self, spec: ExecutorSpec):
        torch.set_num_threads(spec.threads)
        self._spec = spec
        arena = Arena.attach(spec.arena)
        if arena is None:
            raise RuntimeError(f"{spec.arena}: the arena is gone; was it removed by hand?")
        self._arena = arena
        self._device = make_device(spec, arena)
        self._turn = threading.Lock()

    def ready(self) -> int:
        """The process id: answers once the model stands."""
        return os.getpid()

    def plan(self, batch: int, prediction: Prediction, routing: str = "exact") -> None:
        """Hears which experts a later batch will need; their copies begin as soon as there is room for them."""
        self._device.plan(batch, prediction.table.uses_under(routing))

    @torch.inference_mode()
    def execute(self, batch: Batch, prediction: Prediction | None, routing: str = "exact") -> BatchResult:
        """Runs one batch; one at a time, and a second call may wait: its arguments are unpacked while the first computes.

        Args:
            prediction: the batch's table. Under "hash" routing it is the routing; under "exact" it is a hint and may be None.
        """
        with self._turn:
            return self._execute(batch, prediction, routing)

    def _execute(self, batch: Batch, prediction: Prediction | None, routing: str) -> BatchResult:
        start = time.time_ns()
        if prediction is not None:
            self.plan(batch.index, prediction, routing)
        assert routing == "exact" or prediction is not None
        table = prediction.table if prediction is not None and routing == "hash" else None
        answer = self._device.run(batch, table)
        results = self._spec.task.results(batch, answer.outputs)
        moved = self._device.take()
        stats = BatchStats(
            start=start,
            end=time.time_ns(),
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
            predicted_uses=prediction.table.expected_uses(routing) if prediction else 0.0,
        )
        if prediction is not None and answer.chosen:
            truth = [chosen[:, 0] for chosen in answer.chosen]
            stats.accuracy = compare(prediction.table, truth)
            sizes = self._spec.model.shape.experts
            stats.load = _loads(truth, sizes)
            stats.predicted_load = _loads([experts[:, 0] for experts in prediction.table.experts], sizes)
        return BatchResult(batch.index, results, stats)

    @torch.inference_mode()
    def trace(self, batch: Batch, top_t: int) -> Trace:
        """Runs one batch exactly and returns what its routers decided: tokens and labels of the same forward, in one order."""
        with self._turn:
            answer = self._device.run(batch, None, top_t)
        return Trace(batch.tokens, tuple(answer.decisions))

    def close(self) -> None:
        """Stops copying and gives up the arena."""
        self._device.close()
        self._arena.close()


def _loads(choices: list[np.ndarray], sizes: tuple[int, ...]) -> list[list[int]]:
    """Tokens per expert, per MoE layer."""
    return [np.bincount(c, minlength=n).tolist() for c, n in zip(choices, sizes, strict=True)]
