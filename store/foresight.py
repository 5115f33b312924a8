"""Eviction policies that know the queued hash tables: when each expert is wanted next, and how surely.

They are told, and remember, one position per expert: where it is wanted first. See eviction.py for what a policy is.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator

from store.layout import Key

HALF_LIFE = 16.0
"""Of a use, beyond the tables' reach, in rounds of the resident experts: one use now weighs as much as two so long ago."""

SMOOTHING = 0.01
"""What one interval between uses counts for in their running mean."""

HEAVIEST = 2.0**600
"""Of a use: then all are weighed anew. The greatest number is 2^1024; what weighs less than the least is 1,600 half-lives old."""

MUCH = 2.0
"""Times more or fewer experts per layer than were reckoned with, upon which all that are resident are weighed anew."""

NEVER = math.inf

Place = tuple[float, float, Key]
"""In LookAhead's order: minus the next use, weight, expert."""

Rank = tuple[float, int, Place]
"""What there is for keeping the first to go of a MoE layer, the layer, its place."""


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

    def reads(self, layer: int, experts: int) -> None:
        pass

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
    much after `HALF_LIFE` (Lee et al., LRFU, 2001). Here it keeps its weight and later ones weigh more, which is the same, so that
    the order is kept in heaps and hardly ever made anew. Whoever would be the first to go again is better not let in (TinyLFU).

    Where nobody can be kept out, since all that routers name must have a slot, it is told which layers pass (`reads`). Then
    the one expected last goes first: when its layer comes again, and after so many forwards more as it misses, by its share
    of all uses. So a forward that reads most experts of every layer, as a prompt does, runs through the slots of those that it
    has just read, and does not wash out the others before their layers come. Within a layer weights decide; layers are
    compared by their first to go, as it was when the layer passed.
    """

    looks_ahead = True

    def __init__(self) -> None:
        self._wanted_at: dict[Key, int] = {}
        self._next_use: dict[Key, float] = {}  # the same, later for those that may fail to come
        self._interval = 0.0  # MoE layers between two uses of an expert, on average
        self._weight: dict[Key, float] = {}  # of its uses together
        self._place: dict[Key, Place] = {}  # of the resident ones
        self._wants: list[Place] = []  # a heap of those that are wanted, and of what was
        self._idle: defaultdict[int, list[Place]] = defaultdict(list)  # the others by MoE layer: heaps, likewise
        self._room: defaultdict[int, int] = defaultdict(lambda: 64)  # what each of these may grow to
        self._first: dict[int, Rank] = {}  # MoE layer -> the first to go of its idle ones
        self._ranks: list[Rank] = []  # a heap of these, and of what was
        self._use = 1.0  # what one weighs now
        self._all = 0.0  # the sum of all weights
        self._passes: dict[int, int] = {}  # MoE layer -> the pass, of any layer, that was its last
        self._pass = 0
        self._now = 0.0  # experts that the forward under way reads per layer
        self._usual = 0.0  # the same of those before it
        self._begun = 0  # _pass when it began

    def admitted(self, key: Key) -> None:
        if not self._pass or key not in self._weight:  # where all that is named comes, coming says no more than the use
            self._touch(key)
        self._insert(key)

    def used(self, key: Key) -> None:
        self._touch(key)
        if key not in self._wanted_at and key in self._place:  # among those that are wanted it counts for nothing
            self._insert(key)

    def evicted(self, key: Key) -> None:
        del self._place[key]

    def wanted(self, key: Key, position: int | None, probability: float = 1.0) -> None:
        if position is None:
            self._wanted_at.pop(key, None)
            self._next_use.pop(key, None)
            use = NEVER
        else:
            before = self._wanted_at.get(key, position)
            if position > before:
                self._interval += SMOOTHING * (position - before - self._interval)
            self._wanted_at[key] = position
            use = self._next_use[key] = position if probability == 1 else position + (1 / probability - 1) * self._interval
        if key in self._place:
            self._push((-use, self._weight[key], key))

    def reads(self, layer: int, experts: int) -> None:
        self._pass += 1
        self._passes[layer] = self._pass
        if experts and not self._now / MUCH <= experts <= self._now * MUCH:
            self._now = float(experts)
            for each in self._idle:
                self._rank(each)
        else:
            self._rank(layer)

    def finished(self) -> None:
        if self._now:
            self._usual = (self._usual + self._now) / 2 if self._usual else self._now
        self._begun = self._pass

    def order(self) -> Iterator[Key]:
        passed: list[Place] = []
        looked: set[int] = set()  # layers that have lost their rank
        try:  # most who ask take the first: it stays where it is until they ask for another
            while self._ranks:
                rank = self._ranks[0]
                _, layer, place = rank
                if self._first.get(layer) is not rank:
                    heapq.heappop(self._ranks)
                    continue
                if self._place.get(place[2]) is place:
                    yield place[2]
                    passed.append(heapq.heappop(self._idle[layer]))
                    looked.add(layer)
                heapq.heappop(self._ranks)
                self._rank(layer)
            while self._wants:
                place = self._wants[0]
                if self._place.get(place[2]) is place:
                    yield place[2]
                    passed.append(place)
                heapq.heappop(self._wants)
        finally:
            for place in passed:
                if self._place.get(place[2]) is place:
                    self._push(place)
            for layer in looked:
                self._rank(layer)

    def outlasts(self, key: Key, resident: Key) -> bool:
        return self._weight.get(key, 0.0) + self._use >= self._weight[resident]

    def _touch(self, key: Key) -> None:
        self._use *= 2 ** (1 / (HALF_LIFE * (len(self._place) + 1)))
        self._all += self._use
        self._weight[key] = self._weight.get(key, 0.0) + self._use
        if self._use > HEAVIEST:
            self._weigh_anew()

    def _weigh_anew(self) -> None:
        """So that a use weighs one again."""
        one, self._use = self._use, 1.0
        self._all /= one
        self._weight = {key: weight / one for key, weight in self._weight.items()}
        self._wants, self._idle = [], defaultdict(list)
        for key in self._place:
            self._insert(key)

    def _stay(self, key: Key) -> float:
        """How much there is for keeping an expert that none wants: minus the pass at which it is expected, or, as long as nobody
        has said which layers pass, its weight."""
        last = self._passes.get(key[0])
        if last is None:
            return self._weight[key] if not self._pass else -math.inf
        layers = len(self._passes)
        experts = min(self._usual or self._now, self._now) if last > self._begun else self._now
        share = self._weight[key] / self._all
        probability = -math.expm1(-min(max(share * experts * layers, 1e-9), 50.0))
        return -(last + layers / probability)

    def _insert(self, key: Key) -> None:
        self._push((-self._next_use.get(key, NEVER), self._weight[key], key))

    def _push(self, place: Place) -> None:
        self._place[place[2]] = place
        if place[0] != -NEVER:
            heapq.heappush(self._wants, place)
            if len(self._wants) > 4 * len(self._place) + 64:
                self._wants = [wanted for wanted in self._wants if self._place.get(wanted[2]) is wanted]
                heapq.heapify(self._wants)
            return
        layer = place[2][0]
        idle = self._idle[layer]
        heapq.heappush(idle, place)
        if len(idle) > self._room[layer]:
            idle[:] = [there for there in idle if self._place.get(there[2]) is there]
            heapq.heapify(idle)
            self._room[layer] = 4 * len(idle) + 64
        if idle[0] is place:
            self._rank(layer)

    def _rank(self, layer: int) -> None:
        """Puts a layer among the others again: its first is another, or what there is for keeping it has changed."""
        idle = self._idle[layer]
        while idle and self._place.get(idle[0][2]) is not idle[0]:
            heapq.heappop(idle)
        if not idle:
            self._first.pop(layer, None)
            return
        rank = self._first[layer] = (self._stay(idle[0][2]), layer, idle[0])
        heapq.heappush(self._ranks, rank)
        if len(self._ranks) > 4 * len(self._first) + 64:
            self._ranks = list(self._first.values())
            heapq.heapify(self._ranks)
