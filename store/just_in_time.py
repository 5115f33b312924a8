"""The schedule of copies that are free to begin late: an expert comes when its layer is the next to be read, and not sooner.

Where a copy and a read in place take the same way and the same time, as on a CPU, nothing is won by copying early at the cost of
another; waiting shows who has to go. That no table wants an expert yet means little where tables reach a few batches: the next one
may, and whoever went for it early is there again for nothing. (A GPU's link must be kept busy: schedule.py has the bounds for
that.) Free slots are filled ahead here too.

And who is read without having had a slot moves anyway: it may as well stay, if somebody can go who is not wanted sooner, and who is
worth less by the policy where no table wants either. So what no table foretells is kept as any cache keeps it, and wrong tables
cost what no tables do.

A CPU reads a layer's experts one after the other, so who goes may be one that the same layer has just read: those in slots are read
first, and their slots may pass to those that are read after them (heirs). What is left in slots behind a layer is then what
perfect foresight would leave there. Whoever can come so is not copied before its layer at the cost of one that should stay.

Only policies that know the tables are held to this; the others take whom they like, as the papers have it.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from store.layout import Key
from store.schedule import Schedule

NEVER = 2**62

KNOWN, SURE = 0.3, 0.9
"""Probabilities of use. Whoever is read can stay at no cost, so that a copy ahead of an uncertain use wins nothing, and is lost as
often as it fails to come; but who may be wanted again should not go before who is not. With an LSTM's tables, one short sentence
a batch and a budget of 10, 20 and 40 %, this moves 1.28, 1.55 and 2.24 times what perfect foresight would; with 0.5 for both
1.33, 1.65 and 2.56."""


@dataclass(frozen=True)
class Readings:
    """Where a layer's experts are read. Who is named here is pinned, heirs when they have come; the others are read in place.

    Attributes:
        held: have had a slot.
        kept: have missed one and got it now, to be filled first.
        heirs: have missed one; each gets that of a held one which has been read, see `_inherits`.
    """

    held: list[Key]
    kept: list[Key]
    heirs: dict[Key, Key]


class JustInTime(Schedule):
    """A Schedule whose copies at another's cost come last of all."""

    worth_knowing, worth_copying = KNOWN, SURE
    _ranked = -1
    """The position whose experts stand in the order in which they will be wanted again."""

    def _begin_reading(self, batch: int, layer: int, experts: Sequence[int]) -> Readings:
        """A forward reads experts of a layer, which is past now."""
        position, keys = batch * self._layers + layer, [(layer, expert) for expert in experts]
        held = [key for key in keys if key in self.slots]
        missed = [key for key in keys if key not in self.slots]
        for key in held:
            self.slots.pin(key)
        self._learn(position, experts)
        self._pass(position)
        if self._policy.looks_ahead:
            missed.sort(key=self._wanted_next)
        kept, heirs = self._share_out(missed, set(held) if self._policy.looks_ahead else set())
        for key in keys:
            self._policy.used(key)
        self._movement.hits[layer] += len(held)
        self._movement.misses[layer] += len(missed)
        self._movement.read_in_place_bytes += len(missed) * self.slots.block_bytes((layer, 0))
        return Readings(held, kept, heirs)

    def _share_out(self, missed: list[Key], leaving: set[Key]) -> tuple[list[Key], dict[Key, Key]]:
        """Gives slots to experts that are read now, as far as there are some for them.

        Args:
            missed: who has the first choice stands first.
            leaving: whose slots are to be had when they have been read. Where no table wants either again, nobody changes places
                with them: both have been used now.

        Returns: who has one; who is to have whose.
        """
        kept: list[Key] = []
        heirs: dict[Key, Key] = {}
        for key in missed:
            if not self.slots.has_free:
                again = self._wanted_next(key)
                victim = self._first_to_go(again, leaving if again < NEVER else ())
                if victim is None or (again == NEVER and not self._policy.outlasts(key, victim)):
                    continue
                if victim in leaving:
                    leaving.remove(victim)
                    heirs[key] = victim
                    continue
                self._evict(victim)
            self._take_slot(key)
            kept.append(key)
        return kept, heirs

    def _inherits(self, heir: Key, holder: Key) -> bool:
        """Gives an expert the slot, and the pin, of one that has been read; False, and nothing done: others have moved since."""
        self.slots.unpin(holder)
        if heir in self.slots or not self.slots.is_evictable(holder):
            self.slots.pin(holder)
            return False
        self._evict(holder)
        self._take_slot(heir)
        return True

    def _take_slot(self, key: Key) -> None:
        self._policy.admitted(key)
        self.slots.admit(key)
        self.slots.pin(key)

    def _comes(self, key: Key, position: int, victim: Key) -> bool | None:
        if position > self._now:
            return None
        if not self._next_uses[victim] and self._wanted_again(key, position) == NEVER:
            return self._policy.outlasts(key, victim)
        return self._is_worth(key, position, victim) and not self._may_stay(victim, position)

    def _may_stay(self, victim: Key, position: int) -> bool:
        """Whether all that `position` brings and that is worth more than `victim` will find slots of others that it reads."""
        if not self._next_uses[victim]:
            return False
        at = self._next_uses[victim][0]
        leaving = heirs = 0
        for key in self._wanted[position]:
            again = self._wanted_again(key, position)
            if key in self.slots:
                leaving += again > at
            else:
                heirs += again < at
        return heirs <= leaving

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

    def _wanted_next(self, key: Key) -> int:
        uses = self._next_uses[key]
        return uses[0] if uses else NEVER

    def _wanted_again(self, key: Key, position: int) -> int:
        uses = self._next_uses[key]
        after = bisect.bisect_right(uses, position)
        return uses[after] if after < len(uses) else NEVER
