"""Whether routers are asked, because tables do worse than none would.

A GPU reads in place what no table foretold: the host is asked nothing, and nothing is left of what was read. With tables that are
mostly right that is best. With bad ones experts cross the link for nothing, or again and again, where a cache that copies what
routers name would have kept them. So unless tables are mostly right, that cache is played beside: what it would have moved is
compared with what did move. Once it would have moved less, routers are asked, and tables are only judged, until they are
mostly right.

Knows experts by name and counts them; nothing of tables, copies or times.
"""

from __future__ import annotations

from collections.abc import Collection

from store.layout import Key

ENOUGH = 0.9
"""Of what is used tables foretold so much, and of what they foretell (trust.py) so much is used: then they are not questioned.
Where that is 0.94 and 0.88, the movie sentences move 0.57 to 1.03 times what `lru` does on demand (docs/buffering.md)."""
MARGIN = 1.05
"""Moves over those of the cache, beyond which it is better: asking takes time, too."""
LEAST, ROUNDS = 1000, 4
"""Uses in which moves are compared, and how often they go round the slots at least: until then a cache only fills."""


class Doubt:
    """Of one predictor's tables, in one run. Not thread-safe.

    Attributes:
        asks: whether routers are to be asked, and no table heeded.
    """

    def __init__(self, slots: int):
        self.asks = False
        self._slots = slots
        self._window = max(LEAST, ROUNDS * slots)
        self._uses = self._named = self._foretold = 0.0  # the latest count most
        self._recent: dict[Key, None] = {}  # what the cache would hold, least recently used first
        self._is_full = False
        self._watched = self._moved = self._would_move = 0

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
            self.asks = False
            self._forget()
        elif not self.asks:
            self._moved += missed
            self._compare([(layer, expert) for expert in used])

    def _compare(self, used: Collection[Key]) -> None:
        """Plays the cache: least recently used goes first, and of the layer's own nobody, unless they are too many."""
        there = [key for key in used if key in self._recent]
        for key in there:
            del self._recent[key]
        self._recent.update(dict.fromkeys(used))
        while len(self._recent) > self._slots:
            del self._recent[next(iter(self._recent))]
        self._watched += len(used)
        self._would_move += len(used) - len(there)
        if self._watched >= self._window:
            if self._is_full:
                self.asks = self._moved > MARGIN * self._would_move
            self._is_full = True
            self._watched = self._moved = self._would_move = 0

    def _forget(self) -> None:
        self._recent.clear()
        self._is_full = False
        self._watched = self._moved = self._would_move = 0
