"""The Executor actor: the backbone on its device, as many experts as the budget allows in slots, the rest a read away.

`plan` hears of a batch several batches ahead, so that its experts are on their way; `execute` runs it. The first is a hint and may
be lost; the second carries all that it needs and may be repeated, in any order, by a restarted Executor.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.experts import Current, Forward
from pipeline.models import ModelSpec, build
from pipeline.tasks import Result, Task
from predictor.accuracy import Accuracy, compare
from predictor.actor import Prediction
from predictor.traces import Trace
from store.arena import Arena
from store.copies import CopyEngine
from store.eviction import POLICIES
from store.slots import Slots


@dataclass(frozen=True)
class ExecutorSpec:
    """All that an Executor is made of; travels to it.

    Attributes:
        slots: how many experts fit the budget (store.slots.parse_budget).
        background: copy on a thread of its own; otherwise whenever a table or a layer comes.
        threads: for torch's operators.
    """

    model: ModelSpec
    task: Task
    arena: Path
    slots: int
    policy: str
    device: str
    threads: int
    background: bool = True


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
        device = torch.device(spec.device)
        arena = Arena.attach(spec.arena)
        if arena is None:
            raise RuntimeError(f"{spec.arena}: the arena is gone; was it removed by hand?")
        self._arena = arena
        self._slots = Slots(arena, spec.slots, device)
        self._engine = CopyEngine(arena, self._slots, POLICIES[spec.policy](), spec.background)
        self._current = Current()
        self._model = build(spec.model, arena, self._engine, self._current, device)
        self._device = device

    def ready(self) -> int:
        """The process id: answers once the model stands."""
        return os.getpid()

    def plan(self, batch: int, prediction: Prediction, routing: str = "exact") -> None:
        """Hears which experts a later batch will need; their copies begin as soon as there is room for them."""
        self._engine.plan(batch, prediction.table.uses_under(routing))

    @torch.inference_mode()
    def execute(self, batch: Batch, prediction: Prediction | None, routing: str = "exact") -> BatchResult:
        """Runs one batch.

        Args:
            prediction: the batch's table. Under "hash" routing it is the routing; under "exact" it is a hint and may be None.
        """
        start = time.time_ns()
        if prediction is not None:
            self.plan(batch.index, prediction, routing)
        forward = self._forward(batch, prediction, routing)
        try:
            results = self._spec.task.run(self._model, batch)
        finally:
            self._engine.finish(batch.index)
        moved = self._engine.take()
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
            predicted_uses=prediction.table.expected_uses(routing) if prediction else 0.0,
        )
        if prediction is not None and forward.decisions:
            truth = [layer.top[:, 0] for layer in forward.decisions]
            stats.accuracy = compare(prediction.table, truth)
            sizes = self._spec.model.shape.experts
            stats.load = _loads(truth, sizes)
            stats.predicted_load = _loads([experts[:, 0] for experts in prediction.table.experts], sizes)
        return BatchResult(batch.index, results, stats)

    @torch.inference_mode()
    def trace(self, batch: Batch, top_t: int) -> Trace:
        """Runs one batch exactly and returns what its routers decided: tokens and labels of the same forward, in one order."""
        forward = self._forward(batch, None, "exact", top_t)
        self._spec.task.run(self._model, batch)
        self._engine.finish(batch.index)
        return Trace(batch.tokens, tuple(forward.decisions))

    def close(self) -> None:
        """Stops copying and gives up the arena."""
        self._engine.close()
        self._arena.close()

    def _forward(self, batch: Batch, prediction: Prediction | None, routing: str, top_t: int = 1) -> Forward:
        """Tells the MoE layers what they are about to run."""
        assert routing == "exact" or prediction is not None
        real = []
        for stream in range(len(batch.tokens.streams)):
            _, mask = batch.pad(stream, 0)
            real.append(mask.reshape(-1).nonzero().squeeze(1).to(self._device))
        table = prediction.table if prediction is not None and routing == "hash" else None
        self._current.forward = Forward(batch.index, tuple(real), table, top_t)
        return self._current.forward


def _loads(choices: list[np.ndarray], sizes: tuple[int, ...]) -> list[list[int]]:
    """Tokens per expert, per MoE layer."""
    return [np.bincount(c, minlength=n).tolist() for c, n in zip(choices, sizes, strict=True)]
