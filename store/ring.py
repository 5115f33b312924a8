"""Lanes for a device that cannot read the arena: experts come through a ring of pinned host memory.

A `fill` is carried out a chunk at a time: the host copies a chunk of the arena into the ring's next entry, which on a disk is what
reads it, and the copy lane brings it from there into the slot. An entry may be written again when what was sent from it has
left. Behind an expert's last chunk the copy lane stores the slot's address into the pointer table, as ever. What a `withdraw`
stores is 0: an expert that is in no slot is nowhere, and no kernel may ask for it (staged_copies.py).

The chunks of all fills go in the order of the fills. Nobody carries them but the thread that waits for a mark: the copy
thread, which has decided by then, and holds no lock.

Without a single slot on the device, slots lie in pinned host memory themselves, and kernels read them over the link: then a chunk
goes into the slot at once, when the copy lane has come to it, and the ring is not needed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol

import torch

from store import cuda
from store.arena import Arena
from store.lanes import CudaLanes, PointerTable
from store.layout import Key
from store.slots import Slots, pinned

CHUNK_BYTES = 4 * 2**20
"""Copied from pinned memory, so much at a time goes at nearly the link's full rate."""

ENTRIES = 4
"""One is written, one is read, and one more of each, since neither takes the same time always."""

COPIERS = 4
"""Threads that copy a chunk into the ring: one alone reaches a fraction of the link's rate."""

HOST_SLOTS = 4
"""Of a budget that has no room for one: some are computed, others come."""


class Point(Protocol):
    """A point of the copy lane."""

    def synchronize(self) -> None: ...

    @property
    def is_reached(self) -> bool: ...


@dataclass(frozen=True)
class RingMark:
    """See `store.lanes.Mark`: that of the fill with this number."""

    lanes: RingLanes
    number: int

    def wait(self) -> None:
        """Carries this fill out, and those behind it while its last chunk is on its way."""
        lanes = self.lanes
        while lanes.end_of(self.number) is None or (lanes.has_more and not self.is_reached()):
            lanes.carry()
        end = lanes.end_of(self.number)
        assert end is not None
        end.synchronize()

    def is_reached(self) -> bool:
        end = self.lanes.end_of(self.number)
        return end is not None and end.is_reached

    def span(self) -> tuple[int, int]:
        """May be asked once."""
        return self.lanes.span(self.number)


class RingLanes:
    """What is decided about the ring, whatever the device: which chunk is next, and which entry it may have."""

    mark = RingMark

    def __init__(self, block_bytes: Sequence[int], chunk_bytes: int, entries: int):
        """
        Args:
            block_bytes: of an expert, by MoE layer.
        """
        self._block_bytes, self._chunk_bytes = block_bytes, chunk_bytes
        self._filling: deque[tuple[int, Key, int]] = deque()  # (number, expert, slot) of those that are not wholly sent
        self._fills = 0
        self._sent = 0  # bytes of the first of them
        self._begun = 0  # when that was, time.time_ns()
        self._entry = 0  # whose turn it is
        self._free_at: list[Any] = [None] * entries  # a Point: what was sent from the entry has left it
        self._ends: dict[int, tuple[int, Any]] = {}  # fill -> when it began, and the Point at its end, until it has been asked for

    def fill(self, key: Key, slot: int) -> RingMark:
        self._filling.append((self._fills, key, slot))
        self._fills += 1
        return self.mark(self, self._fills - 1)

    @property
    def has_more(self) -> bool:
        return bool(self._filling)

    def end_of(self, number: int) -> Any:
        """The Point at the end of a fill; None: it is not wholly sent."""
        return self._ends[number][1] if number in self._ends else None

    def span(self, number: int) -> tuple[int, int]:
        begun, end = self._ends.pop(number)
        return begun, self._time_of(end)

    def carry(self) -> None:
        """Sends the next chunk, as soon as there is an entry for it."""
        number, key, slot = self._filling[0]
        entry = self._entry
        if self._free_at[entry] is not None:
            self._free_at[entry].synchronize()
        if self._sent == 0:
            self._begun = time.time_ns()
        begin, whole = self._sent, self._block_bytes[key[0]]
        end = min(begin + self._chunk_bytes, whole)
        self._write(entry, key, slot, begin, end)
        self._free_at[entry] = self._send(entry, key, slot, begin, end)
        self._entry = (entry + 1) % len(self._free_at)
        self._sent = end
        if end == whole:
            self._filling.popleft()
            self._sent = 0
            self._ends[number] = (self._begun, self._point_to(key, slot))

    def _write(self, entry: int, key: Key, slot: int, begin: int, end: int) -> None:
        """The host copies bytes `begin` to `end` of an expert into an entry."""
        raise NotImplementedError

    def _send(self, entry: int, key: Key, slot: int, begin: int, end: int) -> Any:
        """The copy lane copies them from there into the slot; returns the Point behind that."""
        raise NotImplementedError

    def _point_to(self, key: Key, slot: int) -> Any:
        """The copy lane stores the slot's address; returns the Point behind that."""
        raise NotImplementedError

    def _time_of(self, point: Any) -> int:
        """When a point that has been reached was, time.time_ns()."""
        raise NotImplementedError


class CudaRingLanes(RingLanes, CudaLanes):
    """Lanes on a GPU: two streams, and blocks in memory that CUDA knows nothing of."""

    def __init__(self, arena: Arena, slots: Slots, table: PointerTable, compute: torch.cuda.Stream):
        """
        Raises:
            SpaceError: no pinned memory can be had.
        """
        CudaLanes.__init__(self, arena, slots, table, compute)
        RingLanes.__init__(self, self._nbytes, min(CHUNK_BYTES, arena.layout.slot_bytes), ENTRIES)
        self._arena = arena
        in_host = slots.memory.device.type == "cpu"
        self._host_slots = slots.memory.view(slots.count, -1) if in_host else None
        entry_bytes = 0 if in_host else self._chunk_bytes
        self._ring = pinned(ENTRIES * entry_bytes).view(ENTRIES, entry_bytes)

    def _write(self, entry: int, key: Key, slot: int, begin: int, end: int) -> None:
        self._use_context()
        if self._host_slots is None:
            target = self._ring[entry, : end - begin]
        else:
            target = self._host_slots[slot, begin:end]
            self._here().synchronize()  # the copy lane waits for those who read the slot, and so has the host to
        target.copy_(self._arena.block(*key)[begin:end])

    def _send(self, entry: int, key: Key, slot: int, begin: int, end: int) -> cuda.Event:
        if self._host_slots is None:
            cuda.copy_to_device(self._slots[slot] + begin, self._ring[entry].data_ptr(), end - begin, self._copy)
        return self._here()

    def _point_to(self, key: Key, slot: int) -> cuda.Event:
        cuda.store(self._table.entry_address(key), self._slots[slot], self._copy)
        return self._here()

    def _time_of(self, point: cuda.Event) -> int:
        return self.clock.ns(point)

    def _here(self) -> cuda.Event:
        """Behind all that the copy lane has been given."""
        return cuda.Event(self._copy)

    def _use_context(self) -> None:
        if self._thread != get_ident():
            torch.set_num_threads(COPIERS)
        super()._use_context()
