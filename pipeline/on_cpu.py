"""A model on the CPU: slots are private memory, a miss is read from the arena's own pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.data import Batch
from pipeline.device import Answer, ExecutorSpec
from pipeline.experts import Current, Forward, SlotMoE
from pipeline.families import Family
from pipeline.models import build
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

        def moe(family: Family, router: nn.Module, layer: int, stream: int) -> nn.Module:
            return SlotMoE(family, router, layer, stream, self._engine, self._current)

        self._model = build(spec.model, arena, moe, cpu)

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        self._engine.plan(batch, uses)

    def prepare(self, batch: Batch, table: HashTable | None, top_t: int | None = None) -> OnCPUWork:
        return OnCPUWork(self._forward, batch, table, top_t)

    def close(self) -> None:
        self._engine.close()

    def _forward(self, batch: Batch, table: HashTable | None, top_t: int | None) -> Answer:
        start = time.time_ns()
        inputs = self._task.inputs(batch, lambda longest: longest)
        masks = [inputs["attention_mask"], inputs.get("decoder_attention_mask")]
        real = tuple(mask.reshape(-1).nonzero().squeeze(1) for mask in masks if mask is not None)
        forward = self._current.forward = Forward(batch.index, real, table, top_t or 1)
        try:
            outputs = self._task.forward(self._model, inputs)
        finally:
            self._engine.finish(batch.index)
        chosen = [layer.top[:, : self._top_k] for layer in forward.decisions]
        return Answer(outputs, chosen, forward.decisions, (start, time.time_ns()), self._engine.take())


class OnCPUWork:
    """See `pipeline.device.Work`: all of it is done by `start`."""

    def __init__(self, forward: Callable[..., Answer], *arguments: Any):
        self._forward, self._arguments = forward, arguments

    def start(self) -> None:
        self._answer = self._forward(*self._arguments)

    def answer(self) -> Answer:
        return self._answer
