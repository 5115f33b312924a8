"""Eviction policies that know the queued hash tables: when each expert is wanted next, and how surely.

They are told, and remember, one position per expert: where it is wanted first. See eviction.py for what a policy is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from store.layout import Key

HALF_LIFE = 16.0
"""Of a use, beyond the tables' reach, in rounds of the resident experts: one use now weighs as much as two so long ago."""

SMOOTHING = 0.01
"""What one interval between uses counts for in their running mean."""

Place = tuple[float, float, Key]
"""In LookAhead's order: minus the next use, weight, expert."""


class Priority:
    """The least worth first: a use's predicted probability over its distance in MoE layers; among those that none wants, the
    least recently used.

    Now is the last position that has passed, as far as it can be told: that of a use which is wanted no longer.
    """

    looks_ahead = True

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}  # least recently used first
        self._next_use: dict[Key, tuple[int, float]] = {}
        self._now = 0

    def admitted(self, key: Key) -> None:
        self._keys[key] = None

    def used(self, key: Key) -> None:
        if key in self._keys:
            del self._keys[key]
            self._keys[key] = None

    def evicted(self, key: Key) -> None:
        del self._keys[key]

    def wanted(self, key: Key, position: int | None, probability: float = 1.0) -> None:
        before = self._next_use.pop(key, None)
        if before is not None and (position is None or position > before[0]):
            self._now = max(self._now, before[0])
        if position is not None:
            self._next_use[key] = (position, probability)

    def finished(self) -> None:
        pass

    def order(self) -> Iterator[Key]:
        return iter(sorted(self._keys, key=self._worth))

    def outlasts(self, key: Key, resident: Key) -> bool:
        return True

    def _worth(self, key: Key) -> float:
        if key not in self._next_use:
            return 0.0
        position, probability = self._next_use[key]
        return probability / max(1, position - self._now)


class LookAhead:
    """The one wanted last first, as far as the queued tables say: Belady's MIN within their reach.

    A use that is not certain counts as later than it is, by the time that the expert usually stays away, as far as it may fail to
    come. Before all these go the experts that none wants, the one with the fewest and oldest uses first: every use weighs half as
    much after `HALF_LIFE` (Lee et al., LRFU, 2001). Such a weight, as a logarithm, never changes until the next use, so that
    the order is kept in a heap and never made anew. Whoever would be the first to go again is better not let in (as in TinyLFU).
    """

    looks_ahead = True

    def __init__(self) -> None:
        self._wanted_at: dict[Key, int] = {}
        self._next_use: dict[Key, float] = {}  # the same, later for those that may fail to come
        self._interval = 0.0  # MoE layers between two uses of an expert, on average
        self._weight: dict[Key, float] = {}  # log2 of the sum of 2^(time of use), times in half-lives
        self._place: dict[Key, Place] = {}  # of the resident ones
        self._heap: list[Place] = []  # all that is in _place, and what was
        self._time = 0.0  # half-lives

    def admitted(self, key: Key) -> None:
        self._touch(key)
        self._insert(key)

    def used(self, key: Key) -> None:
        self._touch(key)
        if key in self._place and key not in self._wanted_at:  # among those that are wanted it counts for nothing
            self._insert(key)

    def evicted(self, key: Key) -> None:
        del self._place[key]

    def wanted(self, key: Key, position: int | None, probability: float = 1.0) -> None:
        before = self._wanted_at.pop(key, None)
        if position is None:
            self._next_use.pop(key, None)
        else:
            if before is not None and position > before:
                self._interval += SMOOTHING * (position - before - self._interval)
            self._wanted_at[key] = position
            self._next_use[key] = position + (1 / probability - 1) * self._interval
        if key in self._place:
            self._insert(key)

    def finished(self) -> None:
        pass

    def order(self) -> Iterator[Key]:
        out: list[Place] = []
        try:
            while self._heap:
                place = heapq.heappop(self._heap)
                if self._place.get(place[2]) is place:
                    out.append(place)
                    yield place[2]
        finally:  # whoever has found one goes no further
            for place in out:
                heapq.heappush(self._heap, place)

    def outlasts(self, key: Key, resident: Key) -> bool:
        return self._used_now(key) >= self._weight[resident]

    def _touch(self, key: Key) -> None:
        self._time += 1 / (HALF_LIFE * (len(self._place) + 1))
        self._weight[key] = self._used_now(key)

    def _used_now(self, key: Key) -> float:
        """What it weighs with a use at this time."""
        return self._time + math.log2(1 + 2 ** (self._weight.get(key, -math.inf) - self._time))

    def _insert(self, key: Key) -> None:
        place = self._place[key] = (-self._next_use.get(key, math.inf), self._weight[key], key)
        heapq.heappush(self._heap, place)
        if len(self._heap) > 4 * len(self._place) + 64:
            self._heap = list(self._place.values())
            heapq.heapify(self._heap)
