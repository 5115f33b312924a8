"""Where the work of a device is put in order: a compute lane that reads experts, and a copy lane that brings them.

A lane does what it is given in the order in which it was given, and does not care for the other unless it is told to wait for it.
The order of events that keeps a reader right is made of three operations:

`fill`      on the copy lane: the expert's block into the slot, and then, on the same lane, one aligned 8-byte store of the slot's
            address into the expert's entry of the pointer table. Until then a kernel that reads the entry finds the host's address.
`withdraw`  on the compute lane: the host's address back into the entry. Kernels before it may still read the slot, kernels after
            it cannot. The copy lane waits for this point before anything that is given to it later, so neither a copy into the
            slot nor a new `fill` of that expert can come too early.
`follow`    on the compute lane: what it is given from now on waits for the ends of some fills, and the host does not. No circle
            comes of it: those fills were given before, and wait for withdrawals that were given before them.

A layer's kernels read each entry once, into scratch, and all of them use what was read.

Evicting an expert whose `fill` has not ended would be wrong: its late store would point to a slot that belongs to another by then.
The engine (device_copies.py) only evicts those whose mark it has seen reached.
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
    """What the engine asks of a device; see above."""

    def fill(self, key: Key, slot: int) -> Mark: ...

    def withdraw(self, key: Key) -> None: ...

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


@dataclass(slots=True)
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
    """Lanes on a GPU: two streams, and blocks in registered memory."""

    def __init__(self, arena: Arena, slots: Slots, table: PointerTable, compute: torch.cuda.Stream):
        layers = arena.layout.layers
        start = arena.memory.data_ptr()
        self._source = [[start + layer.expert_offset(e) for e in range(layer.experts)] for layer in layers]
        self._nbytes = [layer.block.nbytes for layer in layers]
        self._slots = [slots.address(slot) for slot in range(slots.count)]
        self._table = table
        self._copy_stream = torch.cuda.Stream(compute.device)  # kept: its handle dies with it
        self._compute, self._copy = compute.cuda_stream, self._copy_stream.cuda_stream
        self.clock = Clock(self._copy)
        self._context, self._thread = cuda.context(), 0

    def fill(self, key: Key, slot: int) -> Mark:
        self._use_context()
        layer, expert = key
        begun = cuda.Event(self._copy)
        cuda.copy_to_device(self._slots[slot], self._source[layer][expert], self._nbytes[layer], self._copy)
        cuda.store(self._table.entry_address(key), self._slots[slot], self._copy)
        return CudaMark(begun, cuda.Event(self._copy), self.clock)

    def withdraw(self, key: Key) -> None:
        self._use_context()
        cuda.store(self._table.entry_address(key), self._table.host_address(key), self._compute)
        cuda.wait(self._copy, cuda.Event(self._compute))

    def follow(self, fills: Sequence[Mark]) -> Mark:
        self._use_context()
        begun, last = cuda.Event(self._compute), fills[-1]  # one lane brings them, in their order
        assert isinstance(last, CudaMark)
        cuda.wait(self._compute, last.ended)
        return CudaMark(begun, cuda.Event(self._compute), self.clock)

    def _use_context(self) -> None:
        """The copy thread is new to CUDA."""
        if self._thread != get_ident():
            cuda.use(self._context)
            self._thread = get_ident()
