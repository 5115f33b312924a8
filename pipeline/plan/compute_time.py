"""How long the batches of a trace would compute with every expert at hand, before a weight is there.

The Executor itself runs them, on a scratch arena of random blocks of the model's shapes: a random backbone and, per MoE layer, only
so many experts as one batch uses at most. The recorded routing decides (as hash routing does), its experts renumbered to those
that are there: so many tokens go to so many experts as in the trace, and only the routers' own small matmul is missing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.machine import cores
from pipeline.plan.footprint import Footprint
from pipeline.tasks.registry import Task
from predictor.actor import Prediction
from predictor.hash_table import HashTable
from predictor.traces import Trace
from store import arena
from store.layout import ArenaLayout

SAMPLED = 16
"""Batches that are timed; the others are taken to be like them."""
WARM_UP = {"cpu": 1, "cuda": 3}
TILE = 2**20


@dataclass(frozen=True)
class Computed:
    """Seconds per batch, on average, and how many experts a layer of the scratch arena had."""

    seconds: float
    experts: int


def compute_seconds(
    known: Footprint, task: Task, batches: Sequence[Batch], traced: Sequence[Trace], seconds: float = 2.0
) -> Computed | None:
    """Times some of the batches for about `seconds`; None: there is no room for a scratch arena.

    Args:
        traced: the routing of each batch.
    """
    sample = np.unique(np.linspace(0, len(batches) - 1, min(SAMPLED, len(batches))).round().astype(int))
    top_k = known.model.shape.top_k
    most = max(len(np.unique(layer.top[:, :top_k])) for i in sample for layer in traced[i].layers)
    free = min(known.directory_free, known.host_free, known.device_free) // 3 - known.layout.backbone_bytes
    per_expert = sum(layer.block.nbytes for layer in known.layout.layers)
    experts = min(most, max(0, free) // per_expert)
    if not experts:
        return None
    tables = [_renumbered(traced[i], top_k, experts) for i in sample]
    with _scratch(known.layout, experts, known.directory) as (path, layout):
        slots, threads = layout.expert_bytes // layout.slot_bytes, max(1, cores() - 1)  # as in a run, with room for all
        executor = Executor(ExecutorSpec(known.model, task, path, slots, "lru", known.device, threads))
        try:
            executor.ready()
            times = _time(executor, [batches[i] for i in sample], tables, WARM_UP[torch.device(known.device).type], seconds)
        finally:
            executor.close()
    return Computed(times, experts)


def _time(executor: Executor, batches: list[Batch], tables: list[HashTable], warm_up: int, seconds: float) -> float:
    """Per batch, when one follows the other as in a run: the median over rounds of all of them."""
    rounds: list[float] = []
    while len(rounds) < warm_up + 3 or (sum(rounds[warm_up:]) < seconds and len(rounds) < warm_up + 20):
        first, start = len(rounds) * len(batches), time.perf_counter()
        answers = [
            executor.submit(replace(batch, index=first + at), Prediction(table, 0, 0), "hash")
            for at, (batch, table) in enumerate(zip(batches, tables, strict=True))
        ]
        for answer in answers:
            answer.result()
        rounds.append((time.perf_counter() - start) / len(batches))
    return statistics.median(rounds[warm_up:])


def _renumbered(trace: Trace, top_k: int, experts: int) -> HashTable:
    """The recorded routing as a table, a layer's used experts numbered from 0, those beyond `experts` from 0 again."""
    chosen, certain, scaling = [], [], []
    for layer in trace.layers:
        _, inverse = np.unique(layer.top[:, :top_k], return_inverse=True)
        chosen.append((inverse.reshape(-1, top_k) % experts).astype(np.int16))
        certain.append(np.ones(chosen[-1].shape, dtype=np.float32))
        scaling.append(np.full(chosen[-1].shape, 1 / top_k, dtype=np.float32))
    return HashTable(tuple(chosen), tuple(certain), tuple(scaling))


@contextmanager
def _scratch(like: ArenaLayout, experts: int, directory: Path) -> Iterator[tuple[Path, ArenaLayout]]:
    """An arena of random blocks; its file goes afterwards, and if this process is killed, with `clean`."""
    layers: list[tuple[int, Mapping[str, tuple[tuple[int, ...], str]]]] = [
        (min(experts, layer.experts), {part.name: (part.shape, part.dtype) for part in layer.block.parts}) for layer in like.layers
    ]
    layout = ArenaLayout.of(layers, {part.name: (part.shape, part.dtype) for part in like.backbone})
    path = arena.arena_path(directory, f"plan-{os.getpid()}")
    held = arena.build(path, layout, "scratch", _filler(layout))
    try:
        yield path, layout
    finally:
        held.remove()


def _filler(layout: ArenaLayout) -> Callable[[torch.Tensor], None]:
    def fill(memory: torch.Tensor) -> None:
        noise = torch.randn(TILE, generator=torch.Generator().manual_seed(0)) * 0.02
        for layer in layout.layers:
            for expert in range(layer.experts):
                start = layer.expert_offset(expert)
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
