"""Copy engines over an arena on a disk: what the queued tables name is read into the page cache before anybody asks for it.

The page cache is a tier between disk and slots that nobody manages but the kernel: it keeps of the file what fits the RAM, and a
page that is not there is read when it is touched, which is right but slow. So the kernel is told, in the order in which layers
will need them, which blocks come next, at most `AHEAD` of the file beyond the layer that runs: more might push out what is
needed sooner. What a router has named on a GPU is read at once, and before all that.
"""

from __future__ import annotations

import heapq
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from store.arena import Arena
from store.copies import CopyEngine
from store.eviction import Policy
from store.layout import Key
from store.schedule import WORTH_COPYING, Schedule
from store.slots import Slots
from store.staged_copies import StagedCopyEngine

AHEAD = 1 / 8
"""Of the arena: with RAM for a third of it, a third of that is being filled while the rest is in use."""


class ReadAhead(Schedule):
    """Reads from disk what an engine will copy, and what will be read in place for want of slots. Stands before the engine."""

    _closed: bool
    _failure: BaseException | None
    _thread: threading.Thread | None

    def __init__(self, arena: Arena, *rest: Any):
        self._to_read: list[tuple[int, int, Key]] = []  # a heap of (position, rank in the table, expert)
        self._reached = -1
        self._announced: defaultdict[int, int] = defaultdict(int)  # position -> bytes that the kernel was told of for it
        self._most = max(arena.layout.slot_bytes, int(arena.layout.nbytes * AHEAD))
        self._reader: threading.Thread | None = None
        super().__init__(arena, *rest)

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        """As a Schedule's; and the experts are read ahead in their turn."""
        with self._changed:
            if self._heeds and batch not in self._planned and batch > self._last_finished:
                for layer, experts in enumerate(uses):
                    for rank, (expert, p) in enumerate(experts):
                        if p >= WORTH_COPYING:
                            heapq.heappush(self._to_read, (batch * self._layers + layer, rank, (layer, expert)))
        super().plan(batch, uses)

    def close(self) -> None:
        super().close()  # type: ignore[misc]  # the engine's
        if self._reader is not None:
            self._reader.join()

    def _pass(self, position: int) -> None:
        super()._pass(position)
        self._reached = max(self._reached, position)
        for past in [known for known in self._announced if known <= self._reached]:
            del self._announced[past]

    def _proceed(self) -> None:
        if self._thread is None:
            while (key := self._next_read()) is not None:
                self._arena.read_ahead(*key)
        super()._proceed()

    def _next_read(self) -> Key | None:
        """The next block to be read ahead; None: there is none, or enough is on its way."""
        with self._changed:
            while self._to_read and sum(self._announced.values()) < self._most:
                position, _, key = heapq.heappop(self._to_read)
                if position > self._reached and key not in self.slots:
                    self._announced[position] += self.slots.block_bytes(key)
                    return key
            return None

    def _start_reading(self) -> None:
        """On a thread of its own; without, whatever changes reads."""
        self._reader = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            with self._changed:
                key = None
                while key is None:
                    if self._closed or self._failure:
                        return
                    key = self._next_read()
                    if key is None:
                        self._changed.wait()
            self._arena.read_ahead(*key)


class ReadAheadEngine(ReadAhead, CopyEngine):
    """On a CPU."""

    def __init__(self, arena: Arena, slots: Slots, policy: Policy, background: bool = True):
        super().__init__(arena, slots, policy, background)
        if background:
            self._start_reading()


class StagedReadAheadEngine(ReadAhead, StagedCopyEngine):
    """On a GPU, which an arena on a disk is not registered with: all of it would be pinned."""

    def __init__(self, *arguments: Any):
        self._named: deque[Key] = deque()
        super().__init__(*arguments)

    def start(self) -> None:
        self._start_reading()
        super().start()

    def demand(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        with self._changed:
            self._named = deque((layer, expert) for expert in experts)
            super().demand(batch, layer, experts)

    def _next_read(self) -> Key | None:
        with self._changed:
            while self._named:
                key = self._named.popleft()
                if not self.slots.is_ready(key):
                    return key
            return super()._next_read()
