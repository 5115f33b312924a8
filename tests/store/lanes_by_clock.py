"""Lanes that take as long as an H200 took (docs/results.md), and the GPU's own engine over them, by a clock that only counts."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch

from store.device_copies import DeviceCopyEngine
from store.eviction import POLICIES
from store.layout import Key
from store.simulator import layout_of
from store.slots import Slots

COPY_MS, AROUND_COPY_MS, IN_PLACE_MS = 0.1728, 0.009, 0.1838
"""Of 9.4 MB: the link's part, the events and stores around it, and a kernel's read."""
CHUNKS = 4
"""Of a copy or a read: so often the link may change over."""


class Clock:
    """What happens when; now in ms. And who has Python's lock until when."""

    def __init__(self) -> None:
        self.now = self._python_free = 0.0
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._coming, (when, next(self._order), what))

    def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self.now, _, what = heapq.heappop(self._coming)
            what()

    def python(self, ms: float) -> float:
        """When a thread that needs so much of Python will have had it."""
        self._python_free = max(self.now, self._python_free) + ms
        return self._python_free

    def spend(self, ms: float) -> None:
        """The main thread's."""
        end, come = self.python(ms), []
        self.at(end, lambda: come.append(None))
        self.until(lambda: bool(come))


class Mark:
    """See store.lanes.Mark."""

    def __init__(self) -> None:
        self._reached = False
        self._then: list[Callable[[], None]] = []

    def is_reached(self) -> bool:
        return self._reached

    def wait(self) -> None:
        assert self._reached, "waited for by hand"

    def span(self) -> tuple[int, int]:
        return 0, 0

    def reach(self) -> None:
        self._reached = True
        for what in self._then:
            what()

    def then(self, what: Callable[[], None]) -> None:
        """Does it as soon as the mark is reached."""
        if self._reached:
            what()
        else:
            self._then.append(what)


Step = Iterator["float | Mark"]
"""Of a lane: until when, or for what, it is busy."""


class Lane:
    """Does what it is given, one after the other.

    Attributes:
        waited_ms: for marks, in all.
    """

    def __init__(self, clock: Clock):
        self._clock = clock
        self._given: deque[Step] = deque()
        self._is_busy = False
        self.waited_ms = 0.0

    def give(self, what: Step) -> None:
        self._given.append(what)
        if not self._is_busy:
            self._is_busy = True
            self._clock.at(self._clock.now, self._go_on)

    def mark(self) -> Mark:
        mark = Mark()

        def reach() -> Step:
            mark.reach()
            yield from ()

        self.give(reach())
        return mark

    def _go_on(self) -> None:
        while self._given:
            busy = next(self._given[0], None)
            if busy is None:
                self._given.popleft()
            elif isinstance(busy, Mark):
                busy.then(partial(self._have_waited, self._clock.now))
                return
            else:
                self._clock.at(busy, self._go_on)
                return
        self._is_busy = False

    def _have_waited(self, since: float) -> None:
        self.waited_ms += self._clock.now - since
        self._clock.at(self._clock.now, self._go_on)


class TimedLanes:
    """See store.lanes.Lanes. Copies and kernels that read in place share the link."""

    def __init__(self, compute_ms: float, layers: int):
        self.clock = Clock()
        self.compute, self.copy = Lane(self.clock), Lane(self.clock)
        self._layer_ms = compute_ms / layers
        self._slot_of: dict[Key, int] = {}
        self._link_free = 0.0
        self.link_ms, self.in_place = 0.0, 0

    def fill(self, key: Key, slot: int) -> Mark:
        def copy() -> Step:
            yield from self._cross(COPY_MS)
            self._slot_of[key] = slot
            yield self.clock.now + AROUND_COPY_MS

        self.copy.give(copy())
        return self.copy.mark()

    def withdraw(self, key: Key) -> None:
        def forget() -> Step:
            self._slot_of.pop(key, None)
            yield from ()

        self.compute.give(forget())
        self.copy.give(iter([self.compute.mark()]))

    def follow(self, fills: Sequence[Mark]) -> Mark:
        self.compute.give(iter([fills[-1]]))
        return self.compute.mark()

    def layer(self, layer: int, left: set[int], found: set[int], last: bool) -> None:
        """Kernels of the experts that are left: of those in slots, or of all."""

        def run() -> Step:
            there = {expert for expert in left if (layer, expert) in self._slot_of}
            found.update(there)
            left.difference_update(there)
            if last:
                for _ in left:
                    yield from self._cross(IN_PLACE_MS)
                self.in_place += len(left)
                yield self.clock.now + self._layer_ms

        self.compute.give(run())

    def _cross(self, ms: float) -> Step:
        for _ in range(CHUNKS):
            self._link_free = max(self.clock.now, self._link_free) + ms / CHUNKS
            self.link_ms += ms / CHUNKS
            yield self._link_free


class TimedEngine(DeviceCopyEngine):
    """Its copy thread, and whoever waits for it, by the clock: in the place of its condition, too."""

    def __init__(self, experts: Sequence[int], slots: int, lanes: TimedLanes, host_ms: float):
        arena: Any = SimpleNamespace(layout=layout_of(experts))
        super().__init__(arena, Slots(arena, slots, torch.device("meta")), POLICIES["lookahead"](), lanes, may_doubt=True)
        self._clock, self._host_ms = lanes.clock, host_ms
        self._changed = self  # type: ignore[assignment]
        self._is_asleep = True

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def notify_all(self) -> None:
        if self._is_asleep:
            self._is_asleep = False
            self._clock.at(self._clock.now, self._go_on)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        self._clock.until(reached)

    def _go_on(self) -> None:
        """See `_work`."""
        if self._begin():
            self._clock.at(self._clock.python(self._host_ms / 2), self._go_on)
        elif self._under_way:
            self._under_way[0][1].then(lambda: self._clock.at(self._clock.now, self._see))  # type: ignore[attr-defined]
        else:
            self._at_rest = self._is_asleep = True

    def _see(self) -> None:
        before = len(self._under_way)
        self._land()
        self._clock.at(self._clock.python((before - len(self._under_way)) * self._host_ms / 2), self._go_on)
