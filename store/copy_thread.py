"""The copy thread of a GPU: keeps the copy lane busy, a few experts deep, and sees them come.

What comes next and who goes for it, schedule.py decides, one expert at a time and as late as the link allows, so that it knows the
most recent tables. The order in which device and host see things is the lanes' (lanes.py). What forwards want and wait for, those
that build on this know (device_copies.py): they are told of every copy that begins and that has ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from store.arena import Arena
from store.eviction import Policy
from store.judged import JudgedSchedule
from store.lanes import Lanes, Mark
from store.layout import Key
from store.slots import Slots

DEPTH = 8
"""Copies decided ahead of the one that runs. Their slots are withdrawn before the next layer begins, so that the link has work
while the layer computes; more would take slots from experts that are wanted sooner than it seems when they go."""


class CopyThread(JudgedSchedule):
    """A schedule whose copies are put into a copy lane. One lock, the schedule's, guards it all."""

    def __init__(self, arena: Arena, slots: Slots, policy: Policy, lanes: Lanes, may_doubt: bool):
        """
        Args:
            may_doubt: whoever runs forwards heeds `is_doubted`.
        """
        self._experts = sum(layer.experts for layer in arena.layout.layers)
        super().__init__(arena, slots, policy, may_doubt and slots.count < self._experts)
        self._depth = max(1, min(DEPTH, slots.count // 8))
        self._lanes = lanes
        self._at_rest = True  # the thread has looked at everything and can do nothing more
        self._settled = False  # nobody waits for a copy, or whoever does may not come as things are
        self._demanded: dict[Key, int] = {}  # not in slots yet, or still on their way -> the position that wants them
        self._failure: BaseException | None = None
        self._closed = False
        self.is_complete = False
        """Every expert is in a slot, and nothing will ever move again."""
        self._under_way: deque[tuple[Key, Mark]] = deque()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to copy, on a thread of its own; at once, if there is a slot for every expert."""
        if self.slots.count >= self._experts:
            every = [(layer, expert) for layer, layout in enumerate(self._arena.layout.layers) for expert in range(layout.experts)]
            with self._changed:
                self._want(-1, every)
        self._thread = threading.Thread(target=self._work, name="copy", daemon=True)
        self._thread.start()

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        if not self.is_complete:
            super().plan(batch, uses)

    def close(self) -> None:
        """Stops the copy thread; what is under way ends first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _catch_up(self) -> None:
        """Takes out of the future what has passed, before somebody is chosen."""

    def _has_settled(self) -> None:
        """All copies that may begin have been put into the lane."""

    def _came(self, key: Key) -> None:
        """A copy has ended."""

    def _is_held(self) -> bool:
        """Whether nobody has to be woken for what has come."""
        raise NotImplementedError

    def _proceed(self) -> None:
        with self._changed:
            self._at_rest = self._settled = False
            self._changed.notify_all()

    def _evicted(self, key: Key) -> None:
        self._lanes.withdraw(key)

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    if self._begin():
                        continue
                    if not self._under_way:
                        if self._closed:
                            return
                        self._at_rest = True
                        self._changed.notify_all()
                        self._changed.wait()
                        continue
                self._land()
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Whoever waits is told, and who comes later."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _begin(self) -> bool:
        """Puts the next copy into the copy lane; False: enough are there, or there is none."""
        if self._closed:
            return False
        self._catch_up()
        if len(self._under_way) >= self._depth:
            if self._waiting() is None:
                self._settle()
            return False
        copy = self._next_copy()
        if copy is None:
            self._settle()
            return False
        self._settled = False
        key = copy[0]
        self._under_way.append((key, self._lanes.fill(key, self.slots.slot_of(key))))
        return True

    def _settle(self) -> None:
        self._settled = True
        self._has_settled()

    def _land(self) -> None:
        """Waits for the oldest copy under way; those behind it that have ended by then are seen with it."""
        self._under_way[0][1].wait()
        with self._changed:
            self._landed(*self._under_way.popleft())
            while self._under_way and self._under_way[0][1].is_reached():
                self._landed(*self._under_way.popleft())
            if not self._is_held():  # whoever waits is woken once, and not for every copy
                self._changed.notify_all()

    def _landed(self, key: Key, mark: Mark) -> None:
        start, end = mark.span()
        self.slots.complete(key)
        self.is_complete = self.is_complete or self.slots.ready_count == self._experts
        self._movement.copied(start, end, self.slots.block_bytes(key), key in self._demanded)
        self._has_come()
        self._demanded.pop(key, None)
        self._came(key)
