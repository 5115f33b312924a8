"""The schedule of copies that are free to begin late: an expert comes when its layer is the next to be read, and not sooner.

Where a copy and a read in place take the same way and the same time, as on a CPU, nothing is won by copying early at the cost of
an expert that is wanted too; waiting shows who has to go. (A GPU's link must be kept busy: schedule.py has the bounds for that.)
Free slots, and those of experts that no table wants, are filled ahead here too.

Only policies that know the tables are held to this; the others take whom they like, as the papers have it.
"""

from __future__ import annotations

import bisect
import heapq

from store.layout import Key
from store.schedule import Schedule

NEVER = 2**62


class JustInTime(Schedule):
    """A Schedule whose copies at a wanted expert's cost come last of all."""

    _ranked = -1
    """The position whose experts stand in the order in which they will be wanted again."""

    def _comes(self, key: Key, position: int, victim: Key) -> bool | None:
        if position > self._now:
            return None
        return self._is_worth(key, position, victim)

    def _open_queue(self) -> list[tuple[int, float, Key]] | None:
        """Whoever is wanted again soonest gets the place of whoever is wanted last; the last in line are read in place."""
        queue = self._queue
        if self._policy.looks_ahead and queue and queue[0][0] != self._ranked and self._wanted and queue[0][0] == self._now:
            now = self._ranked = queue[0][0]
            due = []
            while queue and queue[0][0] == now:
                due.append(heapq.heappop(queue)[2])
            for key in due:
                heapq.heappush(queue, (now, self._wanted_again(key, now), key))
        return queue or None

    def _wanted_again(self, key: Key, position: int) -> int:
        uses = self._next_uses[key]
        after = bisect.bisect_right(uses, position)
        return uses[after] if after < len(uses) else NEVER
