"""A model on the CPU: slots are private memory, a miss is read from the arena's own pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.device import Answer, ExecutorSpec
from pipeline.experts import Current, Forward, SlotExperts
from pipeline.inputs import Hear
from pipeline.models import build
from pipeline.routing import Expert
from predictor.hash_table import HashTable
from store.arena import Arena
from store.copies import CopyEngine
from store.eviction import POLICIES
from store.read_ahead import ReadAheadEngine
from store.slots import Slots


class OnCPU:
    """See `pipeline.device.Device`."""

    memory_peak_bytes = None

    def __init__(self, spec: ExecutorSpec, arena: Arena):
        self._task, self._top_k = spec.task, spec.model.shape.top_k
        cpu = torch.device("cpu")
        engine = ReadAheadEngine if spec.read_ahead else CopyEngine
        self._engine = engine(arena, Slots(arena, spec.slots, cpu), POLICIES[spec.policy](), spec.background)
        self._current = Current()

        def experts(layer: int, stream: int, expert: Expert) -> SlotExperts:
            return SlotExperts(layer, stream, expert, self._engine, self._current, spec.exchange)

        self._model = build(spec.model, arena, experts, cpu)

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        self._engine.plan(batch, uses)

    def prepare(self, batch: Batch, table: HashTable | None, top_t: int | None = None, hear: Hear | None = None) -> OnCPUWork:
        return OnCPUWork(self._forward, batch, table, top_t, hear)

    def close(self) -> None:
        self._engine.close()

    def _forward(self, batch: Batch, table: HashTable | None, top_t: int | None, hear: Hear | None) -> Answer:
        start = time.time_ns()
        inputs = self._task.inputs(batch, lambda longest: longest)
        masks = [inputs["attention_mask"], inputs.get("decoder_attention_mask")]
        real = tuple(mask.reshape(-1).bool() for mask in masks if mask is not None)
        forward = self._current.forward = Forward(batch.index, real, table, top_t or 1)

        def heard(tokens: np.ndarray, awake: np.ndarray) -> None:
            forward.awake = torch.from_numpy(awake)
            if hear is not None:
                hear(tokens, awake)

        try:
            outputs = self._task.forward(self._model, inputs, heard)
        finally:
            self._engine.finish(batch.index)
        decisions = [forward.decisions[layer] for layer in sorted(forward.decisions)]
        chosen = [layer.top[:, : self._top_k] for layer in decisions]
        return Answer(outputs, chosen, decisions, (start, time.time_ns()), self._engine.take())


class OnCPUWork:
    """See `pipeline.device.Work`: all of it is done by `start`."""

    def __init__(self, forward: Callable[..., Answer], *arguments: Any):
        self._forward, self._arguments = forward, arguments

    def start(self) -> None:
        self._answer = self._forward(*self._arguments)

    def answer(self) -> Answer:
        return self._answer
