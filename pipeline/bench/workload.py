"""What `bench` measures on: one data set in batches of one size, what its routers decide, and what the right answers are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pipeline.bench.whole import Transformers, whole_model
from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.predicting.place import slots_beside
from pipeline.prepare import Prepared, own_predictor
from pipeline.progress import bar
from predictor import traces
from predictor.actor import Prediction, timed
from predictor.baselines import Oracle, Worsened
from predictor.hash_table import HashTable
from predictor.registry import HashPredictor
from predictor.traces import Trace
from store.actor import ArenaInfo
from store.arena import Arena
from store.layout import Key
from store.slots import parse_budget


@dataclass(frozen=True)
class Combination:
    """A system and what it is given.

    Attributes:
        budget: as written, of one device; None where a system knows none.
        predictor: the name of the workload's tables.
        devices: so many, with a budget each.
        placement: who has which expert, where devices share them out.
    """

    system: str
    budget: str | None
    predictor: str | None = None
    devices: int = 1
    placement: str | None = None

    def slots(self, workload: Workload) -> int:
        """Those that the budget leaves beside a rehearsal's stand-ins, if they lie on the same device."""
        prepared, layout = workload.prepared, workload.prepared.layout
        budget = self.budget or "100%"
        if self.predictor == "rehearsal" and prepared.predictor_device == "executor":
            return slots_beside(prepared.stand_in_bytes, budget, layout, layout.nbytes)
        return parse_budget(budget, layout.expert_bytes, layout.slot_bytes, layout.nbytes)


@dataclass(frozen=True)
class Workload:
    """All that systems are given, and judged by.

    Attributes:
        trace: the file of their routing, for a predictor in another process.
        tables: one per batch, by the name of what made them.
        recall: of those tables: the share of a batch's (MoE layer, expert) pairs that its table names.
        reference: per batch the outputs of transformers on the whole model in float32.
        uses: per batch and MoE layer, in the order of execution, the experts that it reads.
    """

    prepared: Prepared
    arena: ArenaInfo
    trace: Path
    tables: dict[str, list[Prediction]]
    recall: dict[str, float]
    reference: list[np.ndarray]
    uses: list[list[Key]]

    @property
    def batches(self) -> list[Batch]:
        return self.prepared.batches

    @property
    def batch_size(self) -> int:
        return self.prepared.config.batch.size

    @cached_property
    def experts_used_per_layer(self) -> float:
        return sum(map(len, self.uses)) / len(self.uses)

    def executor_spec(self, given: Combination) -> ExecutorSpec:
        """The Executor of a run, with the slots that a combination has."""
        return replace(self.prepared.executor_spec(), slots=given.slots(self))

    def table(self, name: str, batch: Batch) -> Prediction:
        """A batch's table, whatever number it has in this round."""
        return self.tables[name][batch.index % len(self.batches)]


def record_workload(prepared: Prepared, arena: ArenaInfo, output: Path) -> Workload:
    """Records the routing of every batch as it is served, makes tables, and asks transformers in float32."""
    recorded = record_batches(prepared)
    config, shape = prepared.config, prepared.model.shape
    trace = traces.join(recorded)
    oracle = Oracle(trace, shape, shape.top_k)
    path = output / "trace.safetensors"
    traces.save(trace, path, shape, arena.identity)
    makers: dict[str, HashPredictor] = {"oracle": oracle}
    if config.bench.recall is not None:
        makers[f"oracle worsened to {config.bench.recall:g}"] = Worsened(oracle, shape, config.bench.recall, config.seed)
    if config.predictor.path is not None or config.predictor.kind == "rehearsal":
        makers[config.predictor.kind] = own_predictor(prepared, arena.identity)
    tables = {name: [timed(maker, batch.tokens) for batch in prepared.batches] for name, maker in makers.items()}
    uses = [experts_used(trace, shape.top_k) for trace in recorded]
    recall = {name: _recall([t.table for t in made], uses) for name, made in tables.items()}
    return Workload(prepared, arena, path, tables, recall, _reference(prepared), [layer for batch in uses for layer in batch])


def record_batches(prepared: Prepared) -> list[Trace]:
    """The routing of every batch, as it is served; the arena must stand."""
    recorded = []
    shown = bar(f"recording batches of {prepared.config.batch.size}", len(prepared.batches))
    with closing(Executor(replace(prepared.executor_spec(), slots=0))) as executor, shown:
        for batch in prepared.batches:
            recorded.append(executor.trace(batch, prepared.model.shape.top_k))
            shown.update()
    return recorded


def experts_used(trace: Trace, top_k: int) -> list[list[Key]]:
    """Of one batch: per MoE layer the experts that it reads, ascending."""
    return [[(i, int(e)) for e in np.unique(layer.top[:, :top_k])] for i, layer in enumerate(trace.layers)]


def _recall(tables: list[HashTable], uses: list[list[list[Key]]]) -> float:
    found = needed = 0
    for table, batch in zip(tables, uses, strict=True):
        for named, layer in zip(table.uses, batch, strict=True):
            experts = {expert for expert, _ in named}
            found += sum(expert in experts for _, expert in layer)
            needed += len(layer)
    return found / max(needed, 1)


def _reference(prepared: Prepared) -> list[np.ndarray]:
    """In float32 wherever the experts run; the weights are those that are served, rounded or not."""
    device = torch.device(prepared.device)
    with mapped(prepared) as arena:
        model = whole_model(prepared.model, arena.layout, arena.memory, device, torch.float32)
        outputs = Transformers(model, prepared.task, device).run(prepared.batches).outputs
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return outputs


@contextmanager
def mapped(prepared: Prepared) -> Iterator[Arena]:
    """The workload's arena."""
    arena = Arena.attach(prepared.arena)
    assert arena is not None, "the store keeps it"
    try:
        yield arena
    finally:
        arena.close()
