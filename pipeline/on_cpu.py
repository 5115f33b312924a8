"""A model on the CPU: slots are private memory, a miss is read from the arena's own pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.allocator import keep_freed_memory
from pipeline.data import Batch
from pipeline.device import Answer, ExecutorSpec
from pipeline.experts import Current, Forward, SlotExperts
from pipeline.inputs import Hear
from pipeline.models import build
from pipeline.predicting.next_layer import FIRST, NextLayer
from pipeline.routing import Expert
from pipeline.tasks.writing import OwnSteps
from predictor.hash_table import HashTable
from predictor.stepping import Foresight
from store.arena import Arena
from store.copies import CopyEngine
from store.eviction import POLICIES
from store.read_ahead import ReadAheadEngine
from store.slots import Slots


class OnCPU:
    """See `pipeline.device.Device`."""

    memory_peak_bytes = None
    miss_path = "in_place"

    def __init__(self, spec: ExecutorSpec, arena: Arena):
        keep_freed_memory()
        self._task, self._top_k = spec.task, spec.model.shape.top_k
        cpu = torch.device("cpu")
        engine = ReadAheadEngine if spec.read_ahead else CopyEngine
        self._engine = engine(arena, Slots(arena, spec.slots, cpu), POLICIES[spec.policy](), spec.background)
        self.current = Current()

        def experts(layer: int, stream: int, expert: Expert) -> SlotExperts:
            return SlotExperts(layer, stream, expert, self._engine, self.current, spec.asks_routers, spec.exchange)

        self.model = build(spec.model, arena, experts, cpu)
        self._next_layer: NextLayer | None = None
        if spec.stepping is not None:
            self._next_layer = NextLayer(self.model, spec.model.shape.experts, self._top_k)
            self.current.ahead = self._ahead

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        self._engine.plan(batch * self._task.forwards, uses)

    def prepare(
        self,
        batch: Batch,
        table: HashTable | None,
        top_t: int | None = None,
        hear: Hear | None = None,
        foresight: Foresight | None = None,
    ) -> OnCPUWork:
        return OnCPUWork(self._forward, batch, table, top_t, hear, foresight)

    def close(self) -> None:
        self._engine.close()

    def _ahead(self, layer: int, hidden: torch.Tensor) -> None:
        """Wants whom the next layer's router would name."""
        assert self._next_layer is not None
        if self._next_layer.reaches(layer):
            named = self._next_layer.named(layer, hidden, torch.ones(len(hidden), dtype=torch.bool))[:-1]
            self._engine.expect(self.current.forward.batch, layer + 1, named.nonzero()[:, 0].tolist())

    def _forward(
        self, batch: Batch, table: HashTable | None, top_t: int | None, hear: Hear | None, foresight: Foresight | None
    ) -> Answer:
        start = time.time_ns()
        inputs = self._task.inputs(batch, lambda longest: longest)
        masks = [inputs["attention_mask"], inputs.get("decoder_attention_mask")]
        real = tuple(mask.reshape(-1).bool() for mask in masks if mask is not None)
        first = batch.index * self._task.forwards  # the engine's numbers are of forwards
        forward = self.current.forward = Forward(first, real, table, top_t or 1)
        if foresight is not None and self._next_layer is not None and self._next_layer.reaches_all:
            foresight.layers = FIRST  # of the others the layer before says more
        steps = CPUSteps(self._engine, self.current, batch, self._top_k, hear, foresight)
        try:
            outputs = self._task.forward(self.model, inputs, steps)
        finally:
            self._engine.finish(first + self._task.forwards - 1)
        decisions = [forward.decisions[layer] for layer in sorted(forward.decisions)]
        chosen = [layer.top[:, : self._top_k] for layer in decisions]
        return Answer(outputs, chosen, decisions, (start, time.time_ns()), self._engine.take())


class CPUSteps(OwnSteps):
    """The forwards of one batch that is being written, each a batch of its own to the engine (pipeline.tasks.writing.Steps)."""

    def __init__(
        self, engine: CopyEngine, current: Current, batch: Batch, top_k: int, hear: Hear | None, foresight: Foresight | None
    ):
        self._engine, self._current, self._batch, self._top_k = engine, current, batch, top_k
        self._hear, self._foresight = hear, foresight
        self._rows: np.ndarray | None = None  # those that went on in the forward that has run; None: it was the prompt's

    def next(self, tokens: torch.Tensor, awake: torch.Tensor, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        now = self._current.forward
        self._engine.finish(now.batch)
        if self._foresight is not None:
            chosen = [now.decisions[layer].top[:, : self._top_k] for layer in sorted(now.decisions)]
            if self._rows is None:
                self._foresight.begin(self._batch.tokens, chosen)
            else:
                self._foresight.learn(chosen, self._rows)
            self._rows = awake.numpy()
            self._engine.plan(now.batch + 1, self._foresight.uses(tokens.numpy(), self._rows))
        masks = tuple(awake for _ in now.masks)
        self._current.forward = Forward(now.batch + 1, masks, awake=awake)
        return forward()

    def hear(self, tokens: np.ndarray, awake: np.ndarray) -> None:
        if self._hear is not None:
            self._hear(tokens, awake)


class OnCPUWork:
    """See `pipeline.device.Work`: all of it is done by `start`."""

    def __init__(self, forward: Callable[..., Answer], *arguments: Any):
        self._forward, self._arguments = forward, arguments

    def start(self) -> None:
        self._answer = self._forward(*self._arguments)

    def answer(self) -> Answer:
        return self._answer
