"""How long batches take under a budget, tried before a weight is there: the run's own Executor and copies, on random blocks.

A scratch arena stands for the model: a random backbone, and for each MoE layer some blocks of random numbers, which its experts
share. Slots, policy, tables and moves are those of a run of the same batches; the recorded routing decides who computes what,
as hash routing does, and the routers are asked for their time's sake. Only Ray's messages are missing. What Python costs, how
far copies hide behind computing, and what a GPU's kernels wait for, need no model of their own: they are timed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipeline.batch_result import BatchResult
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.machine import cores
from pipeline.plan.footprint import Footprint
from pipeline.plan.recorded import Recorded
from pipeline.tasks.registry import Task
from pipeline.window import Window
from predictor.actor import Prediction
from predictor.hash_table import HashTable
from predictor.traces import Trace
from store import arena
from store.layout import ArenaLayout

SAMPLED = {"cpu": 16, "cuda": 64}
"""Batches, the first of the trace; all others are taken to be like them, but for what they move."""
WARM_UP = {"cpu": 1, "cuda": 3}
"""Rounds over them that are not timed: kernels are compiled, graphs recorded, slots filled."""
SCRATCH_BYTES = 2**30
"""Of blocks: more than any processor's cache holds."""
TILE = 2**20


@dataclass(frozen=True)
class Tried:
    """Seconds per batch with so many slots."""

    slots: int
    seconds: float


class Trial:
    """An Executor with so many slots over a scratch arena, asked the same batches again and again as a run would ask them."""

    def __init__(self, known: Footprint, task: Task, recorded: Recorded, scratch: Path, slots: int, policy: str, routing: str):
        """
        Args:
            recorded: all of whose batches are in a round; see `Recorded.first`.
        """
        self._recorded, top_k = recorded, known.model.shape.top_k
        self._routing = [Prediction(_as_routed(trace, top_k), 0, 0) for trace in recorded.parts]
        threads = max(1, cores() - 1)  # as in a run
        spec = ExecutorSpec(known.model, task, scratch, slots, policy, known.device, threads, asks_routers=routing == "exact")
        self._executor = Executor(spec)
        self._window = Window(slots, recorded.routed.lookahead)
        self._submitted = self._planned = 0
        self._under_way: deque[Future[BatchResult]] = deque()
        self._executor.ready()

    def round(self) -> float:
        """Seconds per batch, when one follows the other. The next round's first tables are known when it ends."""
        batches = len(self._recorded.batches)
        start = time.perf_counter()
        end = self._submitted + batches
        while self._submitted < end or self._under_way:
            while self._submitted < end and len(self._under_way) <= self._window.lookahead:
                self._under_way.append(self._submit())
            for number in range(self._submitted, self._submitted + self._window.lookahead + 1 - len(self._under_way)):
                self._plan(number)
            self._under_way.popleft().result()
        return (time.perf_counter() - start) / batches

    def close(self) -> None:
        self._executor.close()

    def _submit(self) -> Future[BatchResult]:
        number, self._submitted = self._submitted, self._submitted + 1
        at = number % len(self._recorded.batches)
        self._window.saw(sum(p for layer in self._recorded.routed.predicted[at] for _, p in layer))
        self._plan(number)  # its own table comes first, the truth that decides is heard too late to be planned
        return self._executor.submit(replace(self._recorded.batches[at], index=number), self._routing[at], "hash")

    def _plan(self, number: int) -> None:
        if number >= self._planned:
            self._executor.plan_uses(number, self._recorded.routed.predicted[number % len(self._recorded.batches)])
            self._planned = number + 1


def tried(
    known: Footprint, task: Task, recorded: Recorded, slots: Sequence[int], policy: str, routing: str, seconds: float = 1.0
) -> list[Tried]:
    """Tries each number of slots for about `seconds`; none where there is no room.

    Args:
        recorded: a sample; see `SAMPLED`.
    """
    kind = torch.device(known.device).type
    out: list[Tried] = []
    with scratch(known) as path:
        if path is None:
            return out
        for count in slots:
            if count * known.layout.slot_bytes > known.free:
                continue
            with closing(Trial(known, task, recorded, path, count, policy, routing)) as trial:
                rounds = [trial.round() for _ in range(WARM_UP[kind] + 2)][WARM_UP[kind] :]
                while sum(rounds) * len(recorded.batches) < seconds and len(rounds) < 20:
                    rounds.append(trial.round())
            out.append(Tried(count, statistics.median(rounds)))
    return out


def _as_routed(trace: Trace, top_k: int) -> HashTable:
    """The recorded routing as a table."""
    chosen = tuple(layer.top[:, :top_k].astype(np.int16) for layer in trace.layers)
    certain = tuple(np.ones(layer.shape, dtype=np.float32) for layer in chosen)
    return HashTable(chosen, certain, tuple(layer / np.float32(top_k) for layer in certain))


@contextmanager
def scratch(known: Footprint) -> Iterator[Path | None]:
    """An arena of random blocks; its file goes afterwards, and if this process is killed, with `clean`. None: there is no room."""
    like = known.layout
    free = min(known.directory_free, known.host_free) // 3 - like.backbone_bytes
    blocks = min(free, SCRATCH_BYTES) // sum(layer.block.nbytes for layer in like.layers)
    if blocks < 1:
        yield None
        return
    layers: list[tuple[int, Mapping[str, tuple[tuple[int, ...], str]]]] = [
        (layer.experts, {part.name: (part.shape, part.dtype) for part in layer.block.parts}) for layer in like.layers
    ]
    layout = ArenaLayout.of(layers, {part.name: (part.shape, part.dtype) for part in like.backbone}, blocks)
    path = arena.arena_path(known.directory, f"plan-{os.getpid()}")
    held = arena.build(path, layout, "scratch", _filler(layout))
    try:
        yield path
    finally:
        held.remove()


def _filler(layout: ArenaLayout) -> Callable[[torch.Tensor], None]:
    def fill(memory: torch.Tensor) -> None:
        noise = torch.randn(TILE, generator=torch.Generator().manual_seed(0)) * 0.02
        for layer in layout.layers:
            for start in range(layer.offset, layer.end, layer.block.nbytes):
                for view in layer.block.views(memory[start : start + layer.block.nbytes]).values():
                    _tile(view, noise)
        for part in layout.backbone:
            _tile(part.view(memory), noise)

    return fill


def _tile(view: torch.Tensor, noise: torch.Tensor) -> None:
    """Fills a tensor with the same numbers again and again: making others for gigabytes would take longer than the timing."""
    if not view.is_floating_point():
        view.zero_()
        return
    flat = view.reshape(-1)
    for start in range(0, len(flat), len(noise)):
        part = flat[start : start + len(noise)]
        part.copy_(noise[: len(part)])
