"""The copy engine: brings predicted experts into slots, in the order in which layers will need them, while others compute.

The queued hash tables are the future: `plan` adds one batch of it, `reading` and `finish` turn it into the past. The engine
copies the first planned expert that has no slot, into a free slot or one whose expert is not wanted sooner than the one
to come; among those the eviction policy has the word. If nobody may go, it waits. What a forward needs and nobody
predicted is read in place, from the arena: a wrong prediction costs time, never correctness.

`background=True` copies on a thread of its own. `background=False` copies inside `plan` and `reading`, in the same order: the
same experts move every time, for tests and for simulations.

Knows batches only as numbers, which rise in the order of execution. Thread-safe: one lock guards all state, and no copy happens
under it.
"""

from __future__ import annotations

import bisect
import heapq
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from store.arena import Arena
from store.eviction import Policy
from store.layout import Key
from store.slots import Slots

WORTH_COPYING = 0.5
"""Probability of use. A copy costs a block's bytes for certain, reading in place costs them if the expert is needed at all."""


@dataclass
class Movement:
    """What crossed the link, and what waited for it, since the last `take`. Bytes, counts per MoE layer, nanoseconds."""

    layers: int
    prefetch_bytes: int = 0
    demand_bytes: int = 0
    """Copies that a forward asked for. None where misses are read in place."""
    read_in_place_bytes: int = 0
    hits: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    stall_ns: int = 0
    copy_spans: list[list[int]] = field(default_factory=list)
    """[start, end, experts]: runs of back-to-back copies, time.time_ns()."""
    resident: list[int] = field(default_factory=list)
    """Experts in slots per MoE layer, at the moment of `take`."""
    resident_peak_bytes: int = 0
    """The most that ever lay in slots."""

    def __post_init__(self) -> None:
        self.hits, self.misses = [0] * self.layers, [0] * self.layers

    def copied(self, start: int, end: int, nbytes: int) -> None:
        self.prefetch_bytes += nbytes
        if self.copy_spans and start - self.copy_spans[-1][1] < 200_000:  # gaps below 0.2 ms are no gaps to look at
            self.copy_spans[-1][1] = end
            self.copy_spans[-1][2] += 1
        else:
            self.copy_spans.append([start, end, 1])


class CopyEngine:
    """Moves experts from the arena into slots, ahead of the forwards that read them."""

    def __init__(self, arena: Arena, slots: Slots, policy: Policy, background: bool = True):
        self.slots = slots
        self._arena = arena
        self._policy = policy
        self._layers = len(arena.layout.layers)
        self._queue: list[tuple[int, int, Key]] = []  # a heap of (position, rank in the table, expert): as it is needed
        self._wanted: dict[int, list[Key]] = {}  # position -> planned experts, until that layer of that batch has been read
        self._next_uses: defaultdict[Key, list[int]] = defaultdict(list)  # ascending positions
        self._planned: set[int] = set()
        self._last_finished = -1
        self._movement = Movement(self._layers)
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._work, name="copy", daemon=True)
            self._thread.start()

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Queues a batch's predicted experts, per MoE layer (expert, probability that it is needed), likeliest first.

        Those that are less likely needed than `WORTH_COPYING` are left to be read in place.

        Does nothing for a batch that is planned already, or not later than a finished one: word may come late, or twice.
        """
        with self._changed:
            if batch in self._planned or batch <= self._last_finished:
                return
            self._planned.add(batch)
            for layer, experts in enumerate(uses):
                position = batch * self._layers + layer
                self._wanted[position] = [(layer, expert) for expert, p in experts if p >= WORTH_COPYING]
                for rank, key in enumerate(self._wanted[position]):
                    heapq.heappush(self._queue, (position, rank, key))
                    bisect.insort(self._next_uses[key], position)
        self._proceed()

    @contextmanager
    def reading(self, batch: int, layer: int, experts: Sequence[int]) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The tensors of `experts` for one MoE layer of one forward, each where it is now: in its slot or in the arena.

        Copies already under way are waited for (the same bytes must not cross the link twice); none is evicted while it is read.

        Raises:
            RuntimeError: the copy thread broke.
        """
        keys = [(layer, expert) for expert in experts]
        with self._changed:
            # Decided once, before waiting: waiting gives the lock away, and an expert that comes meanwhile is not pinned.
            pinned = [key for key in keys if key in self.slots]
            for key in pinned:
                self.slots.pin(key)
            self._pass(batch * self._layers + layer)
            start = time.perf_counter_ns()
            self._changed.wait_for(lambda: self._failure or all(self.slots.is_ready(key) for key in pinned))
            self._movement.stall_ns += time.perf_counter_ns() - start
            if self._failure:
                raise RuntimeError("copying experts failed") from self._failure
            for key in pinned:
                self._policy.used(key)
            held = set(pinned)
            weights = [self.slots.weights(key, in_slot=key in held) for key in keys]
            self._movement.hits[layer] += len(pinned)
            self._movement.misses[layer] += len(keys) - len(pinned)
            self._movement.read_in_place_bytes += (len(keys) - len(pinned)) * self.slots.block_bytes((layer, 0))
        try:
            yield weights
        finally:
            with self._changed:
                for key in pinned:
                    self.slots.unpin(key)
            self._proceed()

    def finish(self, batch: int) -> None:
        """The batch has been executed: what it still wanted, or any planned before it, is no longer wanted.

        A batch before it may have been planned and never come: executed by an Executor that died since.
        """
        with self._changed:
            self._last_finished = max(self._last_finished, batch)
            for past in [planned for planned in self._planned if planned <= batch]:
                self._planned.remove(past)
                for layer in range(self._layers):
                    self._pass(past * self._layers + layer)
        self._proceed()

    def take(self) -> Movement:
        """What has moved since the last call."""
        with self._changed:
            movement, self._movement = self._movement, Movement(self._layers)
            resident = self.slots.resident()
            movement.resident = [resident[layer] for layer in range(self._layers)]
            movement.resident_peak_bytes = self.slots.resident_peak_bytes
            return movement

    def close(self) -> None:
        """Stops the copy thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _pass(self, position: int) -> None:
        """Takes a position out of the future."""
        for key in self._wanted.pop(position, ()):
            self._next_uses[key].remove(position)

    def _proceed(self) -> None:
        """Something changed: wakes the copy thread, or does its work here."""
        if self._thread is not None:
            with self._changed:
                self._changed.notify_all()
            return
        while (copy := self._next_copy()) is not None:
            self._copy(*copy)

    def _next_copy(self) -> tuple[Key, torch.Tensor] | None:
        """Chooses what to copy next and makes room for it; None while there is nothing or nobody may go."""
        with self._changed:
            while self._queue:
                position, _, key = self._queue[0]
                if position not in self._wanted or key in self.slots:
                    heapq.heappop(self._queue)
                    continue
                if not self.slots.has_free:
                    victim = self._victim(position)
                    if victim is None:
                        return None
                    self.slots.evict(victim)
                    self._policy.evicted(victim)
                    for use in self._next_uses[victim]:  # it may have been passed over while it was resident
                        heapq.heappush(self._queue, (use, 0, victim))
                heapq.heappop(self._queue)
                self._policy.admitted(key)
                return key, self.slots.admit(key)
            return None

    def _victim(self, position: int) -> Key | None:
        """The first by the policy's order that no forward reads and no table wants before `position`."""
        for key in self._policy.order():
            uses = self._next_uses[key]
            if self.slots.is_evictable(key) and (not uses or uses[0] > position):
                return key
        return None

    def _copy(self, key: Key, slot: torch.Tensor) -> None:
        start = time.time_ns()
        try:
            slot.copy_(self._arena.block(*key))
        except BaseException as error:
            self._fail(error)
            raise
        end = time.time_ns()
        with self._changed:
            self.slots.complete(key)
            self._movement.copied(start, end, slot.numel())
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    copy = None
                    while copy is None:
                        if self._closed:
                            return
                        copy = self._next_copy()
                        if copy is None:
                            self._changed.wait()
                self._copy(*copy)
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Whoever waits for a copy, or asks for experts from now on, is told."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()
