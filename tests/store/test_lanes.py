"""What the lanes of a GPU are given, and in which order; no GPU is asked. And that the model of lane_model.py is given the same."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from store import lanes
from store.arena import Arena, build
from store.lanes import CudaLanes, PointerTable
from store.layout import ArenaLayout, Key
from store.slots import Slots
from tests.store.lane_model import SimulatedLanes

CPU = torch.device("cpu")
HOST_ADDRESS = 1 << 40
SLOTS = 3


@pytest.fixture
def arena(arena_dir: Path) -> Arena:
    """Two MoE layers, of three experts of 256 bytes and of two of 1 KiB."""
    layout = ArenaLayout.of([(3, {"w": ((256,), "uint8")}), (2, {"w": ((1024,), "uint8")})], {})
    return build(arena_dir / "a", layout, "", lambda memory: memory.zero_())


def every(arena: Arena) -> list[Key]:
    return [(layer, expert) for layer, layout in enumerate(arena.layout.layers) for expert in range(layout.experts)]


# The pointer table.


def test_at_first_all_entries_point_to_the_blocks_as_the_device_sees_them(arena):
    table = PointerTable(arena, HOST_ADDRESS, CPU)
    assert table.entries.shape == (2, 3)
    for layer, expert in every(arena):
        offset = arena.block(layer, expert).data_ptr() - arena.memory.data_ptr()
        assert table.entries[layer, expert] == table.host_address((layer, expert)) == HOST_ADDRESS + offset
    assert table.entries[1, 2] == 0  # there is no such expert


def test_the_address_of_an_entry_is_where_it_lies(arena):
    table = PointerTable(arena, HOST_ADDRESS, CPU)
    for layer, expert in every(arena):
        assert table.entry_address((layer, expert)) == table.entries[layer, expert].data_ptr()


# The lanes.


class Recorder:
    """In the place of store/cuda.py: what is given to streams becomes what the model calls it."""

    def __init__(self, arena: Arena):
        self.queues: dict[str, deque[tuple]] = {"compute": deque(), "copy": deque()}
        self.slots = Slots(arena, SLOTS, CPU)
        self.table = PointerTable(arena, HOST_ADDRESS, CPU)
        self.experts = {self.table.entry_address(key): key for key in every(arena)}
        self.blocks = {arena.block(*key).data_ptr(): key for key in every(arena)}
        self.sizes = {key: arena.block(*key).numel() for key in every(arena)}
        self.addresses = {self.slots.address(slot): slot for slot in range(SLOTS)}

    def context(self) -> int:
        return 1

    def use(self, context: int) -> None:
        assert context == 1, "a thread without a context may not call"

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: str) -> None:
        key = self.blocks[source]
        assert nbytes == self.sizes[key]
        self.queues[stream] += [("begin", key, self.addresses[target]), ("end", key, self.addresses[target])]

    def store(self, target: int, value: int, stream: str) -> None:
        key = self.experts[target]
        if value in self.addresses:
            self.queues[stream].append(("store", key, self.addresses[value]))
        else:
            assert value == self.table.host_address(key)
            self.queues[stream].append(("withdraw", key))

    def wait(self, stream: str, event: SimpleNamespace) -> None:
        self.queues[stream].append(("wait", event.point))

    def Event(self, stream: str) -> SimpleNamespace:
        """One that comes right after a store of a slot's address is the mark of a fill; others only tell the time."""
        queue = self.queues[stream]
        event = SimpleNamespace(point=len(queue), synchronize=lambda: None)
        if stream == "copy" and queue and queue[-1][0] == "store":
            queue.append(("mark",))
        return event


@pytest.fixture
def recorder(arena: Arena, monkeypatch) -> Recorder:
    recorder = Recorder(arena)
    monkeypatch.setattr(lanes, "cuda", recorder)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream="copy"))
    return recorder


@pytest.fixture
def cuda_lanes(arena: Arena, recorder: Recorder) -> CudaLanes:
    return CudaLanes(arena, recorder.slots, recorder.table, SimpleNamespace(cuda_stream="compute", device=CPU))


def test_a_copy_its_entry_and_its_mark_are_given_to_the_copy_lane_in_this_order(cuda_lanes, recorder):
    cuda_lanes.fill((1, 0), 2)
    assert list(recorder.queues["copy"]) == [("begin", (1, 0), 2), ("end", (1, 0), 2), ("store", (1, 0), 2), ("mark",)]
    assert not recorder.queues["compute"]


def test_the_copy_lane_waits_for_a_withdrawal_and_all_before_it(cuda_lanes, recorder):
    recorder.queues["compute"].append(("a kernel",))
    cuda_lanes.withdraw((0, 1))
    assert list(recorder.queues["compute"]) == [("a kernel",), ("withdraw", (0, 1))]
    assert list(recorder.queues["copy"]) == [("wait", 2)]


def test_the_compute_lane_follows_the_last_of_the_fills_that_are_awaited(cuda_lanes, recorder):
    fills = [cuda_lanes.fill((0, expert), expert) for expert in range(2)]
    cuda_lanes.follow(fills)
    assert recorder.queues["copy"][-1] == ("mark",)
    assert list(recorder.queues["compute"]) == [("wait", len(recorder.queues["copy"]) - 1)], "behind the store"


def test_the_model_is_given_what_a_gpu_would_be(arena, cuda_lanes, recorder):
    model = SimulatedLanes(SLOTS)
    rng = random.Random(0)
    for _ in range(200):
        key, slot = rng.choice(every(arena)), rng.randrange(SLOTS)
        for given in (cuda_lanes, model):
            if slot:
                given.fill(key, slot)
            else:
                given.withdraw(key)
    assert recorder.queues == model.queues
