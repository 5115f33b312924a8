"""Who is evicted: policies order the resident experts from the first to go to the last.

A policy knows keys and what happened to them, and no tensor, slot or device. It only proposes an order: the copy engines
(schedule.py) never take an expert that the queued hash tables want sooner than the one to be admitted.

Here are the classical ones, which know the past; those that read the queued tables are in foresight.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from store.foresight import LookAhead, Priority
from store.layout import Key


class Policy(Protocol):
    """Told what happens to every expert; asked who should go first.

    Attributes:
        looks_ahead: its order is that of the next uses, so that a copy for which the first in it must go may not be worth it.
    """

    looks_ahead: bool

    def admitted(self, key: Key) -> None:
        """A copy of `key` into a slot has begun."""

    def used(self, key: Key) -> None:
        """A forward has read `key`, from its slot or, where it has none, in place."""

    def evicted(self, key: Key) -> None:
        """`key` has lost its slot."""

    def wanted(self, key: Key, position: int | None, probability: float = 1.0) -> None:
        """The queued tables now want `key`, resident or not, at `position` first, and so surely; None: no longer."""

    def reads(self, layer: int, experts: int) -> None:
        """A forward reads so many experts of a MoE layer, and all must have slots: told by schedules that keep nobody out."""

    def finished(self) -> None:
        """A batch has ended."""

    def order(self) -> Iterator[Key]:
        """The resident experts, first to go first. Not to be changed while iterating."""

    def outlasts(self, key: Key, resident: Key) -> bool:
        """Whether `key`, which is used now, should have the slot of `resident`, where no table wants either again."""


class FIFO:
    """First in, first out: SiDA-MoE's choice (section 3.4)."""

    looks_ahead = False

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}  # a dict keeps the order of insertion

    def admitted(self, key: Key) -> None:
        self._keys[key] = None

    def used(self, key: Key) -> None:
        pass

    def evicted(self, key: Key) -> None:
        del self._keys[key]

    def wanted(self, key: Key, position: int | None, probability: float = 1.0) -> None:
        pass

    def reads(self, layer: int, experts: int) -> None:
        pass

    def finished(self) -> None:
        pass

    def order(self) -> Iterator[Key]:
        return iter(self._keys)

    def outlasts(self, key: Key, resident: Key) -> bool:
        return True


class LRU(FIFO):
    """Least recently used first; admission counts as a use."""

    def used(self, key: Key) -> None:
        if key in self._keys:
            del self._keys[key]
            self._keys[key] = None


class LFU(FIFO):
    """Least often used first, among equals the one that came first. Uses count from the start, those read in place too."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[Key] = Counter()

    def used(self, key: Key) -> None:
        self._uses[key] += 1

    def order(self) -> Iterator[Key]:
        return iter(sorted(self._keys, key=self._uses.__getitem__))


class LIFO(FIFO):
    """First any that the batch does not use, then last in, first out (Towards MoE Deployment, section 6).

    Within a batch experts run in turn: the last one in is the last to come again. What the batch is going to use, tables say, or a
    router that has just decided; of those that it does not use the oldest goes first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._wanted: set[Key] = set()
        self._used: set[Key] = set()  # by the batch under way

    def used(self, key: Key) -> None:
        self._used.add(key)

    def wanted(self, key: Key, position: int | None, probability: float = 1.0) -> None:
        if position is None:
            self._wanted.discard(key)
        else:
            self._wanted.add(key)

    def finished(self) -> None:
        self._used.clear()

    def order(self) -> Iterator[Key]:
        active = self._wanted | self._used
        yield from (key for key in self._keys if key not in active)
        yield from (key for key in reversed(self._keys) if key in active)


POLICIES: dict[str, type[Policy]] = {
    "fifo": FIFO,
    "lru": LRU,
    "lfu": LFU,
    "lifo": LIFO,
    "priority": Priority,
    "lookahead": LookAhead,
}
"""By the name in `store.policy`."""
