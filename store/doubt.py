"""Whether routers are asked, because tables do worse than none would.

A GPU reads in place what no table foretold: the host is asked nothing, and nothing is left of what was read. With tables that are
mostly right that is best. With bad ones experts cross the link for nothing, or again and again, where a cache that copies what
routers name would have kept them. So unless tables are mostly right, that cache is played beside, by the slots' policy: what
it would have moved is compared with what did move. Once it would have moved less, routers are asked, and tables are only judged,
until they are mostly right, or have a chance again: a comparison may have been of an odd moment, and while nobody heeds tables
nobody can tell what they would move.

Knows experts by name and counts them; nothing of tables, copies or times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from store.eviction import Policy
from store.layout import Key

ENOUGH = 0.9
"""Of what is used tables foretold so much, and of what they foretell (trust.py) so much is used: then they are not questioned.
Where that is 0.94 and 0.88, the movie sentences move 0.57 to 1.03 times what `lru` does on demand (docs/buffering.md)."""
MARGIN = 1.25
"""Moves over those of the cache, beyond which it is better. What is asked for comes while nothing computes: on an H200 a move of
`on-demand` took 1.2 to 1.5 times as long as one that tables foretold at batch 1, 1.04 to 1.1 times at 8 and 64
(docs/results/bench-switch-base-256-*.json)."""
SAMPLE, ENOUGH_SLOTS = 16, 64
"""The cache is played for one in so many experts, as long as that leaves it so many slots: forwards need the time that it costs.
Whether an expert is one of them has nothing to do with how often it is used (Waldspurger et al., SHARDS, 2015)."""
PATIENCE = 24
"""Windows (see below) for which routers are asked before tables are heeded again, for two: in the first the cache fills. Each time
that they lose again, twice as many."""
LEAST, ROUNDS = 1000, 4
"""Uses in which moves are compared, and how often they go round the slots at least: until then a cache only fills."""


class Doubt:
    """Of one predictor's tables, in one run. Not thread-safe.

    Attributes:
        asks: whether routers are to be asked, and no table heeded.
    """

    def __init__(self, slots: int, policy: Callable[[], Policy]):
        """
        Args:
            policy: makes one that knows nothing yet: the cache's.
        """
        self.asks = False
        self._every = max(1, min(SAMPLE, slots // ENOUGH_SLOTS))
        self._slots, self._make = slots // self._every, policy
        self._window = max(LEAST, ROUNDS * slots)
        self._patience = PATIENCE
        self._uses = self._named = self._foretold = 0.0  # the latest count most
        self._policy = policy()
        self._held: set[Key] = set()  # by the cache
        self._is_full = False
        self._watched = self._moved = self._played = self._would_move = 0

    def copied(self) -> None:
        """An expert has come into a slot."""
        self._moved += 1

    def heard(self, layer: int, used: Collection[int], named: set[int], missed: int) -> None:
        """A layer's router has spoken.

        Args:
            used: the experts that the layer has read in one batch, each once.
            named: those that its table foretold, as far as that is believed.
            missed: how many were read in place.
        """
        self._uses += len(used)
        self._named += len(named)
        self._foretold += len(named.intersection(used))
        if self._uses > 2 * LEAST:
            self._uses, self._named, self._foretold = self._uses / 2, self._named / 2, self._foretold / 2
        if self._foretold >= ENOUGH * max(self._uses, self._named):
            self.asks, self._patience = False, PATIENCE
            self._forget()
        elif self.asks:
            self._watched += len(used)
            if self._watched >= self._patience * self._window:
                self.asks = False
                self._patience *= 2
                self._forget()
        else:
            self._moved += missed
            self._watched += len(used)
            self._play(layer, {key: None for expert in used if hash(key := (layer, expert)) % self._every == 0})
            if self._watched >= self._window:
                self._compare()

    def finished(self) -> None:
        """A batch has ended."""
        self._policy.finished()

    def _play(self, layer: int, used: Collection[Key]) -> None:
        """Of the layer's own nobody goes for another, unless they are too many: then one is read in place."""
        missing = [key for key in used if key not in self._held]
        for key in missing:
            if len(self._held) >= self._slots:
                victim = next((resident for resident in self._policy.order() if resident not in used), None)
                if victim is None:
                    break
                self._policy.evicted(victim)
                self._held.remove(victim)
            self._policy.admitted(key)
            self._held.add(key)
        for key in used:
            self._policy.used(key)
        self._policy.reads(layer, len(used))
        self._played += len(used)
        self._would_move += len(missing)

    def _compare(self) -> None:
        if self._is_full:
            self.asks = self._moved * self._played > MARGIN * self._would_move * self._watched
        self._is_full = True
        self._watched = self._moved = self._played = self._would_move = 0

    def _forget(self) -> None:
        if self._held:
            self._policy = self._make()
            self._held.clear()
        self._is_full = False
        self._watched = self._moved = self._played = self._would_move = 0
