"""Which expert is copied next, and who goes for it: the queued hash tables are the future.

`plan` adds one batch of that future, `_pass` and `finish` turn it into the past. The next copy is the first planned expert that has
no slot, in the order in which layers will need them; it takes a free slot, or that of an expert which is not wanted sooner than
the one to come; among those the eviction policy has the word. If nobody may go, it waits.

A policy that knows the tables (`LookAhead`) is taken at its word. Whoever comes at the cost of an expert that is wanted too, later,
comes late, when it is known best who has to go: at most `EARLY` such experts lie in slots ahead of their use, and at most `FAR` of
them further ahead than `NEAR` layers. An expert that would be wanted again later than the one that goes for it may only come as
one of these few; the others are set aside, to be read in place when their time comes. So a layer that needs more experts than
there are slots does not empty them. Where reading in place costs hardly more than copying, a use that may fail to come is not
worth an eviction for it alone (`worth_an_eviction`).

Knows no copy, stream or thread: what is under way, the engines know that are built on it (copies.py on a CPU, device_copies.py
on a GPU). Knows batches only as numbers, which rise in the order of execution; a position is batch * MoE layers + layer.
"""

from __future__ import annotations

import bisect
import heapq
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import torch

from store.arena import Arena
from store.eviction import Policy
from store.layout import Key
from store.movement import Movement
from store.slots import Slots
from store.trust import Trust

WORTH_COPYING = 0.5
"""Probability of use. A copy costs a block's bytes for certain, reading in place costs them if the expert is needed at all."""

UNHEARD = 8
"""Batches: so long after the end of one its routers may still speak. A GPU's are heard when the batch is answered."""

NEAR, FAR, EARLY = 1, 16, 24
"""MoE layers, experts, experts: enough to keep the link busy while a layer, or a small batch, computes. With right tables, on the
routing of a random Switch-base-256 at batches of 1, 8 and 64 and budgets of 10, 20 and 40 %, this moves 1.02 to 1.13 times what
perfect foresight would. With EARLY alone it is 1.16 at batch 1 and 40 %, with an eighth of the slots in its place 1.45."""


class Schedule:
    """The state that the copy engines share. One lock, `_changed`, guards it, and whoever changes it tells by it."""

    worth_knowing = worth_copying = WORTH_COPYING
    """Probabilities: of a use that the policy is told of, and of one that a copy is made for."""
    worth_an_eviction = 0.0
    """The same, of one that somebody goes for who is wanted sooner than its expert is wanted again."""

    def __init__(self, arena: Arena, slots: Slots, policy: Policy):
        self.slots = slots
        self._arena = arena
        self._policy = policy
        self._layers = len(arena.layout.layers)
        self._queue: list[tuple[int, float, Key]] = []  # a heap of (position, doubt, expert): who has no slot, as it is needed next
        self._wanted: dict[int, list[Key]] = {}  # position -> planned experts, until that layer of that batch has been read
        self._positions: list[int] = []  # a heap of those in _wanted, and of some that were
        self._next_uses: defaultdict[Key, list[int]] = defaultdict(list)  # ascending positions
        self._aside: list[tuple[int, float, Key]] = []  # as _queue: not worth an eviction
        self._set_aside: set[tuple[int, Key]] = set()  # (position, expert) of those in _aside
        self._probability: dict[tuple[int, Key], float] = {}  # (position, expert) -> that it is needed, where it is not certain
        self._left: set[tuple[int, Key]] = set()  # (position, expert): less likely than `worth_an_eviction`, to be read in place
        self._early: dict[Key, int] = {}  # in slots at a wanted one's cost -> the position that it is for
        self._most_early = max(1, min(EARLY, slots.count // 6))
        self._planned: set[int] = set()
        self._trust = Trust([layer.experts for layer in arena.layout.layers], self.worth_knowing, self.worth_copying)
        self._said: dict[int, Sequence[tuple[int, float]]] = {}  # position -> its table, until routers have spoken
        self._last_finished = -1
        self._movement = Movement(self._layers)
        self._changed = threading.Condition()

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Queues a batch's predicted experts, per MoE layer (expert, probability that it is needed), likeliest first.

        Those that are less likely needed than `worth_copying`, or have been of late where tables said so (trust.py), are left to be
        read when their time comes.

        Does nothing for a batch that is planned already, or not later than a finished one: word may come late, or twice.
        """
        with self._changed:
            if batch in self._planned or batch <= self._last_finished:
                return
            self._planned.add(batch)
        for layer, experts in enumerate(uses):
            position = batch * self._layers + layer
            with self._changed:  # layer by layer: who copies has not to wait for hundreds of experts
                likely = {(layer, expert): p for expert, p in self._trust.worth(layer, experts)}
                self._said[position] = experts
                if batch in self._planned and position not in self._wanted:  # finished, or demanded, in the meantime
                    self._probability.update({(position, key): p for key, p in likely.items() if p < 1})
                    self._want(position, list(likely))
        self._proceed()

    @property
    def _heeds(self) -> bool:
        """Whether what is planned now is wanted."""
        return True

    def expect(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        """Says of one layer of a batch under way what is known now, in place of what was said before."""
        with self._changed:
            self._planned.add(batch)
            position = batch * self._layers + layer
            self._pass(position)
            self._want(position, [(layer, expert) for expert in experts])
        self._proceed()

    def finish(self, batch: int) -> None:
        """The batch has been executed: what it still wanted, or any planned before it, is no longer wanted.

        A batch before it may have been planned and never come: executed by an Executor that died since.
        """
        with self._changed:
            self._last_finished = max(self._last_finished, batch)
            for past in [planned for planned in self._planned if planned <= batch]:
                self._planned.remove(past)
                for layer in range(self._layers):
                    self._pass(past * self._layers + layer)
            self._policy.finished()
            self._tidy()
        self._proceed()

    def _learn(self, position: int, used: Iterable[int]) -> None:
        """Routers have spoken: what the tables said of a layer is judged."""
        said = self._said.pop(position, None)
        if said is not None:
            self._trust.learn(position % self._layers, said, set(used))

    def take(self) -> Movement:
        """What has moved since the last call."""
        with self._changed:
            movement, self._movement = self._movement, Movement(self._layers)
            resident = self.slots.resident()
            movement.resident = [resident[layer] for layer in range(self._layers)]
            movement.resident_peak_bytes = self.slots.resident_peak_bytes
            return movement

    def _proceed(self) -> None:
        """Something changed: there may be something to copy."""
        raise NotImplementedError

    def _evicted(self, key: Key) -> None:
        """An expert has lost its slot, which is about to be given to another."""

    def _want(self, position: int, keys: list[Key]) -> None:
        """Puts a position into the future."""
        self._wanted[position] = keys
        heapq.heappush(self._positions, position)
        for key in keys:
            uses = self._next_uses[key]
            bisect.insort(uses, position)
            if uses[0] == position:
                self._has_next(key)

    def _want_instead(self, position: int, keys: list[Key]) -> None:
        """As `_pass` and `_want`, and those stay where they are that are wanted now as before."""
        before, now = self._wanted.get(position, ()), {*keys}
        stay = {key for key in before if key in now and self._early.get(key) != position}
        stay = {key for key in stay if (position, key) not in self._probability and (position, key) not in self._set_aside}
        if not stay:
            self._pass(position)
            self._want(position, keys)
            return
        self._want_no_more(position, [key for key in before if key not in stay])
        self._want(position, [key for key in keys if key not in stay])
        self._wanted[position] = keys

    def _pass(self, position: int) -> None:
        """Takes a position out of the future."""
        self._want_no_more(position, self._wanted.pop(position, []))

    def _want_no_more(self, position: int, keys: Collection[Key]) -> None:
        """Forgets that `position` uses `keys`. Their next uses are later ones."""
        if self._set_aside or self._left or self._probability:
            for use in [(position, key) for key in keys]:
                self._set_aside.discard(use)
                self._left.discard(use)
                self._probability.pop(use, None)
        for key in keys:
            if self._early.get(key) == position:
                del self._early[key]
            uses = self._next_uses[key]
            is_next = uses[0] == position
            uses.remove(position)
            if is_next:
                self._has_next(key)

    def _has_next(self, key: Key) -> None:
        """An expert's next use is another than before, or there is none. Who has no slot is to be copied by then."""
        uses = self._next_uses[key]
        if not uses:
            self._policy.wanted(key, None)
            return
        position = uses[0]
        probability = self._probability.get((position, key), 1.0) if self._probability else 1.0
        self._policy.wanted(key, position, probability)
        if key not in self.slots and probability >= self.worth_copying:
            heapq.heappush(self._queue, (position, 1 - probability, key))

    def _tidy(self) -> None:
        """Forgets what only stands in heaps: not every policy comes to look at it."""
        while self._positions and self._positions[0] not in self._wanted:
            heapq.heappop(self._positions)
        for position in [known for known in self._said if known < (self._last_finished - UNHEARD) * self._layers]:
            del self._said[position]
        if len(self._aside) > 2 * len(self._set_aside) + 64:
            self._aside = [entry for entry in self._aside if (entry[0], entry[2]) in self._set_aside]
            heapq.heapify(self._aside)

    @property
    def _now(self) -> int:
        """The first position that has not passed, of those that are known."""
        while self._positions[0] not in self._wanted:
            heapq.heappop(self._positions)
        return self._positions[0]

    def _next_copy(self) -> tuple[Key, torch.Tensor] | None:
        """Chooses what to copy next and makes room for it; None while there is nothing or nobody may go."""
        with self._changed:
            while (queue := self._waiting()) is not None:
                position, _, key = queue[0]
                if not self.slots.has_free:
                    victim = self._victim(position)
                    if victim is None:
                        return None
                    if self._policy.looks_ahead:
                        if self._is_better_left(key, position, victim):
                            if position > self._now + NEAR:  # who goes then, is wanted later than who would go now
                                return None
                            heapq.heappop(queue)
                            self._set_aside.discard((position, key))
                            self._leave(position, key)
                            continue
                        comes = self._comes(key, position, victim)
                        if comes is None:
                            return None
                        if not comes:
                            heapq.heappush(self._aside, heapq.heappop(queue))
                            self._set_aside.add((position, key))
                            continue
                    self._evict(victim)
                heapq.heappop(queue)
                self._set_aside.discard((position, key))
                self._policy.admitted(key)
                return key, self.slots.admit(key)
            return None

    def _is_better_left(self, key: Key, position: int, victim: Key) -> bool:
        """Whether a use is in doubt whose expert would have to go before it is wanted again: if it comes, it is read in place."""
        if not self.worth_an_eviction or not self._next_uses[victim]:
            return False
        probability = self._probability.get((position, key), 1.0)
        return probability < self.worth_an_eviction and not self._is_worth(key, position, victim)

    def _leave(self, position: int, key: Key) -> None:
        self._left.add((position, key))

    def _waiting(self) -> list[tuple[int, float, Key]] | None:
        """The heap whose first is wanted and has no slot; None: there is nobody."""
        while (queue := self._open_queue()) is not None:
            position, _, key = queue[0]
            if key not in self.slots and (uses := self._next_uses[key]) and uses[0] == position:
                return queue
            heapq.heappop(queue)
            self._set_aside.discard((position, key))
        return None

    def _comes(self, key: Key, position: int, victim: Key) -> bool | None:
        """Whether `key` comes now at the cost of `victim`; None: not yet, and nobody behind it either."""
        if not self._next_uses[victim]:
            return True
        if position > self._now + NEAR and len(self._early) >= FAR:
            return None
        if len(self._early) >= self._most_early:
            return None if self._is_worth(key, position, victim) else False
        self._early[key] = position
        return True

    def _open_queue(self) -> list[tuple[int, float, Key]] | None:
        """Where the next copy is to be found: among those set aside if there is room for them now, and they come first."""
        if self._aside and len(self._early) < self._most_early and (not self._queue or self._aside[0] < self._queue[0]):
            return self._aside
        return self._queue or None

    def _reconsider(self, position: int) -> None:
        """Those that were set aside for a position stand in the queue again."""
        for entry in [entry for entry in self._aside if entry[0] == position]:
            self._set_aside.discard((position, entry[2]))
            heapq.heappush(self._queue, entry)
        self._aside = [entry for entry in self._aside if entry[0] != position]
        heapq.heapify(self._aside)

    def _is_worth(self, key: Key, position: int, victim: Key) -> bool:
        """Whether `key`, used at `position`, will be wanted again before `victim` is."""
        theirs, own = self._next_uses[victim], self._next_uses[key]
        after = bisect.bisect_right(own, position)
        return not theirs or (after < len(own) and own[after] < theirs[0])

    def _evict(self, victim: Key) -> None:
        self.slots.evict(victim)
        self._policy.evicted(victim)
        self._early.pop(victim, None)
        self._evicted(victim)
        if uses := self._next_uses[victim]:
            probability = self._probability.get((uses[0], victim), 1.0)
            if probability >= self.worth_copying:
                heapq.heappush(self._queue, (uses[0], 1 - probability, victim))

    def _victim(self, position: int) -> Key | None:
        return self._first_to_go(position)

    def _first_to_go(self, position: int, leaving: Collection[Key] = ()) -> Key | None:
        """The first by the policy's order that no table wants before `position` and no forward reads, but for those `leaving`."""
        for key in self._policy.order():
            uses = self._next_uses[key]
            if not uses or uses[0] > position:
                if self.slots.is_evictable(key) or key in leaving:
                    return key
            elif self._policy.looks_ahead and (uses[0], key) not in self._probability:
                return None  # all behind a certain one are wanted sooner
        return None
