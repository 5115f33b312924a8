"""A model whose arena the device cannot read: the GPU's own layers, kernels, engine and ring, interpreted on a CPU.

Only lanes are played. The entries of experts that are in no slot are null, slots and whatever a kernel leaves unwritten are NaN:
an expert that was missed would show in the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import parse
from pipeline.expert_shape import ExpertShape
from pipeline.models import build
from pipeline.prepare import Prepared, prepare
from pipeline.routing import Expert
from predictor.baselines import Random
from predictor.hash_table import HashTable
from store.arena import Arena
from store.eviction import POLICIES
from store.lanes import PointerTable
from store.layout import Key
from store.load import load
from store.read_ahead import StagedReadAheadEngine
from store.ring import RingLanes
from store.slots import Slots
from tests.conftest import answers, config_data, save_switch, write_tsv
from tests.pipeline.interpreted import Interpreter
from tests.pipeline.test_exactness import assert_equal_results
from tests.pipeline.test_generate import save_decoder

CPU = torch.device("cpu")


class PlayedLanes(RingLanes):
    """In the place of a GPU's: whatever is given to a lane is done at once. Bytes are real, and pass through two small entries."""

    def __init__(self, arena: Arena, slots: Slots, table: PointerTable):
        super().__init__([layer.block.nbytes for layer in arena.layout.layers], 5000, 2)
        self._arena, self._slots, self._table = arena, slots, table
        self._ring = torch.full((2, 5000), 255, dtype=torch.uint8)

    def withdraw(self, key: Key) -> None:
        self._table.entries[key] = self._table.host_address(key)

    def _write(self, entry: int, key: Key, slot: int, begin: int, end: int) -> None:
        self._ring[entry, : end - begin] = self._arena.block(*key)[begin:end]

    def _send(self, entry: int, key: Key, slot: int, begin: int, end: int) -> Any:
        self._slots._slots[slot][begin:end] = self._ring[entry, : end - begin]
        self._ring[entry] = 255
        return SimpleNamespace(is_reached=True, synchronize=lambda: None)

    def _point_to(self, key: Key, slot: int) -> Any:
        self._table.entries[key] = self._slots.address(slot)
        return SimpleNamespace(is_reached=True, synchronize=lambda: None)

    def _time_of(self, point: Any) -> int:
        return 0


class Staged:
    """A model as OnGPU has it, without graphs."""

    def __init__(self, prepared: Prepared, arena: Arena, slots: int, policy: str, on_device: bool):
        from pipeline.gpu.layers import Counters, CurrentForward, DeviceExperts  # Triton: not in the process of the tests

        self.prepared, self.spec = prepared, prepared.executor_spec()
        self.slots = Slots(arena, slots, CPU)
        self.slots.memory.fill_(255)
        self.table = PointerTable(arena, None, CPU)
        assert not self.table.entries.any()
        self.counters, self.current = Counters(arena.layout.layers, CPU), CurrentForward()
        self.shapes: list[ExpertShape] = []
        begin = self.slots.memory.data_ptr()

        def experts(layer: int, stream: int, expert: Expert) -> DeviceExperts:
            shape = expert.shape(arena.layout.layers[layer])
            self.shapes.append(shape)
            span = (begin, begin + self.slots.memory.numel())
            entries = self.table.entries[layer, : shape.experts]
            return DeviceExperts(layer, stream, shape, entries, span, self.counters, self.current)

        self.model = build(self.spec.model, arena, experts, CPU)
        lanes = PlayedLanes(arena, self.slots, self.table)
        self.engine = StagedReadAheadEngine(arena, self.slots, POLICIES[policy](), lanes, on_device)
        self.engine.start()
        self.parts = 0

    def run(self, batch, number: int, table: HashTable | None = None) -> list[dict]:
        """
        Args:
            table: decides.
        """
        from pipeline.gpu.layers import DeviceForward

        inputs = self.spec.task.inputs(batch, lambda longest: longest)
        masks = [inputs[name] for name in ("attention_mask", "decoder_attention_mask") if name in inputs]
        tables = None
        if table is not None:
            tables = [
                (torch.from_numpy(experts.astype(np.int64)), torch.from_numpy(scaling))
                for experts, scaling in zip(table.experts, table.scaling, strict=True)
            ]

        def routed(layer: int, counts: torch.Tensor) -> None:
            if not self.engine.is_complete:
                self.engine.demand(number, layer, counts[:-1].numpy().nonzero()[0].tolist())

        def done(layer: int, in_part: bool) -> None:
            self.parts += in_part
            (self.engine.read if in_part else self.engine.passed)(number, layer)

        self.current.forward = DeviceForward(masks, tables, routed, partial(self.engine.stage, number), done)
        try:
            with torch.inference_mode():
                outputs = self.spec.task.forward(self.model, inputs)
        finally:
            self.engine.finish(number)
        for layer, shape in enumerate(self.shapes):
            counted, hits = self.counters.both[:, layer, : shape.experts].numpy()
            self.engine.counted(layer, counted, hits, counted)  # which raises if one was read from no slot
        return self.spec.task.results(batch, outputs)


def serve(data: dict, slots: int, policy: str, on_device: bool = True, twice: bool = True) -> tuple[list[list[dict]], int, Any]:
    """All batches, predicted at random, each as many times as asked; their answers, the parts that it took, what was moved."""
    prepared = prepare(parse(data, "test"))
    arena = load(prepared.arena, prepared.weights, prepared.model.placement)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is left unwritten is NaN
    staged = Staged(prepared, arena, slots, policy, on_device)
    predictor, count = Random(prepared.model.shape, top_k=1, seed=0), len(prepared.batches)
    tables = [predictor.predict(batch.tokens) for batch in prepared.batches]
    results = []
    try:
        for number in range(count * (2 if twice else 1)):
            for later in range(number, number + 3):
                staged.engine.plan(later, tables[later % count].uses_under("exact"))
            results.append(staged.run(prepared.batches[number % count], number))
        return results, staged.parts, staged.engine.take()
    finally:
        staged.engine.close()
        arena.remove()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


@pytest.fixture(scope="module")
def switch(tmp_path_factory) -> tuple[dict, list[list[dict]]]:
    """A config's data, and what the whole model answers: three MoE layers of four experts, and a capacity that drops tokens."""
    place: Path = tmp_path_factory.mktemp("staged")
    whole = save_switch(place / "model", expert_capacity=3, num_experts=4)
    (place / "arenas").mkdir()
    rows = write_tsv(place / "rows.tsv", ["good", "too long", "the plot is a mess"])
    store = {"backing": "file", "directory": str(place / "arenas")}
    data = config_data(place / "model", rows, place / "arenas", place / "out", batch={"size": 2, "order": "input"}, store=store)
    prepared = prepare(parse(data, "test"))
    return data, [answers(prepared.task, whole, batch) for batch in prepared.batches]


@pytest.mark.parametrize(("slots", "policy"), [(2, "fifo"), (4, "lookahead"), (12, "lru")])
def test_equals_the_whole_model_though_nothing_is_read_in_place(interpreter, switch, slots, policy):
    data, expected = switch
    results, parts, moved = interpreter(serve, data, slots, policy)
    for i, ours in enumerate(results):
        assert_equal_results(ours, expected[i % len(expected)])
    assert sum(moved.misses) == moved.read_in_place_bytes == 0
    assert (moved.demand_bytes > 0 and parts > 0) or slots == 12
    assert moved.resident_peak_bytes <= slots * 2 * 48 * 32 * 4


def test_with_no_room_on_the_device_slots_in_the_hosts_memory_serve(interpreter, switch):
    data, expected = switch
    results, _, moved = interpreter(serve, data, 3, "lru", on_device=False, twice=False)
    for ours, theirs in zip(results, expected, strict=True):
        assert_equal_results(ours, theirs)
    assert sum(moved.hits) == moved.prefetch_bytes == moved.demand_bytes == moved.resident_peak_bytes == 0
    assert sum(moved.misses) > 0 and moved.read_in_place_bytes > 0


def test_text_is_written_as_the_whole_model_writes_it(interpreter, tmp_path, arena_dir):
    whole = save_decoder(tmp_path / "model")
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(("good", "too long")) + "\n")
    data = config_data(
        tmp_path / "model", rows, arena_dir, tmp_path / "out", task="generate", generate={"max_new_tokens": 3}, batch={"size": 2}
    ) | {"data": {"path": str(rows)}}
    del data["labels"]
    prepared = prepare(parse(data, "test"))
    expected = [answers(prepared.task, whole, batch) for batch in prepared.batches]
    results, parts, moved = interpreter(serve, data, 2, "lru", twice=False)
    assert [row["token_ids"] for batch in results for row in batch] == [row["token_ids"] for batch in expected for row in batch]
    assert parts > 0 and moved.demand_bytes > 0
