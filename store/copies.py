"""The copy engine of a CPU: brings predicted experts into slots, in the order in which layers will need them, while others compute.

What comes next and who goes for it, schedule.py and just_in_time.py decide; here are the copies, and the forwards that read. What
a forward needs and nobody predicted is read in place, from the arena: a wrong prediction costs time, never correctness.

`background=True` copies on a thread of its own. `background=False` copies inside `plan` and `reading`, in the same order: the
same experts move every time, for tests and for simulations.

Thread-safe: one lock guards all state, and no copy happens under it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from store.arena import Arena
from store.eviction import Policy
from store.just_in_time import JustInTime
from store.layout import Key
from store.slots import Slots


class CopyEngine(JustInTime):
    """Moves experts from the arena into slots, ahead of the forwards that read them."""

    def __init__(self, arena: Arena, slots: Slots, policy: Policy, background: bool = True):
        super().__init__(arena, slots, policy)
        self._failure: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._work, name="copy", daemon=True)
            self._thread.start()

    @contextmanager
    def reading(self, batch: int, layer: int, experts: Sequence[int]) -> Iterator[Iterator[tuple[int, dict[str, torch.Tensor]]]]:
        """The tensors of `experts` for one MoE layer of one forward, each where it is now: in its slot or in the arena.

        In the order in which they are to be read: (index in `experts`, tensors). The bytes are there until the next are asked for;
        then another may get the slot. Copies already under way are waited for (the same bytes must not cross the link twice);
        none is evicted while it is read.

        Raises:
            RuntimeError: the copy thread broke.
        """
        with self._changed:
            self._check()
            # Decided once, before waiting: waiting gives the lock away, and an expert that comes meanwhile is not pinned.
            readings = self._begin_reading(batch, layer, experts)
        for key in readings.kept:
            self._fill(key, self.slots.room(key))
        with self._changed:
            start = time.perf_counter_ns()
            self._changed.wait_for(lambda: self._failure or all(self.slots.is_ready(key) for key in readings.held))
            self._movement.stall_ns += time.perf_counter_ns() - start
            self._check()
        pinned = {*readings.held, *readings.kept}
        try:
            yield self._in_turn([(layer, expert) for expert in experts], readings.heirs, pinned)
        finally:
            with self._changed:
                for key in pinned:
                    self.slots.unpin(key)
            self._proceed()

    def _in_turn(self, keys: list[Key], heirs: dict[Key, Key], pinned: set[Key]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """See `reading`. `pinned` changes with the slots' owners."""
        with self._changed:
            there = [(at, self.slots.weights(key, key in pinned)) for at, key in enumerate(keys) if key not in heirs]
        yield from there
        places = {key: at for at, key in enumerate(keys)} if heirs else {}
        for heir, holder in heirs.items():
            with self._changed:
                self._check()
                inherits = self._inherits(heir, holder)
                if inherits:
                    pinned ^= {heir, holder}
            if inherits:
                self._fill(heir, self.slots.room(heir))
            yield places[heir], self.slots.weights(heir, inherits)  # pinned, or read in place: nobody changes where it is

    def close(self) -> None:
        """Stops the copy thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _proceed(self) -> None:
        """Something changed: wakes the copy thread, or does its work here."""
        if self._thread is not None:
            with self._changed:
                self._changed.notify_all()
            return
        while (copy := self._next_copy()) is not None:
            self._copy(*copy)

    def _copy(self, key: Key, slot: torch.Tensor) -> None:
        start = time.time_ns()
        self._fill(key, slot)
        with self._changed:
            self._movement.copied(start, time.time_ns(), slot.numel())

    def _fill(self, key: Key, slot: torch.Tensor) -> None:
        try:
            slot.copy_(self._arena.block(*key))
        except BaseException as error:
            self._fail(error)
            raise
        with self._changed:
            self.slots.complete(key)
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

    def _check(self) -> None:
        if self._failure:
            raise RuntimeError("copying experts failed") from self._failure

    def _fail(self, error: BaseException) -> None:
        """Whoever waits for a copy, or asks for experts from now on, is told."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()
