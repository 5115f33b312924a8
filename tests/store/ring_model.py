"""The ring of pinned memory on the device that is none (lane_model.py): two chunks an expert, through an entry or more.

What is decided about the ring is the real thing (store.ring.RingLanes). An entry holds a chunk, by name, and the copy lane takes
what it finds there when it comes to it. An expert that is in no slot is nowhere: whoever reads it there is caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from store.layout import Key
from store.ring import RingLanes, RingMark
from tests.store.lane_model import HOST, RUBBISH, LiveLanes, Places, SimulatedLanes

BLOCK, CHUNK = 256, 128


@dataclass(frozen=True)
class SimulatedPoint:
    """After so many operations of the copy lane."""

    lanes: Any
    at: int

    def on(self, lanes: SimulatedRing) -> SimulatedPoint:
        """The same point of a twin's."""
        return SimulatedPoint(lanes, self.at)

    @property
    def is_reached(self) -> bool:
        return self.lanes.has_reached("copy", self.at)

    def synchronize(self) -> None:
        assert self.is_reached, "waits for a point, and nobody steps"


@dataclass(frozen=True)
class SimulatedRingMark(RingMark):
    lanes: Any

    def on(self, lanes: SimulatedRing) -> SimulatedRingMark:
        return SimulatedRingMark(lanes, self.number)


class SimulatedRing(RingLanes, SimulatedLanes):
    """See RingLanes, and SimulatedLanes for the rest.

    Attributes:
        ring: per entry the chunk that it holds.
    """

    mark = SimulatedRingMark  # type: ignore[assignment]
    entries_of_ring = 1
    point_type: type = SimulatedPoint

    def __init__(self, slots: int, *rest: Any):
        RingLanes.__init__(self, [BLOCK] * 8, CHUNK, self.entries_of_ring)
        self.ring: list[tuple[Key, int] | None] = [RUBBISH] * self.entries_of_ring
        self._arrived: dict[int, tuple] = {}  # slot -> the chunks that are in it
        SimulatedLanes.__init__(self, slots, *rest)

    def may_carry(self) -> bool:
        """Whether `carry` has something to do and would not have to wait."""
        left = self._free_at[self._entry]
        return self.has_more and (left is None or left.is_reached)

    def rebind(self) -> None:
        """After `twin`: its points are its own."""
        self._free_at = [left and left.on(self) for left in self._free_at]
        self._ends = {number: (begun, end.on(self)) for number, (begun, end) in self._ends.items()}

    def state(self) -> tuple:
        done = self.done["copy"]

        def ahead(point: SimulatedPoint | None) -> int:
            return max(0, point.at - done) if point is not None else 0

        return (
            *super().state(),
            tuple((number - self._fills, key, slot) for number, key, slot in self._filling),
            *(self._sent, self._entry, tuple(self.ring), tuple(map(ahead, self._free_at)), frozenset(self._arrived.items())),
            frozenset((number - self._fills, ahead(end)) for number, (_, end) in self._ends.items()),
        )

    def _write(self, entry: int, key: Key, slot: int, begin: int, end: int) -> None:
        self.ring[entry] = (key, begin)

    def _send(self, entry: int, key: Key, slot: int, begin: int, end: int) -> SimulatedPoint:
        if begin == 0:
            self.queues["copy"].append(("begin", key, slot))
        self.queues["copy"].append(("arrive", entry, key, slot))
        return self.here()

    def _point_to(self, key: Key, slot: int) -> SimulatedPoint:
        self.queues["copy"] += [("store", key, slot), ("mark",)]
        return self.here()

    def here(self) -> SimulatedPoint:
        return self.point_type(self, self.point("copy"))

    def _time_of(self, point: SimulatedPoint) -> int:
        return point.at

    def _do_begin(self, key: Key, slot: int) -> None:
        super()._do_begin(key, slot)
        self._arrived[slot] = ()

    def _do_arrive(self, entry: int, key: Key, slot: int) -> None:
        chunks = self._arrived[slot] = (*self._arrived[slot], self.ring[entry])
        if chunks == tuple((key, begin) for begin in range(0, BLOCK, CHUNK)):
            self.memory[slot] = key

    def _check_places(self, places: Places) -> None:
        assert all(place != HOST for _, place in places), "an expert was read that is nowhere"
        super()._check_places(places)


class LivePoint(SimulatedPoint):
    """Blocks, as the real one does."""

    def synchronize(self) -> None:
        with self.lanes.changed:
            self.lanes.changed.wait_for(lambda: self.is_reached or self.lanes.broken)


class LiveRing(SimulatedRing, LiveLanes):
    """The same, driven by a thread of its own: see LiveLanes."""

    entries_of_ring = 2
    point_type = LivePoint

    def __init__(self, slots: int, seed: int = 0, pauses_s: Sequence[float] = (0,)):
        RingLanes.__init__(self, [BLOCK] * 8, CHUNK, self.entries_of_ring)
        self.ring = [RUBBISH] * self.entries_of_ring
        self._arrived = {}
        LiveLanes.__init__(self, slots, seed, pauses_s)

    def fill(self, key: Key, slot: int) -> RingMark:
        self.filling.append(key)
        return RingLanes.fill(self, key, slot)

    def _write(self, entry: int, key: Key, slot: int, begin: int, end: int) -> None:
        with self.changed:
            super()._write(entry, key, slot, begin, end)

    def _send(self, entry: int, key: Key, slot: int, begin: int, end: int) -> SimulatedPoint:
        with self.changed:
            point = super()._send(entry, key, slot, begin, end)
            self.changed.notify_all()
            return point

    def _point_to(self, key: Key, slot: int) -> SimulatedPoint:
        with self.changed:
            point = super()._point_to(key, slot)
            self.changed.notify_all()
            return point
