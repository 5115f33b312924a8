"""Where the work of a device is put in order: a compute lane that reads experts, and copy lanes that bring them.

A lane does what it is given in the order in which it was given, and does not care for others unless it is told to wait for them.
The order of events that keeps a reader right is made of three operations:

`fill`      on a copy lane: the expert's block into the slot, and then, on the same lane, one aligned 8-byte store of the slot's
            address into the expert's entry of the pointer table. Until then a kernel that reads the entry finds the host's address.
`withdraw`  on the compute lane: the host's address back into the entry. Kernels before it may still read the slot, kernels after
            it cannot. Whichever copy lane a later `fill` is given to waits for this point first.
`follow`    on the compute lane: what it is given from now on waits for the ends of some fills, and the host does not.

A layer's kernels read each entry once, into scratch, and all of them use what was read.

The engine (device_copies.py) only evicts an expert whose mark it has seen reached: a late store would point to a slot that belongs
to another by then. Copy lanes need not wait for each other, since all that touches one slot, or one entry, is in order:

* Between two fills of a slot, or of an expert, the host saw the first one's mark reached, and then withdrew its expert. The second,
  on whichever lane, waits for that: so it is behind the first one's copy and store, behind the kernels that read the slot, and
  behind the store of the host's address.
* There is one compute lane: who waits for the last withdrawal has waited for all. So a lane is told when its turn comes, once.
  What it was given before a withdrawal needs no wait: it is for slots and experts that this one is not about.

The first of two fills may end last. An expert is then in its slot, and pointed to, before the engine knows, which harms nobody.
Nor do lanes wait for each other in a circle: who follows waits for fills that were given before, and those for withdrawals that
were given before them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Protocol

import torch

from store import cuda
from store.arena import Arena
from store.layout import Key
from store.slots import Slots


class Mark(Protocol):
    """A point of a lane."""

    def wait(self) -> None:
        """Blocks this thread, and no other, until the point is reached."""

    def is_reached(self) -> bool: ...

    def span(self) -> tuple[int, int]:
        """When the `fill`, or the wait, that ends here was done, time.time_ns(); for a mark that has been reached."""


class Lanes(Protocol):
    """What the engine asks of a device; see above. One call at a time."""

    def fill(self, key: Key, slot: int) -> Mark:
        """Marks may be reached in another order than that of their fills."""

    def withdraw(self, key: Key) -> None:
        """Its mark has been seen reached."""

    def follow(self, fills: Sequence[Mark]) -> Mark:
        """Returns the point behind the wait; its span is from the one before it."""


class PointerTable:
    """For every MoE layer the address of each of its experts: a slot, or the block in registered host memory, or 0, nowhere.

    Attributes:
        entries: int64 (MoE layers, experts of the largest layer), on the device; 0 where a layer has no such expert.
    """

    def __init__(self, arena: Arena, host_address: int | None, device: torch.device):
        """
        Args:
            host_address: of the arena's data, as the device sees it; None: it does not see them.
        """
        layers = arena.layout.layers
        host = [[layer.expert_offset(e) for e in range(layer.experts)] for layer in layers]
        self._host = [[0 if host_address is None else host_address + offset for offset in offsets] for offsets in host]
        self._width = max(layer.experts for layer in layers)
        rows = [addresses + [0] * (self._width - len(addresses)) for addresses in self._host]
        self.entries = torch.tensor(rows, dtype=torch.int64).to(device)
        self._start = self.entries.data_ptr()

    def host_address(self, key: Key) -> int:
        return self._host[key[0]][key[1]]

    def entry_address(self, key: Key) -> int:
        """Where the entry itself lies."""
        return self._start + 8 * (key[0] * self._width + key[1])


class Clock:
    """Turns events into time.time_ns(), so that all lanes of a timeline agree."""

    REACH_MS = 60_000.0
    """CUDA tells the time between two events as a float of milliseconds, which is coarse for long ones."""

    def __init__(self, stream: int):
        event = cuda.Event(stream)
        event.synchronize()
        self._base = (event, time.time_ns())

    def ns(self, event: cuda.Event) -> int:
        """When an event that has been reached was reached."""
        base, at = self._base
        elapsed = base.ms_until(event)
        now = at + int(elapsed * 1e6)
        if elapsed > self.REACH_MS:
            self._base = (event, now)
        return now


@dataclass(frozen=True)
class CudaMark:
    """A `fill` under way, or the compute lane's wait for some."""

    begun: cuda.Event
    ended: cuda.Event
    clock: Clock

    def wait(self) -> None:
        self.ended.synchronize()

    def is_reached(self) -> bool:
        return self.ended.is_reached

    def span(self) -> tuple[int, int]:
        return self.clock.ns(self.begun), self.clock.ns(self.ended)


class CudaLanes:
    """Lanes on a GPU: streams, and blocks in registered memory."""

    LANES = 2
    """Copies take turns: events and the store, which stand between two copies of one stream, leave the link idle for a twentieth of
    a copy's time; the other stream's copy uses it meanwhile."""

    def __init__(self, arena: Arena, slots: Slots, table: PointerTable, compute: torch.cuda.Stream):
        layers = arena.layout.layers
        start = arena.memory.data_ptr()
        self._source = [[start + layer.expert_offset(e) for e in range(layer.experts)] for layer in layers]
        self._nbytes = [layer.block.nbytes for layer in layers]
        self._slots = [slots.address(slot) for slot in range(slots.count)]
        self._table = table
        self._copy_streams = [torch.cuda.Stream(compute.device) for _ in range(self.LANES)]  # kept: a handle dies with its stream
        self._compute, self._copy = compute.cuda_stream, [stream.cuda_stream for stream in self._copy_streams]
        self._turn = 0
        self._withdrawn: cuda.Event | None = None  # behind the last withdrawal
        self._waits: list[cuda.Event | None] = [None] * self.LANES  # the one that each stream has been told to wait for
        self.clock = Clock(self._copy[0])
        self._context, self._thread = cuda.context(), 0

    def fill(self, key: Key, slot: int) -> Mark:
        self._use_context()
        layer, expert = key
        stream = self._copy_lane()
        begun = cuda.Event(stream)
        cuda.copy_to_device(self._slots[slot], self._source[layer][expert], self._nbytes[layer], stream)
        cuda.store(self._table.entry_address(key), self._slots[slot], stream)
        return CudaMark(begun, cuda.Event(stream), self.clock)

    def withdraw(self, key: Key) -> None:
        self._use_context()
        cuda.store(self._table.entry_address(key), self._table.host_address(key), self._compute)
        self._withdrawn = cuda.Event(self._compute)

    def follow(self, fills: Sequence[Mark]) -> Mark:
        self._use_context()
        begun = cuda.Event(self._compute)
        for mark in fills:
            assert isinstance(mark, CudaMark)
            cuda.wait(self._compute, mark.ended)
        return CudaMark(begun, cuda.Event(self._compute), self.clock)

    def _copy_lane(self) -> int:
        """The stream whose turn it is; what it is given from now on waits for all that has been withdrawn by now.

        Events are compared as objects, and those that are compared are kept: a handle may be another event's by now.
        """
        turn = self._turn = (self._turn + 1) % len(self._copy)
        withdrawn = self._withdrawn
        if withdrawn is not None and self._waits[turn] is not withdrawn:
            cuda.wait(self._copy[turn], withdrawn)
            self._waits[turn] = withdrawn
        return self._copy[turn]

    def _use_context(self) -> None:
        """The copy thread is new to CUDA."""
        if self._thread != get_ident():
            cuda.use(self._context)
            self._thread = get_ident()
