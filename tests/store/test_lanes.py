"""What the lanes of a GPU are given, and in which order; no GPU is asked. And that the model of lane_model.py is given the same."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from store import cuda, lanes
from store.arena import Arena, build
from store.lanes import CudaLanes, PointerTable
from store.layout import ArenaLayout, Key
from store.ring import CudaRingLanes
from store.slots import Slots
from tests.store.lane_model import SimulatedLanes
from tests.store.ring_model import SimulatedRing

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
    """In the place of store/cuda.py: what is given to streams becomes what the model calls it. Streams go by their names."""

    def __init__(self, arena: Arena):
        self.queues: dict[str, deque[tuple]] = {"compute": deque(), **{lane: deque() for lane in SimulatedLanes.COPY}}
        self.slots = Slots(arena, SLOTS, CPU)
        self.table = PointerTable(arena, HOST_ADDRESS, CPU)
        self.experts = {self.table.entry_address(key): key for key in every(arena)}
        self.blocks = {arena.block(*key).data_ptr(): key for key in every(arena)}
        self.sizes = {key: arena.block(*key).numel() for key in every(arena)}
        self.addresses = {self.slots.address(slot): slot for slot in range(SLOTS)}
        self.recorded: dict[int, int] = {}  # event's handle -> operations of its stream before it, when it was recorded last

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

    def wait(self, stream: str, event: RecordedEvent) -> None:
        self.queues[stream].append(("wait", self.recorded[event.handle.value]))

    def Event(self, stream: str) -> RecordedEvent:
        return RecordedEvent(stream)

    def call(self, name: str, *arguments: Any) -> None:
        """Of CUDA's driver, by an event. One that comes right after a store of a slot's address is the mark of a fill; others only
        tell the time, or are waited for.
        """
        if name == "cuEventCreate":
            arguments[0]._obj.value = new = len(self.recorded) + 1
            self.recorded[new] = 0
        else:
            assert name == "cuEventRecord"
            handle, stream = arguments
            queue = self.queues[stream]
            self.recorded[handle.value] = len(queue)
            if stream != "compute" and queue and queue[-1][0] == "store":
                queue.append(("mark",))


class RecordedEvent(cuda.Event):
    """The real one, which takes the handles of those that are gone."""

    def synchronize(self) -> None:
        pass


@pytest.fixture
def recorder(arena: Arena, monkeypatch) -> Recorder:
    recorder, names = Recorder(arena), iter(SimulatedLanes.COPY)
    monkeypatch.setattr(RecordedEvent, "_spare", defaultdict(list), raising=False)
    monkeypatch.setattr(cuda, "_call", recorder.call)
    monkeypatch.setattr(lanes, "cuda", recorder)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=next(names)))
    return recorder


@pytest.fixture
def cuda_lanes(arena: Arena, recorder: Recorder) -> CudaLanes:
    return CudaLanes(arena, recorder.slots, recorder.table, SimpleNamespace(cuda_stream="compute", device=CPU))


def test_a_copy_its_entry_and_its_mark_are_given_to_one_lane_in_this_order_and_the_next_to_another(cuda_lanes, recorder):
    fills = [((1, 0), 2), ((0, 1), 0), ((0, 0), 1)]
    for key, slot in fills:
        cuda_lanes.fill(key, slot)
    given = [[("begin", *fill), ("end", *fill), ("store", *fill), ("mark",)] for fill in fills]
    one, other = (list(recorder.queues[lane]) for lane in SimulatedLanes.COPY)
    assert [one, other] == [given[1], given[0] + given[2]]
    assert not recorder.queues["compute"]


def test_each_copy_lane_waits_once_for_a_withdrawal_and_all_before_it_when_its_turn_comes(cuda_lanes, recorder):
    recorder.queues["compute"].append(("a kernel",))
    cuda_lanes.withdraw((0, 1))
    cuda_lanes.withdraw((0, 2))
    assert list(recorder.queues["compute"]) == [("a kernel",), ("withdraw", (0, 1)), ("withdraw", (0, 2))]
    copying = [recorder.queues[lane] for lane in SimulatedLanes.COPY]
    assert not any(copying)
    for _ in range(4):
        cuda_lanes.fill((1, 0), 0)
    for given in copying:
        assert given[0] == ("wait", 3)
        assert [operation[0] for operation in given].count("wait") == 1


def at_random(arena: Arena, seed: int) -> Iterator[tuple]:
    """Calls of lanes."""
    rng = random.Random(seed)
    withdrawals = rng.choice((0.1, 0.3, 0.7))
    for _ in range(200):
        key = rng.choice(every(arena))
        yield ("withdraw", key) if rng.random() < withdrawals else ("fill", key, rng.randrange(SLOTS))


@pytest.mark.parametrize("seed", range(3))
def test_a_copy_comes_behind_all_that_was_withdrawn_before_it_whichever_lane_brings_it(arena, cuda_lanes, recorder, seed):
    copying = [recorder.queues[lane] for lane in SimulatedLanes.COPY]
    withdrawn = begun = 0
    for what, *details in at_random(arena, seed):
        lengths = [len(given) for given in copying]
        getattr(cuda_lanes, what)(*details)
        if what == "withdraw":
            withdrawn = len(recorder.queues["compute"])
            continue
        (given,) = (given for given, length in zip(copying, lengths, strict=True) if len(given) > length)
        at = max(i for i, operation in enumerate(given) if operation[0] == "begin")
        assert max((operation[1] for operation in list(given)[:at] if operation[0] == "wait"), default=0) == withdrawn
        begun += 1
    assert begun > 20
    for given in copying:
        waits = [operation[1] for operation in given if operation[0] == "wait"]
        assert waits == sorted({*waits}), "told twice"
        assert len(waits) > 10


@pytest.mark.parametrize("seed", range(3))
def test_the_model_is_given_what_a_gpu_would_be(arena, cuda_lanes, recorder, seed):
    model = SimulatedLanes(SLOTS)
    for what, *details in at_random(arena, seed):
        for given in (cuda_lanes, model):
            getattr(given, what)(*details)
    assert recorder.queues == model.queues
    assert len(recorder.recorded) < 10, "handles were used again"


def test_the_model_has_as_many_copy_lanes_as_a_gpu():
    assert len(SimulatedLanes.COPY) == CudaLanes.LANES
    assert len(SimulatedRing.COPY) == CudaRingLanes.LANES == 1
