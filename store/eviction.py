"""Who is evicted: policies order the resident experts from the first to go to the last.

A policy knows keys and what happened to them, and no tensor, slot or device. It only proposes an order: the copy engine
(copies.py) never takes an expert that the queued hash tables want sooner than the one to be admitted.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from typing import Protocol

from store.layout import Key


class Policy(Protocol):
    """Told what happens to every resident expert; asked who should go first.

    Attributes:
        looks_ahead: its order is that of the next uses, so that a copy for which the first in it must go may not be worth it.
    """

    looks_ahead: bool

    def admitted(self, key: Key) -> None:
        """A copy of `key` into a slot has begun."""

    def used(self, key: Key) -> None:
        """A forward has read `key` from its slot."""

    def evicted(self, key: Key) -> None:
        """`key` has lost its slot."""

    def wanted(self, key: Key, position: int | None, probability: float = 1.0) -> None:
        """The queued tables now want `key`, resident or not, at `position` first; None: no longer."""

    def order(self) -> Iterator[Key]:
        """The resident experts, first to go first. Not to be changed while iterating."""


class FIFO:
    """First in, first out: the paper's choice (SiDA-MoE, section 3.4)."""

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

    def order(self) -> Iterator[Key]:
        return iter(self._keys)


class LRU(FIFO):
    """Least recently used first; admission counts as a use."""

    def used(self, key: Key) -> None:
        del self._keys[key]
        self._keys[key] = None


class LookAhead:
    """The one wanted last first, as far as the queued tables say; before it those that none wants, least recently used first.

    Belady's MIN within the tables' reach.
    """

    looks_ahead = True

    def __init__(self) -> None:
        self._next_use: dict[Key, int] = {}
        self._order: list[tuple[float, int, Key]] = []  # (minus the next use, last touched, expert), ascending
        self._place: dict[Key, tuple[float, int, Key]] = {}  # of the resident ones, in _order
        self._clock = 0

    def admitted(self, key: Key) -> None:
        self._clock += 1
        self._insert(key, self._clock)

    def used(self, key: Key) -> None:
        self._remove(key)
        self.admitted(key)

    def evicted(self, key: Key) -> None:
        self._remove(key)

    def wanted(self, key: Key, position: int | None, probability: float = 1.0) -> None:
        if position is None:
            self._next_use.pop(key, None)
        else:
            self._next_use[key] = position
        if key in self._place:
            self._insert(key, self._remove(key))

    def order(self) -> Iterator[Key]:
        return (key for _, _, key in self._order)

    def _insert(self, key: Key, touched: int) -> None:
        self._place[key] = (-self._next_use.get(key, math.inf), touched, key)
        bisect.insort(self._order, self._place[key])

    def _remove(self, key: Key) -> int:
        """Takes a resident expert out of the order; says when it was last touched."""
        place = self._place.pop(key)
        del self._order[bisect.bisect_left(self._order, place)]
        return place[1]


POLICIES: dict[str, type[Policy]] = {"fifo": FIFO, "lru": LRU, "lookahead": LookAhead}
"""By the name in `store.policy`."""
