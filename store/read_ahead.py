"""A copy engine over an arena on a disk: what the queued tables name is read into the page cache before anybody asks for it.

The page cache is a tier between disk and slots that nobody manages but the kernel: it keeps of the file what fits the RAM, and a
page that is not there is read when it is touched, which is right but slow. So the kernel is told, in the order in which layers
will need them, which blocks come next, at most `AHEAD` of the file beyond the layer that runs: more might push out what is
needed sooner.
"""

from __future__ import annotations

import heapq
import threading
from collections import defaultdict
from collections.abc import Sequence

from store.arena import Arena
from store.copies import CopyEngine
from store.eviction import Policy
from store.layout import Key
from store.schedule import WORTH_COPYING
from store.slots import Slots

AHEAD = 1 / 8
"""Of the arena: with RAM for a third of it, a third of that is being filled while the rest is in use."""


class ReadAheadEngine(CopyEngine):
    """Reads from disk what it will copy, and what will be read in place for want of slots."""

    def __init__(self, arena: Arena, slots: Slots, policy: Policy, background: bool = True):
        self._to_read: list[tuple[int, int, Key]] = []  # a heap of (position, rank in the table, expert)
        self._reached = -1
        self._announced: defaultdict[int, int] = defaultdict(int)  # position -> bytes that the kernel was told of for it
        self._most = max(arena.layout.slot_bytes, int(arena.layout.nbytes * AHEAD))
        super().__init__(arena, slots, policy, background)
        self._reader: threading.Thread | None = None
        if background:
            self._reader = threading.Thread(target=self._read, name="read-ahead", daemon=True)
            self._reader.start()

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        """As a Schedule's; and the experts are read ahead in their turn."""
        with self._changed:
            if batch not in self._planned and batch > self._last_finished:
                for layer, experts in enumerate(uses):
                    for rank, (expert, p) in enumerate(experts):
                        if p >= WORTH_COPYING:
                            heapq.heappush(self._to_read, (batch * self._layers + layer, rank, (layer, expert)))
        super().plan(batch, uses)

    def close(self) -> None:
        super().close()
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
