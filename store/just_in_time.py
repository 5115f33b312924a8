"""The schedule of copies that are free to begin late: an expert comes when its layer is the next to be read, and not sooner.

Where a copy and a read in place take the same way and the same time, as on a CPU, nothing is won by copying early at the cost of
another; waiting shows who has to go. That no table wants an expert yet means little where tables reach a few batches: the next one
may, and whoever went for it early is there again for nothing. (A GPU's link must be kept busy: schedule.py has the bounds for
that.) Free slots are filled ahead here too.

And who is read without having had a slot moves anyway: it may as well stay, if somebody can go who is not wanted sooner, and who is
worth less by the policy where no table wants either. So what no table foretells is kept as any cache keeps it, and wrong tables
cost what no tables do.

Only policies that know the tables are held to this; the others take whom they like, as the papers have it.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

from store.layout import Key
from store.schedule import Schedule

NEVER = 2**62

KNOWN, SURE = 0.3, 0.9
"""Probabilities of use. Whoever is read can stay at no cost, so that a copy ahead of an uncertain use wins nothing, and is lost as
often as it fails to come; but who may be wanted again should not go before who is not. With an LSTM's tables, one short sentence
a batch and a budget of 10, 20 and 40 %, this moves 1.28, 1.55 and 2.24 times what perfect foresight would; with 0.5 for both
1.33, 1.65 and 2.56."""


class JustInTime(Schedule):
    """A Schedule whose copies at another's cost come last of all."""

    worth_knowing, worth_copying = KNOWN, SURE
    _ranked = -1
    """The position whose experts stand in the order in which they will be wanted again."""

    def _begin_reading(self, batch: int, layer: int, experts: Sequence[int]) -> tuple[list[Key], list[Key]]:
        """A forward reads experts of a layer, which is past now.

        Returns: those that have had a slot, and those that have missed one and get it now, to be filled first. Both are pinned. The
            others are read in place.
        """
        position, keys = batch * self._layers + layer, [(layer, expert) for expert in experts]
        held = [key for key in keys if key in self.slots]
        for key in held:
            self.slots.pin(key)
        self._learn(position, experts)
        self._pass(position)
        kept = [key for key in keys if key not in self.slots and self._stays(key)]
        for key in keys:
            self._policy.used(key)
        missed = len(keys) - len(held)
        self._movement.hits[layer] += len(held)
        self._movement.misses[layer] += missed
        self._movement.read_in_place_bytes += missed * self.slots.block_bytes((layer, 0))
        return held, kept

    def _stays(self, key: Key) -> bool:
        """Gives a slot to an expert that is read now, if there is one for it."""
        if not self.slots.has_free:
            again = self._next_uses[key][0] if self._next_uses[key] else NEVER
            victim = self._victim(again)
            if victim is None or (again == NEVER and not self._policy.outlasts(key, victim)):
                return False
            self._evict(victim)
        self._policy.admitted(key)
        self.slots.admit(key)
        self.slots.pin(key)
        return True

    def _comes(self, key: Key, position: int, victim: Key) -> bool | None:
        if position > self._now:
            return None
        if not self._next_uses[victim] and self._wanted_again(key, position) == NEVER:
            return self._policy.outlasts(key, victim)
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
