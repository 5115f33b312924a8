"""The ring and the staged engine apart: bytes that pass through it, and how a layer ends whose experts cannot come."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from store import arena, lanes, ring
from store.eviction import LRU
from store.lanes import PointerTable
from store.layout import ArenaLayout, Key
from store.ring import RingLanes
from store.slots import Slots
from store.staged_copies import StagedCopyEngine
from tests.store.lane_model import make_arena
from tests.store.ring_model import LiveRing
from tests.store.test_device_copies import Held, in_threads, until

A, B, C, D = range(4)
CPU = torch.device("cpu")
SIZES = (1000, 256, 4096)
"""Of the blocks of three layers."""


class Done:
    """A point that is reached as soon as somebody waits for it."""

    def __init__(self, work) -> None:
        self._work, self.is_reached = work, False

    def synchronize(self) -> None:
        if not self.is_reached:
            self.is_reached = True
            self._work()


class LateRing(RingLanes):
    """Real bytes, and a lane that does nothing before it has to: what is sent leaves the ring at the last moment."""

    def __init__(self, blocks: dict[Key, torch.Tensor], slots: torch.Tensor, chunk_bytes: int, entries: int):
        super().__init__(SIZES, chunk_bytes, entries)
        self.blocks, self.slots = blocks, slots
        self.ring = torch.zeros(entries, chunk_bytes, dtype=torch.uint8)
        self.lane: list[Done] = []
        self.pointed: list[tuple[Key, int]] = []

    def _write(self, entry, key, slot, begin, end):
        self.ring[entry, : end - begin] = self.blocks[key][begin:end]

    def _send(self, entry, key, slot, begin, end):
        return self.given(lambda: self.slots[slot, begin:end].copy_(self.ring[entry, : end - begin]))

    def _point_to(self, key, slot):
        return self.given(lambda: self.pointed.append((key, slot)))

    def _time_of(self, point):
        return 1

    def given(self, work) -> Done:
        """In the order of the lane: whoever waits for one waits for those before it."""
        before = self.lane[-1] if self.lane else None

        def all_of_it() -> None:
            if before is not None:
                before.synchronize()
            work()

        self.lane.append(Done(all_of_it))
        return self.lane[-1]


@pytest.mark.parametrize("entries", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [100, 256, 4096])
def test_every_byte_of_every_expert_passes_through_the_ring(chunk_bytes, entries):
    blocks = {(layer, e): torch.randint(256, (size,), dtype=torch.uint8) for layer, size in enumerate(SIZES) for e in range(4)}
    slots = torch.zeros(4, max(SIZES), dtype=torch.uint8)
    late = LateRing(blocks, slots, chunk_bytes, entries)
    keys = [(0, 1), (1, 2), (2, 0), (0, 3), (2, 3), (1, 0), (2, 1), (0, 0)]
    for first in range(0, len(keys), 4):
        marks = [late.fill(key, slot) for slot, key in enumerate(keys[first : first + 4])]
        assert not any(mark.is_reached() for mark in marks), "nothing moves before somebody waits"
        for slot, mark in enumerate(marks):
            mark.wait()
            assert mark.is_reached()
            key = keys[first + slot]
            assert late.pointed[-1] == (key, slot)
            assert torch.equal(slots[slot, : SIZES[key[0]]], blocks[key])
            begin, end = mark.span()
            assert begin > end == 1
    assert not late.has_more and not late._ends


class PlayedDriver:
    """In the place of store.cuda: addresses are the host's, and streams do at once what they are given."""

    def __init__(self) -> None:
        self.copied_bytes = 0

    def Event(self, stream: int) -> SimpleNamespace:
        return SimpleNamespace(is_reached=True, synchronize=lambda: None, ms_until=lambda later: 0.0)

    def context(self) -> int:
        return 1

    def use(self, context: int) -> None:
        assert context == 1

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        ctypes.memmove(target, source, nbytes)
        self.copied_bytes += nbytes

    def store(self, target: int, value: int, stream: int) -> None:
        ctypes.c_int64.from_address(target).value = value

    def wait(self, stream: int, event: SimpleNamespace) -> None:
        pass


@pytest.mark.parametrize("on_device", [True, False])
def test_the_lanes_of_a_gpu_copy_and_point_and_withdraw(tmp_path, monkeypatch, on_device):
    driver = PlayedDriver()
    for module in (lanes, ring):
        monkeypatch.setattr(module, "cuda", driver)
    monkeypatch.setattr(ring, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(ring, "pinned", lambda nbytes: torch.full((nbytes,), 255, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of the process
    layout = ArenaLayout.of([(3, {"w": ((size,), "uint8")}) for size in SIZES], {})
    made = arena.build(tmp_path / "arena", layout, "identity", lambda memory: memory.copy_(torch.arange(len(memory)) % 251))
    slots = Slots(made, 2, CPU)
    slots.memory.fill_(255)
    table = PointerTable(made, None, CPU)
    there = slots
    if on_device:  # as far as anybody can see
        memory = SimpleNamespace(device=torch.device("cuda"))
        there = SimpleNamespace(memory=memory, count=2, address=slots.address)
    gpu = ring.CudaRingLanes(made, there, table, SimpleNamespace(cuda_stream=3, device=CPU))
    assert gpu._ring.numel() == (ring.ENTRIES * 1000 if on_device else 0)
    keys = [(layer, expert) for expert in range(3) for layer in range(3)]
    for turn, key in enumerate(keys):
        mark = gpu.fill(key, turn % 2)
        assert int(table.entries[key]) == 0 and not mark.is_reached()
        mark.wait()
        assert mark.is_reached()
        assert int(table.entries[key]) == slots.address(turn % 2)
        assert torch.equal(slots._slots[turn % 2][: made.block(*key).numel()], made.block(*key))
        gpu.withdraw(key)
        assert not table.entries.any()
    assert driver.copied_bytes == (sum(made.block(*key).numel() for key in keys) if on_device else 0)
    made.remove()


@pytest.fixture
def engine() -> Iterator[StagedCopyEngine]:
    """Two slots, and a layer of four experts."""
    blocks = make_arena([(4, 256)])
    made = StagedCopyEngine(blocks, Slots(blocks, 2, CPU), LRU(), LiveRing(2))
    made.start()
    yield made
    made._lanes.let(*made._lanes.held)
    in_threads(made.close)
    made._lanes.end()


def run(engine: StagedCopyEngine, batch: int, experts: list[int]) -> int:
    """One layer; returns how many parts it took."""
    engine.demand(batch, 0, experts)
    parts = 1
    while engine.stage(batch, 0):
        engine.read(batch, 0)
        parts += 1
    engine.passed(batch, 0)
    return parts


def test_a_layer_of_more_experts_than_slots_is_computed_in_parts(engine):
    in_threads(lambda: run(engine, 0, [A, B, C, D]))
    engine.finish(0)
    moved = engine.take()
    assert (moved.demand_bytes, moved.prefetch_bytes) == (4 * 256, 0)


def test_what_the_tables_named_is_no_demand(engine):
    engine.plan(0, [[(A, 1.0), (B, 1.0)]])
    until(lambda: engine.slots.is_ready((0, A)) and engine.slots.is_ready((0, B)))
    in_threads(lambda: run(engine, 0, [A, C]))
    moved = engine.take()
    assert (moved.prefetch_bytes, moved.demand_bytes) == (2 * 256, 256)


def test_a_batch_of_many_forwards_asks_for_each(engine):
    """As when text is written: the same layers again and again before the batch is finished."""
    for step in range(20):
        in_threads(lambda step=step: run(engine, 0, [step % 4, (step + 1) % 4, (step + 2) % 4]))
    engine.finish(0)
    assert not engine._wanted


def test_plans_of_batches_that_never_come_take_nobody_elses_slots(engine):
    for batch in (0, 1, 2):
        engine.plan(batch, [[(A, 1.0), (B, 1.0)]])
    in_threads(lambda: run(engine, 5, [C, D, A]))
    engine.plan(4, [[(B, 1.0)]])
    in_threads(lambda: run(engine, 5, [C, D]))


def test_an_engine_that_is_closed_while_a_layer_waits_says_so_and_does_not_hang(engine):
    engine._lanes.held.update([(0, A), (0, B)])
    engine.demand(0, 0, [A, B, C])
    held = Held(engine, 0, 0)
    assert held.is_held()
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    until(lambda: engine._closed)
    assert closing.is_alive(), "what is under way ends first"
    engine._lanes.let((0, A), (0, B))
    while held.goes_on():
        engine.read(0, 0)
        held = Held(engine, 0, 0)
        held._thread.join(30)
        if held.error is not None:
            break
    assert "has not come" in str(held.error)
    closing.join(30)
    assert not closing.is_alive()


def test_a_copy_that_breaks_is_told_to_whoever_waits_for_it(engine, monkeypatch):
    def broken(*arguments) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(engine._lanes, "_write", broken)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine.demand(0, 0, [A])
    held = Held(engine, 0, 0)
    with pytest.raises(RuntimeError, match="copying experts failed"):
        held.goes_on()


def test_an_expert_that_was_nowhere_when_it_was_computed_breaks_its_batch(engine):
    routed = np.array([1, 0, 2, 0])
    engine.counted(0, routed, np.array([1, 0, 1, 0]), routed, 0)
    with pytest.raises(RuntimeError, match=r"MoE layer 0: experts \[2\] were in no slot"):
        engine.counted(0, routed, np.array([1, 0, 0, 0]), routed, 1)


def test_what_lies_in_the_hosts_memory_is_not_on_the_device():
    blocks = make_arena([(4, 256)])
    engine = StagedCopyEngine(blocks, Slots(blocks, 2, CPU), LRU(), LiveRing(2), on_device=False)
    engine.start()
    in_threads(lambda: run(engine, 0, [A, B, C]))
    routed = np.array([1, 1, 2, 0])
    engine.counted(0, routed, np.array([1, 1, 1, 0]), routed)
    moved = engine.take()
    in_threads(engine.close)
    engine._lanes.end()
    assert (moved.hits, moved.misses, moved.read_in_place_bytes) == ([0], [3], 4 * 256)
    assert (moved.prefetch_bytes, moved.demand_bytes, moved.resident, moved.resident_peak_bytes) == (0, 0, [0], 0)
